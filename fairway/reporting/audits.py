"""The certificates as the page shows them: per evaluator, each condition with its verdict, reason and evidence."""

import json
from dataclasses import dataclass
from typing import Any

from fairway.reporting.certificates import Condition, worst
from fairway.reporting.runs import Run
from fairway.reporting.scores import Score

# What each condition of a certificate asks for.
MEANINGS = {
    "causality": "no earlier score depends on a later token",
    "normalisation": "the probabilities of a place sum to one",
    "score_first": "nothing is learnt from a token before its score",
    "single_pass": "each token once, in one pass from left to right",
    "decoder": "a decoder can follow, from the code alone",
    "accounting": "bytes, score and size add up",
}


@dataclass(frozen=True)
class Finding:
    """One condition of one evaluator: of several seeds, the one that decides."""

    name: str
    meaning: str
    # None where no certificate names the condition.
    condition: Condition | None
    # Key and value as text.
    evidence: list[tuple[str, str]]


@dataclass(frozen=True)
class Audit:
    """One evaluator's findings, in the order of MEANINGS, then what else its certificates hold."""

    score: Score
    findings: list[Finding]


def audits(runs: list[Run], scores: list[Score]) -> list[Audit]:
    """One audit an evaluator; all of them list the same conditions."""
    certificates = [certificate for run in runs for certificate in run.certificates.values()]
    names = list(dict.fromkeys([*MEANINGS, *(name for found in certificates for name in found.conditions)]))
    return [Audit(score, [_finding(runs, score, name) for name in names]) for score in scores]


def _finding(runs: list[Run], score: Score, name: str) -> Finding:
    condition = worst([run.certificates[score.name] for run in runs], name)
    evidence = [(key, _text(value)) for key, value in condition.evidence.items()] if condition else []
    return Finding(name.replace("_", " "), MEANINGS.get(name, ""), condition, evidence)


def _text(value: Any) -> str:
    """A value of a certificate as one reads it: text as it is, numbers short, lists and maps as JSON."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)

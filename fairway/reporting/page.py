"""The report as one HTML page that needs nothing else: no network, no script, no second file.

The template is filled with the facts and with what is made for the page alone: charts, and the audits below, which
spread the certificates out as a table of conditions by evaluators.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fairway.reporting.budgets import ledger, limit_s
from fairway.reporting.by_document import SHADES, Reading
from fairway.reporting.charts import charts, hue, ladder_bars, ladder_range, signed, time_bars
from fairway.reporting.comparison import MARGIN_NATS, SIGNIFICANCE
from fairway.reporting.facts import Facts
from fairway.reporting.made import Made
from fairway.reporting.runs import Condition, Run, Score, spread, worst
from fairway.reporting.tables import size_parts
from fairway.runtime.settings import TRACK_GPUS


def page(facts: Facts, meta: dict[str, Any], reading: Reading, made: Made) -> str:
    """The HTML of the report; `meta` is the tokens' meta.json, `reading` the documents as the shipped evaluator scored
    them, and `made` what made the report."""
    return render(
        "report.html",
        facts=facts,
        runs=facts.runs,
        made=made,
        reading=reading,
        shades=SHADES,
        charts=charts(facts),
        ladder=ladder_bars(facts.rungs),
        ladder_range=ladder_range(facts.rungs),
        times=time_bars(facts),
        ledger=ledger(facts.runs),
        limit_s=limit_s,
        audits=audits(facts.runs, facts.scores),
        parts=[size_parts(run.size) for run in facts.runs],
        matrices=matrices(facts.runs[0]),
        size=facts.runs[0].size,
        meta=meta,
        margin_nats=MARGIN_NATS,
        significance=SIGNIFICANCE,
        track_gpus=TRACK_GPUS,
    )


def render(template: str, **values: Any) -> str:
    """A template filled with values. The template engine escapes every text."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals |= {"hue": hue, "signed": signed, "spread": spread}
    return templates.get_template(template).render(values)


@dataclass(frozen=True)
class Matrix:
    """A rounded matrix: its name, number of weights, bits of a code, entropy of its codes in bits, and rms error."""

    name: str
    weights: int
    bits: int
    entropy_bits: float
    error: float


def matrices(run: Run) -> list[Matrix]:
    """Every matrix that quantize rounded, in the order of the network; tensors that stay float16 are left out."""
    return [
        Matrix(name, math.prod(tensor["shape"]), tensor["bits"], tensor["entropy_bits"], math.sqrt(tensor["mse"]))
        for name, tensor in run.quantize["tensors"].items()
        if "mse" in tensor
    ]


# What each condition of a certificate asks for, in the order in which the page lists them.
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
    """One condition of one evaluator, with the finding of the seed that decides about it."""

    name: str
    meaning: str
    # None if no certificate names the condition.
    condition: Condition | None
    # Keys and values as text.
    evidence: list[tuple[str, str]]


@dataclass(frozen=True)
class Audit:
    """The findings on one evaluator: those of MEANINGS in their order, then any other that the certificates hold."""

    score: Score
    findings: list[Finding]


def audits(runs: list[Run], scores: list[Score]) -> list[Audit]:
    """One audit for each evaluator. All of them list the same conditions."""
    certificates = [certificate for run in runs for certificate in run.certificates.values()]
    names = list(dict.fromkeys([*MEANINGS, *(name for found in certificates for name in found.conditions)]))
    return [Audit(score, [_finding(runs, score, name) for name in names]) for score in scores]


def _finding(runs: list[Run], score: Score, name: str) -> Finding:
    condition = worst([run.certificates[score.name] for run in runs], name)
    evidence = [(key, _text(value)) for key, value in condition.evidence.items()] if condition else []
    return Finding(name.replace("_", " "), MEANINGS.get(name, ""), condition, evidence)


def _text(value: Any) -> str:
    """A value of a certificate as people read it: text as it is, numbers in short, lists and maps as JSON."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)

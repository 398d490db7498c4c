"""What the stages found out about each seed, and submission.json, which is made of it."""

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from stages.params import Params
from stages.report.budgets import LIMIT_BYTES, budgets, eval_s, train_s
from stages.report.certificates import Standing, standing
from stages.report.runs import Run
from stages.report.runs import collect as collect_runs

TRACK = "track_10min_16mb"


def collect(artifacts: Path, params: Params) -> list[Run]:
    """The figures of every seed. Raises UserError if something is not there, naming the stage that makes it."""
    return collect_runs(artifacts, params.seeds, [params.compress.evaluator])


def verdict(runs: list[Run], evaluator: str) -> Standing:
    """The certificates' word on an evaluator, over all seeds."""
    return standing([run.certificates[evaluator] for run in runs])


def submission_json(params: Params, runs: list[Run], *, date: str) -> dict[str, Any]:
    """The keys of the challenge's submission.json; bytes are those of the largest seed, deviations those of a sample.

    `certificate` and `compliance` are ours: the verdict of stage certify on the evaluator that ships, and the budgets.
    """
    evaluator = params.compress.evaluator
    environment, person = runs[0].train["environment"], params.submission
    bpb, loss = ([run.scores[evaluator][key] for run in runs] for key in ("val_bpb", "val_loss"))
    spread = {"val_bpb_std": stdev(bpb), "val_loss_std": stdev(loss)} if len(runs) > 1 else {}
    size, training, evaluation = budgets(runs, evaluator)
    largest = max(runs, key=lambda run: run.size["total_bytes"]).size
    return {
        "author": person.author,
        "github_id": person.github_id,
        "name": person.name,
        "blurb": person.blurb,
        "date": date,
        "track": TRACK,
        "val_loss": mean(loss),
        "val_bpb": mean(bpb),
        **spread,
        "bytes_total": largest["total_bytes"],
        "bytes_code": largest["train_gpt_bytes"],
        "seeds": [run.seed for run in runs],
        "seed_results": {str(run.seed): _result(run, evaluator) for run in runs},
        "hardware": f"{environment['processes']} x {environment['device']}",
        "pytorch_version": environment["torch"],
        "cuda_version": environment["cuda"],
        "certificate": {
            "evaluator": evaluator,
            "verdict": verdict(runs, evaluator),
            "conditions": {
                str(run.seed): {name: found.verdict for name, found in run.certificates[evaluator].conditions.items()}
                for run in runs
            },
        },
        "compliance": {
            "train_under_600s": training.within,
            "eval_under_600s": evaluation.within,
            "artifact_under_16mb": size.used <= LIMIT_BYTES,
            "three_seeds": len(runs) >= 3,
            "certified_legal": verdict(runs, evaluator) == "legal",
        },
    }


def _result(run: Run, evaluator: str) -> dict[str, Any]:
    return {
        "val_bpb": run.scores[evaluator]["val_bpb"],
        "val_loss": run.scores[evaluator]["val_loss"],
        "artifact_bytes": run.size["total_bytes"],
        "steps": run.train["steps"],
        "step_avg_ms": run.train["step_ms"],
        "train_time_s": round(train_s(run), 3),
        "eval_time_s": round(eval_s(run, evaluator), 3),
    }

"""submission.json, made of what the stages found out about each seed."""

from typing import Any

from stages.params import Params
from stages.report.budgets import LIMIT_BYTES, budgets, eval_s, train_s
from stages.report.certificates import standing
from stages.report.runs import Run
from stages.report.significance import spread

TRACK = "track_10min_16mb"


def submission_json(params: Params, runs: list[Run], *, date: str) -> dict[str, Any]:
    """The keys of the challenge's submission.json; bytes are those of the largest seed, deviations those of a sample.

    `certificate` and `compliance` are ours: the verdict of stage certify on the evaluator that ships, and the budgets.
    """
    evaluator = params.compress.evaluator
    environment, person = runs[0].train["environment"], params.submission
    verdict = standing([run.certificates[evaluator] for run in runs])
    bpb, loss = (spread([run.scores[evaluator][key] for run in runs]) for key in ("val_bpb", "val_loss"))
    deviations = {"val_bpb_std": bpb.std, "val_loss_std": loss.std} if len(runs) > 1 else {}
    size, training, evaluation = budgets(runs, evaluator)
    largest = max(runs, key=lambda run: run.size["total_bytes"]).size
    return {
        "author": person.author,
        "github_id": person.github_id,
        "name": person.name,
        "blurb": person.blurb,
        "date": date,
        "track": TRACK,
        "val_loss": loss.mean,
        "val_bpb": bpb.mean,
        **deviations,
        "bytes_total": largest["total_bytes"],
        "bytes_code": largest["train_gpt_bytes"],
        "seeds": [run.seed for run in runs],
        "seed_results": {str(run.seed): _result(run, evaluator) for run in runs},
        "hardware": f"{environment['processes']} x {environment['device']}",
        "pytorch_version": environment["torch"],
        "cuda_version": environment["cuda"],
        "certificate": {
            "evaluator": evaluator,
            "verdict": verdict,
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
            "certified_legal": verdict == "legal",
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

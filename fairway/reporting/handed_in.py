"""The texts of the folder that is handed in, made of what the stages found out about each seed.

`submission_json` has the keys of the challenge's submission.json. `readme` says what the record is, what it scored,
whether that is a code length, and how to run it. `train_log` tells the training of a seed in the lines that the
challenge's readers and scripts know. No stage writes such a log: its lines are made afterwards, of dvclive's curves and
of what the later stages wrote.
"""

from typing import Any

from fairway.reporting.budgets import budgets, eval_s, train_s
from fairway.reporting.runs import Run, Standing, spread, standing
from fairway.runtime.settings import CAP_BYTES, TRACK, TRACK_GPUS, Section


class SubmissionSettings(Section):
    """What only a person can say of a submission. Everything else in it is made of the stages' output."""

    author: str | None
    github_id: str | None
    name: str
    blurb: str


def submission_json(
    person: SubmissionSettings, evaluator: str, runs: list[Run], *, date: str, subset: str | None
) -> dict[str, Any]:
    """The keys of the challenge's submission.json, and three of our own.

    `date` is YYYY-MM-DD. Bytes are those of the largest seed, and deviations are sample deviations. Ours are `subset`,
    which validation documents were scored (None: all); `certificate`, the verdict of stage certify on the evaluator
    that ships; and `compliance`, which says of each rule whether it is kept. Of rules that limit seconds it says null
    unless the record ran on as many GPUs as the track's own machine has.
    """
    environment = runs[0].train["environment"]
    verdict = standing([run.certificates[evaluator] for run in runs])
    bpb, loss = (spread([run.scores[evaluator][key] for run in runs]) for key in ("val_bpb", "val_loss"))
    deviations = {"val_bpb_std": bpb.std, "val_loss_std": loss.std} if len(runs) > 1 else {}
    size, training, evaluation = budgets(runs, evaluator)
    on_track = runs[0].on_track
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
        "subset": subset,
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
            "train_under_600s": training.within if on_track else None,
            "eval_under_600s": evaluation.within if on_track else None,
            "artifact_under_16mb": size.used <= CAP_BYTES,
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


# A logged figure by step.
Curve = dict[float, float]


def train_log(run: Run, evaluator: str, *, max_steps: int, subset: str | None) -> str:
    """A line for each logged step and validation, then lines on the end of training, its result, bytes and score."""
    train, environment, score = run.train, run.train["environment"], run.scores[evaluator]
    curves: dict[str, Curve] = {name: dict(rows) for name, rows in run.curves.items()}
    curves["clock_s"] |= {0: 0.0, train["steps"]: train["wall_s"]}
    steps = sorted(int(step) for step in {*curves["train_loss"], *curves["val_bpb"]})
    return "\n".join(
        [
            f"seed:{run.seed} world_size:{environment['processes']} commit:{environment['commit']}",
            f"device:{environment['device']} driver:{environment['driver']} torch:{environment['torch']} "
            f"cuda:{environment['cuda']} python:{environment['python']} attention:{environment['attention']}",
            f"model_params:{train['parameters']}",
            *(line for step in steps for line in _step(step, max_steps, curves)),
            f"stopped_by:{train['stopped_by']} train_time:{_ms(train['wall_s'])}ms step:{train['steps']}/{max_steps}",
            f"peak memory: {train['peak_memory_bytes'] >> 20} MiB",
            *(f"weights:{kind} val_bpb:{bpb:.8f}" for kind, bpb in train["val_bpb_by_weights"].items()),
            *_adaptation(run.adapt),
            f"Code size: {run.size['train_gpt_bytes']} bytes",
            f"Serialized model: {run.size['model_bytes']} bytes",
            f"Total submission size: {run.size['total_bytes']} bytes",
            *([f"scored on {subset}"] if subset else []),
            f"final_{score['evaluator']}_exact val_loss:{score['val_loss']:.8f} "
            f"val_bpb:{score['val_bpb']:.8f} eval_time:{_ms(score['eval_s'])}ms",
            f"certificate {evaluator}: {run.certificates[evaluator].standing}",
            "",
        ]
    )


def _step(step: int, max_steps: int, curves: dict[str, Curve]) -> list[str]:
    """The lines of one step. If it was validated but not logged, its time is not known and is left out."""
    time = ""
    if (clock_s := curves["clock_s"].get(step)) is not None:
        time = f" train_time:{_ms(clock_s)}ms step_avg:{1000 * clock_s / max(step, 1):.2f}ms"
    lines = []
    if step in curves["train_loss"]:
        lines.append(f"step:{step}/{max_steps} train_loss:{curves['train_loss'][step]:.4f}{time}")
    if step in curves["val_bpb"]:
        figures = f"val_loss:{curves['val_loss'][step]:.4f} val_bpb:{curves['val_bpb'][step]:.4f}"
        lines.append(f"step:{step}/{max_steps} {figures}{time}")
    return lines


def _adaptation(adapt: dict[str, Any]) -> list[str]:
    if not adapt["epochs"]:
        return []
    epochs = [f"adapt:{epoch}/{adapt['epochs']} loss:{loss:.4f}" for epoch, loss in enumerate(adapt["loss_nats"], 1)]
    return [*epochs, f"adapt split:{adapt['split']} time:{_ms(adapt['adapt_s'])}ms"]


def _ms(seconds: float) -> int:
    return round(1000 * seconds)


VERDICTS: dict[Standing, str] = {
    "legal": "**Certified legal.** Every condition was tested and held; see `certificate` in submission.json.",
    "illegal": "**NOT LEGAL: the figure is not a code length.** The evaluator fails a condition of the challenge:",
    "unproven": "**UNPROVEN.** Nothing was found against the evaluator, but not every condition could be tested:",
}


def readme(submission: dict[str, Any], runs: list[Run]) -> str:
    """The submission's README.md. `submission` is what submission_json made of the same runs."""
    certificate = submission["certificate"]
    missing = [key for key in ("author", "github_id") if submission[key] is None]
    parts = [
        f"# {submission['name']}",
        submission["blurb"],
        *([f"**Scored on {submission['subset']} alone.**"] if submission["subset"] else []),
        _verdict(certificate["verdict"], certificate["evaluator"], runs),
        _table(submission, runs),
        f"Evaluator: `{certificate['evaluator']}`. Ran on {submission['hardware']}, PyTorch "
        f"{submission['pytorch_version']}. Training time includes adaptation to training text and "
        "calibration on it, evaluation time adaptation to validation text.",
        *(f"Not kept: `{key}`." for key in _rules(submission, False)),
        *(f"Told only by a run on {TRACK_GPUS} GPUs: `{key}`." for key in _rules(submission, None)),
        *(f"To be filled in before it is submitted: `submission.{key}` of params.yaml." for key in missing),
        _commands(runs[0], certificate["evaluator"]),
    ]
    return "\n\n".join(parts) + "\n"


def _verdict(verdict: Standing, evaluator: str, runs: list[Run]) -> str:
    """The verdict, and for each condition that did not pass the reason given by the first seed of which it is so."""
    reasons: dict[str, str] = {}
    for run in runs:
        for name, found in run.certificates[evaluator].conditions.items():
            if found.verdict != "pass":
                reasons.setdefault(name, f"* `{name}` {found.verdict} (seed {run.seed}): {found.why}")
    return "\n".join([VERDICTS[verdict], *reasons.values()])


def _table(submission: dict[str, Any], runs: list[Run]) -> str:
    rows = ["| seed | val_bpb | val_loss | artifact bytes | steps | ms/step | training s | evaluation s |"]
    rows.append("|---:" * 8 + "|")
    for seed, found in submission["seed_results"].items():
        scores = f"{found['val_bpb']:.8f} | {found['val_loss']:.8f} | {found['artifact_bytes']:,}"
        times = f"{found['step_avg_ms']:.2f} | {found['train_time_s']:.1f} | {found['eval_time_s']:.1f}"
        rows.append(f"| {seed} | {scores} | {found['steps']} | {times} |")
    if len(runs) > 1:
        rows.append(f"| mean | {submission['val_bpb']:.8f} | {submission['val_loss']:.8f} | | | | | |")
        rows.append(f"| std | {submission['val_bpb_std']:.8f} | {submission['val_loss_std']:.8f} | | | | | |")
    return "\n".join(rows)


def _rules(submission: dict[str, Any], kept: bool | None) -> list[str]:
    """The rules of which that is so, except legality, which the text has told already."""
    return [key for key, found in submission["compliance"].items() if found is kept and key != "certified_legal"]


def _commands(shipped: Run, evaluator: str) -> str:
    return f"""`train_gpt.py` holds the whole record of seed {shipped.seed}. Beside the shards and the tokenizer it
trains, quantizes, packs `model.bin` and scores it with `{evaluator}`; if `model.bin` is already there, it scores that.

```sh
pip install -r requirements.txt
torchrun --standalone --nproc-per-node={shipped.train["environment"]["processes"]} train_gpt.py
```"""

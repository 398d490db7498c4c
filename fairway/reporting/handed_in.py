"""The texts of the folder that is handed in, made of what the stages found out about each seed.

`submission_json` has the keys of the challenge's submission.json. `readme` says what the record is, what it scored,
whether that is a code length, and how to run it. `train_log` tells the training of a seed in the lines that the
challenge's readers and scripts know. No stage writes such a log: its lines are made afterwards, of dvclive's curves and
of what the later stages wrote.
"""

from typing import Any

from fairway.reporting.budgets import budgets, eval_s, train_s
from fairway.reporting.runs import Run, Standing, spread, standing
from fairway.runtime.challenge_log import end_line, epoch_lines, score_line, size_lines, step_line
from fairway.runtime.settings import CAP_BYTES, TRACK, TRACK_GPUS, Section


class SubmissionSettings(Section):
    """What only a person can say of a submission. Everything else in it is made of the stages' output."""

    author: str | None
    github_id: str | None
    name: str
    blurb: str
    # The challenge's pull requests whose work it uses, the nearest first.
    builds_on: list[int]


def submission_json(
    person: SubmissionSettings, evaluator: str, runs: list[Run], *, date: str, subset: str | None
) -> dict[str, Any]:
    """The keys of the challenge's submission.json, and four of our own.

    `date` is YYYY-MM-DD. Bytes are those of the largest seed, and deviations are sample deviations. Ours are
    `builds_on`, the pull requests whose work it uses; `subset`, which validation documents were scored (None: all);
    `certificate`, the verdict of stage certify on the evaluator that ships; and `compliance`, which says of each rule
    whether it is kept. Of rules that limit seconds it says null unless that work ran on as many GPUs as the track's own
    machine has.
    """
    environment = runs[0].train["environment"]
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
        "builds_on": [f"PR #{number}" for number in person.builds_on],
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
        "hardware": _hardware(runs[0], evaluator),
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
            "train_under_600s": training.within if training.comparable else None,
            "eval_under_600s": evaluation.within if evaluation.comparable else None,
            "artifact_under_16mb": size.used <= CAP_BYTES,
            "three_seeds": len(runs) >= 3,
            "certified_legal": verdict == "legal",
        },
    }


def _hardware(run: Run, evaluator: str) -> str:
    """The devices that trained, and how many of them scored if that was another number."""
    environment, scored = run.train["environment"], run.scores[evaluator]["processes"]
    trained = environment["processes"]
    return f"{trained} x {environment['device']}" + (f", scored on {scored}" if scored != trained else "")


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
    """The lines that the program that ships prints (runtime/challenge_log.py), with more on the machine and the end."""
    train, environment, score = run.train, run.train["environment"], run.scores[evaluator]
    curves: dict[str, Curve] = {name: dict(rows) for name, rows in run.curves.items()}
    curves["clock_s"] |= {0: 0.0, train["steps"]: train["wall_s"]}
    steps = sorted(int(step) for step in {*curves["train_loss"], *curves["val_bpb"]})
    return "\n".join(
        [
            f"seed:{run.seed} world_size:{environment['processes']}",
            f"commit:{environment['commit']} device:{environment['device']} driver:{environment['driver']} "
            f"torch:{environment['torch']} cuda:{environment['cuda']} python:{environment['python']} "
            f"attention:{environment['attention']}",
            f"model_params:{train['parameters']}",
            *(line for step in steps for line in _step(step, max_steps, curves)),
            end_line(train["stopped_by"], train["steps"], max_steps, train["wall_s"]),
            f"peak memory: {train['peak_memory_bytes'] >> 20} MiB",
            *(f"weights:{kind} val_bpb:{bpb:.8f}" for kind, bpb in train["val_bpb_by_weights"].items()),
            *_adaptation(run.adapt),
            size_lines(run.size["train_gpt_bytes"], run.size["model_bytes"]),
            *([f"scored on {subset}"] if subset else []),
            score_line(score["evaluator"], score["val_loss"], score["val_bpb"], score["eval_s"]),
            f"certificate {evaluator}: {run.certificates[evaluator].standing}",
            "",
        ]
    )


def _step(step: int, max_steps: int, curves: dict[str, Curve]) -> list[str]:
    """The lines of one step: of its own loss if that was logged, then of the validation behind it if there was one."""
    clock_s = curves["clock_s"].get(step)
    groups = ("train_loss",), ("val_loss", "val_bpb")
    found = [{name: curves[name][step] for name in group if step in curves[name]} for group in groups]
    return [step_line(step, max_steps, figures, clock_s) for figures in found if figures]


def _adaptation(adapt: dict[str, Any]) -> list[str]:
    if not adapt["epochs"]:
        return []
    return [epoch_lines(adapt["loss_nats"]), f"adapt split:{adapt['split']} time:{1000 * adapt['adapt_s']:.0f}ms"]


VERDICTS: dict[Standing, str] = {
    "legal": "**Certified legal.** Every condition was tested and held; see `certificate` in submission.json.",
    "illegal": "**NOT LEGAL: the figure is not a code length.** The evaluator fails a condition of the challenge:",
    "unproven": "**UNPROVEN.** Nothing was found against the evaluator, but not every condition could be tested:",
}


def readme(
    submission: dict[str, Any], runs: list[Run], meta: dict[str, Any], settings: dict[str, dict[str, Any]]
) -> str:
    """The submission's README.md.

    `submission` is what submission_json made of the same runs, `meta` the tokens' meta.json, and `settings` those that
    are written into the program, by section.
    """
    certificate = submission["certificate"]
    missing = [key for key in ("author", "github_id") if submission[key] is None]
    parts = [
        f"# {submission['name']}",
        f"{submission['blurb']} {_builds_on(submission)}".rstrip(),
        *([f"**Scored on {submission['subset']} alone.**"] if submission["subset"] else []),
        _verdict(certificate["verdict"], certificate["evaluator"], runs),
        _table(submission, runs),
        f"Evaluator: `{certificate['evaluator']}`. Ran on {submission['hardware']}, PyTorch "
        f"{submission['pytorch_version']}. Training time includes adaptation to training text and "
        "calibration on it, evaluation time adaptation to validation text.",
        *(f"Not kept: `{key}`." for key in _rules(submission, False)),
        *(f"Told only by a run on {TRACK_GPUS} GPUs: `{key}`." for key in _rules(submission, None)),
        *(f"To be filled in before it is submitted: `submission.{key}` of params.yaml." for key in missing),
        "## Method",
        _method(settings, runs[0].train["parameters"]),
        "## Bytes",
        _bytes(meta, runs[0], certificate["evaluator"]),
        "## Run it",
        _commands(runs[0], certificate["evaluator"]),
    ]
    return "\n\n".join(parts) + "\n"


CHALLENGE = "https://github.com/openai/parameter-golf/pull/"


def _builds_on(submission: dict[str, Any]) -> str:
    """The sentence on whose work it uses; empty where it uses nobody's."""
    numbers = [name.partition("#")[2] for name in submission["builds_on"]]
    links = ", ".join(f"[PR #{number}]({CHALLENGE}{number})" for number in numbers)
    what = "what of them is used, and what is changed, is told at the head of the files in `source/`"
    return f"Builds on {links}; {what}." if links else ""


def _method(settings: dict[str, dict[str, Any]], parameters: int) -> str:
    """A line for each step of the record. All settings stand in source/settings.yaml."""
    model, train, adapt, quantize = (settings[name] for name in ("model", "train", "adapt", "quantize"))
    loops = f", layers {model['loop']['first']} to {model['loop']['last']} in a loop" if model["loop"] else ""
    epochs = f"{adapt['epochs']} epochs of AdamW on rows of the {adapt['split']} split"
    bits = ", ".join(f"{name} {bits}" for name, bits in quantize["bits"].items())
    gptq = quantize["gptq"]
    calibrated = f", calibrated on: {gptq['calibration']}" if gptq else ""
    kept = settings["average"]
    return "\n".join(
        [
            f"* Network: {parameters:,} parameters, {model['layers']} layers of width {model['width']}{loops}, "
            f"{model['vocab_size']} tokens, rows of {model['seq_len']}.",
            f"* Training: Muon (matrices) and AdamW, {train['batch_tokens']:,} tokens a step in the order "
            f"`{train['loader']['kind']}`; kept are the weights `{kept['method']}`.",
            f"* Adaptation before quantization: {epochs if adapt['epochs'] else 'none'}.",
            f"* Quantization: {'GPTQ' if gptq else 'to nearest'}, bits by class: {bits}{calibrated}.",
            f"* Compression: `{settings['compress']['codec']}`. Evaluation: `{settings['compress']['evaluator']}`.",
        ]
    )


def _bytes(meta: dict[str, Any], run: Run, evaluator: str) -> str:
    """How the bytes that bits are divided by are counted, and what was checked of them."""
    counted, raw, score = meta["val_bytes"], meta["val_text_bytes"], run.scores[evaluator]
    if raw is None:
        checked = (
            "The shards are a published export, whose text is not at hand: every file was compared with the checksum "
            "of the hub, and the counts of documents and tokens with its manifest."
        )
    elif raw == counted:
        checked = f"They are all of its UTF-8 text: {raw:,} bytes. Each document was checked when it was tokenized."
    else:
        checked = f"Its UTF-8 text has {raw:,} bytes, since the tokenizer changes text or drops whitespace."
    scored = f"{score['bytes']:,} of them belong to the {score['scored']:,} scores"
    pairs = len(meta["fused_pairs"])
    fused = f" {pairs} frequent pairs of tokens are one token each, which has the bytes of both." if pairs else ""
    return " ".join(
        [
            f"{HOW_COUNTED[meta['transform']]}{fused}",
            f"The tokens of the validation split stand for {counted:,} bytes; {scored}.",
            f"{checked} `tokens.json` has the counts, the pairs, and the SHA-256 of every shard.",
        ]
    )


# By tokenize.transform. fairway/tokens/encoding.py writes no token of a document of which this is not so.
HOW_COUNTED = {
    "none": (
        "Bytes follow from the ids (`source/fairway/tokens/tokenizer.py`): a token stands for the UTF-8 bytes of its "
        "piece, with its leading space unless a control token stands before it, and BOS for none. The bytes so "
        "counted of a document are those of the text that its tokens decode to."
    ),
    "caseops": (
        "Capitals are spelled as operators before text is encoded (`source/fairway/tokens/caseops.py`), so that bytes "
        "do not follow from the ids. A sidecar holds of every validation token the bytes of the original text that it "
        "stands for; operators and BOS stand for none. Put together, the pieces of original text are the document, "
        "but for whitespace at its ends."
    ),
}


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
    processes = shipped.train["environment"]["processes"]
    return f"""`train_gpt.py` holds the whole record of seed {shipped.seed}: it trains, quantizes, packs `model.bin`
and scores it with `{evaluator}`, by all processes. If `model.bin` is already there, it scores that. As the challenge's
program does, it reads SEED, DATA_PATH (the folder of the shards) and TOKENIZER_PATH from the environment; without them
it takes this seed, the working directory, and `tokenizer.model` there. For another seed only its second line differs.

```sh
pip install -r requirements.txt
torchrun --standalone --nproc-per-node={processes} train_gpt.py
```

`source/` is what the program is packed from, with comments: files of the repository, those that prepare the tokens
among them, and the record's settings (`settings.yaml`). Packing links these files, drops what the settings never reach,
shortens names and compresses. The logs are made of what the pipeline's stages, which run the same files, wrote down;
the program prints the lines of its own run in the same form."""

"""Where the time of a run went, and how much it used of what the track limits.

The ledger lists every kind of work that a stage timed, in the order of the stages, with the budget that its seconds
count against. The track has two budgets of time: training, which includes everything else that reads training text, and
evaluation, which includes everything that reads the artifact or validation text in order to score it. Only one
evaluator ships, so each has the evaluation budget for itself. All other work is unlimited, but a user waits for it too.
"""

from dataclasses import dataclass
from typing import Literal

from fairway.reporting.runs import Run
from fairway.runtime.settings import EVAL_S, TRAIN_S

TimeBudget = Literal["training", "evaluation"]

# What adapt.json and quantize.json call a text, in words.
TEXTS = {
    "train": "training text",
    "validation": "validation text",
    "text": "a text file",
    "generated": "generated text",
}


@dataclass(frozen=True)
class Entry:
    """One kind of work: its seconds by seed, and the budget that they count against, None where there is no limit."""

    work: str
    seconds: list[float]
    budget: TimeBudget | None
    # The evaluator that needs this work; None for work that every evaluator needs.
    evaluator: str | None = None


def ledger(runs: list[Run]) -> list[Entry]:
    """Everything that was timed. Start-up and compilation are known of training alone."""
    scoring = [entry for name in runs[0].scores for entry in _scoring(runs, name)]
    return [*_training(runs), *_compression(runs), *scoring]


def _training(runs: list[Run]) -> list[Entry]:
    """Training and adaptation. Where nothing was adapted there is no entry for it."""
    entries = [
        Entry("start-up of training", [run.train["start_s"] for run in runs], None),
        Entry("compilation for training", [run.train["compile_s"] for run in runs], None),
        Entry("training", [run.train["wall_s"] for run in runs], "training"),
    ]
    if runs[0].adapt["epochs"]:
        split, seconds = runs[0].adapt["split"], [run.adapt["adapt_s"] for run in runs]
        entries.append(
            Entry(f"adaptation to {TEXTS[split]}", seconds, "training" if split == "train" else "evaluation")
        )
    return entries


def _compression(runs: list[Run]) -> list[Entry]:
    """From weights to the files that ship. Where nothing was calibrated there is no entry for it."""
    entries = [
        Entry("quantization", [run.quantize["quantize_s"] for run in runs], None),
        Entry("packing", [run.compress["pack_s"] for run in runs], None),
        Entry("trial of the packed files", [run.compress["trial_s"] for run in runs], None),
    ]
    if (calibration := runs[0].quantize["calibration"]) is None:
        return entries
    seconds = [run.quantize["calibration_s"] for run in runs]
    work = f"calibration on {TEXTS[calibration]}"
    return [Entry(work, seconds, "training" if calibration == "train" else None), *entries]


def _scoring(runs: list[Run], evaluator: str) -> list[Entry]:
    """Unpacking, evaluation and certificate of one evaluator. metrics.json counts unpacking as part of eval_s."""
    metrics = [run.scores[evaluator] for run in runs]
    scoring_s = [round(figures["eval_s"] - figures["load_s"], 3) for figures in metrics]
    return [
        Entry("unpacking", [figures["load_s"] for figures in metrics], "evaluation", evaluator),
        Entry("evaluation", scoring_s, "evaluation", evaluator),
        Entry("certificate", [run.certificates[evaluator].certify_s for run in runs], None, evaluator),
    ]


def limit_s(runs: list[Run], budget: TimeBudget, evaluator: str | None) -> float | None:
    """The track's limit on these seconds; None unless all runs were made on its GPUs, whose seconds alone compare.

    Without an evaluator, the limit on evaluation holds if all evaluators ran there.
    """
    if budget == "training":
        return TRAIN_S if all(run.trained_on_track for run in runs) else None
    names = list(runs[0].scores) if evaluator is None else [evaluator]
    return EVAL_S if all(run.scored_on_track(name) for run in runs for name in names) else None


def train_s(run: Run) -> float:
    """The seconds of one run that count against the training budget."""
    return round(sum(entry.seconds[0] for entry in ledger([run]) if entry.budget == "training"), 3)


def eval_s(run: Run, evaluator: str) -> float:
    """The seconds of one run that count against the evaluation budget if this evaluator ships."""
    entries = [entry for entry in ledger([run]) if entry.budget == "evaluation"]
    return round(sum(entry.seconds[0] for entry in entries if entry.evaluator in (None, evaluator)), 3)


@dataclass(frozen=True)
class Budget:
    """How much the seed that needs most uses of one limit."""

    name: str
    used: float
    limit: float
    unit: str
    # Whether the limit can be judged by these figures: seconds only compare on the track's GPUs.
    comparable: bool = True
    # How many processes the seconds are of; None for bytes.
    processes: int | None = None

    def text(self, amount: float) -> str:
        """An amount as it is written: whole bytes, tenths of a second."""
        return f"{amount:,.0f}" if self.unit == "bytes" else f"{amount:,.1f}"

    @property
    def within(self) -> bool:
        """Whether the limit is kept."""
        return self.used <= self.limit


def budgets(runs: list[Run], shipped: str) -> list[Budget]:
    """Size, training and evaluation (by the evaluator `shipped`), in this order.

    The limit on size is the run's own, size_check.cap_bytes, which may lie below the track's.
    """
    training, evaluation = max(train_s(run) for run in runs), max(eval_s(run, shipped) for run in runs)
    on_track = limit_s(runs, "training", None) is not None, limit_s(runs, "evaluation", shipped) is not None
    processes = runs[0].train["environment"]["processes"], runs[0].scores[shipped]["processes"]
    return [
        Budget("size", max(run.size["total_bytes"] for run in runs), runs[0].size["cap_bytes"], "bytes"),
        Budget("training", training, TRAIN_S, "s", on_track[0], processes[0]),
        Budget("evaluation", evaluation, EVAL_S, "s", on_track[1], processes[1]),
    ]

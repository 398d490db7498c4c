"""What the run took of the three things that the track limits."""

from dataclasses import dataclass

from fairway.certification.accounting import EVAL_S
from fairway.reporting.runs import Run

# Bytes of code and model, and seconds on 8xH100 for training (rules of the track), as for evaluation. A run may set
# itself another cap, size_check.cap_bytes.
LIMIT_BYTES, TRAIN_S = 16_000_000, 600.0


@dataclass(frozen=True)
class Budget:
    """The worst seed's use of one limit."""

    name: str
    used: float
    limit: float
    unit: str

    def text(self, amount: float) -> str:
        """An amount as it is written: whole bytes, tenths of a second."""
        return f"{amount:,.0f}" if self.unit == "bytes" else f"{amount:,.1f}"

    @property
    def within(self) -> bool:
        """Whether the limit is kept."""
        return self.used <= self.limit


def budgets(runs: list[Run], shipped: str) -> list[Budget]:
    """Bytes, training and evaluation (of the evaluator `shipped`)."""
    return [
        Budget("size", max(run.size["total_bytes"] for run in runs), runs[0].size["cap_bytes"], "bytes"),
        Budget("training", max(train_s(run) for run in runs), TRAIN_S, "s"),
        Budget("evaluation", max(eval_s(run, shipped) for run in runs), EVAL_S, "s"),
    ]


def train_s(run: Run) -> float:
    """Seconds of training, with those of adapting to training text and of calibrating on it: the track counts both."""
    calibration_s: float = run.quantize["calibration_s"] if run.quantize["calibration"] == "train" else 0.0
    wall_s: float = run.train["wall_s"]
    return wall_s + adapt_s(run, "train") + calibration_s


def eval_s(run: Run, evaluator: str) -> float:
    """Seconds of an evaluation, with those of training on validation tokens before it."""
    seconds: float = run.scores[evaluator]["eval_s"]
    return seconds + adapt_s(run, "validation")


def adapt_s(run: Run, split: str) -> float:
    """Seconds of adaptation if it took place, and on that split; else 0."""
    return run.adapt["adapt_s"] if run.adapt["epochs"] and run.adapt["split"] == split else 0.0

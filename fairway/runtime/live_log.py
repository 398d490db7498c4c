"""What a training run shows while it goes on: a progress line, and curves that DVC can draw."""

from contextlib import suppress
from pathlib import Path
from types import TracebackType

from dvclive import Live
from scmrepo.exceptions import SCMError

from fairway.runtime.progress import Progress

# The figures of one step by name.
Figures = dict[str, float]


class _Live(Live):
    """dvclive as it is, but in a git repository without a commit too, which has no revision to ask for."""

    def _init_dvc(self) -> None:
        with suppress(SCMError):
            super()._init_dvc()


class TrainLog:
    """Writes each figure to a file of its own in `folder` with dvclive, and shows a progress line.

    A resumed run logs its history again, so the files start anew. Progress counts seconds of the training clock where
    the run is limited by `seconds`, and steps where `seconds` is None.
    """

    def __init__(self, folder: Path, *, steps: int, seconds: float | None) -> None:
        # Neither a dvc.yaml nor experiments of dvclive's own: the pipeline has both.
        self.live = _Live(dir=str(folder), dvcyaml=False, save_dvc_exp=False)
        self.steps, self.seconds = steps, seconds
        self.progress: Progress | None = None
        self.shown: Figures = {}

    def log(self, step: int, figures: Figures) -> None:
        """Write the figures of a step."""
        self.live.step = step
        for name, value in figures.items():
            self.live.log_metric(name, value)
        self.live.make_summary()
        if "val_bpb" in figures:
            self.shown["val_bpb"] = figures["val_bpb"]

    def tick(self, step: int, figures: Figures) -> None:
        """Show how far the run is, and its latest loss and bits per byte."""
        if self.seconds is not None:
            total, unit, done = int(self.seconds), "s", int(figures["clock_s"])
        else:
            total, unit, done = self.steps, "steps", step
        if self.progress is None:
            # Both its count and its time begin here, so that a resumed run judges its speed by what it does itself.
            self.progress = Progress("train", total, unit=unit, start=done)
        self.shown["loss"] = figures["train_loss"]
        self.progress.update(done - self.progress.done, **self.shown)

    def __enter__(self) -> "TrainLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress is not None:
            self.progress.__exit__(kind, error, trace)
        self.live.end()


def silent(step: int, figures: Figures) -> None:
    """The log and the tick of ranks other than 0: rank 0 alone shows the run, so they do nothing."""

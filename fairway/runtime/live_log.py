"""What a training run shows while it goes on: a progress line for the user, and curves on disk that DVC can draw."""

from contextlib import suppress
from pathlib import Path
from types import TracebackType

from dvclive import Live
from scmrepo.exceptions import SCMError

from fairway.runtime.progress import Progress

# The figures of one training step, by name.
Figures = dict[str, float]


class _Live(Live):
    """dvclive's Live, which also works in a git repository that has no commit yet.

    dvclive asks git for the current revision when it starts. Without a commit there is none, and that is no fault here:
    nothing in this project uses dvclive's revision.
    """

    def _init_dvc(self) -> None:
        with suppress(SCMError):
            super()._init_dvc()


class TrainLog:
    """Writes each figure to a file of its own in `folder` with dvclive, and shows how far the run is.

    A resumed run logs its earlier figures again, so the files always begin at the first step. Progress counts seconds
    of the training clock if the run is limited by `seconds`, and steps if `seconds` is None.
    """

    def __init__(self, folder: Path, *, steps: int, seconds: float | None) -> None:
        # dvclive would write a dvc.yaml and record an experiment of its own, but the pipeline has both already.
        self.live = _Live(dir=str(folder), dvcyaml=False, save_dvc_exp=False)
        self.steps, self.seconds = steps, seconds
        self.progress: Progress | None = None
        self.shown: Figures = {}

    def log(self, step: int, figures: Figures) -> None:
        """Write the figures of a step to their files."""
        self.live.step = step
        for name, value in figures.items():
            self.live.log_metric(name, value)
        self.live.make_summary()
        if "val_bpb" in figures:
            self.shown["val_bpb"] = figures["val_bpb"]

    def tick(self, step: int, figures: Figures) -> None:
        """Show how far the run is after a step, with its latest training loss and validation bits per byte."""
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

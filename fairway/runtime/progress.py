"""How far a stage is, and what a training run shows while it goes on.

`Progress` is a bar on a terminal; in a log file or in CI it is a plain line every few seconds. `TrainLog` shows it for
training, and writes the figures of the run to disk as curves that DVC can draw.
"""

import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm


class Progress:
    """Counts `total` units of work, of which `start` are done at first, and shows the count. A context manager.

    Where several `processes` share the work, an update says what this one did, which counts for each of them: the
    others are about as far. Its share may be larger than theirs, so the count stops at the total.

    On a terminal it is a tqdm bar. Elsewhere it prints one line every `every_s` seconds, and one at the end unless an
    exception ended the work.
    """

    def __init__(
        self, name: str, total: int, *, unit: str, start: int = 0, processes: int = 1, every_s: float = 10.0
    ) -> None:
        self.name, self.total, self.unit, self.processes, self.every_s = name, total, unit, processes, every_s
        self.done = self._begun_at = start
        self._started_at = self._shown_at = time.monotonic()
        self._figures = ""
        # A process whose output is switched off (sys.stdout is None) shows no bar either.
        shows_bar = sys.stdout and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, desc=name, unit=unit) if shows_bar else None

    def update(self, n: int = 1, **figures: float) -> None:
        """Add `n` units of this process. Keyword arguments are figures to show behind the count, such as bpb=1.12."""
        n = min(n * self.processes, self.total - self.done)
        self.done += n
        self._figures = "".join(f" {key}={value:.4g}" for key, value in figures.items())
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures, refresh=False)
            self._bar.update(n)
        elif time.monotonic() - self._shown_at >= self.every_s:
            self._line()

    def _line(self) -> None:
        """Print the count, the seconds so far, and the seconds left at the speed since the start.

        The speed of less than a hundredth of the work says nothing: much may have gone before the first unit.
        """
        self._shown_at = time.monotonic()
        elapsed_s = self._shown_at - self._started_at
        here = self.done - self._begun_at
        told = 100 * here >= self.total > self.done
        left = f", {(self.total - self.done) * elapsed_s / here:.0f} s left" if told else ""
        print(f"{self.name}: {self.done}/{self.total} {self.unit}, {elapsed_s:.0f} s{left}{self._figures}", flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._line()


# The figures of one training step, by name.
Figures = dict[str, float]


def _live(folder: Path) -> Any:
    """dvclive's Live on a folder, which also works in a git repository that has no commit yet.

    dvclive asks git for the current revision when it starts. Without a commit there is none, and that is no fault here:
    nothing in this project uses dvclive's revision.
    """
    # Imported here, because most of what shows progress, the program that ships among it, logs no curves.
    from dvclive import Live
    from scmrepo.exceptions import SCMError

    class LiveAnywhere(Live):
        def _init_dvc(self) -> None:
            with suppress(SCMError):
                super()._init_dvc()

    # dvclive would write a dvc.yaml and record an experiment of its own, but the pipeline has both already.
    return LiveAnywhere(dir=str(folder), dvcyaml=False, save_dvc_exp=False)


class TrainLog:
    """Writes each figure to a file of its own in `folder` with dvclive, and shows how far the run is.

    A resumed run logs its earlier figures again, so the files always begin at the first step. Progress counts seconds
    of the training clock if the run is limited by `seconds`, and steps if `seconds` is None.
    """

    def __init__(self, folder: Path, *, steps: int, seconds: float | None) -> None:
        self.live = _live(folder)
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
            if self.progress is not None:
                # The last line of a run is printed behind its last validation, after which there is no step.
                self.progress.update(0, **self.shown)

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

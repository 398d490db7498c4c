"""How far a stage is: a bar on a terminal; in a log file or in CI a plain line every few seconds."""

import sys
import time
from types import TracebackType

from tqdm import tqdm


class Progress:
    """Counts `total` units of work, of which `start` are done at first, and shows the count. A context manager.

    On a terminal it is a tqdm bar. Elsewhere it prints one line every `every_s` seconds, and one at the end unless an
    exception ended the work.
    """

    def __init__(self, name: str, total: int, *, unit: str, start: int = 0, every_s: float = 10.0) -> None:
        self.name, self.total, self.unit, self.every_s = name, total, unit, every_s
        self.done = self._begun_at = start
        self._started_at = self._shown_at = time.monotonic()
        self._figures = ""
        self._bar = tqdm(total=total, initial=start, desc=name, unit=unit) if sys.stderr.isatty() else None

    def update(self, n: int = 1, **figures: float) -> None:
        """Add `n` units. Keyword arguments are figures to show behind the count, such as bpb=1.12."""
        self.done += n
        self._figures = "".join(f" {key}={value:.4g}" for key, value in figures.items())
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures, refresh=False)
            self._bar.update(n)
        elif time.monotonic() - self._shown_at >= self.every_s:
            self._line()

    def _line(self) -> None:
        """Print the count, the seconds so far, and the seconds left at the speed since the start."""
        self._shown_at = time.monotonic()
        elapsed_s = max(self._shown_at - self._started_at, 1e-9)
        rate = (self.done - self._begun_at) / elapsed_s
        left = f", {(self.total - self.done) / rate:.0f} s left" if 0 < self.done < self.total and rate else ""
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

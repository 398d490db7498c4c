"""The training clock: seconds of training, standing still while something else is measured."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from stages.distributed import World


class Clock:
    """Runs from start() on, except inside paused(); the device is waited for on both sides of a pause."""

    def __init__(self, world: World, elapsed_s: float = 0.0) -> None:
        self.world, self.elapsed_s = world, elapsed_s
        self.running_since: float | None = None

    def start(self) -> None:
        """Let it run."""
        self.world.synchronize()
        self.running_since = time.perf_counter()

    def read(self) -> float:
        """Seconds so far, as the host sees them: the device may lag behind."""
        return self.elapsed_s + (time.perf_counter() - self.running_since if self.running_since is not None else 0.0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stand still inside the block."""
        self.world.synchronize()
        self.elapsed_s, self.running_since = self.read(), None
        yield
        self.start()

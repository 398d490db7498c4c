"""The running score that an evaluation shows while it goes on."""

import math
import time
from types import TracebackType

import torch
from torch import Tensor

from stages.distributed import World
from stages.progress import Progress


class RunningScore:
    """Sums on the device what this process has scored; the first process shows it in bits per byte now and then."""

    def __init__(self, name: str, target_bytes: Tensor, world: World, *, every_s: float = 1.0) -> None:
        """`target_bytes` (N,) int64 of every target, on the device."""
        self.bytes_N, self.processes, self.every_s = target_bytes, world.size, every_s
        self.nats = torch.zeros((), dtype=torch.float64, device=target_bytes.device)
        self.bytes = torch.zeros((), dtype=torch.int64, device=target_bytes.device)
        self.progress = Progress(name, len(target_bytes), unit="tokens") if world.rank == 0 else None
        self._unshown = 0
        self._shown_at = time.monotonic()

    def add(self, positions_M: Tensor, nats_M: Tensor) -> None:
        """Take the nats (M,) float64 of more targets; both tensors on the device."""
        self.nats += nats_M.sum()
        self.bytes += self.bytes_N[positions_M].sum()
        self._unshown += len(nats_M)
        # Reading a sum makes the host wait for the device, so not at every batch.
        if time.monotonic() - self._shown_at >= self.every_s:
            self._show()

    def _show(self) -> None:
        self._shown_at = time.monotonic()
        if self.progress is not None:
            # The others are about as far.
            ahead = min(self._unshown * self.processes, self.progress.total - self.progress.done)
            self.progress.update(ahead, bpb=float(self.nats) / (math.log(2) * max(int(self.bytes), 1)))
        self._unshown = 0

    def __enter__(self) -> "RunningScore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress is not None:
            if kind is None:
                self._show()
            self.progress.__exit__(kind, error, trace)

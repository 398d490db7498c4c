"""The processes that work on one job: those torchrun started, or just this one.

One process is the degenerate case of eight: every exchange below then returns its input at once, without a process
group. NCCL carries CUDA tensors, gloo carries CPU ones.

The same numbers twice on the same machine.
"""

import ctypes
import os
import signal
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fairway.runtime.errors import UserError

# torch 2.13 renamed both and warns at the old names; torch 2.11 only has the old ones.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# Option number of prctl(2): the signal that the kernel sends to a process whose parent has died.
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Pending:
    """The result of an exchange that may still be under way."""

    result: Tensor
    work: dist.Work | None = None

    def wait(self) -> Tensor:
        """The result. On CUDA the current stream waits, not the host."""
        if self.work is not None:
            self.work.wait()
        return self.result


@dataclass(frozen=True)
class World:
    """This process among its peers. Use as a context manager: leaving it takes the process group down in order."""

    rank: int
    size: int
    device: torch.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """What activations and orthogonalisation are computed in: bfloat16 on CUDA, float32 on a CPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def gather(self, values: Tensor) -> list[list[float]]:
        """Every rank's `values` (n,), in rank order, on the host, which waits for the device: once a step is enough.

        One call serves a mean over ranks, a value of rank 0 for all, and a flag that any rank may raise.
        """
        return self.stack(values[None]).wait().tolist()

    def sum(self, tensor: Tensor) -> Pending:
        """The sum of `tensor` over the ranks, in place, launched at once."""
        return Pending(tensor, dist.all_reduce(tensor, async_op=True) if self.size > 1 else None)

    def scatter_sum(self, stack: Tensor) -> Pending:
        """This rank's equal share (P / size, ...) of the sum of `stack` (P, ...) over ranks, launched at once."""
        if self.size == 1:
            return Pending(stack)
        share = stack.new_empty(stack.shape[0] // self.size, *stack.shape[1:])
        return Pending(share, _reduce_scatter(share, stack, async_op=True))

    def stack(self, share: Tensor) -> Pending:
        """All ranks' shares (n, ...) as one stack (n * size, ...), launched at once."""
        if self.size == 1:
            return Pending(share)
        stack = share.new_empty(share.shape[0] * self.size, *share.shape[1:])
        return Pending(stack, _gather(stack, share.contiguous(), async_op=True))

    def synchronize(self) -> None:
        """Wait until the device has done everything asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *error: object) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def alone(device: torch.device) -> World:
    """One process."""
    return World(rank=0, size=1, device=device)


def start_world() -> World:
    """Join the processes that torchrun started (its RANK, WORLD_SIZE and LOCAL_RANK), or stand alone without it.

    Raises UserError when there are more processes than CUDA devices on this machine.
    """
    rank, size, local_rank = (
        int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if "RANK" in os.environ:
        _die_with_launcher()
    device = _device(local_rank)
    if size > 1 and device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    elif size > 1:
        dist.init_process_group("gloo")
    return World(rank, size, device)


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"params.yaml: processes: {local_rank + 1} or more on a machine with {torch.cuda.device_count()} GPUs"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _die_with_launcher() -> None:
    """Have Linux kill this process when torchrun dies, also of kill -9, which leaves torchrun no time to do it."""
    if sys.platform != "linux":
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        raise SystemExit("the launcher died while this process started")


# cuBLAS reads this once, when its first handle is made, which may be in training; without it torch refuses
# deterministic matrix products later.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def make_deterministic() -> None:
    """Have torch choose kernels whose sums have a fixed order, in this process."""
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True)
    else:
        # The same, but for the compiler, which it need not import then.
        torch.set_deterministic_debug_mode("error")
    # Filling fresh memory with NaN finds reads of uninitialised values, at a cost for every tensor made.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

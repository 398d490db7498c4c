"""The processes that work on one job, what they exchange, and the switch that makes their numbers repeatable.

The processes are those that torchrun started, or just this one. Rank is a process's number, from 0. Code is written
for any number of processes: with a single one every exchange below returns its input at once, without a process group.
NCCL carries CUDA tensors, gloo carries CPU tensors.
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

# cuBLAS reads this variable once, when it makes its first handle, which may happen before make_deterministic is called.
# Without it torch would then refuse deterministic matrix products. Hence it is set as soon as this module is imported.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# torch 2.13 renamed both functions and warns when the old names are used; torch 2.11 has only the old names.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# Option number of prctl(2): the signal that the kernel sends to a process whose parent has died.
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Pending:
    """The result of an exchange between processes that may still be under way."""

    result: Tensor
    work: dist.Work | None = None

    def wait(self) -> Tensor:
        """The finished result. On CUDA it is the current stream that waits for it, not the host."""
        if self.work is not None:
            self.work.wait()
        return self.result


class Reading:
    """Numbers on their way from the device to the host, which may do something else until they are there."""

    def __init__(self, numbers: Tensor) -> None:
        self.host, self.copied = numbers, None
        if numbers.device.type == "cuda":
            # The copy runs beside the host only into memory that the system does not move.
            self.host = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self.host.copy_(numbers, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def arrived(self) -> bool:
        """Whether they are there. The host does not wait."""
        return self.copied is None or self.copied.query()

    def read(self) -> list[list[float]]:
        """The numbers, for which the host waits."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.host.tolist()


def too_few_lanes(section: str, lanes: int, processes: int) -> str:
    """What is wrong with settings that cut the work into fewer lanes than there are processes to share it."""
    return f"{section}.lanes ({lanes}) is less than the {processes} processes"


@dataclass(frozen=True)
class World:
    """This process among those of the job. A context manager: left without a fault, it shuts the process group down."""

    rank: int
    size: int
    device: torch.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of activations and of Muon's orthogonalisation: bfloat16 on CUDA, float32 on a CPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def need_lanes(self, lanes: int, section: str) -> None:
        """Raise UserError if a section of params.yaml cuts the work into fewer lanes than there are processes.

        Who starts the processes decides how many they are, and settings were checked with the number of params.yaml.
        """
        if self.size > lanes:
            raise UserError(f"params.yaml: {too_few_lanes(section, lanes, self.size)}")

    def gather(self, values: Tensor) -> Reading:
        """Every rank's `values` (n,), in the order of ranks, on their way to the host.

        A training step calls this once: the mean of a figure over ranks, a figure of rank 0 for all, and a flag that
        any rank may raise all travel in the same `values`.
        """
        return Reading(self.stack(values[None]).wait())

    def sum(self, tensor: Tensor) -> Pending:
        """Start to replace `tensor` by its sum over the ranks, in place."""
        return Pending(tensor, dist.all_reduce(tensor, async_op=True) if self.size > 1 else None)

    def scatter_sum(self, stack: Tensor) -> Pending:
        """Start to sum `stack` (P, ...) over the ranks; the result is this rank's share of it, (P / size, ...).

        P must be a multiple of the number of ranks. Rank r gets the r-th share.
        """
        if self.size == 1:
            return Pending(stack)
        share = stack.new_empty(stack.shape[0] // self.size, *stack.shape[1:])
        return Pending(share, _reduce_scatter(share, stack, async_op=True))

    def stack(self, share: Tensor) -> Pending:
        """Start to gather all ranks' shares (n, ...) in the order of ranks, as one stack (n * size, ...)."""
        if self.size == 1:
            return Pending(share)
        stack = share.new_empty(share.shape[0] * self.size, *share.shape[1:])
        return Pending(stack, _gather(stack, share.contiguous(), async_op=True))

    def share(self, tensor: Tensor) -> None:
        """Replace `tensor`, which is contiguous, by rank 0's, in place."""
        if self.size > 1:
            dist.broadcast(tensor, 0)

    def synchronize(self) -> None:
        """Wait until the device has finished all work that was launched on it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __enter__(self) -> "World":
        return self

    def __exit__(self, fault: type[BaseException] | None, *_: object) -> None:
        # With a fault the process ends, and torchrun then ends the others. NCCL would wait here until they leave, too.
        if fault is None and dist.is_initialized():
            dist.destroy_process_group()


def alone(device: torch.device) -> World:
    """The world of a single process that works on `device`."""
    return World(rank=0, size=1, device=device)


def start_world() -> World:
    """Join the processes that torchrun started, or be the only process where torchrun did not start this one.

    torchrun tells each process its place in the variables RANK, WORLD_SIZE and LOCAL_RANK (its number on this machine).
    The process with local rank i works on GPU i, or on the CPU if there are no GPUs. Raises UserError if the machine
    has GPUs, but fewer than processes.
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
    """Have Linux kill this process when torchrun dies.

    torchrun ends its processes itself, except when it is killed with SIGKILL and has no time left to do so.
    """
    if sys.platform != "linux":
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        raise SystemExit("the launcher died while this process started")


def make_deterministic() -> None:
    """Have torch use only kernels that add numbers up in a fixed order, in this process from now on.

    The same work on the same machine then gives the same numbers again.
    """
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True)
    else:
        # This sets the switch of torch's operators alone. The call above sets that of torch's compiler as well, and
        # would import the compiler to do so.
        torch.set_deterministic_debug_mode("error")
    # In this mode torch also fills fresh memory with NaN, to reveal reads of uninitialised values. That costs time for
    # every tensor that is made, and does nothing for repeatability.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

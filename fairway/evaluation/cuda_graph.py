"""A function's kernels as one CUDA graph: recorded once, then replayed without the host launching each of them.

Used for forward passes and gradients of the network. Compiling them would save about as much time per batch, but takes
ten seconds first.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class CudaGraph:
    """A function of CUDA tensors, recorded when their shapes are met for the first time and replayed from then on.

    The function's kernels may depend on nothing but these shapes. Gradients are off, unless the function turns them on.
    What a call returns is overwritten by the next call with the same shapes. Other tensors that the function reads,
    such as weights, are read anew in every call: they may change, but only in place.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        # By shapes: the graph, the tensors that it reads and the one that it writes.
        self._recorded: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function of the inputs."""
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self._recorded:
            return self._record(shapes, inputs)
        graph, reads, writes = self._recorded[shapes]
        for read, x in zip(reads, inputs, strict=True):
            read.copy_(x)
        graph.replay()
        return writes

    def _record(self, shapes: tuple[torch.Size, ...], inputs: tuple[Tensor, ...]) -> Tensor:
        """The function of the inputs by an ordinary run, after which it is run again to be recorded.

        The graph has memory of its own beside that of the ordinary run, so that twice what a run takes stays reserved.
        """
        # Now, because no memory can be given back to the device while a graph is recorded.
        torch.cuda.empty_cache()
        graph, same = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
        # Recording needs a stream that is not the default one. The context manager torch.cuda.graph would provide it,
        # but would also make the host wait for the ordinary run.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Triton builds its kernels and libraries choose theirs in this run, which they cannot while recording.
            first = self.function(*same)
            # Other threads, such as NCCL's watchdog, may go on querying the device meanwhile.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                writes = self.function(*same)
            finally:
                graph.capture_end()
        self._recorded[shapes] = graph, same, writes
        torch.cuda.current_stream().wait_stream(stream)
        # It was made on the other stream, which must not reuse its memory before it is read here.
        first.record_stream(torch.cuda.current_stream())
        return first


class TwoGraphs:
    """A function of one tensor, and what is to be done with its result, recorded as two graphs: scores, then gradients.

    Both functions must have been run before with tensors of this shape: Triton builds its kernels and libraries choose
    theirs in that run, which they cannot while recording. Graphs of several shapes share memory, so that what a first
    graph leaves to its second is there only until another is replayed.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        then: Callable[[Tensor, Tensor], None],
        x: Tensor,
        memory: "SharedMemory",
    ) -> None:
        self._reads = x.clone()
        free, total = torch.cuda.mem_get_info()
        if free < total / 2:
            # Now, because no memory can be given back to the device while a graph is recorded. Otherwise not, because
            # the host would have to wait until the device has nothing left to do.
            torch.cuda.empty_cache()
        with memory.recorded() as self._first:
            result = function(self._reads)
        with memory.recorded() as self._second:
            then(self._reads, result)
        # Without what it was computed from: that memory is then free for the next graphs of the pool.
        self._result = result.detach()

    def first(self, x: Tensor) -> Tensor:
        """The function of `x`, which may lie on the host. The next call overwrites what this one returns."""
        self._reads.copy_(x, non_blocking=True)
        self._first.replay()
        return self._result

    def second(self) -> None:
        """What is to be done with the last result."""
        self._second.replay()


class SharedMemory:
    """What several graphs are recorded in: memory, and a stream, since recording needs another than the default."""

    def __init__(self) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    @contextmanager
    def recorded(self) -> Iterator[torch.cuda.CUDAGraph]:
        """A graph of all that is launched inside."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Other threads, such as NCCL's watchdog, may go on querying the device meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                yield graph
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)


def as_cuda_graph(function: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """The function recorded as a CUDA graph (CudaGraph) if the device is a GPU; on a CPU the function itself."""
    return CudaGraph(function) if device.type == "cuda" else function

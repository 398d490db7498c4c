"""A network's forward pass, or its gradients, as one CUDA graph: recorded once, then replayed without the host
launching its kernels.

Compiling the pass would save about as much a batch and take ten seconds first.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class Graphed:
    """A function of one tensor whose kernels depend on nothing but its shape, recorded once for every shape it meets.

    Runs without gradients, unless the function takes its own. What it returns may be overwritten by the next call.
    Weights are read where they lie: the graph sees changes in place.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        # By shape: a graph, and where it reads and writes.
        self._recorded: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The function of `x`, on CUDA."""
        if x.shape not in self._recorded:
            return self._record(x)
        graph, reads, writes = self._recorded[x.shape]
        reads.copy_(x)
        graph.replay()
        return writes

    def _record(self, x: Tensor) -> Tensor:
        """The function of `x` by an ordinary run, and the graph from then on.

        The graph has memory of its own, beside that of the run before it: twice what a run takes stays reserved.
        """
        # What earlier graphs held: nothing can be given back while one is recorded.
        torch.cuda.empty_cache()
        graph, same = torch.cuda.CUDAGraph(), x.clone()
        # On another stream, as recording asks; and not by torch.cuda.graph, which would wait for the run to end.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Kernels are built and libraries choose theirs on a run before.
            first = self.function(same)
            # Other threads, NCCL's watchdog among them, may go on asking the device meanwhile.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                writes = self.function(same)
            finally:
                graph.capture_end()
        self._recorded[x.shape] = graph, same, writes
        torch.cuda.current_stream().wait_stream(stream)
        # Made on another stream: not to be reused there before it is read here.
        first.record_stream(torch.cuda.current_stream())
        return first


def graphed(function: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    """The function as a graph on a GPU; on a CPU as it is."""
    return Graphed(function) if device.type == "cuda" else function

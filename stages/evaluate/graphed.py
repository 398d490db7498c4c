"""A network's forward pass as one CUDA graph: recorded once, then replayed without the host launching its kernels.

Compiling the pass would save about as much a batch and take ten seconds first.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class Graphed:
    """A function of one tensor whose kernels depend on nothing but its shape, recorded for the first shape it meets.

    Runs without gradients. What it returns may be overwritten by the next call. Weights are read where they lie: the
    graph sees changes in place.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self._graph = torch.cuda.CUDAGraph()
        self._input: Tensor | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The function of `x`, on CUDA."""
        if self._input is None:
            return self._record(x)
        self._input.copy_(x)
        self._graph.replay()
        return self._output

    def _record(self, x: Tensor) -> Tensor:
        """The function of `x` by an ordinary run, and the graph from then on.

        The graph has memory of its own, beside that of the run before it: twice what a run takes stays reserved.
        """
        # What earlier graphs held: nothing can be given back while one is recorded.
        torch.cuda.empty_cache()
        same = x.clone()
        # On another stream, as recording asks; and not by torch.cuda.graph, which would wait for the run to end.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Kernels are built and libraries choose theirs on a run before.
            first = self.function(same)
            # Other threads, NCCL's watchdog among them, may go on asking the device meanwhile.
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._output = self.function(same)
            finally:
                self._graph.capture_end()
        self._input = same
        torch.cuda.current_stream().wait_stream(stream)
        # Made on another stream: not to be reused there before it is read here.
        first.record_stream(torch.cuda.current_stream())
        return first


def graphed(function: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    """The function as a graph on a GPU; on a CPU as it is."""
    return Graphed(function) if device.type == "cuda" else function

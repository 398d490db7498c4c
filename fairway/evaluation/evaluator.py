"""What every evaluator offers: nats of all targets, and whole distributions at chosen ones.

Legend: N targets, P chosen positions, V vocabulary. Target p is token p + 1.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor

from fairway.evaluation.collect import collect, distributions
from fairway.evaluation.passes import Pass
from fairway.model.gpt import GPT
from fairway.runtime.distributed import World, alone


class Evaluator(ABC):
    """A way to score a network on a stream. Evaluators leave the network as it was."""

    @abstractmethod
    def begin(self, model: GPT, tokens_N1: Tensor, world: World) -> Pass:
        """A pass over the stream (N+1,) int64, on the model's device. Raises UserError if the settings do not fit."""

    def score(self, model: GPT, tokens_N1: Tensor, progress: Callable[[int], None]) -> Tensor:
        """Nats of every target, (N,) float64 on the CPU. `progress` is told how many more targets were scored."""
        world = alone(tokens_N1.device)
        evaluation = self.begin(model, tokens_N1, world)
        return collect(evaluation, tokens_N1, world, scored=lambda _, nats: progress(len(nats))).nats_N

    def log_probs(self, model: GPT, tokens_N1: Tensor, positions: Sequence[int]) -> Tensor:
        """The log-distributions that score would commit to at these positions: (P, V) float64 on the CPU."""
        return distributions(self.begin(model, tokens_N1, alone(tokens_N1.device)), tokens_N1, positions)

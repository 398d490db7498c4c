"""What every evaluator offers: nats of all targets, and whole distributions at chosen ones; and what its settings do.

Legend: N targets, P chosen positions, V vocabulary. Target p is token p + 1.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fairway.evaluation.collect import collect, distributions
from fairway.evaluation.passes import Pass
from fairway.model.config import ModelConfig
from fairway.model.gpt import GPT
from fairway.runtime.distributed import World, alone
from fairway.runtime.settings import Section


class EvaluatorSettings(Section):
    """The section of params.yaml that has an evaluator's name."""

    def check(self, *, section: str, model: ModelConfig, processes: int) -> None:
        """Check the settings against the network that is scored and the number of processes that share the work.

        Called when params.yaml is read, and again with the network that is scored, before a pass begins. Raises
        ValueError naming `section` (the evaluator's name), the key, and what was expected. Here everything fits.
        """

    def looked_up(self) -> dict[str, str]:
        """Tables ("module.TABLE") in which the evaluator looks up nothing but one entry, with its key. Here none."""
        return {}


@dataclass(frozen=True)
class Evaluator(ABC):
    """A way to score a network on a stream. Evaluators leave the network as it was.

    A subclass narrows the annotation of `settings` to its own class of settings: the registry reads the evaluator's
    section of params.yaml as that.
    """

    settings: EvaluatorSettings

    @abstractmethod
    def begin(self, model: GPT, tokens_N1: Tensor, world: World) -> Pass:
        """A pass over the stream (N+1,) int64, on the model's device, with settings that passed their check.

        Nothing is exchanged between processes, and the model is left as it is. Raises UserError if the settings do not
        fit the stream or the number of processes.
        """

    def score(self, model: GPT, tokens_N1: Tensor, progress: Callable[[int], None]) -> Tensor:
        """Nats of every target, (N,) float64 on the CPU. `progress` is told how many more targets were scored."""
        world = alone(tokens_N1.device)
        evaluation = self.begin(model, tokens_N1, world)
        return collect(evaluation, tokens_N1, world, scored=lambda _, nats: progress(len(nats))).nats_N

    def log_probs(self, model: GPT, tokens_N1: Tensor, positions: Sequence[int]) -> Tensor:
        """The log-distributions that score would commit to at these positions: (P, V) float64 on the CPU."""
        return distributions(self.begin(model, tokens_N1, alone(tokens_N1.device)), tokens_N1, positions)

"""One evaluation of a stream: predictions that are committed to before anything is learned from them.

Legend: N targets, M targets predicted together, V vocabulary. Target p is token p + 1 of the stream.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor

# Positions (M,) int64 and the logits (M, V) float32 that the evaluator commits to there, on the model's device.
Prediction = tuple[Tensor, Tensor]
# What a pass has adapted so far, by name.
State = dict[str, Tensor]


class Pass(ABC):
    """One evaluation under way: chunk 0 is predicted, then learned from, then chunk 1, and so on.

    Whatever an evaluator adapts, it adapts in `learn`, from targets whose predictions it has already given away. "Score
    before update", the third condition of the challenge, is then the order of two calls. (SLOT as the records had it
    adapts inside `predict`; that is what is wrong with it.) Except for the places where documents start, which decide
    in what order they are visited, tokens are read only when they are predicted or learned from, so that a decoder can
    fill them in on the way (certification/stepping.py). Processes share the work: each predicts a part of every chunk,
    and all learn together, so that they hold the same state between chunks.
    """

    chunks: int

    @property
    def updates(self) -> int:
        """How many times this pass, up to its last prediction, adapts something that it keeps for later ones.

        What is fitted inside a prediction and then forgotten does not count.
        """
        return 0

    def learns(self, chunk: int) -> bool:
        """Whether `learn` can change something for later chunks: as far as the lengths of documents tell."""
        return chunk < self.chunks - 1

    @abstractmethod
    def predict(self, chunk: int, wanted: Tensor | None = None) -> Iterator[Prediction]:
        """This process's predictions of a chunk, a batch at a time.

        Batches without a position in `wanted`, a bool tensor (N,) on the CPU, may be skipped.
        """

    @abstractmethod
    def learn(self, chunk: int) -> None:
        """Adapt to the targets of a chunk that has been predicted."""

    @abstractmethod
    def state(self) -> State:
        """What `restore` needs to go on after the last chunk learned from, in another pass over the same stream."""

    @abstractmethod
    def restore(self, state: State) -> None:
        """Continue where the pass stood that gave this state."""

"""One pass over the stream with a rolling key/value cache: each token goes through the network once.

Sliding windows compute every token seq_len/stride times. Here the keys and values of every layer are kept, and a token
attends to those of the last seq_len tokens, its own included. Through the layers below, a hidden state then depends on
tokens further back than seq_len, which the network never met in training; whether that helps is for the score to say.
Causal, and nothing is adapted.

With within_documents a lane's cache is forgotten where a document begins: attention goes back no further than to its
BOS, which is embedded as the first token of a row is.

The stream is cut into equal lanes that are worked on side by side, on one GPU or several. Each begins with an empty
cache. The number of lanes is a setting, and the result does not depend on the number of processes.
Ours; the rolling window is that of arXiv:2310.06825 (Mistral 7B).

Legend: N targets, B lanes, C tokens of a block, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from fairway.evaluation.evaluator import Evaluator, EvaluatorSettings
from fairway.evaluation.kv_cache import Cache, cached_hidden
from fairway.evaluation.passes import Pass, Prediction, State
from fairway.model.config import ModelConfig
from fairway.model.embedding import LOOK_BACK
from fairway.model.gpt import GPT
from fairway.runtime.distributed import World, too_few_lanes
from fairway.runtime.errors import UserError


class StreamingSettings(EvaluatorSettings):
    """One pass with a rolling key/value cache, each token computed once."""

    # Tokens of a lane that go through the network together.
    block_tokens: int = Field(gt=1)
    # Equal parts of the stream, each begun with an empty cache, that are worked on side by side.
    lanes: int = Field(gt=0)
    # Forget the cache where a document begins.
    within_documents: bool

    def check(self, *, section: str, model: ModelConfig, processes: int) -> None:
        """Every process has a lane to work on."""
        if processes > self.lanes:
            raise ValueError(too_few_lanes(section, self.lanes, processes))


@dataclass(frozen=True)
class StreamingEvaluator(Evaluator):
    """A fixed network with a key/value cache."""

    settings: StreamingSettings

    def begin(self, model: GPT, tokens_N1: Tensor, world: World) -> Pass:
        """A pass whose chunks are the blocks of all lanes at the same place."""
        s, seq_len, targets = self.settings, model.config.seq_len, len(tokens_N1) - 1
        world.need_lanes(s.lanes, "streaming")
        if targets < s.lanes * seq_len:
            raise UserError(
                f"params.yaml: streaming.lanes ({s.lanes}): too many for {targets} targets in rows of {seq_len}"
            )
        return StreamingPass(model, tokens_N1, world, s)


class StreamingPass(Pass):
    """A pass that predicts block_tokens of every lane in a chunk."""

    def __init__(self, model: GPT, tokens_N1: Tensor, world: World, settings: StreamingSettings) -> None:
        self.model, self.tokens_N1, self.world, self.settings = model, tokens_N1, world, settings
        targets, lanes = len(tokens_N1) - 1, settings.lanes
        self.bounds = [targets * lane // lanes for lane in range(lanes + 1)]
        self.mine = range(world.rank, lanes, world.size)
        longest = max(end - begin for begin, end in zip(self.bounds, self.bounds[1:], strict=False))
        self.chunks = -(-longest // settings.block_tokens)
        self._cache: Cache = ()
        if settings.within_documents:
            self._cache = (torch.zeros(len(self.mine), dtype=torch.int64, device=tokens_N1.device),)
        self._next: Cache = ()

    def predict(self, chunk: int, wanted: Tensor | None = None) -> Iterator[Prediction]:
        """A block of every lane of this process. None is left out, because later blocks attend to it."""
        begin = chunk * self.settings.block_tokens
        end = begin + self.settings.block_tokens
        tokens = torch.stack([self._cut(lane, max(begin - LOOK_BACK, 0), end) for lane in self.mine])
        hid_BCD, self._next = cached_hidden(self.model, tokens, begin, self._cache)
        for lane, hid_CD in zip(self.mine, hid_BCD, strict=True):
            first, last = self.bounds[lane] + begin, min(self.bounds[lane] + end, self.bounds[lane + 1])
            if last > first:
                yield torch.arange(first, last, device=hid_CD.device), self._logits(hid_CD[: last - first])

    @torch.no_grad()
    def _logits(self, hid_CD: Tensor) -> Tensor:
        return self.model.logits(hid_CD)

    def _cut(self, lane: int, begin: int, end: int) -> Tensor:
        """The tokens begin ... end - 1 of a lane; beyond its end, where nothing is scored, they are 0."""
        piece = self.tokens_N1[self.bounds[lane] + begin : min(self.bounds[lane] + end, self.bounds[lane + 1])]
        return torch.nn.functional.pad(piece, (0, end - begin - len(piece)))

    def learn(self, chunk: int) -> None:
        """Go on to the next block with the keys and values of this one in the cache."""
        self._cache = self._next

    def state(self) -> State:
        """The cache of every lane, whichever process has it; the same on all processes."""
        state = {}
        for index, mine in enumerate(self._cache):
            of_lanes = mine.new_zeros(self.settings.lanes, *mine.shape[1:])
            of_lanes[self.mine.start :: self.world.size] = mine
            state[str(index)] = self.world.sum(of_lanes).wait()
        return state

    def restore(self, state: State) -> None:
        """Take this process's lanes out of the state."""
        self._cache = tuple(state[str(index)][self.mine.start :: self.world.size] for index in range(len(state)))

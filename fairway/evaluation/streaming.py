"""One pass over the stream with rolling keys and values: each token goes through the network once.

Sliding windows compute every token seq_len/stride times. Here a layer's keys and values stay where they were computed,
and a token attends to those of the last seq_len tokens, itself included. What a token's hidden state knows then reaches
further back than a window, through the layers below, but the network was trained on rows that begin nowhere; which of
both scores better is for the numbers to say. Causal, and nothing is adapted.

The stream is cut into equal lanes, each of which begins cold, so that a GPU has several to work on at a time, and
several GPUs have theirs. Their number is a setting, and the result does not depend on the processes.
Ours; the rolling window is that of arXiv:2310.06825 (Mistral 7B).

Legend: N targets, B lanes, C tokens of a block, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from fairway.evaluation.evaluator import Evaluator, EvaluatorSettings
from fairway.evaluation.kv_cache import OVERLAP, RememberingNetwork
from fairway.evaluation.passes import Pass, Prediction, State
from fairway.model.config import ModelConfig
from fairway.model.gpt import GPT
from fairway.runtime.distributed import World
from fairway.runtime.errors import UserError


class StreamingSettings(EvaluatorSettings):
    """One pass with rolling keys and values, each token computed once."""

    # Tokens of a lane that go through the network together.
    block_tokens: int = Field(gt=1)
    # Equal parts of the stream, each begun without memory, that are worked on side by side.
    lanes: int = Field(gt=0)

    def check(self, *, section: str, model: ModelConfig, processes: int) -> None:
        """Every process has a lane to work on."""
        if processes > self.lanes:
            raise ValueError(f"{section}.lanes ({self.lanes}) is less than the {processes} processes")


@dataclass(frozen=True)
class StreamingEvaluator(Evaluator):
    """A fixed network that remembers keys and values."""

    settings: StreamingSettings

    def begin(self, model: GPT, tokens_N1: Tensor, world: World) -> Pass:
        """A pass whose chunks are blocks of all lanes."""
        s, seq_len, targets = self.settings, model.config.seq_len, len(tokens_N1) - 1
        if targets < s.lanes * seq_len:
            raise UserError(
                f"params.yaml: streaming.lanes ({s.lanes}): too many for {targets} targets in rows of {seq_len}"
            )
        return StreamingPass(model, tokens_N1, world, s)


class StreamingPass(Pass):
    """Blocks of block_tokens of every lane; the first has nothing to remember."""

    def __init__(self, model: GPT, tokens_N1: Tensor, world: World, settings: StreamingSettings) -> None:
        self.model, self.tokens_N1, self.world, self.settings = model, tokens_N1, world, settings
        self.network = RememberingNetwork(model)
        targets, lanes = len(tokens_N1) - 1, settings.lanes
        self.bounds = [targets * lane // lanes for lane in range(lanes + 1)]
        self.mine = range(world.rank, lanes, world.size)
        longest = max(end - begin for begin, end in zip(self.bounds, self.bounds[1:], strict=False))
        self.chunks = -(-longest // settings.block_tokens)
        self._memory = self._next = self.network.nothing

    def predict(self, chunk: int, wanted: Tensor | None = None) -> Iterator[Prediction]:
        """A block of every lane of this process. None is left out: what follows remembers it."""
        begin = chunk * self.settings.block_tokens
        end = begin + self.settings.block_tokens
        tokens = torch.stack([self._cut(lane, max(begin - OVERLAP, 0), end) for lane in self.mine])
        hid_BCD, self._next = self.network.hidden(tokens, begin, self._memory)
        for lane, hid_CD in zip(self.mine, hid_BCD, strict=True):
            first, last = self.bounds[lane] + begin, min(self.bounds[lane] + end, self.bounds[lane + 1])
            if last > first:
                yield torch.arange(first, last, device=hid_CD.device), self._logits(hid_CD[: last - first])

    @torch.no_grad()
    def _logits(self, hid_CD: Tensor) -> Tensor:
        return self.model.logits(hid_CD)

    def _cut(self, lane: int, begin: int, end: int) -> Tensor:
        """Tokens of a lane, (end - begin,); 0 beyond its end, where nothing is scored."""
        piece = self.tokens_N1[self.bounds[lane] + begin : min(self.bounds[lane] + end, self.bounds[lane + 1])]
        return torch.nn.functional.pad(piece, (0, end - begin - len(piece)))

    def learn(self, chunk: int) -> None:
        """Remember the block."""
        self._memory = self._next

    def state(self) -> State:
        """Every lane's memory, whichever process has it."""
        state = {}
        for index, memory in enumerate(self._memory):
            of_lanes = memory.new_zeros(self.settings.lanes, *memory.shape[1:])
            of_lanes[self.mine.start :: self.world.size] = memory
            state[str(index)] = self.world.sum(of_lanes).wait()
        return state

    def restore(self, state: State) -> None:
        """Take this process's lanes out of it."""
        of_lanes = [state[str(index)] for index in range(len(state))]
        self._memory = tuple(memory[self.mine.start :: self.world.size] for memory in of_lanes)

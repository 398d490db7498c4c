"""The hidden states of a row of tokens, a few at a time, while the tokens behind them are not known yet.

Legend: S tokens of a step, D model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fairway.evaluation.kv_cache import Cache, cached_hidden
from fairway.model.embedding import LOOK_BACK
from fairway.model.gpt import GPT

# Tokens of a step. So few cost little more than one token, and where all are known already, fewer steps are needed.
STEP = 4


class RowReader:
    """Goes through a row in steps of STEP tokens, and again through those whose tokens have changed since.

    Steps begin at the same places whatever is known, so that a decoder computes on the same shapes as the encoder and
    gets the same bits. The tokens before a step are in the key/value cache, and are computed again only if they have
    changed. `begin` and `cache` say where the row starts, if tokens before it are cached already.
    """

    def __init__(self, model: GPT, *, begin: int = 0, cache: Cache = ()) -> None:
        self.model = model
        self._start = (begin, cache)
        # The tokens read before the last step and with it, and what both left in the cache.
        self._before = self._after = (torch.empty(0), cache)

    def step(self, row: Tensor, begin: int, context: int) -> Tensor:
        """Hidden states (S, D) at places begin ... of a row, of which the first `context` tokens are read at once."""
        known, cache = self._read_before(row, begin)
        while known < begin:
            end = known + STEP if known >= context else context
            cache = self._run(row, known, end, cache)[1]
            known = end
        hid_SD, cache_after = self._run(row, begin, begin + STEP, cache)
        self._before, self._after = (row[:begin].clone(), cache), (row[: begin + STEP].clone(), cache_after)
        return hid_SD

    def _read_before(self, row: Tensor, begin: int) -> tuple[int, Cache]:
        """How many of the tokens before `begin` are cached and still the same, and the cache behind them."""
        for tokens, cache in (self._after, self._before):
            if 0 < len(tokens) <= begin and torch.equal(row[: len(tokens)], tokens):
                return len(tokens), cache
        return self._start

    def _run(self, row: Tensor, begin: int, end: int, cache: Cache) -> tuple[Tensor, Cache]:
        """Hidden states of the places begin ... end - 1; beyond the row's end tokens are 0."""
        tokens = F.pad(row, (0, max(end - len(row), 0)))[begin - (LOOK_BACK if begin else 0) : end]
        hid_1SD, cache = cached_hidden(self.model, tokens[None], begin, cache)
        return hid_1SD[0], cache

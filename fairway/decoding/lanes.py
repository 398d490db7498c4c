"""The network read token by token, in several texts side by side: what it predicts behind the tokens known so far.

A lane is one text, whose first token is BOS. In each step every lane takes one token and gives the distribution of the
next one. Keys and values of earlier tokens are kept, so that a token goes through the network once. Where a row of
seq_len tokens is full, its second half is read again as the beginning of a new one. Predictions are therefore those of
the evaluator `sliding` with a stride of half a row, which is causal and adapts nothing.

Floating point rounds otherwise in batches of another shape. So there are no other shapes than these: as many lanes in
each step as at first, with any token for those that have ended, whether the tokens behind are known already or not.

Legend: B lanes, C new tokens, T tokens of a lane's row so far, D model width, H query heads, K key/value heads,
G = H/K, E width of a head, V vocabulary.
"""

import torch
from torch import Tensor

from fairway.model.attention import rotary_table
from fairway.model.causal_attention import attend_plainly
from fairway.model.config import ModelConfig
from fairway.model.context import Context
from fairway.model.embedding import LOOK_BACK
from fairway.model.gpt import GPT


class RowCache:
    """A way to attend (model.context.Attend): to the new tokens and to those of the row that were new before.

    Unlike the rolling cache of evaluation/kv_cache.py, which serves blocks of tokens, it writes keys and values in
    place: for single tokens, copying the cache would take most of the time. There is room for one row.
    """

    def __init__(self, config: ModelConfig, lanes: int) -> None:
        applications = sum(map(len, config.layer_order(looped=True)))
        shape = (applications, 2, lanes, config.kv_heads, config.seq_len, config.head_dim)
        self._kv = torch.zeros(shape)
        # Tokens of the row that are cached. Whoever runs the network counts them, since every layer writes once.
        self.length = 0

    def __call__(self, q_BCHE: Tensor, k_BCKE: Tensor, v_BCKE: Tensor, application: int) -> Tensor:
        """Attention of the new tokens (B, C, H, E). Behind cached tokens there may be but one new token."""
        end = self.length + k_BCKE.size(1)
        self._kv[application, 0, :, :, self.length : end] = k_BCKE.transpose(1, 2)
        self._kv[application, 1, :, :, self.length : end] = v_BCKE.transpose(1, 2)
        if not self.length:
            return attend_plainly(q_BCHE, k_BCKE, v_BCKE, None)
        k_BKTE, v_BKTE = self._kv[application, :, :, :, :end]
        q_BKGE = q_BCHE[:, 0].unflatten(1, (k_BKTE.size(1), -1))
        shares_BKGT = (q_BKGE @ k_BKTE.transpose(2, 3) * q_BKGE.size(-1) ** -0.5).softmax(-1)
        return (shares_BKGT @ v_BKTE).flatten(1, 2)[:, None]


class Lanes:
    """So many texts side by side, on the CPU."""

    def __init__(self, model: GPT, lanes: int) -> None:
        self.model, self._cache = model, RowCache(model.config, lanes)
        self._row_BT = torch.zeros(lanes, 0, dtype=torch.int64)

    @torch.inference_mode()
    def step(self, tokens_B: Tensor) -> Tensor:
        """Take one token (B,) int64 of each lane; the log-probabilities (B, V) float32 of the tokens behind them."""
        seq_len = self.model.config.seq_len
        if self._row_BT.size(1) == seq_len:
            self._row_BT = self._row_BT[:, seq_len // 2 :]
            self._cache.length = 0
            self._run(self._row_BT)
        self._row_BT = torch.cat([self._row_BT, tokens_B[:, None]], 1)
        hid_B1D = self._run(self._row_BT[:, self._cache.length :])
        return self.model.logits(hid_B1D[:, 0]).log_softmax(-1)

    def _run(self, tokens_BC: Tensor) -> Tensor:
        """Final hidden states (B, C, D) of the next tokens of the rows; from then on they are cached."""
        model, cache = self.model, self._cache
        begin, count = cache.length, tokens_BC.size(1)
        first = max(begin - LOOK_BACK, 0)
        x0_BCD = model.embed_tokens(self._row_BT[:, first : begin + count])[:, begin - first :].contiguous()
        positions_C = torch.arange(begin, begin + count, dtype=torch.float32)
        context = Context(
            x0_BTD=x0_BCD,
            rope=rotary_table(model.config.rope, model.config.seq_len, positions_C, x0_BCD.dtype),
            value_embeddings=model.value_embeddings(tokens_BC),
            attend=cache,
        )
        hid_BCD = model.run_layers(context)
        cache.length += count
        return hid_BCD

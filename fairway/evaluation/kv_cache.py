"""A network that attends to keys and values of tokens it saw before.

Legend: B rows, C new tokens, P remembered tokens, D model width, H query heads, K key/value heads, E width of a head.
"""

import copy

import torch
from torch import Tensor

from fairway.model.attention import Attention, Shared, attend_recent
from fairway.model.gpt import GPT
from fairway.model.precision import rms_norm
from fairway.model.residual import Block
from fairway.model.rope import rotary_table

# Keys and values (B, P, K, E) of every application of a layer in turn: k, v, k, v, ...
Memory = tuple[Tensor, ...]

# Tokens before the new ones that mechanisms look back at: the previous token's embedding, itself a bigram's.
OVERLAP = 2


class RememberingNetwork:
    """The hidden states of a network for new tokens, given the memory of earlier ones; the network is not changed.

    In every layer a token sees itself and the seq_len - 1 tokens before it.
    """

    nothing: Memory = ()

    def __init__(self, model: GPT) -> None:
        # A copy, whose attention is replaced.
        self.model, self.window = copy.deepcopy(model), model.config.seq_len
        # Of the forward pass under way, application by application: what it was given, and what it leaves.
        self._recalled: Memory = ()
        self._left: list[Tensor] = []
        for i in range(model.config.layers):
            block = self.model.get_submodule(f"layer{i}")
            assert isinstance(block, Block)
            self._replace_attention(block.attn)

    @torch.no_grad()
    def hidden(self, tokens: Tensor, begin: int, memory: Memory) -> tuple[Tensor, Memory]:
        """Final hidden states (B, C, D) of tokens at positions begin ... begin + C - 1, and the memory they leave.

        Without memory, tokens (B, C) begin a row. With it, tokens (B, 2 + C) have the two before them.
        """
        self._recalled, self._left = memory, []
        overlap = OVERLAP if memory else 0
        x0_BCD = self.model._embed(tokens)[:, overlap:].contiguous()
        # In float64: positions go far beyond what float32 can tell apart after a multiplication.
        positions_C = begin + torch.arange(x0_BCD.size(1), device=tokens.device, dtype=torch.float64)
        values = self.model.ve(tokens[:, overlap:], x0_BCD.dtype) if self.model.ve is not None else {}
        shared = Shared(
            x0_BTD=x0_BCD,
            rope=rotary_table(self.model.config.rope, self.window, positions_C, x0_BCD.dtype),
            segments=None,
            longest=self.window,
            value_embeddings=values,
        )
        return rms_norm(self.model._layers(x0_BCD, shared, looped=True)), tuple(self._left)

    def _replace_attention(self, attn: Attention) -> None:
        """Take the attention of a layer from here, and nothing else of it."""

        def attend(q_BCHE: Tensor, k_BCKE: Tensor, v_BCKE: Tensor, shared: Shared) -> Tensor:
            return self._attend(q_BCHE, k_BCKE, v_BCKE)

        setattr(attn, "_attend", attend)  # noqa: B010

    def _attend(self, q_BCHE: Tensor, k_BCKE: Tensor, v_BCKE: Tensor) -> Tensor:
        """Attend to what is remembered and to the new tokens, and leave the last of both to be remembered."""
        k, v = k_BCKE, v_BCKE
        if self._recalled:
            index = len(self._left)
            k, v = (torch.cat(pair, 1) for pair in zip(self._recalled[index : index + 2], (k, v), strict=True))
        # Copies, so that the rest can go.
        self._left += [k[:, 1 - self.window :].clone(), v[:, 1 - self.window :].clone()]
        return attend_recent(q_BCHE, k, v, window=self.window)

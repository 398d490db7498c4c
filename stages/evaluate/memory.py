"""A network that attends to keys and values of tokens it saw before.

Legend: B rows, C new tokens, P remembered tokens, J chunks, X tokens of a chunk, D model width, H query heads, K
key/value heads, E width of a head.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import Attention, Shared, attend
from model.gpt import GPT
from model.precision import rms_norm
from model.residual import Block
from model.rope import frequencies
from stages.evaluate.scoring import compiled

# Keys and values (B, P, K, E) of every application of a layer in turn: k, v, k, v, ...
Memory = tuple[Tensor, ...]


class RememberingNetwork:
    """The hidden states of a network for new tokens, given the memory of earlier ones; the network is not changed.

    New tokens come in chunks of X; each sees the last P = seq_len - X tokens before its chunk, and its chunk so far.
    """

    nothing: Memory = ()

    def __init__(self, model: GPT, *, chunk_tokens: int) -> None:
        # A copy, whose attention is replaced.
        self.model, self.chunk = copy.deepcopy(model), chunk_tokens
        self.remembered = model.config.seq_len - chunk_tokens
        # Of the forward pass under way, application by application: what it was given, and what it leaves.
        self._recalled: Memory = ()
        self._left: list[Tensor] = []
        device = model.embed.token.device
        # Angles are taken in float64: positions go far beyond what float32 can tell apart after a multiplication.
        self.omega = frequencies(model.config.rope, model.config.seq_len, device).double()
        for i in range(model.config.layers):
            block = self.model.get_submodule(f"layer{i}")
            assert isinstance(block, Block)
            self._replace_attention(block.attn)
        self._run = compiled(self._forward, device)

    def hidden(self, tokens: Tensor, begin: int, memory: Memory) -> tuple[Tensor, Memory]:
        """Final hidden states (B, C, D) of tokens at positions begin ... begin + C - 1, and the memory they leave.

        Without memory, tokens (B, C) begin a row, with C = seq_len. With it, tokens (B, 2 + C) have the two before
        them, and X divides C.
        """
        overlap = 2 if memory else 0
        positions = begin + torch.arange(tokens.size(1) - overlap, device=tokens.device, dtype=torch.float64)
        angles = torch.outer(positions, self.omega)[:, None]
        dtype = self.model.compute_dtype
        hid_BCD, *left = self._run(tokens, angles.cos().to(dtype), angles.sin().to(dtype), memory)
        return hid_BCD, tuple(left)

    def _forward(self, tokens: Tensor, cos: Tensor, sin: Tensor, memory: Memory) -> tuple[Tensor, ...]:
        self._recalled, self._left = memory, []
        overlap = 2 if memory else 0
        x0_BCD = self.model._embed(tokens)[:, overlap:]
        values = self.model.ve(tokens[:, overlap:], x0_BCD.dtype) if self.model.ve is not None else {}
        shared = Shared(
            x0_BTD=x0_BCD,
            rope=(cos, sin),
            segments=None,
            longest=self.model.config.seq_len,
            value_embeddings=values,
        )
        hid_BCD = rms_norm(self.model._layers(x0_BCD, shared, looped=True))
        return hid_BCD, *self._left

    def _replace_attention(self, attn: Attention) -> None:
        """Take the attention of a layer from here, and nothing else of it."""

        def attend(q_BCHE: Tensor, k_BCKE: Tensor, v_BCKE: Tensor, shared: Shared) -> Tensor:
            return self._attend(q_BCHE, k_BCKE, v_BCKE)

        setattr(attn, "_attend", attend)  # noqa: B010

    def _attend(self, q_BCHE: Tensor, k_BCKE: Tensor, v_BCKE: Tensor) -> Tensor:
        """Attend to what is remembered and to the new tokens, and leave the last P of both to be remembered."""
        if self._recalled:
            index = len(self._left)
            k, v = (
                torch.cat(pair, 1) for pair in zip(self._recalled[index : index + 2], (k_BCKE, v_BCKE), strict=True)
            )
            o_BCHE = attend_in_chunks(q_BCHE, k, v, self.chunk)
        else:
            k, v, o_BCHE = k_BCKE, v_BCKE, attend(q_BCHE, k_BCKE, v_BCKE, None)
        self._left += [k[:, -self.remembered :].clone(), v[:, -self.remembered :].clone()]
        return o_BCHE


def attend_in_chunks(q_BCHE: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Causal attention of C queries to keys and values (B, P + C, K, E), of which the last C are the queries' own.

    Query c sees the keys from P before its chunk of X queries up to its own. Returns (B, C, H, E).
    """
    chunks = q_BCHE.size(1) // chunk
    reach = k.size(1) - q_BCHE.size(1) + chunk
    # Copies of overlapping runs, one batch row each: (B·J, P + X, K, E).
    runs = [x.unfold(1, reach, chunk).permute(0, 1, 4, 2, 3).flatten(0, 1) for x in (k, v)]
    o = attend_to_longer(q_BCHE.unflatten(1, (chunks, chunk)).flatten(0, 1), *runs)
    return o.unflatten(0, (-1, chunks)).flatten(1, 2)


def attend_to_longer(q_BXHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor) -> Tensor:
    """Causal attention of the last X positions of S to all S: (B, X, H, E)."""
    length, reach = q_BXHE.size(1), k_BSKE.size(1)
    if q_BXHE.is_cuda and q_BXHE.dtype == torch.bfloat16:
        # FlashAttention aligns the causal mask with the last key.
        tensors = (x.contiguous() for x in (q_BXHE, k_BSKE, v_BSKE))
        o: Tensor = torch.ops.aten._flash_attention_forward(*tensors, None, None, length, reach, 0.0, True, False)[0]
        return o
    mask = torch.ones(length, reach, dtype=torch.bool, device=q_BXHE.device).tril(reach - length)
    q, k, v = (x.transpose(1, 2) for x in (q_BXHE, k_BSKE, v_BSKE))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

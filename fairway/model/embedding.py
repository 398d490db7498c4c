"""Both ends of the network: from token ids to the first residual stream, and from the final hidden state to logits and
loss. Also the value embeddings, which layers look up by token.

Legend: B rows, T tokens, N = B·T, D model width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairway.model.config import Bigram, ModelConfig, Smear, ValueEmbedding
from fairway.model.kernels import fused
from fairway.model.precision import linear

# Every tokenizer of the challenge starts each document with this id.
BOS = 1

# How many tokens before its own an embedding depends on: a smear adds the previous token's, and that one depends, by
# its bigram, on the token before it.
LOOK_BACK = 2


def storage(name: str) -> torch.dtype:
    """The dtype a config names, "float32" or "bfloat16"."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


class TokenTable(nn.Module):
    """One row per token, `token` (V, D): the input embedding and, tied, the output head. No √D on either side."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(config.vocab_size, config.width, dtype=storage(config.table_dtype)))

    def forward(self, tokens_BT: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T, D) in `dtype`."""
        return F.embedding(tokens_BT, self.token).to(dtype)


def bigram_bucket(tokens_BT: Tensor, buckets: int) -> Tensor:
    """Which row of the bigram table each position reads: (B, T) int64 in [0, buckets).

    A hash of (previous, current) token into all buckets but the last; the last belongs to the first position of a row,
    whatever its token. Rows know nothing of documents (PR #549; the constants are the same in all records).
    """
    tokens_BT = tokens_BT.long()
    bucket = (36313 * tokens_BT[:, 1:] ^ 27191 * tokens_BT[:, :-1]) % (buckets - 1)
    return F.pad(bucket, (1, 0), value=buckets - 1)


class BigramTable(nn.Module):
    """scale · proj · table[bucket of (previous, current)]: added to the token embedding before its norm.

    The table starts at zero and the projection does not, so the path is silent at first and still learns.
    """

    def __init__(self, config: ModelConfig, bigram: Bigram) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(bigram.buckets, bigram.width, dtype=storage(config.table_dtype)))
        self.proj = nn.Parameter(torch.empty(config.width, bigram.width))
        self.scale = nn.Parameter(torch.empty(()))

    def forward(self, tokens_BT: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T, D) in `dtype`."""
        rows = F.embedding(bigram_bucket(tokens_BT, self.table.size(0)), self.table)
        return self.scale.to(dtype) * linear(rows.to(dtype), self.proj)


class ValueTable(nn.Module):
    """Value embeddings: layer_scale[j] · scale · proj · table[token], for the values of the j-th listed layer.

    Table and projection are shared by the layers; unlike the bigram path, this one speaks from the start (PR #549).
    """

    def __init__(self, config: ModelConfig, values: ValueEmbedding) -> None:
        super().__init__()
        kv_width = config.kv_heads * config.head_dim
        self.layers = values.layers
        self.table = nn.Parameter(torch.empty(config.vocab_size, values.width, dtype=storage(config.table_dtype)))
        self.proj = nn.Parameter(torch.empty(kv_width, values.width))
        self.scale = nn.Parameter(torch.empty(()))
        self.layer_scale = nn.Parameter(torch.empty(len(values.layers)))

    def forward(self, tokens_BT: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
        """(B, T, kv_heads·head_dim) in `dtype` for each layer that has one."""
        rows = F.embedding(tokens_BT, self.table).to(dtype)
        values = self.scale.to(dtype) * linear(rows, self.proj)
        return {layer: self.layer_scale[j].to(dtype) * values for j, layer in enumerate(self.layers)}


def _previous(x_BTD: Tensor) -> Tensor:
    """Each position's predecessor in its row; zeros at the first."""
    return F.pad(x_BTD[:, :-1], (0, 0, 1, 0))


class StaticSmear(nn.Module):
    """Blend each channel with the previous token's by a learned share σ(gate), after the norm (PR #549).

    It starts as a half-and-half blend, not as the identity, and crosses document boundaries.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(config.width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D); the predecessor of a row's first token is zero."""
        share = torch.sigmoid(self.gate.to(x_BTD.dtype))
        return (1 - share) * x_BTD + share * _previous(x_BTD)


class GatedSmear(nn.Module):
    """Add λ·σ(gate_w·x[:window]) times the previous token's embedding, before the norm (PR #1855).

    One gate per token, read from its own first channels. A document's first token receives nothing, so that no
    document reaches the next. Starts as the identity (λ = 0).
    """

    def __init__(self, smear: Smear) -> None:
        super().__init__()
        self.gate_w = nn.Parameter(torch.empty(1, smear.window))
        self.register_parameter("lambda", nn.Parameter(torch.empty(1)))

    def forward(self, x_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        # Looked up, not an attribute: the compiler writes its guards as code, where `lambda` is a keyword.
        strength = self._parameters["lambda"]
        assert strength is not None
        gate_BT1 = torch.sigmoid(linear(x_BTD[..., : self.gate_w.size(1)], self.gate_w))
        gate_BT1 = strength.to(x_BTD.dtype) * gate_BT1
        return x_BTD + gate_BT1 * (tokens_BT != BOS)[..., None] * _previous(x_BTD)


def softcap(scores: Tensor, cap: float) -> Tensor:
    """cap·tanh(scores/cap), in float32 whatever comes in (logit soft-capping, Gemma 2, arXiv:2408.00118)."""
    return cap * torch.tanh(scores.float() / cap)


def logits(hid: Tensor, table_VD: Tensor, *, cap: float) -> Tensor:
    """Softcapped logits (..., V), float32, from the final hidden state (..., D); the product runs in its dtype."""
    return softcap(linear(hid, table_VD), cap)


def mean_cross_entropy(hid_BTD: Tensor, table_VD: Tensor, targets_BT: Tensor, *, cap: float) -> Tensor:
    """Mean cross-entropy of the softcapped logits in nats per token, a float32 scalar."""
    hid_ND, targets_N = hid_BTD.flatten(0, 1), targets_BT.flatten()
    if fused(hid_BTD):
        from fairway.model.kernels.loss import LARGEST_CAP, softcapped_loss

        if cap <= LARGEST_CAP:
            return softcapped_loss(hid_ND, table_VD.to(hid_ND.dtype), targets_N, cap)[0]
    return F.cross_entropy(logits(hid_ND, table_VD, cap=cap), targets_N)

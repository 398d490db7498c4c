"""Windows that begin a constant number of tokens apart, with what depends on tokens alone computed once per token.

Embeddings and value embeddings of a token are the same in every window, but for a window's first OVERLAP places, which
look back at nothing. From the first layer on, hidden states differ: a window's context begins with it.

Legend: B windows, T tokens of a window, L tokens of the stretch that they cover, X wanted places, D model width.
"""

from torch import Tensor

from model.attention import Shared
from model.gpt import GPT
from model.precision import rms_norm
from model.rope import rotary_table
from stages.evaluate.memory import OVERLAP


def overlapping_hidden(model: GPT, tokens_L: Tensor, *, spacing: int, last: int | None) -> Tensor:
    """As model.hidden of the stretch's windows of seq_len tokens, spacing apart, at their last X places: (B, X, D).

    `last`: X, or None for all T.
    """
    seq_len = model.config.seq_len

    def windows(x: Tensor) -> Tensor:
        # Views (B, T) or (B, D, T), whose windows overlap in memory.
        return x.unfold(0, seq_len, spacing)

    tokens_1L = tokens_L[None]
    x0_BTD = windows(model._embed(tokens_1L)[0]).mT.contiguous()
    x0_BTD[:, :OVERLAP] = model._embed(windows(tokens_L)[:, :OVERLAP])
    values = model.ve(tokens_1L, x0_BTD.dtype) if model.ve is not None else {}
    shared = Shared(
        x0_BTD=x0_BTD,
        rope=rotary_table(model.config.rope, seq_len, device=tokens_L.device, dtype=x0_BTD.dtype),
        segments=None,
        longest=seq_len,
        value_embeddings={layer: windows(value_1LD[0]).mT for layer, value_1LD in values.items()},
    )
    return rms_norm(model._layers(x0_BTD, shared, looped=True, last=last))

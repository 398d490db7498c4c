"""Windows that begin a constant number of tokens apart, with what depends on tokens alone computed once per token.

Embeddings and value embeddings of a token are the same in every window, and so are the first layer's queries, keys and
values, but for a window's first OVERLAP places, which look back at nothing. From the first layer's attention on, hidden
states differ: a window's context begins with it.

Legend: B windows, T tokens of a window, L tokens of the stretch that they cover, P = OVERLAP, U = L + B·P rows of x0, X
wanted places, D model width.
"""

import torch
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

    # Rows of x0: the stretch's places, then the windows' first ones.
    first_BPD = model._embed(windows(tokens_L)[:, :OVERLAP])
    x0_1UD = torch.cat([model._embed(tokens_L[None]), first_BPD.flatten(0, 1)[None]], 1)
    row_U = torch.arange(x0_1UD.size(1), device=tokens_L.device)
    rows_BT = windows(row_U[: len(tokens_L)]).contiguous()
    # Attention sees differences of angles, so that a row's is that of its place in the stretch.
    places_U = torch.cat([row_U[: len(tokens_L)], rows_BT[:, :OVERLAP].flatten()]).double()
    rows_BT[:, :OVERLAP] = row_U[len(tokens_L) :].view(-1, OVERLAP)
    values = model.ve(tokens_L[None], x0_1UD.dtype) if model.ve is not None else {}
    shared = Shared(
        x0_BTD=x0_1UD,
        rope=rotary_table(model.config.rope, seq_len, places_U, x0_1UD.dtype),
        segments=None,
        longest=seq_len,
        value_embeddings={layer: windows(value_1LD[0]).mT for layer, value_1LD in values.items()},
        rows_BT=rows_BT,
        spacing=spacing,
        last=last,
    )
    return rms_norm(model._layers(x0_1UD, shared, looped=True))

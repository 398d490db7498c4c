"""Windows that begin a constant number of tokens apart, with what depends on tokens alone computed once per token.

The embedding and value embeddings of a token are the same in every window that it stands in, and so are its queries,
keys and values in the first layer. The exception is a window's first LOOK_BACK places: there the embedding cannot look
back at tokens outside the window. From the first layer's attention on, hidden states differ from window to window,
because what attention sees begins with the window.

So x0 is stored by row: first one row for each token of the stretch that the windows cover, then LOOK_BACK rows for each
window's first places.

Legend: B windows, T tokens of a window, L tokens of the stretch, P = LOOK_BACK, U = L + B·P rows of x0, X wanted
places, D model width, H query heads, K key/value heads, E width of a head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fairway.model.attention import rotary_table
from fairway.model.causal_attention import WithinRows
from fairway.model.context import Context, by_row, placed
from fairway.model.embedding import LOOK_BACK
from fairway.model.gpt import GPT
from fairway.model.kernels import fused, powers_of_two


@dataclass(frozen=True, eq=False)
class WithinWindows:
    """A way to attend (model.context.Attend) within windows `spacing` apart; `rows_BT` as in Context.

    Queries, keys and values may be by row, as the first layer's are, or by place.
    """

    rows_BT: Tensor
    spacing: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, application: int) -> Tensor:
        """Attention of the places, (B, X, H, E); without a gradient where they are by row."""
        if all(by_row(x, self.rows_BT) for x in (q, k, v)) and self._has_kernel(q, k):
            from fairway.model.kernels.nested import nested_attention

            return nested_attention(q, k, v, self.rows_BT, self.spacing)
        q, k, v = (placed(x, self.rows_BT) for x in (q, k, v))
        return WithinRows()(q, k, v, application)

    def _has_kernel(self, q: Tensor, k: Tensor) -> bool:
        """Whether the fused kernel takes such queries and keys, and windows of this length and spacing."""
        if not (fused(q) and powers_of_two(*q.shape[2:], k.size(2))):
            return False
        from fairway.model.kernels.nested import SMALLEST, block_size

        return min(block_size(self.spacing, self.rows_BT.size(1)), q.size(3)) >= SMALLEST


def overlapping_hidden(model: GPT, tokens_L: Tensor, *, spacing: int, wanted: int | None) -> Tensor:
    """What model.hidden gives of each window of a stretch of tokens: (B, X, D).

    Windows have seq_len tokens and begin `spacing` tokens apart; the last one ends with the stretch. `wanted`: see
    GPT.hidden.
    """
    seq_len = model.config.seq_len

    def windows(x: Tensor) -> Tensor:
        # Views (B, T) or (B, D, T), whose windows overlap in memory.
        return x.unfold(0, seq_len, spacing)

    first_BPD = model.embed_tokens(windows(tokens_L)[:, :LOOK_BACK])
    x0_1UD = torch.cat([model.embed_tokens(tokens_L[None]), first_BPD.flatten(0, 1)[None]], 1)
    row_U = torch.arange(x0_1UD.size(1), device=tokens_L.device)
    rows_BT = windows(row_U[: len(tokens_L)]).contiguous()
    # Attention only sees differences of positions, so that a row may have its token's position in the stretch.
    positions_U = torch.cat([row_U[: len(tokens_L)], rows_BT[:, :LOOK_BACK].flatten()]).double()
    rows_BT[:, :LOOK_BACK] = row_U[len(tokens_L) :].view(-1, LOOK_BACK)
    values = model.value_embeddings(tokens_L[None])
    context = Context(
        x0_BTD=x0_1UD,
        rope=rotary_table(model.config.rope, seq_len, positions_U, x0_1UD.dtype),
        value_embeddings={layer: windows(value_1LD[0]).mT for layer, value_1LD in values.items()},
        attend=WithinWindows(rows_BT, spacing),
        rows_BT=rows_BT,
    )
    return model.run_layers(context, wanted=wanted)

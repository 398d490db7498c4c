"""Documents kept apart in a pass with a key/value cache: no embedding and no attention reaches over a document's BOS.

The cache keeps the keys of earlier documents until they are older than a window; they are only not looked at.

Legend: B rows, C new tokens, P cached tokens, T = P + C, D model width, H query heads, K key/value heads, E width of a
head, S starts of documents.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fairway.model.backends import recent_packed_attention
from fairway.model.embedding import BOS, LOOK_BACK
from fairway.model.gpt import GPT


def embed_documents(model: GPT, tokens_BC: Tensor) -> Tensor:
    """x0 (B, C, D) of rows in which a BOS is embedded as the first token of a row, and the tokens after it likewise."""
    x0_BCD = model.embed_tokens(tokens_BC)
    row_S, place_S = (tokens_BC == BOS).nonzero(as_tuple=True)
    if not len(row_S):
        return x0_BCD
    padded = F.pad(tokens_BC, (0, LOOK_BACK))
    first_SLD = model.embed_tokens(
        padded[row_S[:, None], place_S[:, None] + torch.arange(LOOK_BACK, device=row_S.device)]
    )
    # The places furthest behind a start go first, so that a next document's start within reach has the last word.
    for behind in reversed(range(LOOK_BACK)):
        inside = place_S + behind < tokens_BC.size(1)
        x0_BCD[row_S[inside], place_S[inside] + behind] = first_SLD[inside, behind]
    return x0_BCD


class Documents:
    """Where the document of every new token begins, and attention of the new tokens that stops there."""

    def __init__(self, tokens_BC: Tensor, cached: int, reach_B: Tensor) -> None:
        """Of `cached` tokens P before the new ones, the last `reach` belong to the document of the last one."""
        self.cached, length = cached, tokens_BC.size(1)
        place_C = cached + torch.arange(length, device=tokens_BC.device)
        own_BC = torch.where(tokens_BC == BOS, place_C, 0).cummax(1).values
        # Of every new token, the place among the T cached and new ones from which on it may look.
        self.starts_BC = torch.maximum(own_BC, (cached - reach_B)[:, None])
        # The same bounds serve every layer.
        self.bounds = segment_bounds(self.starts_BC, cached) if tokens_BC.is_cuda else None

    def reach(self, window: int) -> Tensor:
        """How many of the last window - 1 tokens belong to the document of the last one, (B,) int64."""
        total = self.cached + self.starts_BC.size(1)
        return (total - self.starts_BC[:, -1]).clamp(max=window - 1)

    def attend(self, q_BCHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, *, window: int) -> Tensor:
        """As causal_attention.attend_recent, within documents: (B, C, H, E)."""
        if self.bounds is not None and q_BCHE.dtype == torch.bfloat16:
            return recent_packed_attention(q_BCHE, k_BTKE, v_BTKE, window, *self.bounds)
        length, pieces = k_BTKE.size(1), []
        # As many queries at a time as a window has places, so that no more than half of the scores are masked.
        for begin in range(self.cached, length, window):
            end, first = min(begin + window, length), max(begin - window + 1, 0)
            position = torch.arange(first, end, device=q_BCHE.device)
            mine, back = slice(begin - self.cached, end - self.cached), position[begin - first :, None] - position
            mask = (back >= 0) & (back < window) & (position >= self.starts_BC[:, mine, None])
            q, k, v = (x.transpose(1, 2) for x in (q_BCHE[:, mine], k_BTKE[:, first:end], v_BTKE[:, first:end]))
            o_BHXE = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True)
            pieces.append(o_BHXE.transpose(1, 2))
        return torch.cat(pieces, 1)


def segment_bounds(starts_BC: Tensor, cached: int) -> tuple[Tensor, Tensor]:
    """Where segments begin among all queries and among all keys of the rows, one row after the other, and the ends:
    (n,) int32 each.

    The first segment of a row are the keys that none of its queries sees.
    """
    rows, length = starts_BC.shape
    place_C = cached + torch.arange(length, device=starts_BC.device)
    begins_BC = starts_BC == place_C
    # A row's second segment begins with its first query, whether or not that starts a document.
    begins_BC[:, 0] = True
    row_S, query_S = F.pad(begins_BC, (1, 0), value=True).nonzero(as_tuple=True)
    query_S = query_S - 1
    key_S = torch.where(query_S == 0, starts_BC[row_S, 0], query_S + cached).where(query_S >= 0, 0)
    total = length + cached
    queries_S, keys_S = row_S * length + query_S.clamp(min=0), row_S * total + key_S
    ends = torch.tensor([[rows * length], [rows * total]], device=row_S.device)
    queries, keys = torch.cat([torch.stack([queries_S, keys_S]), ends], 1).int()
    return queries, keys

"""Keys and values of earlier tokens, kept so that each token goes through the network once.

Where documents are kept apart, no embedding and no attention reaches over a document's BOS. The cache keeps the keys of
earlier documents until they are older than a window; they are only not looked at.

Legend: B rows, C new tokens, P cached tokens, T = P + C, D model width, H query heads, K key/value heads, E width of a
head, S starts of documents, R tokens that an embedding is read from.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fairway.model.attention import rotary_table
from fairway.model.backends import recent_packed_attention
from fairway.model.causal_attention import attend_recent
from fairway.model.context import Context
from fairway.model.embedding import BOS, LOOK_BACK
from fairway.model.gpt import GPT


def embed_documents(model: GPT, tokens_BC: Tensor) -> Tensor:
    """x0 (B, C, D) of rows in which a BOS is embedded as the first token of a row, and the tokens after it likewise.

    All places are embedded as the first of a document, as its second, and so on, and then one of these is chosen for
    each. So the shapes do not depend on where documents start, which a decoder does not know yet of later places:
    matrix products of other shapes may round otherwise, and it would not get the encoder's bits.
    """
    x0_BCD, starts_BC = model.embed_tokens(tokens_BC), tokens_BC == BOS
    if not starts_BC.any():
        # Nothing would be chosen but what is there.
        return x0_BCD
    # The places furthest behind a start go first, so that a next document's start within reach has the last word.
    for behind in reversed(range(LOOK_BACK)):
        # Each place with the `behind` tokens before it as a row, and whether a document starts with that row.
        reach_BCR = F.pad(tokens_BC, (behind, 0)).unfold(1, behind + 1, 1)
        own_BCD = model.embed_tokens(reach_BCR.flatten(0, 1))[:, -1].view_as(x0_BCD)
        x0_BCD = torch.where(reach_BCR[..., :1] == BOS, own_BCD, x0_BCD)
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


# Keys and values (B, P, K, E) of every application of a layer in turn: k, v, k, v, ... Empty before the first token.
# Where documents are kept apart, one more tensor (B,) int64 follows, from the first token on: how many of the P tokens
# belong to the same document as the last one.
Cache = tuple[Tensor, ...]


class CachedAttention:
    """A way to attend (model.context.Attend) in which a token sees itself and the window - 1 tokens before it.

    Earlier tokens' keys and values come from the cache; what later tokens will need is collected while the pass runs.
    With `documents` it sees those tokens alone that these allow.
    """

    def __init__(self, cache: Cache, *, window: int, documents: Documents | None = None) -> None:
        self.cache, self.window, self.documents = cache, window, documents
        self._next: list[Tensor] = []

    def __call__(self, q_BCHE: Tensor, k_BCKE: Tensor, v_BCKE: Tensor, application: int) -> Tensor:
        """Attention of the new tokens, (B, C, H, E)."""
        k, v = k_BCKE, v_BCKE
        if len(self.cache) > 1:
            earlier = self.cache[2 * application : 2 * application + 2]
            k, v = (torch.cat(pair, 1) for pair in zip(earlier, (k, v), strict=True))
        # Copies, so that the memory of the tokens that no later one sees can be given back.
        self._next += [k[:, 1 - self.window :].clone(), v[:, 1 - self.window :].clone()]
        attend = self.documents.attend if self.documents else attend_recent
        return attend(q_BCHE, k, v, window=self.window)

    def next_cache(self) -> Cache:
        """What the tokens after the new ones attend to, once the pass has been through all layers."""
        return (*self._next, *([self.documents.reach(self.window)] if self.documents else []))


@torch.no_grad()
def cached_hidden(model: GPT, tokens: Tensor, begin: int, cache: Cache) -> tuple[Tensor, Cache]:
    """Final hidden states (B, C, D) of tokens at positions begin ... begin + C - 1, and the cache for those after them.

    A token sees itself and the seq_len - 1 tokens before it in every layer. `cache` is what the call for the tokens
    before returned. `tokens` is (B, C) where it is empty, and they begin a row; otherwise it is (B, LOOK_BACK + C) and
    begins with the tokens before the new ones, on which embeddings depend. If the cache says which tokens are of the
    same document (it has an odd number of tensors then), a token sees none of an earlier one.
    """
    look_back, window, apart = LOOK_BACK if len(cache) > 1 else 0, model.config.seq_len, len(cache) % 2 == 1
    new_BC = tokens[:, look_back:]
    embed = partial(embed_documents, model) if apart else model.embed_tokens
    x0_BCD = embed(tokens)[:, look_back:].contiguous()
    # In float64, because positions go far beyond what float32 can tell apart after a multiplication.
    positions_C = begin + torch.arange(x0_BCD.size(1), device=tokens.device, dtype=torch.float64)
    cached = cache[0].size(1) if look_back else 0
    documents = Documents(new_BC, cached, cache[-1]) if apart else None
    attention = CachedAttention(cache, window=window, documents=documents)
    context = Context(
        x0_BTD=x0_BCD,
        rope=rotary_table(model.config.rope, window, positions_C, x0_BCD.dtype),
        value_embeddings=model.value_embeddings(new_BC),
        attend=attention,
    )
    return model.run_layers(context), attention.next_cache()

"""Keys and values of earlier tokens, kept so that each token goes through the network once.

Legend: B rows, C new tokens, P cached tokens, D model width, H query heads, K key/value heads, E width of a head.
"""

from functools import partial

import torch
from torch import Tensor

from fairway.evaluation.document_cache import Documents, embed_documents
from fairway.model.attention import rotary_table
from fairway.model.causal_attention import attend_recent
from fairway.model.context import Context
from fairway.model.embedding import LOOK_BACK
from fairway.model.gpt import GPT

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

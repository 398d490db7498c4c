"""Keys and values of earlier tokens, kept so that each token goes through the network once.

Legend: B rows, C new tokens, P cached tokens, D model width, H query heads, K key/value heads, E width of a head.
"""

import torch
from torch import Tensor

from fairway.model.causal_attention import attend_recent
from fairway.model.context import Context
from fairway.model.embedding import LOOK_BACK
from fairway.model.gpt import GPT
from fairway.model.rope import rotary_table

# Keys and values (B, P, K, E) of every application of a layer in turn: k, v, k, v, ... Empty before the first token.
Cache = tuple[Tensor, ...]


class CachedAttention:
    """A way to attend (model.context.Attend) in which a token sees itself and the window - 1 tokens before it.

    Earlier tokens' keys and values come from the cache; what later tokens will need is collected while the pass runs.
    """

    def __init__(self, cache: Cache, *, window: int) -> None:
        self.cache, self.window = cache, window
        self._next: list[Tensor] = []

    def __call__(self, q_BCHE: Tensor, k_BCKE: Tensor, v_BCKE: Tensor, application: int) -> Tensor:
        """Attention of the new tokens, (B, C, H, E)."""
        k, v = k_BCKE, v_BCKE
        if self.cache:
            earlier = self.cache[2 * application : 2 * application + 2]
            k, v = (torch.cat(pair, 1) for pair in zip(earlier, (k, v), strict=True))
        # Copies, so that the memory of the tokens that no later one sees can be given back.
        self._next += [k[:, 1 - self.window :].clone(), v[:, 1 - self.window :].clone()]
        return attend_recent(q_BCHE, k, v, window=self.window)

    def next_cache(self) -> Cache:
        """What the tokens after the new ones attend to, once the pass has been through all layers."""
        return tuple(self._next)


@torch.no_grad()
def cached_hidden(model: GPT, tokens: Tensor, begin: int, cache: Cache) -> tuple[Tensor, Cache]:
    """Final hidden states (B, C, D) of tokens at positions begin ... begin + C - 1, and the cache for those after them.

    A token sees itself and the seq_len - 1 tokens before it in every layer. `cache` is what the call for the tokens
    before returned. `tokens` is (B, C) where it is empty, and they begin a row; otherwise it is (B, LOOK_BACK + C) and
    begins with the tokens before the new ones, on which embeddings depend.
    """
    look_back, window = LOOK_BACK if cache else 0, model.config.seq_len
    x0_BCD = model.embed_tokens(tokens)[:, look_back:].contiguous()
    # In float64, because positions go far beyond what float32 can tell apart after a multiplication.
    positions_C = begin + torch.arange(x0_BCD.size(1), device=tokens.device, dtype=torch.float64)
    attention = CachedAttention(cache, window=window)
    context = Context(
        x0_BTD=x0_BCD,
        rope=rotary_table(model.config.rope, window, positions_C, x0_BCD.dtype),
        value_embeddings=model.value_embeddings(tokens[:, look_back:]),
        attend=attention,
    )
    return model.run_layers(context), attention.next_cache()

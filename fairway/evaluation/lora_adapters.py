"""Low-rank adapters beside the matrices of a network, one set for each row of the batch (LoRA, arXiv:2106.09685).

A set has two factors, A and B, at each site, and adds scale·B(A·x) to what the matrix there puts out. The sites:

    q, k, v   queries, keys and values, before their norm and rotation
    o         the output of attention, but the adapter reads the attention's input
    mlp       the output of the MLP, read from its input
    head      the logits, before the softcap

All but the head have their own factors in each application of a layer (depth recurrence applies some layers several
times). Source: PR #1855.

Legend: L applications of layers, B rows, T tokens, D model width, O outputs of a site, r rank, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fairway.model.config import ModelConfig
from fairway.model.embedding import softcap
from fairway.model.gpt import GPT
from fairway.model.precision import linear


def site_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """How many applications a site has, and how many outputs; all sites read D channels."""
    applications = sum(len(half) for half in config.layer_order(looped=True))
    kv_width = config.kv_heads * config.head_dim
    outputs = {"q": config.width, "k": kv_width, "v": kv_width, "o": config.width, "mlp": config.width}
    return {site: (applications, width) for site, width in outputs.items()} | {"head": (1, config.vocab_size)}


# The first factors of every site, (L, B, r, D) float32.
Factors = dict[str, Tensor]


def draw_factors(config: ModelConfig, rows: int, rank: int, generator: torch.Generator) -> Factors:
    """First factors, uniform in ±1/√D, drawn by a generator on the CPU."""
    bound = config.width**-0.5
    return {
        site: (2 * torch.rand(count, rows, rank, config.width, generator=generator) - 1) * bound
        for site, (count, _) in site_shapes(config).items()
    }


class LoraAdapters(nn.Module):
    """Both factors of every site: A (L, B, r, D) as given, and B (L, B, O, r), which starts at zero; float32."""

    def __init__(self, config: ModelConfig, factors: Factors, *, scale: float, device: torch.device) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.ParameterDict({site: nn.Parameter(A.to(device)) for site, A in factors.items()})
        _, rows, rank, _ = factors["q"].shape
        self.up = nn.ParameterDict(
            {
                site: nn.Parameter(torch.zeros(count, rows, width, rank, device=device))
                for site, (count, width) in site_shapes(config).items()
            }
        )

    def added(self, sites: Sequence[str], application: int, x_BTD: Tensor) -> list[Tensor]:
        """What the sites of an application add, (B, T, O) each, in the dtype of `x` (model.context.Adapters)."""
        return [self._product(site, application, x_BTD) for site in sites]

    def head(self, hid_BTD: Tensor) -> Tensor:
        """What is added to the products of the final hidden state with the token table, (B, T, V)."""
        return self._product("head", 0, hid_BTD)

    def _product(self, site: str, application: int, x_BTD: Tensor) -> Tensor:
        A, B = (factors[site][application].to(x_BTD.dtype) for factors in (self.down, self.up))
        return self.scale * (x_BTD @ A.transpose(1, 2)) @ B.transpose(1, 2)

    @torch.no_grad()
    def forget(self) -> None:
        """Set the second factors back to zero, so that nothing is added; the first ones stay as they have become."""
        for up in self.up.values():
            up.zero_()


def adapted_logits(model: GPT, hid_BTD: Tensor, adapters: LoraAdapters) -> Tensor:
    """As model.logits, (B, T, V) float32, with what the head's adapters add before the softcap."""
    scores_BTV = linear(hid_BTD, model.embed.token) + adapters.head(hid_BTD)
    return softcap(scores_BTV, model.config.softcap)

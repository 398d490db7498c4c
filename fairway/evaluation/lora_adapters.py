"""Low-rank adapters beside the matrices of a network, one set per row of the batch (LoRA, arXiv:2106.09685).

Each adds scale·B(A·x) to what a matrix puts out. Sites, separately for every application of a layer (depth recurrence
applies some layers several times): queries, keys and values, before their norm and rotation; the attention's output,
but read from the attention's *input*; the MLP's output, read from its input; and the logits, before the softcap.
Source: PR #1855; sites as in model.md of the records.

Legend: L applications of layers, B rows, T tokens, D model width, O outputs of a site, r rank, V vocabulary.
"""

import torch
from torch import Tensor, nn

from fairway.model.attention import Attention, Shared
from fairway.model.config import ModelConfig
from fairway.model.embedding import softcap
from fairway.model.gpt import GPT
from fairway.model.norm import Normed
from fairway.model.precision import linear, rms_norm
from fairway.model.residual import Block
from fairway.model.rope import rotate


def site_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Applications and outputs of every site; all read D channels."""
    applications = sum(len(half) for half in config.layer_order(looped=True))
    kv_width = config.kv_heads * config.head_dim
    outputs = {"q": config.width, "k": kv_width, "v": kv_width, "o": config.width, "mlp": config.width}
    return {site: (applications, width) for site, width in outputs.items()} | {"head": (1, config.vocab_size)}


# The first factors of every site, (L, B, r, D) float32.
Factors = dict[str, Tensor]


def draw_factors(config: ModelConfig, rows: int, rank: int, generator: torch.Generator) -> Factors:
    """First factors, uniform in ±1/√D, from a CPU generator."""
    bound = config.width**-0.5
    return {
        site: (2 * torch.rand(count, rows, rank, config.width, generator=generator) - 1) * bound
        for site, (count, _) in site_shapes(config).items()
    }


class Adapters(nn.Module):
    """Both factors of every site: A (L, B, r, D) as given, B (L, B, O, r) zero, float32."""

    def __init__(self, config: ModelConfig, factors: Factors, *, scale: float, device: torch.device) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.ParameterDict({site: nn.Parameter(A.to(device)) for site, A in factors.items()})
        _, rows, rank, _ = factors["q"].shape
        shapes = site_shapes(config).items()
        self.up = nn.ParameterDict(
            {
                site: nn.Parameter(torch.zeros(count, rows, width, rank, device=device))
                for site, (count, width) in shapes
            }
        )

    def forward(self, site: str, application: int, x_BTD: Tensor) -> Tensor:
        """What a site adds, (B, T, O) in the dtype of `x`."""
        A, B = (factors[site][application].to(x_BTD.dtype) for factors in (self.down, self.up))
        return self.scale * (x_BTD @ A.transpose(1, 2)) @ B.transpose(1, 2)

    @torch.no_grad()
    def forget(self) -> None:
        """Second factors back to zero, so that nothing is added; the first ones stay warm."""
        for up in self.up.values():
            up.zero_()


class AdaptedNetwork:
    """A network with room for adapters; without any it computes what it did. Takes over the model it is given."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self._adapters: Adapters | None = None
        self._application = -1
        for i in range(model.config.layers):
            block = model.get_submodule(f"layer{i}")
            assert isinstance(block, Block)
            self._hang_on(block)

    def hidden(self, tokens_BT: Tensor, adapters: Adapters) -> Tensor:
        """As model.hidden, with a set of adapters for each row."""
        self._adapters, self._application = adapters, -1
        try:
            return self.model.hidden(tokens_BT)
        finally:
            self._adapters = None

    def logits(self, hid_BTD: Tensor, adapters: Adapters) -> Tensor:
        """As model.logits, (B, T, V) float32, with a set of adapters for each row."""
        scores_BTV = linear(hid_BTD, self.model.embed.token) + adapters("head", 0, hid_BTD)
        return softcap(scores_BTV, self.model.config.softcap)

    def _hang_on(self, block: Block) -> None:
        """Wrap what a block's attention and MLP compute. Attention comes first in each application of the block."""
        attn, attend, project, transform = block.attn, block.attn.forward, block.attn._project, block.mlp.forward

        def attend_adapted(n: Normed, scale_D: Tensor, shared: Shared, onto: Tensor | None = None) -> Tensor:
            self._application += 1
            n = self._kept(n)
            return self._added("o", n, attend(n, scale_D, shared, onto), scale_D)

        def project_adapted(n: Normed, shared: Shared) -> tuple[Tensor, Tensor, Tensor]:
            return self._projected(attn, n.x, shared.rope) if self._adapters else project(n, shared)

        def transform_adapted(n: Normed, scale_D: Tensor, onto: Tensor | None = None) -> Tensor:
            n = self._kept(n)
            return self._added("mlp", n, transform(n, scale_D, onto), scale_D)

        for module, name, wrapped in (
            (attn, "forward", attend_adapted),
            (attn, "_project", project_adapted),
            (block.mlp, "forward", transform_adapted),
        ):
            setattr(module, name, wrapped)

    def _kept(self, n: Normed) -> Normed:
        """With adapters, a copy that outlives what the branch does in place."""
        return Normed(n.tensor()) if self._adapters else n

    def _added(self, site: str, n: Normed, y_BTD: Tensor, scale_D: Tensor) -> Tensor:
        """A branch's output with the site's, which is scaled per channel as the branch is."""
        if self._adapters is None:
            return y_BTD
        return y_BTD + scale_D.to(y_BTD.dtype) * self._adapters(site, self._application, n.x)

    def _projected(self, attn: Attention, n_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Attention._project with what the sites q, k and v add."""
        assert self._adapters is not None
        weights = {"q": attn.q, "k": attn.k, "v": attn.v}
        q_BTHE, k_BTKE, v_BTKE = (
            (linear(n_BTD, weight) + self._adapters(site, self._application, n_BTD)).unflatten(2, (-1, attn.head_dim))
            for site, weight in weights.items()
        )
        gain = attn.q_gain.to(n_BTD.dtype)
        return rotate(rms_norm(q_BTHE), rope) * gain[:, None], rotate(rms_norm(k_BTKE), rope), v_BTKE

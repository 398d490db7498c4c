"""Initial values, by parameter name: one table for all records.

Matrices that write to the residual stream start at zero, so every block starts as the identity. The records cast the
whole network to bfloat16 and back before the first step; all initial values are therefore bfloat16 numbers (1.1 is
1.1015625), and so are ours.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.config import ModelConfig

Shape = torch.Size
Draw = Callable[[Shape, torch.Generator], Tensor]


def constant(value: float) -> Draw:
    """All entries alike."""
    return lambda shape, _: torch.full(shape, value)


def normal(std: float) -> Draw:
    """Independent normal entries of mean zero."""
    return lambda shape, generator: torch.randn(shape, generator=generator) * std


def orthogonal(gain: float = 1.0) -> Draw:
    """Semi-orthogonal: rows or columns, whichever are fewer, are orthonormal, times `gain`."""
    return lambda shape, generator: nn.init.orthogonal_(torch.empty(shape), gain, generator=generator)


def _mix_rows(shape: Shape, _: torch.Generator) -> Tensor:
    """Row 0 (the stream) ones, row 1 (the embedding) zeros."""
    return torch.tensor([1.0, 0.0])[:, None].expand(shape)


def initial_values(config: ModelConfig) -> dict[str, Draw]:
    """How to draw each parameter, keyed by its name without the `layer{i}.` in front."""
    return {
        "embed.token": normal(config.embed_init_std),
        "bigram.table": constant(0),
        "bigram.proj": orthogonal(config.bigram.proj_init if config.bigram else 1),
        "bigram.scale": constant(0.05),
        "smear.gate": constant(0),
        "smear.gate_w": constant(0),
        "smear.lambda": constant(0),
        "ve.table": normal(0.01),
        "ve.proj": orthogonal(config.value_embedding.proj_init if config.value_embedding else 1),
        "ve.scale": constant(0.1),
        "ve.layer_scale": constant(1),
        "attn.q": orthogonal(),
        "attn.k": orthogonal(),
        "attn.v": orthogonal(),
        "attn.o": constant(0),
        "attn.q_gain": constant(config.qk_gain),
        "attn.vrl_gate": constant(-1.5),
        "attn.gate_w": constant(0),
        "mlp.up": orthogonal(),
        "mlp.down": constant(0),
        "resid_mix": _mix_rows,
        "attn_scale": constant(1),
        "mlp_scale": constant(1),
        "skip.weight": constant(1),
        "skip.gate": constant(0),
        "lanes.post": constant(1),
        "lanes.resid": constant(1.1),
    }


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Set every parameter of `model`, in order, from one generator. Drawn on the CPU: the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    draws = initial_values(config)
    for name, parameter in model.named_parameters():
        draw = draws[re.sub(r"^layer\d+\.", "", name)]
        parameter.copy_(draw(parameter.shape, generator).bfloat16())

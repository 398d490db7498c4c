"""Initial values, by parameter name: one table for all records.

Matrices that write to the residual stream start at zero, so every block starts as the identity. The records cast the
whole network to bfloat16 and back before the first step; all initial values are therefore bfloat16 numbers (1.1 is
1.1015625), and so are ours.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fairway.model.config import ModelConfig

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
    values = {
        "embed.token": normal(config.embed_init_std),
        "attn.q": orthogonal(),
        "attn.k": orthogonal(),
        "attn.v": orthogonal(),
        "attn.o": constant(0),
        "attn.q_gain": constant(config.qk_gain),
        "mlp.up": orthogonal(),
        "mlp.down": constant(0),
        "resid_mix": _mix_rows,
        "attn_scale": constant(1),
        "mlp_scale": constant(1),
        "skip.weight": constant(1),
        "skip.gate": constant(0),
        "smear.gate": constant(0),
    }
    if config.bigram:
        projection = orthogonal(config.bigram.proj_init)
        values |= {"bigram.table": constant(0), "bigram.proj": projection, "bigram.scale": constant(0.05)}
    if config.value_embedding:
        projection = orthogonal(config.value_embedding.proj_init)
        values |= {"ve.table": normal(0.01), "ve.proj": projection}
        values |= {"ve.scale": constant(0.1), "ve.layer_scale": constant(1)}
    if config.smear and config.smear.kind == "gated":
        values |= {"smear.gate_w": constant(0), "smear.lambda": constant(0)}
    if config.value_residual:
        values |= {"attn.vrl_gate": constant(-1.5)}
    if config.attn_gate:
        values |= {"attn.gate_w": constant(0)}
    if config.lanes_from is not None:
        values |= {"lanes.post": constant(1), "lanes.resid": constant(1.1)}
    return values


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Set every parameter of `model` from one generator, drawn on the CPU.

    They are the same for every device and number of CPU threads.

    Drawn in the order of PR #1488, so that its seeds give its own initial weights: its modules first draw PyTorch's
    default values, as they are made, and then all but the value table's are drawn anew.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = initial_values(config)
    # The last bits of LAPACK's QR decomposition depend on how many threads share it. More of them are no faster either:
    # the matrices are small, and on busy cores threads wait for each other many times as long as they work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # The value table stands behind the layers there.
    named = sorted(model.named_parameters(), key=lambda item: item[0].startswith("ve."))
    for name, parameter in named:
        kind = name.rpartition(".")[2]
        if kind in ("token", "table"):
            torch.randn(parameter.shape, generator=generator)
        if kind in ("q", "k", "v", "o", "proj", "up", "down"):
            torch.rand(parameter.shape, generator=generator)
        if name == "ve.table":
            parameter.copy_(draws[name](parameter.shape, generator).bfloat16())
    for name, parameter in named:
        if name != "ve.table":
            draw = draws[re.sub(r"^layer\d+\.", "", name)]
            parameter.copy_(draw(parameter.shape, generator).bfloat16())
    torch.set_num_threads(threads)

"""The network of all four records: one composition of small modules, each present or absent by config.

Legend: B rows, T tokens, D model width, V vocabulary.

    x0 = norm(token + bigram), smeared with the previous token
    encoder layers push their output; before each decoder layer the last pushed one is popped and merged in (U-Net)
    layer: u = mix(x, x0); y = u + attention(norm(u)); y + mlp(norm(y))
    logits = softcap(token table · norm(x))

Source: PR #1150 (PR #549), #1172 (#1019), #1488 (#1313), #1958 (#1855). Parameters are stored per layer; batching
equal-shaped matrices is the optimizer's business.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fairway.model.attention import rotary_table
from fairway.model.causal_attention import WithinRows
from fairway.model.config import ModelConfig
from fairway.model.context import Adapters, Context
from fairway.model.embedding import (
    BigramTable,
    GatedSmear,
    StaticSmear,
    TokenTable,
    ValueTable,
    logits,
    mean_cross_entropy,
)
from fairway.model.init import initialize
from fairway.model.precision import rms_norm
from fairway.model.residual import Block, Lanes, Skips
from fairway.runtime.errors import UserError


class GPT(nn.Module):
    """A decoder-only transformer. Masters are float32 (tables as config.table_dtype); activations are `compute_dtype`.

    Weights are uninitialised until init_weights or load_state_dict.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.embed = TokenTable(config)
        self.bigram = BigramTable(config, config.bigram) if config.bigram else None
        self.smear: StaticSmear | GatedSmear | None = None
        if config.smear:
            self.smear = GatedSmear(config.smear) if config.smear.kind == "gated" else StaticSmear(config)
        self.ve = ValueTable(config, config.value_embedding) if config.value_embedding else None
        for i in range(config.layers):
            self.add_module(f"layer{i}", Block(config, i))
        self.skip = Skips(config)
        self.lanes = Lanes(config) if config.lanes_from is not None else None
        self.first_in_lanes = config.layers if config.lanes_from is None else config.lanes_from

    def init_weights(self, seed: int) -> None:
        """Set every parameter to its initial value, the same on every device (model/init.py)."""
        initialize(self, self.config, seed)

    def to_device(self, device: torch.device) -> "GPT":
        """Move to `device` and choose the activations' dtype for it: bfloat16 on CUDA, float32 on a CPU."""
        self.compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return self.to(device)

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor, *, segments: Tensor | None = None, looped: bool = True
    ) -> Tensor:
        """Mean cross-entropy in nats per token, a float32 scalar. Arguments as for `hidden`."""
        hid_BTD = self.hidden(tokens_BT, segments=segments, looped=looped)
        return mean_cross_entropy(hid_BTD, self.embed.token, targets_BT, cap=self.config.softcap)

    def logits(self, hid: Tensor) -> Tensor:
        """Softcapped logits (..., V), float32, from the final hidden state (..., D); the product runs in its dtype."""
        return logits(hid, self.embed.token, cap=self.config.softcap)

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        segments: Tensor | None = None,
        looped: bool = True,
        adapters: Adapters | None = None,
        wanted: int | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, in the compute dtype, of integer tokens (B, T): (B, X, D).

        `segments`: see causal_attention.attend; none is longer than config.seq_len. `looped` switches depth recurrence
        on, where the config has it. `adapters` add to the outputs of the layers' matrices (context.Adapters). `wanted`
        is X, the number of places at the end of each row whose states are computed, or None for all T.
        """
        x0_BTD, length = self.embed_tokens(tokens_BT), tokens_BT.size(1)
        positions_T = torch.arange(length, device=x0_BTD.device, dtype=torch.float32)
        context = Context(
            x0_BTD=x0_BTD,
            rope=rotary_table(self.config.rope, length, positions_T, x0_BTD.dtype),
            value_embeddings=self.value_embeddings(tokens_BT),
            attend=WithinRows(segments, self.config.seq_len),
            adapters=adapters,
        )
        return self.run_layers(context, looped=looped, wanted=wanted)

    def embed_tokens(self, tokens_BT: Tensor) -> Tensor:
        """x0 (B, T, D) in the compute dtype: what the first layer starts from (context.Context.x0_BTD)."""
        x_BTD = self.embed(tokens_BT, self.compute_dtype)
        if self.bigram is not None:
            x_BTD = x_BTD + self.bigram(tokens_BT, self.compute_dtype)
        if isinstance(self.smear, GatedSmear):
            x_BTD = self.smear(x_BTD, tokens_BT)
        x_BTD = rms_norm(x_BTD)
        if isinstance(self.smear, StaticSmear):
            x_BTD = self.smear(x_BTD)
        return x_BTD

    def value_embeddings(self, tokens_BT: Tensor) -> dict[int, Tensor]:
        """What is added to the values, (B, T, K·E) in the compute dtype, by layer; empty where the config has none."""
        return self.ve(tokens_BT, self.compute_dtype) if self.ve is not None else {}

    def run_layers(self, context: Context, *, looped: bool = True, wanted: int | None = None) -> Tensor:
        """Hidden states after the final norm, (B, X, D), of all layers in turn from context.x0_BTD on.

        `looped` and `wanted` as for `hidden`: only the last layer's application computes fewer places.
        """
        encoder, decoder = self.config.layer_order(looped)
        x_BTD, first_values = context.x0_BTD, None
        saved: list[Tensor] = []
        for application, index in enumerate(encoder):
            x_BTD, first_values = self._block(index)(x_BTD, context, application, first_values=first_values)
            saved.append(x_BTD)
        lanes: tuple[Tensor, Tensor] | None = None
        for step, index in enumerate(decoder):
            application, few = len(encoder) + step, wanted if step == len(decoder) - 1 else None
            block, skip = self._block(index), (saved.pop(), self.skip(step, x_BTD.dtype)) if saved else None
            if self.lanes is not None and index >= self.first_in_lanes:
                lanes = self.lanes(
                    block,
                    lanes or (x_BTD, x_BTD),
                    context,
                    application,
                    skip=skip,
                    first_values=first_values,
                    wanted=few,
                )
            else:
                x_BTD, first_values = block(
                    x_BTD, context, application, skip=skip, first_values=first_values, wanted=few
                )
        return rms_norm(x_BTD if lanes is None else 0.5 * (lanes[0] + lanes[1]))

    def _block(self, index: int) -> Block:
        block: Block = getattr(self, f"layer{index}")
        return block


MATRICES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
SIDE_MATRICES = ("bigram.proj", "ve.proj")
TABLES = ("embed.token", "bigram.table", "ve.table")


def param_groups(model: GPT, *, side_matrices: bool = False) -> dict[str, list[tuple[str, Parameter]]]:
    """Every parameter once, by kind of optimizer, in the order of the network.

    "matrix": the layers' projections (Muon), with the projections of the bigram and value tables if `side_matrices`
    (PR #1488). "table": what tokens look up. "scalar": all the rest.
    """
    matrices = MATRICES + SIDE_MATRICES if side_matrices else MATRICES
    groups: dict[str, list[tuple[str, Parameter]]] = {"matrix": [], "table": [], "scalar": []}
    for name, parameter in model.named_parameters():
        kind = "matrix" if name.endswith(matrices) else "table" if name in TABLES else "scalar"
        groups[kind].append((name, parameter))
    return groups


def load_network(config: ModelConfig, weights: dict[str, Tensor], path: Path, device: torch.device) -> GPT:
    """The network of `config` on `device` with these weights. Raises UserError naming `path` if they are another's."""
    model = GPT(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first_fault = str(error).splitlines()[1].strip()
        raise UserError(f"{path}: not weights of the network in params.yaml (model): {first_fault}") from None
    return model.to_device(device)

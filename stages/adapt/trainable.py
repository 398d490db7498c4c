"""Which parameters an adaptation may change."""

from typing import Literal

from torch.nn import Parameter

from model.gpt import GPT, MATRICES

Named = list[tuple[str, Parameter]]


def trainable(
    model: GPT, *, freeze_blocks: int, freeze: Literal["blocks", "vectors"], freeze_tokens: bool = False
) -> Named:
    """Turn requires_grad off in the first `freeze_blocks` blocks; the names and parameters of all the rest.

    "vectors" freezes no matrix of those blocks but only vectors, scalars and the (2, D) resid_mix: in records that keep
    all layers' matrices in banks, freezing a block by its name missed them. `freeze_tokens` freezes the token table.
    """
    blocks = tuple(f"layer{i}." for i in range(freeze_blocks))
    for name, parameter in model.named_parameters():
        in_bank = freeze == "vectors" and name.endswith(MATRICES)
        frozen = (name.startswith(blocks) and not in_bank) or (freeze_tokens and name == "embed.token")
        parameter.requires_grad_(not frozen)
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]

"""The arithmetic of SLOT: offsets to the final hidden state, their gradient in closed form, and AdamW.

With h the final hidden state, W the token table (the tied head) and c the softcap, an offset δ enters behind the final
norm and an optional bias b before the softcap: logits z = c·tanh((W(h + δ) + b)/c). So U = W·h is computed once, and
a = W·δ + b is one vector for all places of a group; the gradient needs no backward pass:

    g_p = (softmax(z_p) - onehot(y_p)) ⊙ (1 - (z_p/c)²)      ∂(nats of place p)/∂U_p
    γ   = Σ weight_p · g_p over the fitted places            ∂loss/∂a = ∂loss/∂b
    Wᵀγ                                                      ∂loss/∂δ

Source: SLOT is arXiv:2505.12392, the bias is of PR #1229 and #1313. Ours: the closed form.

Legend: G groups, P fitted places of a group, D width, V vocabulary.
"""

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fairway.evaluation.scoring import WindowSettings
from fairway.model.config import ModelConfig
from fairway.model.gpt import GPT
from fairway.runtime.settings import Section


class SlotFitSettings(Section):
    """How a hidden-state offset is fitted (evaluation/slot.py)."""

    steps: int = Field(ge=0)
    lr: float = Field(gt=0)
    # Where the learning rate's cosine ends; null keeps it constant.
    lr_end: float | None = Field(ge=0)
    # One offset per batch on all places (PR #1150, #1172), per window on its scored places (PR #1488), or per window on
    # the places before them: the last alone is causal.
    fitted_on: Literal["batch", "scored", "context"]
    # An offset to the logits too (PR #1488).
    bias: bool

    def check_context(self, *, section: str, stride: int, model: ModelConfig) -> None:
        """An offset that is fitted on the places before the scored ones needs such places."""
        if self.fitted_on == "context" and stride >= model.seq_len:
            raise ValueError(
                f"{section}.stride ({stride}): expected less than model.seq_len ({model.seq_len}), because with "
                "fitted_on: context an offset is fitted on the places of a window that it does not score"
            )


class SlotSettings(SlotFitSettings, WindowSettings):
    """A hidden-state offset fitted on each batch of windows before it is scored (not a code length: see README)."""

    # Instead of starting anew, carry one offset along the stream and fit it on what has been scored: causal.
    carried: bool

    @property
    def form(self) -> Literal["carried", "documents", "stream"]:
        """Which of slot.FORMS the pass has."""
        if self.carried:
            return "carried"
        return "documents" if self.within_documents else "stream"

    @model_validator(mode="after")
    def _forms(self) -> "SlotSettings":
        if self.carried and self.fitted_on != "batch":
            raise ValueError(f"fitted_on ({self.fitted_on}) has no meaning where the offset is carried")
        return self

    def check(self, *, section: str, model: ModelConfig, processes: int) -> None:
        """Within documents, offsets are fitted on what comes before: the records' other forms are theirs alone."""
        super().check(section=section, model=model, processes=processes)
        self.check_context(section=section, stride=self.stride, model=model)
        if self.within_documents and not self.carried and self.fitted_on != "context":
            raise ValueError(
                f"{section}.fitted_on ({self.fitted_on}): expected context, or carried: true, with within_documents"
            )

    def looked_up(self) -> dict[str, str]:
        """With the list of windows, the form of the pass and what an offset is fitted on."""
        slot = "fairway.evaluation.slot"
        return super().looked_up() | {f"{slot}.FORMS": self.form, f"{slot}.FITTED_ON": self.fitted_on}


# As in all the records. The eps matters: it is as large as the gradients.
BETA1, BETA2, EPS, WEIGHT_DECAY = 0.9, 0.999, 1e-5, 1e-8


class Offsets:
    """Offsets δ (G, D) and, if the settings ask for it, biases b (G, V), float32, with AdamW's moments."""

    def __init__(self, model: GPT, groups: int, settings: SlotFitSettings) -> None:
        V, D = model.embed.token.shape
        self.width, self.biased = D, settings.bias
        # δ and b side by side, so that one update serves both.
        self.theta = torch.zeros(groups, D + V * settings.bias, device=model.embed.token.device)
        self.mean, self.square = torch.zeros_like(self.theta), torch.zeros_like(self.theta)
        self.steps = 0

    @property
    def delta_GD(self) -> Tensor:
        """The offsets to the hidden state."""
        return self.theta[:, : self.width]

    @property
    def bias_GV(self) -> Tensor:
        """The offsets to the logits; no columns without a bias."""
        return self.theta[:, self.width :]

    def logit_shift(self, model: GPT) -> Tensor:
        """a = W·δ + b, (G, V)."""
        shift_GV = self.delta_GD @ model.embed.token.float().T
        return shift_GV + self.bias_GV if self.biased else shift_GV

    def step(self, model: GPT, gamma_GV: Tensor, lr: float) -> None:
        """One step of AdamW (arXiv:1711.05101) from the gradient by `a`; equal to torch.optim.AdamW's."""
        gradient = gamma_GV @ model.embed.token.float()
        if self.biased:
            gradient = torch.cat([gradient, gamma_GV], dim=1)
        self.steps += 1
        self.theta.mul_(1 - lr * WEIGHT_DECAY)
        self.mean.lerp_(gradient, 1 - BETA1)
        self.square.lerp_(gradient.square(), 1 - BETA2)
        corrected = (self.square / (1 - BETA2**self.steps)).sqrt() + EPS
        self.theta.addcdiv_(self.mean, corrected, value=-lr / (1 - BETA1**self.steps))


def step_lr(settings: SlotFitSettings, step: int) -> float:
    """The learning rate of a step, from 0: constant, or a cosine that would reach lr_end after the last."""
    if settings.lr_end is None:
        return settings.lr
    return settings.lr_end + (settings.lr - settings.lr_end) * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def products(hid: Tensor, model: GPT) -> Tensor:
    """U = W·h (..., V) in float32, of hidden states (..., D) in the model's compute dtype."""
    W_VD = model.embed.token.to(hid.dtype)
    if not hid.is_cuda or hid.dtype != torch.bfloat16:
        return hid.float() @ W_VD.float().T
    # Sums of bfloat16 products, kept in float32: nothing is lost.
    flat: Tensor = torch.mm(hid.flatten(0, -2), W_VD.T, out_dtype=torch.float32)
    return flat.unflatten(0, hid.shape[:-1])


def gradient(U_GPV: Tensor, a_GV: Tensor, targets_GP: Tensor, weight_GP: Tensor, cap: float) -> Tensor:
    """γ (G, V): gradient by `a` of the weighted sum over places of the cross-entropy of softcapped logits U + a."""
    # In place, because there are few passes over little else than (G, P, V): on a CPU memory is what takes the time.
    t_GPV = (U_GPV + a_GV[:, None]).div_(cap).tanh_()
    g_GPV = (cap * t_GPV).softmax(-1)
    is_target_GPV = torch.arange(U_GPV.size(-1), device=U_GPV.device) == targets_GP[..., None]
    g_GPV.add_(is_target_GPV, alpha=-1).mul_(t_GPV.square_().neg_().add_(1)).mul_(weight_GP[..., None])
    return g_GPV.sum(1)

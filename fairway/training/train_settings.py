"""The section `train` of params.yaml, put together from the settings of the parts of training, and the run's budget."""

from typing import Literal

from pydantic import Field, model_validator

from fairway.runtime.settings import Section
from fairway.tokens.data_orders import LoaderSettings
from fairway.training.adamw import AdamWSettings
from fairway.training.averages import SwaSettings
from fairway.training.muon import MuonSettings
from fairway.training.qat import QatSettings
from fairway.training.schedule import Budget, ScheduleSettings


class TrainSettings(Section):
    """A training run: its length, its data, its optimizers and schedules, and what it logs and keeps."""

    max_steps: int = Field(gt=0)
    max_wallclock_s: float | None
    reserve_s: float = Field(ge=0)
    batch_tokens: int = Field(gt=0)
    micro_batch_tokens: int = Field(gt=0)
    loader: LoaderSettings
    muon: MuonSettings
    adamw: AdamWSettings
    schedule: ScheduleSettings
    grad_clip: float = Field(gt=0)
    clip: Literal["micro_batch", "step"]
    ema_decays: list[float] = Field(min_length=1)
    qat: QatSettings | None
    swa: SwaSettings
    log_every: int = Field(gt=0)
    val_every: int = Field(gt=0)
    checkpoint_every: int = Field(gt=0)
    # Steps that are run before the clock starts, so that everything is compiled by then. Without `compile` it is 0.
    warmup_steps: int = Field(ge=0)
    compile: bool

    @model_validator(mode="after")
    def _agree(self) -> "TrainSettings":
        if self.batch_tokens % self.micro_batch_tokens:
            raise ValueError(
                f"micro_batch_tokens ({self.micro_batch_tokens}) must divide batch_tokens ({self.batch_tokens})"
            )
        if any(not 0 < decay < 1 for decay in self.ema_decays):
            raise ValueError(f"ema_decays {self.ema_decays}: each must lie between 0 and 1")
        if self.max_wallclock_s is not None and self.max_wallclock_s <= self.reserve_s:
            raise ValueError(f"max_wallclock_s ({self.max_wallclock_s}) must exceed reserve_s ({self.reserve_s})")
        if self.warmup_steps and not self.compile:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) are run to compile: expected 0 with compile: false")
        return self


def run_budget(train: TrainSettings) -> Budget:
    """How long the run may go on: max_steps, and max_wallclock_s less reserve_s unless that is null."""
    seconds = train.max_wallclock_s
    return Budget(train.max_steps, None if seconds is None else seconds - train.reserve_s)

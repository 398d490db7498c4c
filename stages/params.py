"""params.yaml, typed: one class per section, unknown keys forbidden, cross-checked once.

`load_params("params.yaml")` is the only reader. Every key's meaning and unit stands in params.yaml itself, above the
key; here stand its type, its bounds and what must agree with what.
"""

import re
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from model.config import ModelConfig, Section
from stages.errors import UserError

# What an evaluator may be called: it becomes part of stage and folder names.
EvaluatorName = Literal["sliding", "ttt", "slot", "lora_ttt", "streaming"]
SectionT = TypeVar("SectionT", bound=Section)
# What stages write and replace.
PIPELINES_OWN = ("data/docs", "artifacts")


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
    """Documents from a local JSONL, JSONL.zst or Parquet file: one object with `text` per line, or a column `text`."""

    source: Literal["file"]
    path: str

    @field_validator("path")
    @classmethod
    def _outside(cls, path: str) -> str:
        for folder in PIPELINES_OWN:
            if Path(path).resolve().is_relative_to(Path(folder).resolve()):
                raise ValueError(f"{path} lies in {folder}, which is the pipeline's own: keep the documents elsewhere")
        return path


class FetchHub(Section):
    """Published token shards from a Hugging Face dataset repository; there are no documents then."""

    source: Literal["hub"]
    repository: str
    # A commit, so that the same params always mean the same shards (a branch or tag works too).
    revision: str
    # Folder of the export inside the repository: all published ones use `datasets`.
    root: str
    # Name of the dataset in the export's manifest.
    variant: str
    # The first so many training shards; validation is always whole.
    train_shards: int = Field(gt=0)
    endpoint: str


class Tokenize(Section):
    """Documents to token shards."""

    # A given SentencePiece model, or null to train one on the training split.
    model: str | None
    # How one is trained: lossless, or published with the challenge's folding of text (tokenize/trainer.py).
    trainer: Literal["lossless", "published"] = "lossless"
    # none, or caseops: capitals as operators (tokenize/caseops.py).
    transform: Literal["none", "caseops"] = "none"
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
    # Storage of the momentum and of the gradients that the processes exchange.
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    # How the quadratic term of Newton-Schulz is formed: c(AA), or (cA)A as PR #1488; equal but for rounding.
    ns_association: Literal["square_first", "scale_first"] = "square_first"
    # Whether bigram.proj and ve.proj are stepped by Muon (PR #1488) or, as scalars are, by AdamW.
    side_matrices: bool = False

    @model_validator(mode="after")
    def _steps(self) -> "Muon":
        if self.orthogonalizer == "polar_express" and self.ns_steps > 5:
            raise ValueError(f"ns_steps ({self.ns_steps}) exceeds the 5 iterations of polar_express")
        return self


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
    # Share of the run after which model.loop is applied; null applies it from the start.
    loop_from: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _fraction(self) -> "Schedule":
        if self.warmdown_unit == "fraction" and self.warmdown > 1:
            raise ValueError(f"warmdown ({self.warmdown}) is a share of the run: expected 0 to 1")
        return self


class SequentialLoader(Section):
    """Shards as one stream, cut into micro-batches (PR #1150, #1488)."""

    kind: Literal["sequential"]


class CoprimeLoader(Section):
    """Windows from many shards at once (PR #1172)."""

    kind: Literal["coprime"]
    # The names that seed the order, %d standing for a shard's number: the record hashed the paths of its shards.
    names: str = Field(pattern=r"^[^%]*%\d*d[^%]*$")


class PackedLoader(Section):
    """Rows of a whole micro-batch whose documents do not see each other (PR #1958)."""

    kind: Literal["packed"]
    # Segment bounds are padded to a multiple of so many: fewer lengths, fewer graphs to compile.
    bucket: int = Field(gt=0)


class ShuffledLoader(Section):
    """Windows of shuffled shards (PR #1958's calibration); needs a shard for each micro-batch of a step."""

    kind: Literal["shuffled"]


Loader = Annotated[
    SequentialLoader | CoprimeLoader | PackedLoader | ShuffledLoader,
    Field(discriminator="kind"),
]


class Qat(Section):
    """Quantization-aware training: matrices are rounded in the forward pass, late in the run (train/qat.py)."""

    # "ste": rounded, gradient straight through (PR #1150, #1488). "soft": a sigmoid that hardens (PR #1172).
    kind: Literal["ste", "soft"]
    bits: int = Field(ge=4, le=8)
    # Rows are never scaled as if their largest weight were below this; records: 1.0.
    min_clip: float = Field(ge=0)
    # From the first step whose learning-rate multiplier is below this, but not before min_step.
    below_lr: float = Field(gt=0)
    min_step: int = Field(ge=0)
    # Steps over which "soft" hardens.
    ramp_steps: int = Field(gt=0)


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
    loader: Loader
    muon: Muon
    adamw: AdamW
    schedule: Schedule
    grad_clip: float = Field(gt=0)
    clip: Literal["micro_batch", "step"]
    ema_decays: list[float] = Field(min_length=1)
    qat: Qat | None = None
    swa: Swa
    log_every: int = Field(gt=0)
    val_every: int = Field(gt=0)
    checkpoint_every: int = Field(gt=0)
    # To compile in, so 0 without `compile`.
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
        if self.warmup_steps and not self.compile:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) are run to compile: expected 0 with compile: false")
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
    # Of one lane.
    batch_rows: int = Field(gt=0)
    # The last so many rows of the split, which training in order reaches last; null takes all.
    max_rows: int | None = Field(default=None, gt=0)
    grad_clip: float = Field(gt=0)
    freeze_blocks: int = Field(ge=0)
    # What stays fixed in those blocks: everything, or only vectors and scalars (PR #1958, matrices being elsewhere).
    freeze: Literal["blocks", "vectors"] = "blocks"
    freeze_tokens: bool = False
    # Shares of the rows that are trained on side by side: the GPUs of a record. Processes do not change the result.
    lanes: int = Field(default=1, gt=0)
    # What lanes average: gradients at every step (PR #1488), or weights after every epoch (PR #1958).
    coupling: Literal["step", "epoch"] = "step"
    # Matrices that are rounded to 6 bits in the forward pass (PR #1488: all).
    fake_quantize: Literal["none", "side", "all"] = "none"


class Bits(Section):
    """Bits per weight of each class of tensor."""

    attn: int = Field(ge=4, le=8)
    mlp: int = Field(ge=4, le=8)
    embed: int = Field(ge=4, le=8)
    other: int = Field(ge=4, le=8)


class Sigmas(Section):
    """Clip of each class of tensor, in standard deviations of the row."""

    attn: float = Field(gt=0)
    mlp: float = Field(gt=0)
    embed: float = Field(gt=0)
    other: float = Field(gt=0)


class Gptq(Section):
    """Rounding that compensates (quantize/gptq.py), and the text its Hessians come from (quantize/calibrate.py)."""

    classes: list[Literal["attn", "mlp", "embed"]] = Field(min_length=1)
    damping: float = Field(gt=0)
    block_size: int = Field(gt=0)
    # "validation" is the very text that is scored: not a code length, and recorded as such.
    calibration: Literal["train", "validation", "text", "generated"]
    # Plain text, for "text" alone.
    path: str | None
    batches: int = Field(gt=0)
    batch_rows: int = Field(gt=0)

    @model_validator(mode="after")
    def _text(self) -> "Gptq":
        if (self.path is not None) != (self.calibration == "text"):
            raise ValueError("path is the text file of calibration: text, and null for every other calibration")
        return self


class Lqer(Section):
    """Low-rank correction of the matrices with the largest error (quantize/lqer.py)."""

    rank: int = Field(gt=0)
    tensors: int = Field(gt=0)
    group: int = Field(gt=0)


class Quantize(Section):
    """Weights to integer codes and row scales."""

    # "percentile" rounds every matrix to nearest; "gptq" those classes that the section gptq names by GPTQ.
    method: Literal["percentile", "gptq"]
    bits: Bits
    clip_percentiles: list[float] = Field(min_length=1)
    embed_percentile: float = Field(gt=0, le=1)
    min_clip: float = Field(ge=0)
    passthrough_elements: int = Field(ge=0)
    # Instead of percentiles and min_clip.
    clip_sigmas: Sigmas | None = None
    gptq: Gptq | None = None
    lqer: Lqer | None = None
    # Bits of a scale's mantissa: 10 is float16. Few are enough, since codes are formed with the scale as rounded.
    scale_mantissa_bits: int = Field(default=10, ge=2, le=10)
    # Widen all steps until model.bin has this size.
    target_bytes: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _agree(self) -> "Quantize":
        if any(not 0 < p <= 1 for p in self.clip_percentiles):
            raise ValueError(f"clip_percentiles {self.clip_percentiles}: each is a quantile in (0, 1]")
        if (self.method == "gptq") != (self.gptq is not None):
            raise ValueError("gptq is the section of method: gptq, and null for every other method")
        return self


class Compress(Section):
    """Codes to bytes, and the program that ships beside them."""

    codec: Literal["ans", "brotli", "brotli_shuffled", "zstd", "lzma", "lrzip"]
    # The evaluator that the shipped train_gpt.py runs.
    evaluator: EvaluatorName


class SizeCheck(Section):
    """The track's cap."""

    cap_bytes: int = Field(gt=0)


class Certify(Section):
    """How much of the validation stream the experiments on an evaluator run on."""

    # Tokens that are coded, and decoded again from the artifact alone.
    tokens: int = Field(gt=0)
    # The longest beginning of the stream that is run to find a step of learning in.
    stream_tokens: int = Field(gt=0)

    @model_validator(mode="after")
    def _agree(self) -> "Certify":
        if self.tokens > self.stream_tokens:
            raise ValueError(f"tokens ({self.tokens}) exceeds stream_tokens ({self.stream_tokens})")
        return self


class Report(Section):
    """Names in records/published.yaml: whose figures to show beside these, and whom to be tested against."""

    record: str | None
    baseline: str | None


class Submission(Section):
    """What a person has to say of a submission (submission/figures.py has the rest)."""

    author: str | None
    github_id: str | None
    name: str
    blurb: str


class Sliding(Section):
    """Overlapping windows, each token scored once."""

    stride: int = Field(gt=0)
    batch_windows: int = Field(gt=0)
    # Score the last tokens repeatedly, as PR #1150, #1172 and #1488 did (evaluate/windows.py).
    published_window_list: bool = False


class SlotFit(Section):
    """How a hidden-state offset is fitted (evaluate/slot.py)."""

    steps: int = Field(ge=0)
    lr: float = Field(gt=0)
    # Where the learning rate's cosine ends; null keeps it constant.
    lr_end: float | None = Field(default=None, ge=0)
    # One offset per batch on all places (PR #1150, #1172), per window on its scored places (PR #1488), or per window on
    # the places before them: the last alone is causal.
    fitted_on: Literal["batch", "scored", "context"] = "batch"
    # An offset to the logits too (PR #1488).
    bias: bool = False


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
    # As in adapt.
    freeze: Literal["blocks", "vectors"] = "blocks"
    # Matrices that are rounded to 6 bits while training (PR #1150: side, the projections of bigram and value tables).
    fake_quantize: Literal["none", "side", "all"] = "none"
    published_window_list: bool = False
    # Chunks are scored with SLOT as well (PR #1150).
    slot: SlotFit | None = None


class Slot(SlotFit):
    """A hidden-state offset fitted on each batch of windows before it is scored (not a code length: see README)."""

    stride: int = Field(gt=0)
    batch_windows: int = Field(gt=0)
    published_window_list: bool = False
    # Instead of starting anew, carry one offset along the stream and fit it on what has been scored: causal.
    carried: bool = False

    @model_validator(mode="after")
    def _forms(self) -> "Slot":
        if self.carried and self.fitted_on != "batch":
            raise ValueError(f"fitted_on ({self.fitted_on}) has no meaning where the offset is carried")
        return self


class LoraTtt(Section):
    """Low-rank adapters fitted to each document as it is scored, and phases of global SGD (PR #1855)."""

    # Targets scored between two steps of the adapters, and documents side by side.
    chunk_tokens: int = Field(gt=0)
    batch_documents: int = Field(gt=0)
    rank: int = Field(gt=0)
    alpha: float = Field(gt=0)
    lr: float = Field(gt=0)
    beta2: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    # After so many documents, in so many phases, the network itself is trained on the documents done.
    prefix_documents: int = Field(ge=0)
    phases: int = Field(ge=0)
    global_chunk_tokens: int = Field(gt=0)
    global_lr: float = Field(gt=0)
    global_momentum: float = Field(ge=0, lt=1)
    grad_clip: float = Field(gt=0)
    # Batches of documents under way at a time: the GPUs of a record. Processes do not change the result.
    lanes: int = Field(gt=0)
    # Of the adapters' first factors; the generator's seed is this times 10^9 and a bit (evaluate/lora_ttt.py).
    seed: int = Field(ge=0, lt=2**32)

    @model_validator(mode="after")
    def _phases(self) -> "LoraTtt":
        if self.phases > self.prefix_documents:
            raise ValueError(f"phases ({self.phases}) exceed prefix_documents ({self.prefix_documents})")
        return self


class Streaming(Section):
    """One pass with rolling keys and values, each token computed once."""

    # Tokens of a lane that go through the network together.
    block_tokens: int = Field(gt=1)
    # Equal parts of the stream, each begun without memory, that are worked on side by side.
    lanes: int = Field(gt=0)


class Params(Section):
    """The whole of params.yaml."""

    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(min_length=1)
    evaluators: list[EvaluatorName] = Field(min_length=1)
    processes: int = Field(gt=0)
    fetch: Annotated[FetchSdists | FetchFile | FetchHub, Field(discriminator="source")]
    tokenize: Tokenize
    model: ModelConfig
    train: Train
    average: Average
    adapt: Adapt
    quantize: Quantize
    compress: Compress
    size_check: SizeCheck
    certify: Certify
    report: Report
    submission: Submission
    sliding: Sliding
    ttt: Ttt
    slot: Slot
    lora_ttt: LoraTtt | None = None
    streaming: Streaming | None = None

    @model_validator(mode="after")
    def _training_agrees(self) -> "Params":
        seq_len, train = self.model.seq_len, self.train
        _need(len(set(self.seeds)) == len(self.seeds), f"seeds {self.seeds} repeats a seed")
        _need(
            self.model.vocab_size == self.tokenize.vocab_size,
            f"model.vocab_size ({self.model.vocab_size}) must equal tokenize.vocab_size ({self.tokenize.vocab_size})",
        )
        _need(
            train.micro_batch_tokens % seq_len == 0,
            f"model.seq_len ({seq_len}) must divide train.micro_batch_tokens ({train.micro_batch_tokens})",
        )
        micro_steps = train.batch_tokens // train.micro_batch_tokens
        _need(
            micro_steps % self.processes == 0,
            f"processes ({self.processes}) must divide the {micro_steps} micro-batches of a step "
            "(train.batch_tokens / train.micro_batch_tokens)",
        )
        _need(
            train.schedule.loop_from is None or self.model.loop is not None,
            "train.schedule.loop_from needs a model.loop to switch on (found null)",
        )
        _need(
            self.average.method != "ema" or self.average.ema_decay in train.ema_decays,
            f"average.ema_decay ({self.average.ema_decay}) must be one of train.ema_decays {train.ema_decays}",
        )
        for name, section in (("adapt", self.adapt), ("ttt", self.ttt)):
            blocks, layers = section.freeze_blocks, self.model.layers
            _need(blocks <= layers, f"{name}.freeze_blocks ({blocks}) exceeds model.layers ({layers})")
        _need(
            not self.adapt.epochs or self.processes <= self.adapt.lanes,
            f"adapt.lanes ({self.adapt.lanes}) is less than the {self.processes} processes",
        )
        return self

    @model_validator(mode="after")
    def _evaluators_exist(self) -> "Params":
        _need(len(set(self.evaluators)) == len(self.evaluators), f"evaluators {self.evaluators} repeats a name")
        _need(
            self.compress.evaluator in self.evaluators,
            f"compress.evaluator ({self.compress.evaluator}) must be one of evaluators {self.evaluators}",
        )
        for name in self.evaluators:
            _need(getattr(self, name) is not None, f"{name}: missing section, which the evaluator of that name needs")
        return self

    @model_validator(mode="after")
    def _evaluators_agree(self) -> "Params":
        seq_len, lora, streaming = self.model.seq_len, self.lora_ttt, self.streaming
        _need(
            self.certify.stream_tokens >= seq_len,
            f"certify.stream_tokens ({self.certify.stream_tokens}) is less than model.seq_len ({seq_len})",
        )
        for name in ("sliding", "ttt", "slot"):
            stride = getattr(self, name).stride
            _need(stride <= seq_len, f"{name}.stride ({stride}) exceeds model.seq_len ({seq_len})")
        _need(
            self.ttt.chunk_tokens % seq_len == 0 and self.ttt.chunk_tokens % self.ttt.stride == 0,
            f"ttt.chunk_tokens ({self.ttt.chunk_tokens}) must be a multiple of model.seq_len and of ttt.stride",
        )
        if streaming:
            _need(
                self.processes <= streaming.lanes,
                f"streaming.lanes ({streaming.lanes}) is less than the {self.processes} processes",
            )
        if lora:
            _need(
                lora.chunk_tokens <= seq_len,
                f"lora_ttt.chunk_tokens ({lora.chunk_tokens}) exceeds model.seq_len ({seq_len})",
            )
            _need(
                lora.global_chunk_tokens % (lora.lanes * seq_len) == 0,
                f"lora_ttt.global_chunk_tokens ({lora.global_chunk_tokens}) must be a multiple of "
                f"lora_ttt.lanes * model.seq_len ({lora.lanes * seq_len})",
            )
        return self


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _yaml_loader() -> type[yaml.SafeLoader]:
    """SafeLoader with YAML 1.2 floats: PyYAML reads `1e-3` as text, DVC as a number."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)$"),
        list("-+.0123456789"),
    )
    return Loader


def load_params(path: str | Path) -> Params:
    """Read and check a params file. Raises UserError (one line: file, key, what was expected) on any fault."""
    return load_section(Path(path), Params)


def load_section(path: Path, kind: type[SectionT]) -> SectionT:
    """Read a YAML file as the section `kind`, faults as in load_params."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_yaml_loader())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(raw).__name__}")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_fault(error)}") from None


def _first_fault(error: ValidationError) -> str:
    """The first fault as `key.path: what is wrong (found value)`; the number of further ones behind it.

    Unknown keys go first: where one is misspelt, the right one is missing too.
    """
    fault = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    # Of a section that comes in kinds, pydantic names the kind behind the section: not a key of the file.
    kinds = {("fetch", 1), ("loader", 2)}
    places = zip(range(len(fault["loc"])), ("", *fault["loc"]), fault["loc"], strict=False)
    key = ".".join(str(part) for i, before, part in places if (before, i) not in kinds)
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

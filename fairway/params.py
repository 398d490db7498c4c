"""params.yaml, typed: one class per section, unknown keys forbidden, cross-checked once.

`load_params("params.yaml")` is the only reader. Every key's meaning and unit stands in params.yaml itself, above the
key; here stand its type, its bounds and what must agree with what.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fairway.adaptation.row_training import AdaptSettings
from fairway.certification.experiments import CertifySettings
from fairway.codec.artifact import CompressSettings, SizeCheckSettings
from fairway.evaluation.lora_ttt import LoraTttSettings
from fairway.evaluation.sliding import SlidingSettings
from fairway.evaluation.slot_offsets import SlotSettings
from fairway.evaluation.streaming import StreamingSettings
from fairway.evaluation.ttt import TttSettings
from fairway.model.config import ModelConfig
from fairway.quantization.quantize_weights import QuantizeSettings
from fairway.reporting.handed_in import SubmissionSettings
from fairway.reporting.published import ReportSettings
from fairway.runtime.settings import Section, load_section
from fairway.tokens.documents import FetchFile
from fairway.tokens.hub import FetchHub
from fairway.tokens.sdists import FetchSdists
from fairway.tokens.tokenizer import TokenizeSettings
from fairway.training.averages import AverageSettings
from fairway.training.train_settings import TrainSettings

# What an evaluator may be called: it becomes part of stage and folder names.
EvaluatorName = Literal["sliding", "ttt", "slot", "lora_ttt", "streaming"]


class Params(Section):
    """The whole of params.yaml."""

    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(min_length=1)
    evaluators: list[EvaluatorName] = Field(min_length=1)
    processes: int = Field(gt=0)
    fetch: Annotated[FetchSdists | FetchFile | FetchHub, Field(discriminator="source")]
    tokenize: TokenizeSettings
    model: ModelConfig
    train: TrainSettings
    average: AverageSettings
    adapt: AdaptSettings
    quantize: QuantizeSettings
    compress: CompressSettings
    size_check: SizeCheckSettings
    certify: CertifySettings
    report: ReportSettings
    submission: SubmissionSettings
    sliding: SlidingSettings
    ttt: TttSettings
    slot: SlotSettings
    lora_ttt: LoraTttSettings | None = None
    streaming: StreamingSettings | None = None

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


def load_params(path: str | Path) -> Params:
    """Read and check a params file. Raises UserError (one line: file, key, what was expected) on any fault."""
    return load_section(Path(path), Params)

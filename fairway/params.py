"""params.yaml as a typed object: which sections there are, and what must agree among them.

`load_params("params.yaml")` is the only way in which the pipeline reads it. An unknown or a missing key is an error.
The meaning and unit of a key stand in params.yaml itself, above the key; its type and bounds stand in a class beside
the code that the section configures. Besides the sections listed here, a file has one for each evaluator that it uses,
under the evaluator's name (evaluation/registry.py).
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ModelWrapValidatorHandler, create_model, model_validator

from fairway.adaptation.row_training import AdaptSettings
from fairway.certification.experiments import CertifySettings
from fairway.codec.artifact import CompressSettings, SizeCheckSettings
from fairway.evaluation.evaluator import EvaluatorSettings
from fairway.evaluation.registry import evaluator_class, evaluator_names, is_evaluator, settings_class
from fairway.model.config import ModelConfig
from fairway.quantization.quantize_weights import QuantizeSettings
from fairway.reporting.comparison import ReportSettings
from fairway.reporting.handed_in import SubmissionSettings
from fairway.runtime.distributed import too_few_lanes
from fairway.runtime.errors import UserError
from fairway.runtime.settings import Section, load_section
from fairway.tokens.hub import FetchHub
from fairway.tokens.own_text import FetchFile
from fairway.tokens.sdists import FetchSdists
from fairway.tokens.tokenizer import TokenizeSettings
from fairway.training.averages import AverageSettings
from fairway.training.schedule import TrainSettings


def _existing(name: str) -> str:
    """The same name. Raises ValueError if there is no such evaluator."""
    try:
        evaluator_class(name)
    except UserError as error:
        raise ValueError(str(error)) from None
    return name


EvaluatorName = Annotated[str, AfterValidator(_existing)]


class ArtifactParams(Section):
    """The sections that decide what is made of the tokens. Only these are written into the program that ships."""

    model: ModelConfig
    train: TrainSettings
    average: AverageSettings
    adapt: AdaptSettings
    quantize: QuantizeSettings
    compress: CompressSettings


class Params(ArtifactParams):
    """The whole of params.yaml.

    model_validate makes an object of a subclass, which has one more field for each section of an evaluator in the file.
    """

    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(min_length=1)
    evaluators: list[EvaluatorName] = Field(min_length=1)
    processes: int = Field(gt=0)
    fetch: Annotated[FetchSdists | FetchFile | FetchHub, Field(discriminator="source")]
    tokenize: TokenizeSettings
    size_check: SizeCheckSettings
    certify: CertifySettings
    report: ReportSettings
    submission: SubmissionSettings

    @model_validator(mode="wrap")
    @classmethod
    def _with_evaluators(cls, raw: Any, handler: ModelWrapValidatorHandler["Params"]) -> "Params":
        if cls is not Params or not isinstance(raw, dict):
            return handler(raw)
        return _class_for(raw).model_validate(raw)

    def evaluator_settings(self, name: str) -> EvaluatorSettings:
        """The section of an evaluator. Raises UserError if there is no such evaluator or no such section."""
        evaluator_class(name)
        if name not in self._evaluator_sections():
            raise UserError(f"params.yaml: {_missing(name)}")
        settings: EvaluatorSettings = getattr(self, name)
        return settings

    def _evaluator_sections(self) -> list[str]:
        return [name for name in type(self).model_fields if name not in Params.model_fields]

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
        blocks, layers = self.adapt.freeze_blocks, self.model.layers
        _need(blocks <= layers, f"adapt.freeze_blocks ({blocks}) exceeds model.layers ({layers})")
        _need(
            not self.adapt.epochs or self.processes <= self.adapt.lanes,
            too_few_lanes("adapt", self.adapt.lanes, self.processes),
        )
        _need(
            (self.quantize.grid == "trellis") == (self.compress.codec == "trellis_ans"),
            f"quantize.grid ({self.quantize.grid}) and compress.codec ({self.compress.codec}): expected trellis with "
            "trellis_ans, and scalar with any other codec",
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
            _need(name in self._evaluator_sections(), _missing(name))
        return self

    @model_validator(mode="after")
    def _evaluators_fit(self) -> "Params":
        for name in self._evaluator_sections():
            self.evaluator_settings(name).check(section=name, model=self.model, processes=self.processes)
        return self


def _class_for(raw: dict[str, Any]) -> type[Params]:
    """Params with one more field for every section of `raw` that has an evaluator's name.

    Raises ValueError naming the first section that is neither one of Params nor an evaluator's.
    """
    others = [name for name in raw if name not in Params.model_fields]
    unknown = next((name for name in others if not isinstance(name, str) or not is_evaluator(name)), None)
    if unknown is not None:
        fixed = ", ".join(Params.model_fields)
        raise ValueError(f"{unknown}: unknown key; expected {fixed}, or an evaluator: {evaluator_names()}")
    sections: dict[str, Any] = {name: (settings_class(name), ...) for name in others}
    return create_model("Params", __base__=Params, **sections)


def _missing(name: str) -> str:
    return f"{name}: missing section, which the evaluator of that name needs"


def _need(ok: bool, message: str) -> None:
    """Raise ValueError with the message unless `ok`."""
    if not ok:
        raise ValueError(message)


def load_params(path: str | Path) -> Params:
    """Read and check a params file. Raises UserError (one line: file, key, what was expected) on any fault."""
    return load_section(Path(path), Params)

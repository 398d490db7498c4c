"""The published figures of records, read from records/published.yaml, and which of them params.yaml asks to see."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fairway.runtime.errors import UserError
from fairway.runtime.settings import Section, load_section


class ReportSettings(Section):
    """Two names in records/published.yaml, or null: the record whose figures are shown beside ours, and the record
    that our score is tested against."""

    record: str | None
    baseline: str | None


# The kinds of weights that are scored on the way to an evaluator.
WEIGHTS = ("trained", "averaged", "adapted", "quantized")
# What a figure belongs to: one of these kinds of weights, or an evaluator, by a name that params.yaml could give it,
# such as sliding_64, the second stride of PR #1488. A test checks that there is such an evaluator. The code cannot: it
# would have to import all evaluators, and the report would then run again whenever one of them changes.
Pass = Annotated[str, Field(pattern=r"^[a-z][a-z0-9]*(_[a-z0-9]+)*$")]


class PublishedSeed(Section):
    """The figures of one seed. Their meaning and units are explained at the top of the file."""

    val_bpb: float = Field(gt=0)
    val_loss: float = Field(gt=0)
    artifact_bytes: int = Field(gt=0)
    model_bytes: int = Field(gt=0)
    code_bytes: int = Field(gt=0)
    steps: int = Field(gt=0)
    train_s: float = Field(gt=0)
    step_ms: float = Field(gt=0)
    bpb: dict[Pass, float]
    # Seconds of the same passes, and under "adapt" the seconds of training on validation tokens.
    eval_s: dict[Pass, float]
    other_s: dict[Literal["calibration", "pack", "unpack"], float]

    @model_validator(mode="after")
    def _bytes(self) -> "PublishedSeed":
        if self.artifact_bytes != self.model_bytes + self.code_bytes:
            raise ValueError(f"artifact_bytes ({self.artifact_bytes}) must be model_bytes + code_bytes")
        return self


class PublishedRecord(Section):
    """One record: where it comes from, what was scored how, and the figures of its seeds."""

    pull_request: int = Field(gt=0)
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")
    status: str
    evaluator: Pass
    parameters: int = Field(gt=0)
    val_targets: int = Field(gt=0)
    val_bytes: int = Field(gt=0)
    seeds: dict[int, PublishedSeed] = Field(min_length=1)

    def bpb(self, name: str) -> list[float]:
        """Bits per byte by seed of a kind of weights or of an evaluator; empty if none was published."""
        if name == self.evaluator:
            return [seed.val_bpb for seed in self.seeds.values()]
        return [bpb for seed in self.seeds.values() for key, bpb in seed.bpb.items() if key == name]


class Published(Section):
    """The whole file: records by name."""

    records: dict[str, PublishedRecord]


def load_published(path: Path) -> Published:
    """Read and check the file. Raises UserError (one line: file, key, what was expected) on any fault."""
    return load_section(path, Published)


def named_record(published: Published, key: str, name: str | None) -> tuple[str, PublishedRecord] | None:
    """The name that params.yaml gives under `report.<key>`, with the record of that name; None if it gives none.

    Raises UserError if there is no such record.
    """
    if name is None:
        return None
    if name not in published.records:
        known = ", ".join(published.records)
        raise UserError(f"params.yaml: report.{key}: no record {name!r} in records/published.yaml (known: {known})")
    return name, published.records[name]

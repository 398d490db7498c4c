"""The experiments of `dvc exp run` as they are stored, the commit that they go back to, and the workspace.

The figures and the training curve of each come from results/, which git tracks, so that every experiment has them.
Seconds and the scores of single tokens lie in DVC's cache; where they are missing there, that is told in a line.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import dvc.api
import numpy as np

from fairway.reporting.by_document import Stream, Texts, read_nats, read_stream, title
from fairway.reporting.comparison import Paired, paired
from fairway.reporting.runs import Standing
from fairway.reporting.tables import scores_of
from fairway.reporting.versions import FAULTS, Change, Version, changes
from fairway.runtime.errors import UserError
from fairway.runtime.files import read_figures

WORKSPACE = "workspace"


@dataclass(frozen=True)
class Row:
    """A version with its figures: bits per byte with their standing by evaluator, bytes, seconds, and the curve.

    `changes` are its settings against those of the commit. `missing` has a line for everything that is not stored.
    """

    version: Version
    # When it was made, as `dvc exp show` writes it; empty for the workspace.
    created: str
    changes: list[Change]
    summary: dict[str, float]
    seconds: dict[str, float]
    seeds: list[int]
    # Validation bits per byte by step, the mean over seeds.
    curve: list[tuple[float, float]]
    missing: list[str]

    @property
    def name(self) -> str:
        """The name that the version has on the page and on the command line."""
        return self.version.name

    @property
    def scores(self) -> dict[str, tuple[float, Standing]]:
        """Bits per byte and standing by evaluator."""
        return scores_of(self.summary)


@dataclass(frozen=True)
class Found:
    """Every version with its figures, the workspace first and experiments from new to old, and what has none yet.

    `commit` is what experiments go back to, None without one, and `unfinished` the names and states of experiments that
    are queued, running or failed.
    """

    rows: list[Row]
    commit: str | None
    unfinished: list[tuple[str, str]]

    @property
    def evaluators(self) -> list[str]:
        """The evaluators that any version was scored by."""
        return list(dict.fromkeys(name for row in self.rows for name in row.scores))


def experiments() -> Found:
    """The workspace, the experiments that `dvc exp show` lists, and the commit that they go back to.

    Raises UserError outside of a git and DVC repository.
    """
    try:
        shown = [row for row in dvc.api.exp_show() if row["rev"] != WORKSPACE]
    except FAULTS:
        raise UserError("no git and DVC repository here: `dvc exp` keeps its experiments in one") from None
    finished = [row for row in shown if row["State"] in (None, "Success")]
    # The commit is the first that DVC lists; here it comes last.
    finished.sort(key=lambda row: row["typ"] == "baseline")
    commits = [Version(row["rev"], row["rev"]) for row in finished if row["typ"] == "baseline"]
    before = commits[0].settings() if commits else {}
    rows = [_row(Version(WORKSPACE, None), "", before)]
    rows += [_row(Version(row["Experiment"] or row["rev"], row["rev"]), row["Created"], before) for row in finished]
    unfinished = [(row["Experiment"] or row["rev"], row["State"].lower()) for row in shown if row not in finished]
    return Found(rows, commits[0].commit() if commits else None, unfinished)


def _row(version: Version, created: str, before: dict[str, Any]) -> Row:
    missing: list[str] = []

    def figures(path: str) -> dict[str, Any]:
        """The numbers of a JSON file, none if it is missing."""
        try:
            return {key: value for key, value in json.loads(version.read(path)).items() if not isinstance(value, list)}
        except UserError as error:
            missing.append(str(error))
            return {}

    try:
        curve = _curve(version.read("results/curve.csv").decode())
    except UserError as error:
        curve = []
        missing.append(str(error))
    settings = version.settings()
    return Row(
        version,
        created,
        changes(before, settings) if before else [],
        figures("results/summary.json"),
        figures("results/times.json"),
        settings["seeds"],
        curve,
        missing,
    )


def _curve(text: str) -> list[tuple[float, float]]:
    """The validation curve in the content of results/curve.csv, at every step the mean over seeds."""
    by_step: dict[float, list[float]] = {}
    for row in csv.DictReader(text.splitlines()):
        by_step.setdefault(int(row["step"]), []).append(float(row["val_bpb"]))
    return [(step, mean(values)) for step, values in by_step.items()]


@dataclass(frozen=True)
class Gap:
    """A document under two scores: its title, its bytes, and bits per byte by both."""

    title: str
    size_bytes: int
    first_bpb: float
    second_bpb: float


@dataclass(frozen=True)
class Apart:
    """How an evaluator's two scores differ: the test over all documents, and those that differ most, in their order."""

    evaluator: str
    test: Paired
    gaps: list[Gap]


@dataclass(frozen=True)
class Pair:
    """Two versions document by document; None for both if no two could be compared, and `missing` says why."""

    first: Row | None
    second: Row | None
    apart: list[Apart]
    missing: list[str]


def pair(rows: list[Row], wanted: list[str]) -> Pair:
    """Compare the two named versions, or the workspace with the first other one whose scores are stored and differ.

    Raises UserError if a name is not that of a row.
    """
    known = {row.name: row for row in rows}
    for name in wanted:
        if name not in known:
            raise UserError(f"no version {name!r}; expected two of: {', '.join(known)}")
    first = known[wanted[0]] if wanted else rows[0]
    others = [known[wanted[1]]] if wanted else [row for row in rows[1:] if row.scores != first.scores]
    missing: list[str] = []
    for second in others:
        try:
            return Pair(first, second, _compared(first, second), missing)
        except UserError as error:
            missing.append(f"Not compared by document: {error}.")
    return Pair(None, None, [], list(dict.fromkeys(missing)))


def _compared(first: Row, second: Row) -> list[Apart]:
    """Each evaluator that scored both. Raises UserError if scores are not stored, or are of different texts."""
    with TemporaryDirectory() as a, TemporaryDirectory() as b:
        sides = [_Side(first, Path(a)), _Side(second, Path(b))]
        names = [name for name in first.scores if name in second.scores]
        return [_apart(name, sides[0].scored(name), sides[1].scored(name), sides[0].texts) for name in names]


class _Side:
    """What is stored of one version: its tokens, and the scores of single tokens by evaluator, copied to a folder."""

    def __init__(self, row: Row, folder: Path) -> None:
        self.version, self.folder = row.version, folder / "artifacts"
        self.seeds, self.reported = row.seeds, row.scores
        self.into = folder
        for name in row.version.names("artifacts/tokens"):
            if not name.startswith("train_"):
                row.version.copy(f"artifacts/tokens/{name}", folder)
        keys = ("vocab_size", "transform", "fused_pairs")
        self.meta = read_figures(self.folder / "tokens/meta.json", "python -m stages.tokenize", keys)
        self.texts = Texts(self.folder / "tokens", self.meta)

    def scored(self, evaluator: str) -> tuple[Stream, np.ndarray]:
        """The stream, and the bits (D,) of its documents.

        Raises UserError unless they are what results/summary.json tells of. In the workspace they are not after git
        alone, without `dvc checkout`, has brought back the results of another run.
        """
        stored = []
        for seed in self.seeds:
            made = f"artifacts/evaluate/{seed}/{evaluator}"
            for name in ("nats.npz", "metrics.json"):
                self.version.copy(f"{made}/{name}", self.into)
            stage = f"python -m stages.evaluate {seed} {evaluator}"
            stored.append(read_figures(self.into / made / "metrics.json", stage, ("val_bpb",))["val_bpb"])
        if abs(mean(stored) - self.reported[evaluator][0]) > 1e-6:
            raise UserError(
                f"{self.version.name}: artifacts/evaluate and results/ are of different runs; `dvc checkout` brings "
                "back the one that dvc.lock names"
            )
        nats_N = read_nats(self.folder, self.seeds, evaluator)
        stream = read_stream(self.folder / "tokens", self.meta["vocab_size"], len(nats_N))
        return stream, stream.bits_D(nats_N)


# How many documents are shown.
MOST_GAPS = 20


def _apart(evaluator: str, first: tuple[Stream, np.ndarray], second: tuple[Stream, np.ndarray], texts: Texts) -> Apart:
    (stream, first_D), (other, second_D) = first, second
    shared = same_documents(stream.bytes_D, other.bytes_D)
    first_D, second_D, bytes_D = first_D[shared], second_D[shared], stream.bytes_D[shared]
    most = np.sort(np.argsort(-np.abs(second_D - first_D), kind="stable")[:MOST_GAPS])
    gaps = [
        Gap(
            title("".join(texts.pieces(stream.document(int(shared[i]))))),
            int(bytes_D[i]),
            float(first_D[i] / bytes_D[i]),
            float(second_D[i] / bytes_D[i]),
        )
        for i in most
    ]
    return Apart(evaluator, paired(first_D, second_D, bytes_D), gaps)


def same_documents(first_D: np.ndarray, second_D: np.ndarray) -> np.ndarray:
    """The numbers of the documents that both streams hold whole, given the bytes (D,) of theirs.

    Streams are cut to whole rows, which may leave less of the last document. Raises UserError if any other differs.
    """
    most = min(len(first_D), len(second_D))
    same_D = first_D[:most] == second_D[:most]
    if not same_D[: most - 1].all() or not same_D.any():
        raise UserError("the two scored different texts")
    return np.flatnonzero(same_D & (first_D[:most] > 0))

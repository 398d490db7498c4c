"""What the report reads, made from one small run: certificates as the certify stage writes them, and further seeds.

Also a reader of HTML that checks the pages.
"""

import json
import shutil
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from conftest import REPOSITORY, Experiment

from fairway.params import load_params
from fairway.reporting.by_document import read_documents
from fairway.reporting.compare_page import compare_page
from fairway.reporting.comparison import load_published, paired
from fairway.reporting.facts import Facts, facts
from fairway.reporting.made import Made
from fairway.reporting.page import page
from fairway.reporting.runs import collect
from fairway.reporting.stored_experiments import Apart, Found, Gap, Pair, Row
from fairway.reporting.versions import Change, Version

# The stages whose figures the report reads, besides certify.
STAGES = ("train", "adapt", "quantize", "compress", "size_check", "evaluate")
QUANTIZED = "artifacts/quantize/1337/quantize.json"
CONDITIONS = ("causality", "normalisation", "score_first", "single_pass", "decoder", "accounting")


def certificate(evaluator: str, *, failing: tuple[str, ...] = (), unproven: tuple[str, ...] = ()) -> dict[str, Any]:
    """A certificate in which the named conditions fail or stay unproven, and the others pass."""

    def condition(name: str) -> dict[str, Any]:
        verdict = "fail" if name in failing else "unproven" if name in unproven else "pass"
        return {
            "verdict": verdict,
            "why": f"{name}: {verdict}",
            "evidence": {"positions": 32, "largest_error": 1.5e-16},
        }

    legal: bool | str = False if failing else "unproven" if unproven else True
    conditions = {name: condition(name) for name in CONDITIONS}
    return {"evaluator": evaluator, "legal": legal, "conditions": conditions, "certify_s": 1.25}


def write_certificate(folder: Path, seed: int, content: dict[str, Any]) -> Path:
    """Put a certificate where the certify stage would."""
    path = folder / f"artifacts/certify/{seed}/{content['evaluator']}/certificate.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def certify(folder: Path, seed: int) -> None:
    """Certificates of the laptop default's evaluators: slot breaks causality and normalisation."""
    for evaluator in ("sliding", "ttt"):
        write_certificate(folder, seed, certificate(evaluator))
    write_certificate(folder, seed, certificate("slot", failing=("causality", "normalisation")))


def add_seed(folder: Path, seed: int, shift_bpb: float) -> None:
    """Another seed: seed 1337's artifacts, with scores that lie `shift_bpb` higher."""
    for stage in STAGES:
        shutil.copytree(folder / f"artifacts/{stage}/1337", folder / f"artifacts/{stage}/{seed}")
    for path in (folder / f"artifacts/evaluate/{seed}").glob("*/metrics.json"):
        figures = json.loads(path.read_text())
        path.write_text(json.dumps(figures | {"val_bpb": figures["val_bpb"] + shift_bpb}))
    certify(folder, seed)


MADE = Made(
    name="Laptop default",
    experiment="rapid-lark",
    at=datetime(2026, 5, 1, 12, 30, tzinfo=UTC),
    against="params.yaml of commit 0123abc",
    changes=[Change("slot.steps", "5", "24"), Change("train.loader.kind", '"sequential"', '"packed"')],
)


def comparison_page() -> str:
    """A comparison with everything on it: changed settings, a score that is not legal, two versions by document, lines
    on what is missing and on what is still running."""
    curve = [(0.0, 3.9), (100.0, 2.1), (200.0, 1.8)]
    settings = [Change("slot.steps", "5", "24"), Change("train.loader.kind", '"sequential"', '"packed"')]
    summary = {"sliding_bpb": 1.5895, "ttt_bpb": 1.5869, "slot_bpb_illegal": 1.5833, "artifact_bytes": 1083946}
    faster = [(step, bpb - 0.1) for step, bpb in curve]
    first = Row(Version("workspace", None), "", [], summary, {"train_s": 270.0, "eval_s": 26.0}, [1337], curve, [])
    second = Row(
        Version("rapid-lark", "0123abc"), "09:34 AM", settings, summary, {}, [1337], faster, ["rapid-lark: no seconds"]
    )
    bits_D, bytes_D = np.array([9e3, 21e3, 15e3]), np.array([5000, 12000, 9000])
    gaps = [
        Gap("How to write a custom model field for the database layer", 5000, 1.8, 1.7),
        Gap("Releases", 12000, 1.75, 1.8),
    ]
    apart = [
        Apart("sliding", paired(bits_D, bits_D * [0.98, 1.01, 0.99], bytes_D), gaps),
        Apart("slot", paired(bits_D, bits_D, bytes_D), []),
    ]
    found = Found([first, second], "89abcde", [("slow-owl", "running")])
    published = load_published(REPOSITORY / "records/published.yaml")
    return compare_page(found, Pair(first, second, apart, ["Not compared by document: old-cat."]), published)


class Figures:
    """A private copy of the evaluated experiment's figures, with certificates."""

    def __init__(self, folder: Path, evaluated: Experiment) -> None:
        self.folder = folder
        for stage in STAGES:
            shutil.copytree(evaluated.folder / "artifacts" / stage, folder / "artifacts" / stage)
        shutil.copytree(evaluated.folder / "artifacts/tokens", folder / "artifacts/tokens")
        shutil.copytree(REPOSITORY / "records", folder / "records")
        self.meta = json.loads((evaluated.folder / "artifacts/tokens/meta.json").read_text())
        self.params = json.loads(json.dumps(evaluated.params))
        certify(folder, 1337)

    def add_seeds(self, shifts: dict[int, float]) -> None:
        """Further seeds by what is added to their scores."""
        for seed, shift in shifts.items():
            add_seed(self.folder, seed, shift)
        self.params["seeds"] = [1337, *shifts]

    def change(self, path: str, **figures: Any) -> None:
        """Overwrite figures of an artifact's JSON."""
        file = self.folder / "artifacts" / path
        file.write_text(json.dumps(json.loads(file.read_text()) | figures))

    def on_the_challenges_text(self) -> None:
        """Pretend that every evaluation scored the challenge's validation text with r1150's tokenizer."""
        artifacts = self.folder / "artifacts"
        for path in artifacts.glob("evaluate/*/*/metrics.json"):
            self.change(str(path.relative_to(artifacts)), bytes=151080363, targets=62021632, scored=62021632)

    def on_track(self) -> None:
        """Pretend that every seed was trained, adapted and scored on eight GPUs."""
        artifacts = self.folder / "artifacts"
        for path in (artifacts / "train").glob("*/train.json"):
            environment = json.loads(path.read_text())["environment"] | {"cuda": "12.8", "processes": 8}
            self.change(f"train/{path.parent.name}/train.json", environment=environment)
        for path in [*artifacts.glob("adapt/*/adapt.json"), *artifacts.glob("evaluate/*/*/metrics.json")]:
            self.change(str(path.relative_to(artifacts)), processes=8, on_gpus=True)

    def facts(self) -> Facts:
        """What the stage works out from the folder."""
        (self.folder / "params.yaml").write_text(yaml.safe_dump(self.params))
        params = load_params(self.folder / "params.yaml")
        runs = collect(self.folder / "artifacts", params.seeds, list(params.evaluators))
        return facts(
            runs,
            load_published(self.folder / "records/published.yaml"),
            self.meta,
            report=params.report,
            kept=params.average.kind,
            shipped=params.compress.evaluator,
        )

    def page(self) -> str:
        """The page's HTML, of a run that changed two settings."""
        found = self.facts()
        seeds = [run.seed for run in found.runs]
        reading = read_documents(self.folder / "artifacts", self.meta, seeds, found.shipped.name)
        return page(found, self.meta, reading, MADE)


VOID = {"meta", "br", "link", "img", "input", "hr"}


class Document(HTMLParser):
    """Checks that tags are balanced, and gathers attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.feed(html)
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def values(self, name: str) -> list[str]:
        """All values of an attribute."""
        return [value for _, key, value in self.attributes if key == name]

"""What the README says at first sight holds: published scores, what is legal, the picture, versions, the citation."""

import re
import struct
import tomllib
from statistics import mean
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from test_readme import README

from fairway.params import load_params
from fairway.reporting.comparison import load_published

TABLE = README.partition("| record | published")[2].partition("\n\n")[0]
ROWS = {cells[0]: cells[1:] for line in TABLE.splitlines()[2:] if (cells := [c.strip() for c in line.split("|")[1:-1]])}
PUBLISHED = load_published(REPOSITORY / "records/published.yaml").records
RUN_HERE = [name for name in ROWS if (REPOSITORY / f"records/{name}.yaml").is_file()]


def test_the_table_has_every_record_as_it_was_run() -> None:
    assert set(RUN_HERE) == {path.stem for path in (REPOSITORY / "records").glob("r????.yaml")}


@pytest.mark.parametrize("name", ROWS)
def test_published_figures_are_those_of_the_file(name: str) -> None:
    record = PUBLISHED[name]
    assert ROWS[name][0] == f"{mean(record.bpb(record.evaluator)):.4f}"
    assert ROWS[name][1].startswith("accepted") is (record.status == "accepted")


@pytest.mark.parametrize("name", RUN_HERE)
def test_why_a_score_is_not_legal_is_what_its_settings_do(name: str) -> None:
    """Trained on the validation text, or scored by SLOT that is fitted on what it scores, also inside of TTT."""
    params = load_params(REPOSITORY / f"records/{name}.yaml")
    scored_by = params.evaluator_settings(PUBLISHED[name].evaluator)
    slot: Any = scored_by if PUBLISHED[name].evaluator == "slot" else getattr(scored_by, "slot", None)
    verdict = ROWS[name][1]
    assert verdict.startswith("no: ")
    assert ("SLOT" in verdict) is (slot is not None and slot.fitted_on != "context")
    assert ("trained on the validation text" in verdict) is (
        params.adapt.epochs > 0 and params.adapt.split == "validation"
    )


def test_scores_that_were_seen_here_stand_in_the_benchmarks() -> None:
    results = " ".join((REPOSITORY / "benchmarks/RESULTS.md").read_text(encoding="utf-8").split())
    for name in ("r1150", "r1488"):
        [gap] = re.findall(r"300 steps on one H200, (0\.\d+) below its program", ROWS[name][2])
        assert f"{name} {gap} below" in results
    [theirs, ours] = re.findall(r"bpb of rows, EMA \| (\S+) \| (\S+) \|", results)[0]
    assert f"averaged weights {float(theirs) - float(ours):.3f} below" in ROWS["r1855"][2]


def test_the_picture_is_a_small_png() -> None:
    [(source, drawn)] = re.findall(r'<img src="([^"]+)" width="(\d+)" alt="[^"]{40,}">', README)
    data = (REPOSITORY / source).read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(data) < 200_000
    # Drawn at most as wide as it is: a picture that is stretched has blurred text.
    [width] = struct.unpack(">I", data[16:20])
    assert int(drawn) <= width


def test_tested_versions_are_those_that_are_pinned() -> None:
    table = README.partition("## Tested versions")[2]
    rows = {cells[1].strip(): cells[2:4] for line in table.splitlines() if len(cells := line.split("|")) == 5}
    for column, file in enumerate(("requirements.txt", "requirements-gpu.txt")):
        pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (REPOSITORY / file).read_text(), flags=re.MULTILINE))
        assert re.search(rf"(?<![\d.]){re.escape(pins['torch'])}(?![\d.])", rows["PyTorch"][column])
    assert f"flash-attn-4 {pins['flash-attn-4']};" in rows["attention"][1]


# What version 1.2.0 of the Citation File Format demands, and the keys that it knows of those used here.
REQUIRED = {"cff-version", "message", "title", "authors"}
KNOWN = REQUIRED | {"abstract", "type", "version", "date-released", "license", "keywords"}


def test_the_citation_is_valid_and_tells_the_version_of_the_project() -> None:
    """By https://github.com/citation-file-format/citation-file-format, schema-guide of 1.2.0."""
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(cited) >= REQUIRED
    assert set(cited) <= KNOWN
    assert (cited["cff-version"], cited["type"]) == ("1.2.0", "software")
    # An entity, such as a group of authors, has a name and no family name.
    assert [set(author) for author in cited["authors"]] == [{"name"}]
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    changes = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {cited['version']} – {cited['date-released']}\n" in changes
    assert cited["authors"][0]["name"] in (REPOSITORY / "LICENSE").read_text(encoding="utf-8")

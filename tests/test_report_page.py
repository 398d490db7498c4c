"""The report's page: well formed, complete, and careful with what it claims."""

import json
import math
import re

import pytest
import yaml
from reports import QUANTIZED, Document, Figures, certificate, write_certificate

from fairway.reporting.page import matrices
from fairway.reporting.tables import markdown

HOSTILE = "<script>alert(1)</script>\"'&amp;"


@pytest.mark.parametrize("seeds", [{}, {42: 0.002, 2025: -0.001}])
@pytest.mark.parametrize("record", [None, "r1150"])
def test_the_page_is_well_formed_and_needs_nothing_else(
    one: Figures, seeds: dict[int, float], record: str | None
) -> None:
    one.add_seeds(seeds)
    one.params["report"] = {"record": record, "baseline": record}
    html = one.page()
    document = Document(html)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(document.tags)
    assert not re.search(r"https?:|url\(|@import|//\w", html)
    assert all(value.startswith("#") for value in document.values("href"))
    assert not {"src", "srcset", "action", "onclick", "onload"} & {name for _, name, _ in document.attributes}
    assert "nan" not in html.lower().split()


def test_every_reference_of_the_page_has_its_target(three: Figures) -> None:
    document = Document(three.page())
    ids = document.values("id")
    assert len(ids) == len(set(ids))
    wanted = [name for value in document.values("aria-labelledby") for name in value.split()]
    assert {*wanted, *(value[1:] for value in document.values("href"))} <= set(ids)


def test_each_chart_has_a_title_a_summary_and_its_numbers(three: Figures) -> None:
    figures = re.findall(r'<figure class="chart".*?</figure>', three.page(), re.DOTALL)
    assert len(figures) == 4
    for figure in figures:
        assert re.search(r'<h3 id="(\w+)-title">.+</h3>', figure)
        assert re.search(r'role="img" aria-label="[^"]{40,}"', figure)
        assert figure.count("<polyline") == figure.count("<span><svg")
        assert re.search(r"<details>.*<caption.*<tbody><tr>", figure, re.DOTALL)


def test_an_illegal_headline_is_struck(one: Figures) -> None:
    one.params["compress"]["evaluator"] = "slot"
    html = one.page()
    assert re.search(r"<h1>\s*<s>.*struck, illegal: </span>\d\.\d{4}</s>", html)
    assert "Not a code length: causality, normalisation." in html


def test_hostile_names_arrive_as_text(one: Figures) -> None:
    published = yaml.safe_load((one.folder / "records/published.yaml").read_text())
    published["records"][HOSTILE] = published["records"]["r1150"] | {"status": HOSTILE}
    (one.folder / "records/published.yaml").write_text(yaml.safe_dump(published))
    one.params["report"] = {"record": HOSTILE, "baseline": HOSTILE}
    one.meta["transform"] = HOSTILE
    environment = json.loads((one.folder / "artifacts/train/1337/train.json").read_text())["environment"]
    one.change("train/1337/train.json", environment=environment | {"device": HOSTILE})
    hostile = certificate("slot", failing=("causality",))
    hostile["conditions"]["causality"] |= {"why": HOSTILE, "evidence": {HOSTILE: [HOSTILE], "text": HOSTILE}}
    hostile["conditions"][HOSTILE] = hostile["conditions"]["causality"]
    write_certificate(one.folder, 1337, hostile)
    html = one.page()
    assert "script" not in Document(html).tags
    assert "".join(Document(html).text).count(HOSTILE) >= 6


def test_scores_of_a_part_of_the_held_out_documents_are_labelled_so(one: Figures) -> None:
    assert one.facts().subset is None
    scored = one.meta["val_documents"]
    one.meta["held_out_documents"] = 50_000
    label = f"the first {scored} of 50000 validation documents"
    assert markdown(one.facts()).startswith(f"| bits per byte of {label} | ")
    assert f"of {label}" in one.page()


def test_the_head_says_what_ran_when_and_with_what_changed(one: Figures) -> None:
    html = one.page()
    assert "Laptop default · experiment rapid-lark · 2026-05-01 12:30 UTC" in html
    assert "Changed against params.yaml of commit 0123abc" in html
    assert "<code>slot.steps</code> 5 → <b>24</b>" in html


def test_seconds_of_another_machine_are_not_measured_by_the_tracks_limits(one: Figures) -> None:
    """Only the size fills a meter, no bar has a limit, and no record is claimed."""
    html = one.page()
    assert html.count('class="meter"') == 1
    assert "mark limit" not in html
    assert "600 s are of 8 H100" in html
    one.on_track()
    html = one.page()
    assert html.count('class="meter"') == 3
    assert "mark limit" in html
    assert "training, 600 s" in html
    one.change("evaluate/1337/sliding/metrics.json", processes=2)
    html = one.page()
    assert html.count('class="meter"') == 2
    assert re.search(r"on 2 × [^;]*; the track's 600 s are of 8 H100", html)
    assert re.search(r"Seconds on 8 × [^<]*, scored on 2, by what the track would count them as", html)
    one.change("evaluate/1337/sliding/metrics.json", processes=8, on_gpus=False)
    assert "not all of it on 8 GPUs; the track's 600 s are of 8 H100" in one.page()


def test_a_figure_good_enough_for_a_record_is_one_on_the_tracks_machine_alone(three: Figures) -> None:
    three.on_the_challenges_text()
    three.params["report"]["baseline"] = "r549"
    for seed, bpb in zip(three.params["seeds"], (0.9, 0.9001, 0.9002), strict=True):
        three.change(f"evaluate/{seed}/sliding/metrics.json", val_bpb=bpb)
    assert "this is one" not in three.page()
    assert "a record is made on 8 H100" in three.page()
    three.on_track()
    assert "<strong>this is one</strong>" in three.page()


def test_every_rounded_matrix_has_its_bits_and_its_error(one: Figures) -> None:
    tensors = json.loads((one.folder / QUANTIZED).read_text())["tensors"]
    rounded = {name: tensor for name, tensor in tensors.items() if tensor["bits"] < 16}
    found = {matrix.name: matrix for matrix in matrices(one.facts().runs[0])}
    assert found.keys() == rounded.keys() != set()
    for name, matrix in found.items():
        assert matrix.error**2 == pytest.approx(rounded[name]["mse"])
        assert matrix.weights == math.prod(rounded[name]["shape"])
        assert f"<code>{name}</code>" in one.page()


def test_the_page_has_the_ledger_and_how_often_evaluators_learn(three: Figures) -> None:
    html = three.page()
    table = re.search(r'aria-label="Ledger of time, table".*?</table>', html, re.DOTALL)[0]  # type: ignore[index]
    rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)
    # Its head, the eight kinds of work without adaptation and calibration, three for each evaluator, and the sum.
    assert len(rows) == 1 + 6 + 3 * 3 + 1
    assert all(row.count("<td") == 1 + 3 for row in rows[1:])
    assert '<td data-label="budget">training</td>' in rows[3]
    updates = re.search(r'aria-label="Scores and updates, table".*?</table>', html, re.DOTALL)[0]  # type: ignore[index]
    assert re.search(r"<code>sliding</code></th>(<td[^>]*>[\d,]+</td>)<td[^>]*>0</td>\s*<td[^>]*></td>", updates)
    ttt = three.facts().runs[0].scores["ttt"]
    assert ttt["updates"] == ttt["chunks"] - 1 > 0
    every = f"{ttt['targets'] / ttt['chunks']:,.0f}"
    assert re.search(rf"<code>ttt</code></th>.*\n<td[^>]*>{every}</td></tr>", updates)

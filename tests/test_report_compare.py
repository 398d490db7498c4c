"""The comparison: what is read of stored experiments, the test over documents, and the page."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Experiment, git
from hypothesis import given
from hypothesis import strategies as st
from reports import Document, comparison_page

from fairway.reporting.compare_page import gap_bars
from fairway.reporting.comparison import paired
from fairway.reporting.made import made
from fairway.reporting.stored_experiments import Apart, Gap, same_documents
from fairway.reporting.tables import scores_of
from fairway.reporting.versions import Change, Version, changes
from fairway.runtime.errors import UserError

PAGE = "results/compare.html"


@pytest.fixture(scope="module")
def page(compared: Experiment) -> str:
    """The page of it, made as `make compare` does."""
    assert "3 versions beside 8 published records" in compared.stage("compare").stdout
    return _page(compared)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, reproduced: Experiment) -> Experiment:
    """A clone that ran the pipeline, then an experiment with another SLOT, which the workspace now holds; a second one
    is queued."""
    folder = tmp_path_factory.mktemp("compared") / "clone"
    shutil.copytree(reproduced.folder, folder, symlinks=True)
    made = Experiment(folder)
    made.dvc("dvc exp run --name four -S slot.steps=4", "dvc exp run --queue --name later -S slot.steps=9")
    return made


@pytest.fixture
def cloned(tmp_path: Path, reproduced: Experiment) -> Experiment:
    """A clone in which nothing ran: git has its figures, and nobody its scores of single tokens."""
    git(tmp_path, "clone", "-q", str(reproduced.folder), "clone")
    return Experiment(tmp_path / "clone")


def _page(made: Experiment) -> str:
    html = (made.folder / PAGE).read_text()
    Document(html)
    return html


def _row(html: str, name: str) -> str:
    return re.search(rf"<tr><th scope=\"row\"><b>{name}</b>.*?</tr>", html, re.DOTALL)[0]  # type: ignore[index]


def test_an_experiment_stands_beside_the_workspace_the_commit_and_the_records(compared: Experiment, page: str) -> None:
    names = re.findall(r'<tr><th scope="row"><b>(.*?)</b>', page)
    assert names[:3] == ["workspace", "four", "master"]
    assert {"r1150", "r1172", "r1488", "r1958"} <= set(names[3:])
    summary = json.loads((compared.folder / "results/summary.json").read_text())
    [slot] = [name for name in summary if name.startswith("slot_bpb")]
    for name in ("workspace", "four"):
        assert "<code>slot.steps</code> 4" in _row(page, name)
        assert f"{summary[slot]:.4f}" in _row(page, name)
        assert f"{summary['artifact_bytes']:,}" in _row(page, name)
    assert "slot.steps" not in _row(page, "master")
    assert f"{summary[slot]:.4f}" not in _row(page, "master")
    assert "not stored" not in page
    assert '<p class="note">later is queued.</p>' in page
    # All were trained alike, so that their curves are one line.
    assert page.count("<polyline") == 1
    assert "workspace, four, master" in page


def test_the_workspace_is_compared_by_document_with_the_first_version_of_other_scores(
    compared: Experiment, page: str
) -> None:
    assert "<b>master</b> against <b>workspace</b>" in page
    # SLOT alone has changed.
    assert page.count("The same scores for all 4 documents.") == 2
    assert page.count("Student's paired test") == 1
    bars = re.search(r'<ul class="bars" aria-label="Difference by document, slot">.*?</ul>', page, re.DOTALL)
    assert bars is not None
    assert bars[0].count("<li>") == 4
    metrics = json.loads((compared.folder / "artifacts/evaluate/1337/slot/metrics.json").read_text())
    shown = float(re.search(r"<p>([+−][\d.]+) bits per byte", page)[1].replace("−", "-"))  # type: ignore[index]
    before = json.loads(git_show(compared, "HEAD:results/summary.json"))
    [was] = [value for name, value in before.items() if name.startswith("slot_bpb")]
    assert shown == pytest.approx(was - metrics["val_bpb"], abs=2e-5)


def git_show(made: Experiment, path: str) -> str:
    return made.run("git", "show", path).stdout


def test_two_versions_may_be_named(compared: Experiment) -> None:
    compared.stage("compare", "workspace", "four")
    html = _page(compared)
    assert "<b>four</b> against <b>workspace</b>" in html
    assert html.count("The same scores for all 4 documents.") == 3
    fault = compared.fails("compare", "workspace", "five")
    assert fault == "error: no version 'five'; expected two of: workspace, four, master"
    assert "usage: python -m stages.compare [FIRST SECOND]; found: four" in compared.fails("compare", "four")


def test_results_and_artifacts_of_different_runs_are_not_compared(compared: Experiment) -> None:
    """As after `git checkout HEAD -- results dvc.lock` alone: the artifacts are still those of the experiment."""
    summary = compared.folder / "results/summary.json"
    of_experiment = summary.read_text()
    summary.write_text(git_show(compared, "HEAD:results/summary.json"))
    try:
        printed = compared.stage("compare").stdout
    finally:
        summary.write_text(of_experiment)
    fault = "Not compared by document: workspace: artifacts/evaluate and results/ are of different runs; `dvc checkout`"
    assert printed.count(fault) == 1
    assert "The same scores" not in _page(compared)


def test_a_clone_without_experiments_says_how_to_make_one_and_what_it_lacks(cloned: Experiment) -> None:
    printed = cloned.stage("compare", "master", "workspace").stdout
    assert "2 versions beside 8 published records" in printed
    html = _page(cloned)
    assert "<code>dvc exp run -S slot.steps=4</code> makes one" in html
    assert "workspace: no results/times.json." in html
    assert "master: no results/times.json in git, nor in DVC&#39;s cache or remote." in html
    assert _row(html, "workspace").count("not stored") == 2
    line = "Not compared by document: master: no artifacts/tokens in git, nor in DVC's cache or remote."
    assert line in printed
    assert line.replace("'", "&#39;") in html


def test_a_report_is_headed_by_what_dvc_knows_of_its_run(
    compared: Experiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In an experiment by its name; settings beside the commit, beside the record that is named, or beside nothing."""
    assert " · Laptop default · experiment four · 2" in (compared.folder / "results/report.html").read_text()
    monkeypatch.chdir(compared.folder)
    found = made("mine", None)
    commit = compared.run("git", "rev-parse", "HEAD").stdout[:7]
    assert (found.name, found.experiment, found.against) == ("mine", None, f"params.yaml of commit {commit}")
    assert found.changes == [Change("slot.steps", "2", "4")]
    found = made("mine", "r1172")
    assert found.against == "records/r1172.yaml"
    assert Change("slot.steps", "8", "4") in found.changes
    assert made("mine", "r549").against == f"params.yaml of commit {commit}"
    monkeypatch.chdir(tmp_path)
    assert (made("mine", None).against, made("mine", None).changes) == (None, [])


def test_there_must_be_a_repository(experiment: Experiment) -> None:
    shutil.copytree(Path(__file__).parents[1] / "records", experiment.folder / "records")
    assert "no git and DVC repository here" in experiment.fails("compare")


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    html = comparison_page()
    document = Document(html)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(document.tags)
    assert not re.search(r"https?:|url\(|@import|//\w", html)
    assert all(value.startswith("#") for value in document.values("href"))
    ids = document.values("id")
    assert len(ids) == len(set(ids))
    wanted = [name for value in document.values("aria-labelledby") for name in value.split()]
    assert {*wanted, *(value[1:] for value in document.values("href"))} <= set(ids)


def test_the_page_tells_what_is_missing_running_and_illegal() -> None:
    html = comparison_page()
    assert '<p class="note">slow-owl is running.</p>' in html
    assert '<p class="note">rapid-lark: no seconds.</p>' in html
    assert re.search(r"<s>.*struck, illegal: </span>1\.5833</s>", _row(html, "workspace"))
    assert html.count("<polyline") == 2


def test_bars_lead_from_the_middle_to_where_a_document_has_gone() -> None:
    gaps = [Gap("a", 10, 1.0, 1.2), Gap("b", 10, 1.0, 0.9), Gap("c", 10, 1.0, 1.0)]
    drawn = gap_bars(Apart("sliding", paired(np.ones(3), np.ones(3), np.ones(3)), gaps))
    assert [(bar.start, bar.width, bar.tone) for bar in drawn] == [
        (50, 50, "worsened"),
        (25, 25, "improved"),
        (50, 0, "improved"),
    ]
    assert [bar.value for bar in drawn] == ["+0.2000", "\u22120.1000", "+0.0000"]


# scipy.stats.ttest_rel(second, first).pvalue of SciPy 1.17.1; documents of the same length count the same there too
@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        ([10, 20, 30, 41], [9, 18, 31, 38], 0.23944259863600298),
        ([1, 2], [1.5, 2.2], 0.25776211681831307),
        ([5, 5, 5, 5, 5], [6, 7, 5.5, 5, 4.9], 0.1512331469434043),
    ],
)
def test_the_paired_test_agrees_with_scipy(first: list[float], second: list[float], p: float) -> None:
    found = paired(np.array(first, float), np.array(second, float), np.full(len(first), 10))
    assert found.p == pytest.approx(p, rel=1e-9)
    assert found.gap_bpb == pytest.approx((sum(second) - sum(first)) / (10 * len(first)))


bits = st.lists(st.tuples(st.floats(1, 1e4), st.floats(1, 1e4), st.integers(1, 9000)), min_size=1, max_size=8)


@given(bits)
def test_the_other_way_round_only_the_sign_changes(documents: list[tuple[float, float, int]]) -> None:
    first, second, sizes = (np.array(column) for column in zip(*documents, strict=True))
    there, back = paired(first, second, sizes), paired(second, first, sizes)
    assert (there.gap_bpb, there.error_bpb, there.p) == (-back.gap_bpb, back.error_bpb, back.p)
    assert (there.better, there.worse) == (back.worse, back.better)
    assert there.p is None or 0 <= there.p <= 1
    assert (there.p is None) == (len(documents) < 2 or there.better + there.worse == 0)


def test_a_gap_that_all_documents_share_is_certain_whatever_their_lengths() -> None:
    sizes = np.array([100, 5000, 60_000, 900])
    first = np.array([300.0, 9000.0, 80_000.0, 2000.0])
    shared = paired(first, first + 0.01 * sizes, sizes)
    assert (shared.gap_bpb, shared.better, shared.worse) == (pytest.approx(0.01), 0, 4)
    assert shared.p is not None
    assert shared.p < 1e-20
    mixed = paired(first, first + np.array([0.5, -0.4, 0.3, 0.1]) * sizes, sizes)
    assert mixed.p is not None
    assert mixed.p > 0.05


def test_one_document_and_equal_scores_are_not_tested() -> None:
    one, two, size = np.array([3.0]), np.array([4.0]), np.array([8])
    assert (paired(one, two, size).p, paired(one, two, size).gap_bpb) == (None, 0.125)
    same = np.array([3.0, 4.0])
    assert paired(same, same, np.array([8, 8])).p is None


def test_only_the_last_document_may_be_cut() -> None:
    assert same_documents(np.array([5, 7, 9]), np.array([5, 7, 9])).tolist() == [0, 1, 2]
    assert same_documents(np.array([5, 7, 9]), np.array([5, 7, 4])).tolist() == [0, 1]
    assert same_documents(np.array([5, 7]), np.array([5, 7, 4])).tolist() == [0, 1]
    assert same_documents(np.array([5, 0, 9]), np.array([5, 0, 9])).tolist() == [0, 2]
    for other in ([5, 6, 9], [4, 7, 9], [1]):
        with pytest.raises(UserError, match="different texts"):
            same_documents(np.array([5, 7, 9]), np.array(other))


def test_changes_name_the_whole_key() -> None:
    before: dict[str, Any] = {"slot": {"steps": 5, "lr": 3.0e-3}, "seeds": [1337], "gone": None, "qat": None}
    after: dict[str, Any] = {"slot": {"steps": 24, "lr": 3.0e-3}, "seeds": [1337, 42], "qat": {"bits": 6}}
    assert changes(before, after) == [
        Change("slot.steps", "5", "24"),
        Change("seeds", "[1337]", "[1337, 42]"),
        Change("qat.bits", None, "6"),
        Change("gone", "null", None),
        Change("qat", "null", None),
    ]
    assert changes(before, before) == []


def test_settings_that_are_none_are_refused_with_version_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for text, told in [("seeds: [1\n", "not valid YAML: line 2: "), ("- 1\n", "expected a mapping of sections")]:
        Path("params.yaml").write_text(text)
        with pytest.raises(UserError, match=f"^the workspace: params.yaml: {told}"):
            Version("the workspace", None).settings()


def test_scores_are_told_from_other_figures() -> None:
    summary = {"trained_bpb": 1.0, "sliding_512_bpb": 1.1, "slot_bpb_illegal": 1.2, "my_bpb_unproven": 1.3}
    assert scores_of(summary | {"xz_bpb": 2.0, "bpb_std": 0.1, "artifact_bytes": 5, "p_beats_baseline": 1.0}) == {
        "sliding_512": (1.1, "legal"),
        "slot": (1.2, "illegal"),
        "my": (1.3, "unproven"),
    }

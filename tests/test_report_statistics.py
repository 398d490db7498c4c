"""Significance, published figures, certificates over seeds, and the geometry of charts: the report's arithmetic."""

import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from reports import certificate, write_certificate

from fairway.evaluation.registry import is_evaluator
from fairway.reporting.budgets import Budget
from fairway.reporting.charts import BOTTOM, TOP, Line, plot, ticks
from fairway.reporting.comparison import WEIGHTS, Published, load_published, named_record, welch
from fairway.reporting.runs import PARTS, Certificate, Score, broken, load_certificate, profile, spread, standing, worst
from fairway.reporting.tables import size_parts
from fairway.runtime.errors import UserError

PUBLISHED = REPOSITORY / "records/published.yaml"
# Means and sample deviations of the reported figures as worked out from the logs (records.md 2).
PUBLISHED_BPB = {
    "r549": (1.11937967, 0.00058043),
    "r1019": (1.11473509, 0.00035387),
    "r1150": (1.11512332, 0.00009983),
    "r1172": (1.10149149, 0.00112843),
    "r1488": (0.82646827, 0.00296656),
    "r1493": (1.08100288, 0.00019680),
    "r1855": (1.06107587, 0.00110608),
    "r1958": (1.01354700, 0.00038162),
}
R1150 = [1.11514996, 1.11501287, 1.11520712]
R549 = [1.11922988, 1.12002032, 1.11888882]
samples = st.lists(st.floats(0.5, 2.0), min_size=2, max_size=5)


@pytest.fixture(scope="module")
def published() -> Published:
    return load_published(PUBLISHED)


def test_every_published_figure_is_of_weights_or_of_an_evaluator(published: Published) -> None:
    for record in published.records.values():
        assert is_evaluator(record.evaluator)
        for seed in record.seeds.values():
            assert all(is_evaluator(name) for name in {*seed.bpb, *seed.eval_s} - {*WEIGHTS, "adapt"})


# scipy.stats.ttest_ind(lower + margin, higher, equal_var=False, alternative="less").pvalue of SciPy 1.17.1
@pytest.mark.parametrize(
    ("lower", "higher", "margin", "expected"),
    [
        (R1150, R549, 0.0, 0.002535224317399937),
        (R1150, R549, 0.00296, 0.028491987701234917),
        ([1.0, 2.0, 3.0], [4.0, 5.0, 7.0], 0.0, 0.020957258735727017),
        ([1.0, 2.0, 3.0], [4.0, 5.0, 7.0], 4.5, 0.8302218072533802),
        ([1.1, 1.2], [1.15, 1.3, 1.25, 1.2], 0.05, 0.3585958122867523),
        ([2.0, 1.0], [1.0, 1.5], 0.0, 0.6441386043831652),
    ],
)
def test_welch_agrees_with_scipy(lower: list[float], higher: list[float], margin: float, expected: float) -> None:
    assert welch(lower, higher, margin) == pytest.approx(expected, rel=1e-9)


@given(samples, samples)
def test_the_two_directions_of_a_test_share_all_the_chance(a: list[float], b: list[float]) -> None:
    if len({*a, *b}) > 2:
        assert welch(a, b) + welch(b, a) == pytest.approx(1.0)


def test_seeds_without_any_deviation_are_decided_by_their_gap() -> None:
    assert welch([1.0, 1.0], [1.1, 1.1]) == 0.0
    assert welch([1.0, 1.0], [1.1, 1.1], 0.2) == 1.0


def test_a_single_seed_has_no_deviation() -> None:
    assert spread([1.5]).std is None
    assert spread([1.0, 2.0, 3.0]).std == 1.0


@pytest.mark.parametrize("name", PUBLISHED_BPB)
def test_published_seeds_give_the_published_mean(name: str, published: Published) -> None:
    record = published.records[name]
    values = record.bpb(record.evaluator)
    assert (round(mean(values), 8), round(stdev(values), 8)) == PUBLISHED_BPB[name]


def test_published_losses_are_the_scores_in_other_units(published: Published) -> None:
    for record in published.records.values():
        for seed in record.seeds.values():
            bits = seed.val_loss / math.log(2) * record.val_targets / record.val_bytes
            assert bits == pytest.approx(seed.val_bpb, rel=2e-5)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("val_bpp", 1.0, "records.r1150.seeds.42.val_bpp: unknown key"),
        ("code_bytes", 1, "records.r1150.seeds.42: artifact_bytes (15956372) must be model_bytes + code_bytes"),
        ("steps", "many", "records.r1150.seeds.42.steps: Input should be a valid integer (found 'many')"),
    ],
)
def test_faults_of_the_published_file_name_their_key(tmp_path: Path, key: str, value: Any, expected: str) -> None:
    content = yaml.safe_load(PUBLISHED.read_text())
    content["records"]["r1150"]["seeds"][42][key] = value
    (tmp_path / "published.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError) as fault:
        load_published(tmp_path / "published.yaml")
    assert expected in str(fault.value)


def test_an_unknown_baseline_lists_the_known_ones(published: Published) -> None:
    with pytest.raises(UserError, match=r"report.baseline: no record 'r99' .*r1150"):
        named_record(published, "baseline", "r99")


def test_an_evaluator_is_illegal_if_it_is_so_on_any_seed() -> None:
    good = Certificate.model_validate(certificate("slot"))
    doubtful = Certificate.model_validate(certificate("slot", unproven=("decoder",)))
    bad = Certificate.model_validate(certificate("slot", failing=("causality",), unproven=("decoder",)))
    assert [standing(found) for found in ([good], [good, doubtful], [good, doubtful, bad])] == [
        "legal",
        "unproven",
        "illegal",
    ]
    assert broken([good, bad]) == ["causality"]
    found = worst([good, doubtful], "decoder")
    assert found is not None
    assert found.verdict == "unproven"
    assert worst([good], "no such condition") is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"legal": "perhaps"}, "legal"),
        ({"conditions": {}}, "conditions"),
        ({"evaluator": "ttt"}, "a certificate of 'ttt', expected 'slot'"),
    ],
)
def test_a_damaged_certificate_is_named(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    path = write_certificate(tmp_path, 1, certificate("slot"))
    path.write_text(json.dumps(certificate("slot") | change))
    with pytest.raises(UserError, match=expected) as fault:
        load_certificate(path, "slot", "python -m stages.certify 1 slot")
    assert str(path) in str(fault.value)


@given(st.lists(st.floats(0, 20), min_size=1, max_size=400))
def test_parts_of_the_stream_hold_all_of_the_loss(nats: list[float]) -> None:
    means = profile(np.array(nats))
    assert len(means) == min(PARTS, len(nats))
    bounds = np.linspace(0, len(nats), len(means) + 1).astype(int)
    assert np.dot(means, np.diff(bounds)) == pytest.approx(sum(nats))


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_are_few_and_within_the_axis(low: float, width: float, most: int) -> None:
    found, high = ticks(low, low + width, most), low + width
    room = 1e-6 * (abs(low) + width)
    assert 1 <= len(found) <= most
    assert found == sorted(set(found))
    assert low - room <= found[0] <= found[-1] <= high + room


def test_lines_fill_their_drawing() -> None:
    drawn = plot([Line("a", [(0, 2.0), (50, 1.0), (100, 1.5)], 1, dots=True), Line("b", [(20, 1.2)], 2)])
    dots = drawn.strokes[0].dots
    assert [dot.x for dot in dots] == [0, 50, 100]
    assert TOP < dots[0].y < dots[2].y < dots[1].y < BOTTOM
    assert [text for _, text in drawn.y_ticks] == ["1.0", "1.2", "1.4", "1.6", "1.8", "2.0"]


def test_sizes_that_do_not_add_up_are_refused() -> None:
    size = {
        "classes": {"mlp": {"bytes": 10, "bits_per_weight": 5.0}},
        "parts": {"mlp": 10, "float16": 2, "header": 1, "train_gpt.py": 3},
    }
    assert [part.size_bytes for part in size_parts(size | {"total_bytes": 16})] == [10, 2, 1, 3]
    with pytest.raises(AssertionError, match="every byte"):
        size_parts(size | {"total_bytes": 17})


def test_a_limit_is_kept_up_to_the_last_unit() -> None:
    assert Budget("size", 16_000_000, 16_000_000, "bytes").within
    assert not Budget("training", 600.1, 600.0, "s").within


def test_an_evaluator_of_ones_own_needs_no_entry_in_the_report() -> None:
    assert Score("tempered", [1.5], "legal", []).title == "an evaluator of your own"
    assert Score("sliding_512", [1.5], "legal", []).title == "sliding window"
    assert Score("slotted", [1.5], "legal", []).title == "an evaluator of your own"
    assert Score("tempered", [1.5], "illegal", ["score_first"]).remark == "illegal: score first"

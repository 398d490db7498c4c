"""The report on real small artifacts: figures over seeds, verdicts, the test against a record, and the page."""

import csv
import json
import math
import re
import shutil
from pathlib import Path
from statistics import mean, stdev

import pytest
import yaml
from conftest import REPOSITORY, Experiment
from reports import QUANTIZED, Figures, certificate, certify, write_certificate

from fairway.reporting import tables
from fairway.reporting.budgets import Entry, budgets, eval_s, ledger, train_s
from fairway.reporting.charts import time_bars
from fairway.reporting.comparison import compare, load_published, welch
from fairway.reporting.facts import Facts
from fairway.reporting.tables import markdown, summarize, time_table, times, timing
from fairway.runtime.errors import UserError


def test_the_stage_writes_what_dvc_and_people_read(one: Figures, evaluated: Experiment, tmp_path: Path) -> None:
    experiment = Experiment(_folder(tmp_path / "run"))
    shutil.copytree(evaluated.folder / "artifacts", experiment.folder / "artifacts")
    experiment.copy_code()
    certify(experiment.folder, 1337)
    printed = experiment.stage("report").stdout
    results = {path.name for path in (experiment.folder / "results").iterdir()}
    tracked = {"summary.json", "report.md", "curve.csv", "positions.csv", "sizes.csv"}
    assert results == tracked | {"report.html", "times.json"}
    table = (experiment.folder / "results/report.md").read_text()
    assert printed.strip() == f"{table}\n{timing(one.facts())} The page to look at: results/report.html"
    seconds = json.loads((experiment.folder / "results/times.json").read_text())
    assert seconds == times(one.facts()) | {"ledger": time_table(one.facts().runs)}
    # But for the head, which says what made it, and when.
    below = [html.partition('<dl class="cards">')[2] for html in (_page(experiment), one.page())]
    assert below[0] == below[1] != ""
    assert "· Laptop default ·" in _page(experiment)


def _page(experiment: Experiment) -> str:
    return (experiment.folder / "results/report.html").read_text()


def _as_git_tracks_it(found: Facts) -> tuple[str, ...]:
    """The texts of results/ that git tracks."""
    return (
        json.dumps(summarize(found)),
        markdown(found),
        tables.curve(found),
        tables.positions(found),
        tables.sizes(found),
    )


def test_a_run_that_only_took_longer_elsewhere_changes_no_file_that_git_tracks(one: Figures) -> None:
    one.change("adapt/1337/adapt.json", epochs=2, split="train", adapt_s=5.0)
    one.change("quantize/1337/quantize.json", calibration="train", calibration_s=2.0, quantize_s=3.0)
    here, page_here, times_here = _as_git_tracks_it(one.facts()), one.page(), times(one.facts())
    elsewhere = {"device": "another", "commit": "0123abc", "torch": "9.9", "processes": 8}
    environment = json.loads((one.folder / "artifacts/train/1337/train.json").read_text())["environment"]
    one.change("train/1337/train.json", wall_s=77.7, start_s=6.6, compile_s=5.5, step_ms=7.7, peak_memory_bytes=7)
    one.change("train/1337/train.json", environment=environment | elsewhere)
    one.change("adapt/1337/adapt.json", adapt_s=55.5)
    one.change("quantize/1337/quantize.json", calibration_s=44.4, quantize_s=33.3)
    one.change("compress/1337/compress.json", pack_s=22.2, trial_s=11.1)
    for evaluator in one.params["evaluators"]:
        one.change(f"evaluate/1337/{evaluator}/metrics.json", load_s=8.8, eval_s=88.8)
        one.change(f"certify/1337/{evaluator}/certificate.json", certify_s=99.9)
    assert _as_git_tracks_it(one.facts()) == here
    assert one.page() != page_here
    assert times(one.facts()) == {"train_s": 77.7 + 55.5 + 44.4, "eval_s": 88.8}
    assert times(one.facts()) != times_here
    assert timing(one.facts()) == "Training took 178 s, evaluation with `sliding` 89 s."


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_the_summary_is_small_and_says_what_is_illegal(three: Figures) -> None:
    summary = summarize(three.facts())
    assert len(summary) <= 12
    assert {"trained_bpb", "sliding_bpb", "ttt_bpb", "slot_bpb_illegal", "bpb_std", "artifact_bytes"} <= set(summary)
    assert "slot_bpb" not in summary


def test_every_evaluator_of_the_pipeline_fits_into_the_summary(three: Figures) -> None:
    three.on_the_challenges_text()
    three.params["report"] = {"record": "r1150", "baseline": "r549"}
    for seed in three.params["seeds"]:
        for name in ("lora_ttt", "streaming"):
            for stage in ("evaluate", "certify"):
                folder = three.folder / f"artifacts/{stage}/{seed}"
                shutil.copytree(folder / "sliding", folder / name)
            write_certificate(three.folder, seed, certificate(name, unproven=("decoder",)))
    lora = yaml.safe_load((REPOSITORY / "records/r1958-lora-ttt.yaml").read_text())["lora_ttt"]
    three.params |= {"lora_ttt": lora, "streaming": {"block_tokens": 64, "lanes": 1, "within_documents": False}}
    three.params["evaluators"] += ["lora_ttt", "streaming"]
    found = summarize(three.facts())
    assert len(found | times(three.facts())) == 12
    assert "lora_ttt_bpb_unproven" in found


def test_scores_are_means_and_sample_deviations_over_seeds(three: Figures) -> None:
    sliding = three.facts().scores[0]
    base = sliding.bpb[0]
    expected = [base, base + 0.002, base - 0.001]
    assert sliding.spread.mean == pytest.approx(mean(expected))
    assert sliding.spread.std == pytest.approx(stdev(expected))


def test_a_missing_certificate_names_the_command_that_makes_it(one: Figures) -> None:
    (one.folder / "artifacts/certify/1337/ttt/certificate.json").unlink()
    with pytest.raises(UserError, match=r"certificate\.json: no such file; `python -m stages\.certify 1337 ttt`"):
        one.facts()


def test_weights_that_training_did_not_keep_are_named(one: Figures) -> None:
    one.change("train/1337/train.json", val_bpb_by_weights={"last": 2.0})
    with pytest.raises(UserError, match=r"train/1337/train\.json: no ema_[\d.]+, .* among last"):
        one.facts()


def test_the_table_strikes_what_is_illegal_and_only_that(three: Figures) -> None:
    rows = {row.split("`")[1]: row for row in markdown(three.facts()).splitlines() if row.startswith("| `")}
    assert "*(illegal: causality, normalisation)*" in rows["slot"]
    assert rows["slot"].count("~~") == 2 * 4
    assert "~~" not in rows["sliding"] + rows["ttt"] + rows["xz"]


def test_legality_is_the_certificates_business_not_the_names(one: Figures) -> None:
    write_certificate(one.folder, 1337, certificate("slot"))
    write_certificate(one.folder, 1337, certificate("ttt", failing=("score_first",)))
    table = markdown(one.facts())
    assert re.search(r"`slot`.*\| \d\.\d{4} \|", table)
    assert re.search(r"`ttt`.*\*\(illegal: score first\)\* \| ~~\d\.\d{4}~~ \|", table)


def test_adaptation_counts_with_the_split_it_trains_on(one: Figures) -> None:
    one.change("adapt/1337/adapt.json", epochs=2, split="validation", adapt_s=100.0)
    run = one.facts().runs[0]
    assert eval_s(run, "sliding") == round(run.scores["sliding"]["eval_s"] + 100.0, 3)
    assert train_s(run) == run.train["wall_s"]
    assert [budget.name for budget in budgets([run], "sliding")] == ["size", "training", "evaluation"]


def test_each_budget_is_judged_by_the_processes_that_did_its_work(one: Figures) -> None:
    """Training and evaluation may run with different numbers of processes; adaptation counts with its split."""

    def comparable() -> list[str]:
        return [budget.name for budget in one.facts().budgets if budget.comparable]

    assert comparable() == ["size"]
    one.on_track()
    assert comparable() == ["size", "training", "evaluation"]
    one.change("evaluate/1337/sliding/metrics.json", processes=2)
    found = one.facts()
    assert comparable() == ["size", "training"]
    assert not found.on_track
    assert {bar.label: bar.mark is not None for bar in time_bars(found)} == {
        "training": True,
        "evaluation, sliding": False,
        "evaluation, ttt": True,
        "evaluation, slot": True,
    }
    one.on_track()
    one.change("evaluate/1337/sliding/metrics.json", on_gpus=False)
    assert comparable() == ["size", "training"]
    one.on_track()
    one.change("adapt/1337/adapt.json", epochs=2, split="validation", processes=4)
    assert comparable() == ["size", "training"]
    one.change("adapt/1337/adapt.json", split="train")
    assert comparable() == ["size", "evaluation"]


def _time_as_told(figures: Figures) -> None:
    """Give every kind of work seconds of its own, of one evaluator."""
    figures.params["evaluators"] = ["ttt"]
    figures.params["compress"]["evaluator"] = "ttt"
    figures.change("train/1337/train.json", start_s=1.0, compile_s=2.0, wall_s=4.0)
    figures.change("adapt/1337/adapt.json", epochs=2, split="train", adapt_s=8.0)
    figures.change("quantize/1337/quantize.json", calibration="train", calibration_s=16.0, quantize_s=32.0)
    figures.change("compress/1337/compress.json", pack_s=64.0, trial_s=128.0)
    figures.change("evaluate/1337/ttt/metrics.json", load_s=256.0, eval_s=256.0 + 512.0)
    figures.change("certify/1337/ttt/certificate.json", certify_s=1024.0)


def test_the_ledger_lists_all_work_once_with_the_budget_that_it_counts_against(one: Figures) -> None:
    _time_as_told(one)
    (run,) = one.facts().runs
    entries = ledger([run])
    assert entries == [
        Entry("start-up of training", [1.0], None),
        Entry("compilation for training", [2.0], None),
        Entry("training", [4.0], "training"),
        Entry("adaptation to training text", [8.0], "training"),
        Entry("calibration on training text", [16.0], "training"),
        Entry("quantization", [32.0], None),
        Entry("packing", [64.0], None),
        Entry("trial of the packed files", [128.0], None),
        Entry("unpacking", [256.0], "evaluation", "ttt"),
        Entry("evaluation", [512.0], "evaluation", "ttt"),
        Entry("certificate", [1024.0], None, "ttt"),
    ]
    assert (train_s(run), eval_s(run, "ttt")) == (4.0 + 8.0 + 16.0, 256.0 + 512.0)


def test_only_training_text_makes_adaptation_and_calibration_count_as_training(one: Figures) -> None:
    _time_as_told(one)
    one.change("adapt/1337/adapt.json", split="validation")
    one.change("quantize/1337/quantize.json", calibration="generated")
    (run,) = one.facts().runs
    assert (train_s(run), eval_s(run, "ttt")) == (4.0, 8.0 + 256.0 + 512.0)
    assert Entry("calibration on generated text", [16.0], None) in ledger([run])
    one.change("adapt/1337/adapt.json", epochs=0)
    one.change("quantize/1337/quantize.json", calibration=None)
    (run,) = one.facts().runs
    assert [entry.work for entry in ledger([run]) if entry.work.startswith(("adapt", "calib"))] == []
    assert (train_s(run), eval_s(run, "ttt")) == (4.0, 256.0 + 512.0)


def test_every_stage_that_the_ledger_lists_writes_its_seconds(one: Figures) -> None:
    """As the stages themselves wrote them: here nothing was compiled, adapted or calibrated."""
    entries = ledger(one.facts().runs)
    assert [entry.work for entry in entries if entry.seconds == [0.0]] == ["compilation for training"]
    assert all(seconds >= 0 for entry in entries for seconds in entry.seconds)


def test_figures_of_an_older_version_name_the_stage_to_run_again(one: Figures) -> None:
    path = one.folder / "artifacts/quantize/1337/quantize.json"
    older = json.loads(path.read_text())
    del older["quantize_s"]
    path.write_text(json.dumps(older))
    with pytest.raises(UserError, match=r"quantize\.json: no quantize_s; run `python -m stages\.quantize 1337` again"):
        one.facts()


def test_dvc_shows_two_figures_of_times_and_not_the_ledger(one: Figures, tmp_path: Path) -> None:
    experiment = Experiment(_folder(tmp_path / "run"))
    (experiment.folder / "results").mkdir()
    found = one.facts()
    content = times(found) | {"ledger": time_table(found.runs)}
    (experiment.folder / "results/times.json").write_text(json.dumps(content))
    _, printed = experiment.dvc("dvc init --no-scm --quiet", "dvc metrics show --json results/times.json")
    shown = json.loads(printed)
    assert shown[""]["data"]["results/times.json"]["data"] == times(found)


def test_the_ladder_leads_from_trained_to_quantized_weights_to_windows_to_what_adapts(one: Figures) -> None:
    trained, averaged, quantized, sliding, *adaptive = one.facts().rungs
    assert (trained.before, averaged.before, quantized.before) == (None, trained.bpb, averaged.bpb)
    assert quantized.bpb == json.loads((one.folder / QUANTIZED).read_text())["quantized_rows_bpb"]
    assert (sliding.name, sliding.before) == ("sliding", quantized.bpb)
    assert [(rung.name, rung.before) for rung in adaptive] == [("ttt", sliding.bpb), ("slot", sliding.bpb)]
    one.params["average"]["method"] = "last"
    assert [rung.name for rung in one.facts().rungs] == ["trained", "quantized", "sliding", "ttt", "slot"]


def test_without_sliding_windows_evaluators_start_from_the_quantized_weights(one: Figures) -> None:
    one.params["evaluators"] = ["ttt"]
    one.params["compress"]["evaluator"] = "ttt"
    *_, quantized, ttt = one.facts().rungs
    assert ttt.before == quantized.bpb


def test_quantized_rows_lie_between_the_trained_ones_and_what_windows_win_back(one: Figures) -> None:
    """On this network 6 bits cost next to nothing, and longer windows help a little."""
    *_, averaged, quantized, sliding, _, _ = one.facts().rungs
    assert quantized.bpb == pytest.approx(averaged.bpb, abs=2e-3)
    assert quantized.bpb > sliding.bpb


def test_published_levels_join_the_ladder_only_if_the_text_is_theirs(one: Figures) -> None:
    one.params["report"]["record"] = "r1150"
    assert {rung.published for rung in one.facts().rungs} == {None}
    one.on_the_challenges_text()
    assert one.facts().rungs[0].published == pytest.approx((1.1379 + 1.1377 + 1.1380) / 3)


def test_published_seeds_against_a_baseline_pass_the_rule_as_they_should(three: Figures) -> None:
    """r1150's own figures: 0.0072 nats below r549's, but too few seeds to say so of 0.005 at p < 0.01."""
    three.on_the_challenges_text()
    record = load_published(REPOSITORY / "records/published.yaml").records
    for seed, bpb in zip(three.params["seeds"], record["r1150"].bpb("ttt"), strict=True):
        three.change(f"evaluate/{seed}/ttt/metrics.json", val_bpb=bpb)
    found = three.facts()
    comparison = compare(found.scores[1], found.runs, "r549", record["r549"])
    margin = 0.005 * 62021632 / 151080363 / math.log(2)
    assert comparison.gap_nats == pytest.approx(1.89002068 - 1.88283403, abs=2e-5)
    assert comparison.p_beats == pytest.approx(welch(record["r1150"].bpb("ttt"), record["r549"].bpb("ttt"), margin))
    assert comparison.p_better is not None
    assert comparison.p_beats is not None
    assert comparison.p_better < 0.01 < comparison.p_beats
    assert not comparison.beats


def test_an_illegal_score_beats_no_record(three: Figures) -> None:
    three.on_the_challenges_text()
    for seed, bpb in zip(three.params["seeds"], (0.9, 0.9001, 0.9002), strict=True):
        for name in ("ttt", "slot"):
            three.change(f"evaluate/{seed}/{name}/metrics.json", val_bpb=bpb)
    record = load_published(REPOSITORY / "records/published.yaml").records["r549"]
    found = three.facts()
    legal, illegal = (compare(score, found.runs, "r549", record) for score in found.scores[1:])
    assert (legal.beats, illegal.beats) == (True, False)
    assert illegal.caveat == "slot is illegal: causality, normalisation"


def test_scores_of_another_text_are_not_tested_against_a_record(three: Figures) -> None:
    three.params["report"]["baseline"] = "r549"
    found = three.facts().comparison
    assert found is not None
    assert found.caveat is not None
    assert (found.p_beats, found.beats) == (None, False)
    assert "of another text" in found.caveat
    assert f"Not tested against r549: {found.caveat}." in markdown(three.facts())


def test_one_seed_is_not_tested(one: Figures) -> None:
    one.params["report"]["baseline"] = "r549"
    found = one.facts().comparison
    assert found is not None
    assert found.caveat == "a test needs two seeds or more"


def test_reproduced_figures_stand_beside_published_ones(one: Figures) -> None:
    one.params["report"]["record"] = "r1150"
    reproduction = one.facts().reproduction
    assert reproduction is not None
    rows = {row.label: row for row in reproduction.figures}
    assert rows["ttt, bpb"].published == pytest.approx(1.11512332)
    assert rows["training, s"].published == pytest.approx(600.086)
    assert rows["quantized weights, bpb"].reproduced == one.facts().rungs[2].bpb
    assert rows["slot, bpb"].published is None
    assert rows["slot, bpb"].struck
    assert "do not compare" in one.page()


def test_plots_are_tables_of_series(three: Figures) -> None:
    found = three.facts()
    curve, positions, sizes = (
        list(csv.DictReader(text.splitlines()))
        for text in (tables.curve(found), tables.positions(found), tables.sizes(found))
    )
    assert {row["series"] for row in curve} == {"seed 1337", "seed 42", "seed 2025"}
    assert {row["series"] for row in positions} == {"sliding", "ttt", "slot (illegal)"}
    assert sum(int(row["bytes"]) for row in sizes) == found.runs[0].size["total_bytes"]


def test_dvc_draws_the_plots(one: Figures, evaluated: Experiment, tmp_path: Path) -> None:
    experiment = Experiment(_folder(tmp_path / "run"))
    found = one.facts()
    for name in ("curve", "positions", "sizes"):
        path = experiment.folder / f"results/{name}.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_text(getattr(tables, name)(found))
    shutil.copytree(REPOSITORY / ".dvc", experiment.folder / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache"))
    (experiment.folder / ".git").mkdir()
    drawn = json.loads(experiment.run("dvc", "plots", "show", "--json").stdout)["data"]
    assert set(drawn) == {"Validation while training", "Loss along the validation stream", "Size of the artifact"}
    assert all(plot["content"]["data"]["values"] for plots in drawn.values() for plot in plots)

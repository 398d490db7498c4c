"""The comparison with PR #1855's program (benchmarks/side_by_side.py): what is read off both, and the table."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Experiment

from benchmarks.paired import tables
from benchmarks.side_by_side import Line, fairway_entry, pr1855_entry, settings_name, table
from fairway.params import Params
from fairway.runtime.errors import UserError

# Lines of the form that the program prints, with made-up figures.
LOG: list[Line] = [
    (400.0, "warmup_step: 3/3"),
    (450.0, "1/20000 train_loss: 9.0 train_time: 0.0m tok/s: 1"),
    (453.0, "5/20000 train_loss: 8.0 train_time: 0.0m tok/s: 1"),
    (467.0, "25/20000 train_loss: 7.0 train_time: 0.3m tok/s: 1"),
    (470.0, "layer_loop:enabled step:30 frac:0.350"),
    (480.0, "50/20000 train_loss: 6.0 train_time: 0.5m tok/s: 1"),
    (505.0, "75/20000 train_loss: 5.0 train_time: 0.9m tok/s: 1"),
    (510.0, "80/20000 val_loss: 2.5 val_bpb: 1.0613"),
    (510.5, "stopping_early: wallclock_cap train_time: 60000ms step: 80/20000"),
    (511.0, "peak memory allocated: 40960 MiB reserved: 47140 MiB"),
    (520.0, "diagnostic pre-quantization post-ema val_loss:2.4 val_bpb:1.05200000 eval_time:6718ms"),
    (521.0, "GPTQ:collecting Hessians from calibration data..."),
    (530.5, "Serialize: per-group lrzip compression..."),
    (721.5, "Serialize: per-group compression done in 191.0s"),
    (722.0, "Total submission size quantized+pergroup: 15950603 bytes"),
    (760.0, "Deserialize: decompression done in 34.0s"),
    (770.0, "diagnostic quantized val_loss:2.5 val_bpb:1.05980000 eval_time:49995ms"),
    (990.0, "quantized_ttt_phased val_loss:2.3 val_bpb:1.03500000 eval_time:84000ms"),
    (991.0, "total_eval_time:84.0s"),
]
COMMON: dict[str, Any] = {
    "date": "2026-11-27",
    "pair": "2026-11-27T01:00:00",
    "gpu": "H100",
    "torch": "2.11",
    "attention": "flash4",
}
COMMON |= {"record": "lab-1gpu", "seed": 42, "seconds": 360.0}


def test_figures_are_read_off_the_programs_log() -> None:
    entry = pr1855_entry(LOG)
    assert (entry["steps"], entry["start_s"], entry["artifact_bytes"]) == (80, 450.0, 15950603)
    assert (entry["step_ms"], entry["step_ms_looped"]) == pytest.approx((700.0, 1000.0))
    assert (entry["last_bpb"], entry["ema_bpb"], entry["quantized_bpb"]) == (1.0613, 1.052, 1.0598)
    assert (entry["final_bpb"], entry["adaptive_eval_s"], entry["total_s"]) == (1.035, 84.0, 991.0)
    assert (entry["pack_s"], entry["unpack_s"], entry["gptq_s"], entry["peak_gib"]) == (191.0, 34.0, 9.5, 40.0)


def test_a_log_that_ends_early_leaves_figures_out() -> None:
    entry = pr1855_entry(LOG[:4])
    assert entry["step_ms"] == pytest.approx(700.0)
    assert entry["step_ms_looped"] is entry["final_bpb"] is entry["total_s"] is None


def test_the_pipelines_figures_have_the_same_keys(evaluated: Experiment, tmp_path: Path) -> None:
    """Read from the artifacts of a tiny run, whose ttt stands for lora_ttt."""
    artifacts = shutil.copytree(evaluated.folder / "artifacts", tmp_path / "artifacts")
    metrics = shutil.copytree(artifacts / "evaluate/1337/ttt", artifacts / "evaluate/1337/lora_ttt") / "metrics.json"
    certificate = artifacts / "certify/1337/lora_ttt/certificate.json"
    certificate.parent.mkdir(parents=True)
    certificate.write_text('{"legal": true}')
    params = Params.model_validate(evaluated.params).model_copy(update={"evaluators": ["sliding", "lora_ttt"]})
    entry = fairway_entry(params, [(99.0, "done")], artifacts)
    assert entry.keys() == pr1855_entry(LOG).keys()
    assert entry["steps"] == 12
    assert entry["final_bpb"] == json.loads(metrics.read_text())["val_bpb"]


def test_a_pair_that_was_broken_off_is_added_as_far_as_it_came(evaluated: Experiment, tmp_path: Path) -> None:
    """From the folder with the two logs; what neither log nor artifacts tell is null."""
    out = tmp_path / "artifacts/side_by_side"
    out.mkdir(parents=True)
    (tmp_path / "benchmarks").mkdir()
    shutil.copyfile(evaluated.folder / "params.yaml", tmp_path / "params.yaml")
    (out / "conditions.json").write_text(json.dumps(COMMON))
    (out / "pr1855.log").write_text("".join(f"{at:9.3f} {text}\n" for at, text in LOG[:4]))
    (out / "fairway.log").write_text("    0.100 \n   99.000 Running stage 'train'\n")
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "benchmarks.side_by_side", "add", "--unmeasured"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([*command, "start"], cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert "--unmeasured start: expected keys of benchmarks/side_by_side.json" in done.stderr
    subprocess.run([*command, "start_s"], cwd=tmp_path, env=environment, check=True)
    theirs, ours = json.loads((tmp_path / "benchmarks/side_by_side.json").read_text())
    assert (theirs["pair"], theirs["steps"], ours["steps"], ours["final_bpb"]) == (COMMON["pair"], None, None, None)
    assert theirs["settings"] == ours["settings"] == settings_name(Params.model_validate(evaluated.params))
    assert theirs["step_ms"] == pytest.approx(700.0)
    assert theirs["start_s"] is None, "the log has it, but it does not count"
    assert ours["total_s"] is None, "there is no last figure yet"


def test_the_table_shows_the_last_pair() -> None:
    theirs = COMMON | pr1855_entry(LOG)
    ours = theirs | {"program": "fairway", "steps": 100, "final_bpb": 1.03}
    old = [run | {"pair": "2026-11-26T01:00:00", "steps": 7} for run in (theirs, ours)]
    alone = theirs | {"pair": None, "steps": 9}
    lines = table([*old, alone, theirs, ours]).splitlines()
    assert "| | pr1855 | fairway |" in lines
    assert "| steps | 80 | 100 |" in lines
    assert "| bpb of LoRA TTT | 1.0350 | 1.0300 |" in lines
    assert table([]) == "no pairs yet"


def test_settings_have_the_same_name_whatever_the_seed_and_the_text(evaluated: Experiment) -> None:
    raw = copy.deepcopy(evaluated.params)
    before = settings_name(Params.model_validate(raw))
    raw["seeds"], raw["fetch"]["shuffle_seed"] = [5], 9
    assert settings_name(Params.model_validate(raw)) == before
    for section, key in (("train", "batch_tokens"), ("tokenize", "shard_tokens")):
        other = copy.deepcopy(raw)
        other[section][key] *= 2
        assert settings_name(Params.model_validate(other)) != before


def test_pairs_of_several_seeds_are_tested_together() -> None:
    """Gaps of -0.02, -0.03 and -0.04: mean -0.03, deviation 0.01, so t = 5.196 with two degrees of freedom."""
    runs = []
    for seed, gap in ((42, -0.02), (314, -0.03), (999, -0.04)):
        theirs = COMMON | pr1855_entry(LOG) | {"seed": seed, "pair": f"at {seed}", "final_bpb": 1.05 + seed / 1e6}
        runs += [theirs, theirs | {"program": "fairway", "final_bpb": theirs["final_bpb"] + gap, "quantized_bpb": None}]
    text = tables([{**runs[0], "pair": "before", "steps": 7}, *runs])
    assert "| pr1855 / fairway | 42 | 314 | 999 |" in text
    assert "| bpb of LoRA TTT | 1.0500 / 1.0300 |" in text
    assert "| bpb of rows, quantized | 1.0598 / – | 1.0598 / – |" in text
    assert "- bpb of LoRA TTT: -0.0300 over 3 pairs, deviation 0.0100, p 0.035" in text
    assert "- bpb of rows, quantized: no pair has both" in text
    assert "7" not in text.split("| steps |")[1].split("\n")[0], "an earlier run with the seed does not count"
    # What was measured with other settings stands in a table of its own.
    apart = tables([*runs, *({**run, "settings": "1a2b3c4d"} for run in runs[:2])])
    assert "lab-1gpu (settings not noted), 360 s:" in apart
    assert "lab-1gpu (settings 1a2b3c4d), 360 s:" in apart
    assert apart.count("| pr1855 / fairway | 42 |") == 2
    with pytest.raises(UserError, match=r"side_by_side\.json: no pair of r1 of both programs"):
        tables(runs, "r1")

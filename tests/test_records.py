"""Every file in records/: it loads, builds the published network, and trains at toy size, on one process and on two."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import REPOSITORY, Experiment, tiny_params

from model.gpt import GPT
from stages.params import load_params

PARAMETERS = {"r1150": 26_993_756, "r1172": 27_201_116, "r1488": 26_862_694, "r1958": 35_945_671}
TOY_STEPS = 20


def toy(record: str, corpus: Path) -> dict[str, Any]:
    """The record with the sizes of the tiny experiment and every mechanism of its own."""
    params: dict[str, Any] = yaml.safe_load((REPOSITORY / "records" / f"{record}.yaml").read_text())
    tiny = tiny_params(corpus)
    params |= {"seeds": [1337], "processes": 1, "fetch": tiny["fetch"]}
    params["tokenize"] |= {"vocab_size": 600, "val_documents": 4, "shard_tokens": 2000}
    params["model"] |= {"vocab_size": 600, "width": 32, "heads": 4, "kv_heads": 2, "mlp_hidden": 64, "seq_len": 64}
    params["model"]["rope"]["dims"] = 4
    if params["model"]["bigram"]:
        params["model"]["bigram"] |= {"buckets": 64, "width": 8}
        params["model"]["value_embedding"]["width"] = 8
    params["train"] |= {"max_steps": TOY_STEPS, "max_wallclock_s": None, "batch_tokens": 512, "micro_batch_tokens": 128}
    params["train"] |= {"warmup_steps": 0, "compile": False, "val_every": 20, "log_every": 1}
    params["ttt"]["chunk_tokens"] = 128
    for evaluator in ("sliding", "ttt", "slot"):
        params[evaluator]["stride"] = 32
    return params


@pytest.mark.parametrize("record", PARAMETERS)
def test_a_record_builds_the_published_network(record: str) -> None:
    params = load_params(REPOSITORY / "records" / f"{record}.yaml")
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(params.model).parameters()) == PARAMETERS[record]


# r1488 and r1958 have every mechanism between them.
@pytest.mark.parametrize(
    "record",
    [pytest.param("r1150", marks=pytest.mark.long), pytest.param("r1172", marks=pytest.mark.long), "r1488", "r1958"],
)
def test_a_record_trains_alike_on_one_process_and_on_two(record: str, experiment: Experiment) -> None:
    experiment.set_params(toy(record, experiment.folder / "corpus.jsonl"))
    experiment.stage("fetch")
    experiment.stage("tokenize")
    losses = []
    for processes in (1, 2):
        experiment.run("torchrun", "--standalone", f"--nproc-per-node={processes}", "-m", "stages.train", "1337")
        trained = experiment.folder / "artifacts/train/1337"
        assert json.loads((trained / "train.json").read_text())["steps"] == TOY_STEPS
        rows = (trained / "live/plots/metrics/train_loss.tsv").read_text().splitlines()[1:]
        losses.append([float(row.split("\t")[1]) for row in rows])
    assert len(losses[0]) == TOY_STEPS
    # Relative: the records exchange gradients in bfloat16, whose sums round differently by the number of processes.
    assert losses[0][:10] == pytest.approx(losses[1][:10], rel=1e-4)

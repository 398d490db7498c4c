"""What ships is run before it is written, and must score as the repository does."""

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Experiment
from test_bundle import record_text, toy
from test_evaluate import SECTIONS
from test_records import FILES

from fairway.codec.container import pack
from fairway.evaluation.evaluator import Evaluator
from fairway.evaluation.registry import make_evaluator
from fairway.model.gpt import GPT
from fairway.packing import shipped_run
from fairway.packing.bundle import self_extracting
from fairway.packing.shipped_run import ShippedRun, check_shipped_run, short_stream
from fairway.params import Params, load_params
from fairway.quantization.quantize_weights import quantize_state
from fairway.runtime.distributed import alone
from fairway.runtime.errors import UserError
from fairway.tokens.shards import open_shard, write_shard
from fairway.tokens.validation import load_validation

ALONE = alone(torch.device("cpu"))


@pytest.fixture
def as_before() -> Iterator[None]:
    """Ends the deterministic mode that scoring puts this process into."""
    yield
    torch.set_deterministic_debug_mode("default")


def test_what_ships_is_run_before_anything_is_written(finished_copy: Experiment) -> None:
    """The packed text of this experiment is replaced by one that prints figures of its own."""
    text = finished_copy.folder / "artifacts/pack/program.py"
    text.write_text("print('final_sliding_exact val_loss:1.00000000 val_bpb:2.00000000')")
    shutil.rmtree(finished_copy.folder / "artifacts/compress")
    line = finished_copy.fails("compress", "1337")
    assert re.fullmatch(
        r"error: train_gpt.py: sliding scores 1\.00000000 nats per token, expected \d\.\d{8} as the repository scores "
        "the first 128 targets of artifacts/tokens",
        line,
    )
    assert not (finished_copy.folder / "artifacts/compress").exists()


@pytest.mark.usefixtures("as_before")
def test_a_shipped_program_that_stops_is_told_with_what_it_says(finished: Experiment) -> None:
    message = r"sliding scores nan nats per token, expected \d\..* \(NameError: lost\)$"
    with pytest.raises(UserError, match=message):
        _check_finished(finished, b"raise NameError('lost')", finished.folder / "artifacts/tokens")


@pytest.mark.usefixtures("as_before")
def test_what_ships_scores_bytes_of_a_sidecar_too(finished: Experiment, tmp_path: Path) -> None:
    shard = finished.folder / "artifacts/tokens/val_000000.bin"
    shutil.copy(shard, tmp_path)
    entries = len(open_shard(shard, vocab_size=None))
    write_shard(tmp_path / "val_bytes_000000.bin", np.full(entries, 7, dtype=np.uint16))
    program = (finished.folder / "artifacts/compress/1337/train_gpt.py").read_bytes()
    run = _check_finished(finished, program, tmp_path)
    assert run.targets == 128
    assert run.figures["val_bpb"] == pytest.approx(run.figures["val_loss"] / math.log(2) / 7)


def _check_finished(finished: Experiment, program: bytes, tokens: Path) -> ShippedRun:
    model = (finished.folder / "artifacts/compress/1337/model.bin").read_bytes()
    return _check(program, model, load_params(finished.folder / "params.yaml"), tokens)


def _evaluator(name: str, params: Params) -> Evaluator:
    return make_evaluator(name, params.evaluator_settings(name), model=params.model, processes=1)


def _check(program: bytes, model: bytes, params: Params, tokens: Path) -> ShippedRun:
    name = params.compress.evaluator
    return check_shipped_run(program, model, name, params.evaluator_settings(name), tokens, torch.device("cpu"))


@pytest.mark.parametrize("name", ["sliding", "ttt", "slot", "streaming", "lora_ttt"])
def test_the_stream_is_as_short_as_an_evaluator_can_learn_on(name: str, tokenized: Experiment) -> None:
    params = Params.model_validate(tokenized.params | SECTIONS)
    evaluator, network = _evaluator(name, params), GPT(params.model)
    tokens_N1 = load_validation(tokenized.folder / "artifacts/tokens", seq_len=64, vocab_size=320).tokens
    targets = short_stream(evaluator, network, tokens_N1)
    assert targets % 64 == 0
    assert targets < len(tokens_N1) - 64
    assert evaluator.begin(network, tokens_N1[: targets + 1], ALONE).chunks > 1
    if targets > 128:
        assert evaluator.begin(network, tokens_N1[: targets - 63], ALONE).chunks == 1


@pytest.mark.parametrize(("name", "targets"), [("sliding", 64), ("ttt", 64), ("streaming", 256)])
def test_a_large_network_scores_the_shortest_stream_on_a_cpu(
    name: str, targets: int, tokenized: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped_run, "MOST_WORK_ON_CPU", 10_000)
    params = Params.model_validate(tokenized.params | SECTIONS)
    tokens_N1 = load_validation(tokenized.folder / "artifacts/tokens", seq_len=64, vocab_size=320).tokens
    assert short_stream(_evaluator(name, params), GPT(params.model), tokens_N1) == targets


@pytest.mark.long
@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("record", FILES)
def test_what_ships_of_every_record_scores_as_the_repository(record: str, tokenized: Experiment) -> None:
    params = toy(record)
    network = GPT(params.model)
    network.init_weights(7)
    state, _ = quantize_state(network.state_dict(), params.quantize)
    model = pack(params.model, state, codec=params.compress.codec)
    program = self_extracting(record_text(params), seed=7)
    run = _check(program, model, params, tokenized.folder / "artifacts/tokens")
    assert 0 < run.figures["val_loss"] < 20

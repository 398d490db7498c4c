"""model.bin: exact round trips, and one plain error for every file that is not what pack made."""

import hashlib
import json
import random
import threading
import tracemalloc
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import brotli
import pytest
import torch
import yaml
from conftest import REPOSITORY
from forks import ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_in_lrzip import install

from fairway.codec import byte_codecs, codecs
from fairway.codec.artifact import load_artifact, load_artifact_once, snapshot
from fairway.codec.byte_codecs import Lrzip
from fairway.codec.codecs import CODECS, Serialized
from fairway.codec.codes import LowRank, Quantized, QuantizedState, dequantize, largest_code
from fairway.codec.container import DIGEST_BYTES, MAX_VALUES, PREFIX, check_round_trip, pack, read_header, unpack
from fairway.model.config import ModelConfig
from fairway.model.gpt import GPT
from fairway.runtime.distributed import start_world
from fairway.runtime.errors import UserError

CONFIG = ModelConfig.model_validate(yaml.safe_load((REPOSITORY / "params.yaml").read_text())["model"])
NAMES = ["embed.token", "layer0.attn.q", "layer10.attn.q", "layer2.mlp.up", "ve.table", "bigram.proj"]


def _matrix(rng: torch.Generator, rows: int, columns: int, bits: int) -> Quantized:
    Q = largest_code(bits)
    codes = (torch.randn(rows, columns, generator=rng) * Q / 3).round().clamp(-Q, Q).to(torch.int8)
    return Quantized(codes, torch.rand(rows, generator=rng).half() + 2.0**-14, bits)


def _correction(rng: torch.Generator, rows: int, columns: int, rank: int, scales: int) -> LowRank:
    a, b = (torch.randint(-8, 8, shape, generator=rng).to(torch.int8) for shape in ((rows, rank), (rank, columns)))
    return LowRank(a, b, torch.rand(1, generator=rng).half(), torch.rand(scales, generator=rng).half())


def _state(seed: int = 0, size: int = 12) -> QuantizedState:
    rng = torch.Generator().manual_seed(seed)
    state: QuantizedState = {name: _matrix(rng, size + i, size, 4 + i % 5) for i, name in enumerate(NAMES)}
    corrected = _matrix(rng, 10, size, 6)
    state["layer1.mlp.up"] = replace(corrected, correction=_correction(rng, 10, size, 4, size // 2))
    state["layer0.attn_scale"] = torch.randn(size, generator=rng).half()
    state["bigram.scale"] = torch.tensor(0.05).half()
    return state


DATA = pack(CONFIG, _state(), codec="brotli")


def _sealed(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


def _with_header(change: dict[str, Any], **prefix: int) -> bytes:
    """DATA with keys of its header replaced, and the checksum made good again."""
    magic, version, _, packed = PREFIX.unpack_from(DATA)
    start = PREFIX.size + packed
    header = json.loads(brotli.decompress(DATA[PREFIX.size : start])) | change
    text = json.dumps(header).encode()
    compressed = brotli.compress(text)
    lengths = {"plain": len(text), "packed": len(compressed)} | prefix
    head = PREFIX.pack(magic, version, lengths["plain"], lengths["packed"])
    return _sealed(head + compressed + DATA[start:-DIGEST_BYTES])


def test_equal_input_gives_equal_bytes_in_any_order() -> None:
    backwards = dict(reversed(_state().items()))
    assert pack(CONFIG, _state(), codec="brotli") == pack(CONFIG, backwards, codec="brotli") == DATA


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shapes=st.dictionaries(
        st.sampled_from(NAMES), st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(2, 8)), max_size=6
    ),
    floats=st.dictionaries(
        st.sampled_from(["skip.weight", "lanes.post", "smear.lambda"]), st.lists(st.integers(1, 5), max_size=4)
    ),
)
def test_what_goes_in_comes_out(
    seed: int, shapes: dict[str, tuple[int, int, int]], floats: dict[str, list[int]]
) -> None:
    rng = torch.Generator().manual_seed(seed)
    state: QuantizedState = {name: _matrix(rng, *shape) for name, shape in shapes.items()}
    state |= {name: torch.randn(shape, generator=rng).half() for name, shape in floats.items()}
    check_round_trip(pack(CONFIG, state, codec="brotli"), CONFIG, state)


@pytest.mark.parametrize(
    "codec", [pytest.param(name, marks=pytest.mark.program("lrzip") if name == "lrzip" else ()) for name in CODECS]
)
def test_every_codec_brings_back_the_same_state(codec: str) -> None:
    check_round_trip(pack(CONFIG, _state(), codec=codec), CONFIG, _state())


def test_groups_are_packed_and_unpacked_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run of this lrzip waits until four of them have started: one for each class of tensors."""
    runs = install(tmp_path, monkeypatch, together=4)
    monkeypatch.setattr(byte_codecs, "_FREE_PROCESSORS", threading.BoundedSemaphore(4))
    check_round_trip(pack(CONFIG, _state(), codec="lrzip"), CONFIG, _state())
    assert sorted(runs.read_text().split()) == ["pack"] * 4 + ["unpack"] * 4


def test_files_packed_row_by_row_by_lrzip_are_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pack wrote them before it put columns in pieces."""
    install(tmp_path, monkeypatch)
    with monkeypatch.context() as earlier:
        earlier.setitem(codecs.CODECS, "lrzip", Serialized(Lrzip()))
        old = pack(CONFIG, _state(), codec="lrzip")
    assert old != pack(CONFIG, _state(), codec="lrzip")
    check_round_trip(old, CONFIG, _state())


def test_the_round_trip_check_sees_a_single_code() -> None:
    changed = _state()
    matrix = changed["layer2.mlp.up"]
    assert isinstance(matrix, Quantized)
    matrix.codes[0, 0] = 1 - matrix.codes[0, 0].clamp(-1, 1)
    with pytest.raises(AssertionError, match=r"layer2\.mlp\.up changed"):
        check_round_trip(DATA, CONFIG, changed)


def test_the_header_accounts_for_every_byte() -> None:
    header = read_header(DATA)
    assert header.model == CONFIG
    assert [group.kind for group in header.groups] == ["attn", "mlp", "embed", "other"]
    assert [entry.name for entry in header.groups[0].matrices] == ["layer0.attn.q", "layer10.attn.q", "bigram.proj"]


def _flips_are_noticed(positions: list[int], rng: random.Random) -> None:
    for position in positions:
        damaged = bytearray(DATA)
        damaged[position] ^= rng.randint(1, 255)
        with pytest.raises(UserError):
            unpack(bytes(damaged))


def test_one_changed_byte_is_noticed_wherever_it_is() -> None:
    _, _, _, packed = PREFIX.unpack_from(DATA)
    header = list(range(PREFIX.size + packed))
    rng = random.Random(0)
    _flips_are_noticed(header + rng.choices(range(len(DATA)), k=300), rng)


@pytest.mark.long
def test_one_changed_byte_is_noticed_twenty_thousand_times() -> None:
    rng = random.Random(1)
    _flips_are_noticed(rng.choices(range(len(DATA)), k=20_000), rng)


def _survives_without_checksum(positions: list[int], rng: random.Random) -> None:
    """Damage under a good checksum: whatever unpack makes of it, it is a state or a UserError, and nothing else."""
    for position in positions:
        damaged = bytearray(DATA[:-DIGEST_BYTES])
        damaged[position] ^= rng.randint(1, 255)
        with suppress(UserError):
            unpack(_sealed(bytes(damaged)))


def test_forged_files_raise_nothing_but_the_one_error() -> None:
    rng = random.Random(2)
    _survives_without_checksum(rng.choices(range(len(DATA) - DIGEST_BYTES), k=300), rng)


@pytest.mark.long
def test_twenty_thousand_forged_files_raise_nothing_but_the_one_error() -> None:
    rng = random.Random(3)
    _survives_without_checksum(rng.choices(range(len(DATA) - DIGEST_BYTES), k=20_000), rng)


def test_every_truncation_is_noticed() -> None:
    for length in [*range(80), *range(80, len(DATA), 37), len(DATA) - 1]:
        with pytest.raises(UserError):
            unpack(DATA[:length])
        with pytest.raises(UserError):
            unpack(_sealed(DATA[:length]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a Fairway model file"),
        (b"PK\x03\x04" + bytes(100), "not a Fairway model file"),
        (DATA + b"\0", "checksum"),
        (_sealed(DATA[:7] + b"\x09" + DATA[8:-DIGEST_BYTES]), "version 9, expected 1"),
        (_with_header({}, plain=2**32 - 1), "impossible header length"),
        (_with_header({}, packed=2**32 - 1), "impossible header length"),
        (_with_header({}, plain=7), "expected 7 bytes"),
        (_with_header({"codec": "pickle"}), "unknown codec 'pickle'"),
        (_with_header({"surprise": 1}), "Extra inputs are not permitted"),
        (_with_header({"groups": []}), "the streams should take"),
        (_with_header({"floats_bytes": -1}), "greater than or equal to 0"),
        (_with_header({"floats_bytes": 2**62}), "the streams should take"),
        (
            _with_header({"floats": [{"name": "x", "shape": [2**40, 2**40], "bits": 16}]}),
            f"more than {MAX_VALUES} weights",
        ),
        (_with_header({"floats": [{"name": "x", "shape": [-1, -8], "bits": 16}]}), "impossible tensor shape"),
        (_with_header({"floats": [{"name": "x", "shape": [0], "bits": 16}]}), "impossible tensor shape"),
        (_with_header({"floats": [{"name": "x", "shape": [1], "bits": 16}] * 2}), "a tensor occurs twice"),
        (_with_header({"floats": [{"name": "x", "shape": [MAX_VALUES - 9999], "bits": 16}]}), "expected"),
        (_with_header({"model": CONFIG.model_dump() | {"heads": 3}}), r"heads \(3\) must divide width"),
    ],
)
def test_a_bad_file_is_told_in_one_line(data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        unpack(data)
    assert "\n" not in str(caught.value)


def test_a_length_bomb_does_not_take_memory() -> None:
    """A table that claims 2^28 weights over a stream of nothing but zeros: refused without half a gigabyte of zeros."""
    header = json.loads(read_header(DATA).model_dump_json())
    bomb = brotli.compress(bytes(2**26), quality=5)
    table = {"groups": [], "floats": [{"name": "x", "shape": [1000], "bits": 16}], "floats_bytes": len(bomb)}
    text = json.dumps(header | table).encode()
    packed = brotli.compress(text)
    magic, version, _, _ = PREFIX.unpack_from(DATA)
    data = _sealed(PREFIX.pack(magic, version, len(text), len(packed)) + packed + bomb)
    tracemalloc.start()
    with pytest.raises(UserError, match="expected 2000 bytes, the stream holds more"):
        unpack(data)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_codes_beyond_their_bits_are_refused() -> None:
    state = _state()
    wide = Quantized(torch.full((4, 4), 100, dtype=torch.int8), torch.ones(4).half(), 8)
    data = pack(CONFIG, {**state, "ve.table": wide}, codec="brotli")
    groups = json.loads(read_header(data).model_dump_json())["groups"]
    groups[-1]["matrices"][0]["bits"] = 6
    magic, version, _, packed = PREFIX.unpack_from(data)
    header = json.loads(read_header(data).model_dump_json()) | {"groups": groups}
    text = json.dumps(header).encode()
    compressed = brotli.compress(text)
    streams = data[PREFIX.size + packed : -DIGEST_BYTES]
    forged = _sealed(PREFIX.pack(magic, version, len(text), len(compressed)) + compressed + streams)
    with pytest.raises(UserError, match="codes exceed 6 bits"):
        unpack(forged)


def _network() -> tuple[ModelConfig, QuantizedState]:
    small = {"layers": 2, "width": 16, "heads": 1, "kv_heads": 1, "xsa_last_layers": 0, "value_embedding": None}
    config = ModelConfig.model_validate(CONFIG.model_dump() | small)
    model = GPT(config)
    model.init_weights(3)
    return config, {name: weight.half() for name, weight in model.state_dict().items()}


def test_a_network_comes_back_with_its_weights_ready_to_evaluate(tmp_path: Path) -> None:
    config, state = _network()
    state["layer0.mlp.up"] = _matrix(torch.Generator(), config.mlp_hidden, config.width, 6)
    (tmp_path / "model.bin").write_bytes(pack(config, state, codec="brotli"))
    model = load_artifact(tmp_path / "model.bin", torch.device("cpu"))
    assert model.config == config
    assert not model.training
    for name, weight in dequantize(state).items():
        assert torch.equal(model.state_dict()[name], weight)


def test_a_snapshot_makes_the_network_that_was_whatever_becomes_of_it(tmp_path: Path) -> None:
    config, state = _network()
    (tmp_path / "model.bin").write_bytes(pack(config, state, codec="brotli"))
    model = load_artifact(tmp_path / "model.bin", torch.device("cpu"))
    again = snapshot(model)
    first = again()
    for network in (model, first):
        for parameter in network.parameters():
            torch.nn.init.constant_(parameter, 7.0)
    second = again()
    assert (second.config, second.training) == (config, False)
    for name, weight in dequantize(state).items():
        assert torch.equal(second.state_dict()[name], weight)


def load_as_one_of_several() -> None:
    """Leave what this rank has loaded in the current folder."""
    with start_world() as world:
        model = load_artifact_once(Path("model.bin"), world)
        torch.save((model.config.model_dump(), model.training, model.state_dict()), f"{world.rank}.pt")


def test_three_processes_unpack_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, state = _network()
    state["layer0.mlp.up"] = _matrix(torch.Generator(), config.mlp_hidden, config.width, 6)
    runs = install(tmp_path, monkeypatch)
    (tmp_path / "model.bin").write_bytes(pack(config, state, codec="lrzip"))
    runs.unlink()
    ranks(load_as_one_of_several, tmp_path, processes=3)
    assert runs.read_text().split() == ["unpack"]
    for rank in range(3):
        found_config, training, weights = torch.load(tmp_path / f"{rank}.pt")
        assert (found_config, training) == (config.model_dump(), False)
        for name, weight in dequantize(state).items():
            assert torch.equal(weights[name], weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer0.mlp.up": None}, r"tensor layer0\.mlp\.up: expected \(384, 16\), found none"),
        ({"layer0.mlp.up": torch.zeros(3).half()}, r"tensor layer0\.mlp\.up: expected \(384, 16\), found \(3,\)"),
        ({"layer7.mlp.up": torch.zeros(3).half()}, r"tensor layer7\.mlp\.up: expected none, found \(3,\)"),
    ],
)
def test_tensors_that_are_not_the_networks_are_refused(
    tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    config, state = _network()
    changed = {name: value for name, value in (state | change).items() if value is not None}
    (tmp_path / "model.bin").write_bytes(pack(config, changed, codec="brotli"))
    with pytest.raises(UserError, match=rf"model\.bin: {message}"):
        load_artifact(tmp_path / "model.bin", torch.device("cpu"))


def test_a_network_too_large_for_its_tensors_is_refused_before_it_is_built(tmp_path: Path) -> None:
    config, state = _network()
    for change in ({"layers": 1000}, {"width": 2**60}, {"mlp_hidden": 2**62}):
        huge = ModelConfig.model_validate(config.model_dump() | change)
        (tmp_path / "model.bin").write_bytes(pack(huge, state, codec="brotli"))
        with pytest.raises(UserError, match=r"model\.bin: "):
            load_artifact(tmp_path / "model.bin", torch.device("cpu"))

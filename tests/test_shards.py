"""Shard files, the validation stream, and the check of a token folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_bytes import write_model

from fairway.runtime.errors import UserError
from fairway.runtime.files import file_sha256
from fairway.tokens.shards import ShardWriter, open_shard, shard_paths, write_shard
from fairway.tokens.validation import load_validation, verify_tokens

VOCAB_SIZE = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A token folder: pieces a (4), b (5), ▁ab (6), ▁ (7); 11 validation and 6 training tokens."""
    write_model(tmp_path / "tokenizer.model", {4: "a", 5: "bb", 6: "▁ab", 7: "▁"}, VOCAB_SIZE)
    write_shard(tmp_path / "val_000000.bin", np.array([1, 4, 6, 5, 1, 6], dtype=np.uint16))
    write_shard(tmp_path / "val_000001.bin", np.array([6, 1, 4, 4, 7], dtype=np.uint16))
    write_shard(tmp_path / "train_000000.bin", np.array([1, 4, 4, 1, 5, 5], dtype=np.uint16))
    write_meta(tmp_path)
    return tmp_path


def write_meta(folder: Path) -> None:
    hashes = {path.name: file_sha256(path) for path in folder.iterdir() if path.suffix in (".bin", ".model")}
    (folder / "meta.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE, "sha256": hashes}))


@settings(deadline=None)
@given(values=arrays.arrays(np.uint16, st.integers(0, 300)))
def test_a_shard_comes_back_as_written(values: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "shard.bin"
    write_shard(path, values)
    assert path.stat().st_size == 1024 + 2 * len(values)
    assert np.array_equal(open_shard(path, vocab_size=None), values)


def test_the_header_is_the_published_one(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.bin", np.array([258, 3], dtype=np.uint16))
    data = (tmp_path / "x.bin").read_bytes()
    assert np.frombuffer(data[:1024], dtype="<i4").tolist() == [20240520, 1, 2] + [0] * 253
    assert data[1024:] == bytes([2, 1, 3, 0])


@pytest.mark.parametrize("values", [np.array([1, 2]), np.zeros((2, 2), dtype=np.uint16)])
def test_only_flat_uint16_is_written(values: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one-dimensional uint16"):
        write_shard(tmp_path / "x.bin", values)


def header(magic: int = 20240520, version: int = 1, entries: int = 2) -> bytes:
    return np.array([magic, version, entries] + [0] * 253, dtype="<i4").tobytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(magic=1) + bytes(4), "magic number 1, expected 20240520"),
        (header(version=2) + bytes(4), "shard version 2, expected 1"),
        (header() + bytes(3), "1027 bytes, expected 1028 for the 2 entries"),
        (header() + bytes(5), "1029 bytes, expected 1028 for the 2 entries"),
        (header(entries=-1), "for the -1 entries"),
        (header()[:1000], "1000 bytes are no shard"),
        (b"", "0 bytes are no shard"),
        (header() + np.array([7, 8], dtype="<u2").tobytes(), "token 8 lies outside the vocabulary of 8"),
    ],
)
def test_a_bad_shard_is_refused_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_shard(tmp_path / "x.bin", vocab_size=8)
    assert str(caught.value).startswith(str(tmp_path / "x.bin"))
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        open_shard(tmp_path / "x.bin", vocab_size=8)


def test_byte_sidecars_are_no_token_shards(tmp_path: Path) -> None:
    for name in ("val_000001.bin", "val_000000.bin", "val_bytes_000000.bin", "fineweb_val_000002.bin", "train_0.bin"):
        write_shard(tmp_path / name, np.array([1], dtype=np.uint16))
    names = [path.name for path in shard_paths(tmp_path, "val")]
    assert names == ["fineweb_val_000002.bin", "val_000000.bin", "val_000001.bin"]
    with pytest.raises(UserError, match=r"no val_\*\.bin"):
        shard_paths(tmp_path / "absent", "val")


@settings(deadline=None)
@given(parts=st.lists(arrays.arrays(np.uint16, st.integers(0, 20)), max_size=8), entries=st.integers(1, 9))
def test_a_stream_is_cut_into_full_shards(
    parts: list[np.ndarray], entries: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    with ShardWriter(folder, "val", entries) as writer:
        for part in parts:
            writer.append(part)
    stream = np.concatenate([np.empty(0, dtype=np.uint16), *parts])
    shards = [open_shard(path, vocab_size=None) for path in sorted(folder.iterdir())]
    assert writer.written == len(stream) == sum(map(len, shards))
    assert all(len(shard) == entries for shard in shards[:-1])
    assert np.array_equal(np.concatenate([stream[:0], *shards]), stream)


def test_validation_is_cut_to_whole_rows_and_counted_by_the_table(folder: Path) -> None:
    validation = load_validation(folder, seq_len=3, vocab_size=VOCAB_SIZE)
    assert validation.tokens.tolist() == [1, 4, 6, 5, 1, 6, 6, 1, 4, 4]
    assert validation.bytes.tolist() == [1, 3, 2, 0, 2, 3, 0, 1, 1]


def test_the_sidecar_replaces_the_table(folder: Path) -> None:
    write_shard(folder / "val_bytes_000000.bin", np.arange(6, dtype=np.uint16))
    write_shard(folder / "val_bytes_000001.bin", np.arange(6, 11, dtype=np.uint16))
    (folder / "tokenizer.model").unlink()
    validation = load_validation(folder, seq_len=5, vocab_size=VOCAB_SIZE)
    assert validation.tokens.shape == (11,)
    assert validation.bytes.tolist() == list(range(1, 11))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((6, 4), r"val_bytes_000001\.bin: 4 entries, expected 5 as .*/val_000001\.bin has tokens"),
        ((6, 6), r"val_bytes_000001\.bin: 6 entries, expected 5 as .*/val_000001\.bin has tokens"),
        ((5, 6), r"val_bytes_000000\.bin: 5 entries, expected 6 as .*/val_000000\.bin has tokens"),
        ((11,), "1 byte sidecars, expected 2"),
        ((6, 5, 5), "3 byte sidecars, expected 2"),
    ],
)
def test_a_sidecar_that_does_not_fit_its_shard_is_refused(lengths: tuple[int, ...], message: str, folder: Path) -> None:
    for index, length in enumerate(lengths):
        write_shard(folder / f"val_bytes_{index:06d}.bin", np.arange(length, dtype=np.uint16))
    with pytest.raises(UserError, match=message):
        load_validation(folder, seq_len=5, vocab_size=VOCAB_SIZE)


def test_a_stream_shorter_than_a_row_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"11 validation tokens, expected more than model\.seq_len = 11"):
        load_validation(folder, seq_len=11, vocab_size=VOCAB_SIZE)


def test_a_whole_folder_is_accepted(folder: Path) -> None:
    verify_tokens(folder, vocab_size=VOCAB_SIZE)


def damage_missing(folder: Path) -> None:
    (folder / "train_000000.bin").unlink()
    write_shard(folder / "train_000001.bin", np.array([1], dtype=np.uint16))
    meta = json.loads((folder / "meta.json").read_text())
    meta["sha256"]["train_000001.bin"] = file_sha256(folder / "train_000001.bin")
    (folder / "meta.json").write_text(json.dumps(meta))


def damage_truncated(folder: Path) -> None:
    path = folder / "val_000001.bin"
    path.write_bytes(path.read_bytes()[:-1])


def damage_flipped(folder: Path) -> None:
    path = folder / "val_000001.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\x04\x00")


def damage_extra(folder: Path) -> None:
    write_shard(folder / "val_000002.bin", np.array([1], dtype=np.uint16))


def damage_tokenizer(folder: Path) -> None:
    write_model(folder / "tokenizer.model", {4: "a"}, VOCAB_SIZE)


def damage_token_range(folder: Path) -> None:
    write_shard(folder / "train_000000.bin", np.array([1, 8], dtype=np.uint16))
    write_meta(folder)


def damage_tokenizer_size(folder: Path) -> None:
    write_model(folder / "tokenizer.model", {4: "a"}, VOCAB_SIZE + 1)
    write_meta(folder)


def damage_meta(folder: Path) -> None:
    (folder / "meta.json").write_text("{")


def damage_meta_keys(folder: Path) -> None:
    (folder / "meta.json").write_text("{}")


def damage_no_meta(folder: Path) -> None:
    (folder / "meta.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, r"train_000000\.bin: no such file"),
        (damage_truncated, r"val_000001\.bin: 1033 bytes, expected 1034"),
        (damage_flipped, r"val_000001\.bin: SHA-256 \w{16}\.\.\., expected"),
        (damage_extra, r"val_000002\.bin: not listed in meta\.json"),
        (damage_tokenizer, r"tokenizer\.model: SHA-256 \w{16}\.\.\., expected"),
        (damage_token_range, r"train_000000\.bin: token 8 lies outside the vocabulary of 8"),
        (damage_tokenizer_size, r"tokenizer\.model: 9 pieces, expected at most tokenize\.vocab_size = 8"),
        (damage_meta, r"meta\.json: not JSON"),
        (damage_meta_keys, r"meta\.json: no vocab_size or sha256"),
        (damage_no_meta, r"meta\.json: no such file"),
        (shutil.rmtree, r"meta\.json: no such file"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(damage: Callable[[Path], object], message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        verify_tokens(folder, vocab_size=VOCAB_SIZE)
    assert "\n" not in str(caught.value)


def test_tokens_of_another_vocabulary_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"meta\.json: tokens of a vocabulary of 8, expected 9"):
        verify_tokens(folder, vocab_size=9)

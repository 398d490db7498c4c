"""Text of one's own: every kind of file gives its documents back, in an order that is drawn alike every time."""

import gzip
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml
import zstandard
from conftest import Experiment
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fairway.runtime.errors import UserError
from fairway.tokens.documents import documents_path, read_texts, text_hash
from fairway.tokens.own_text import FetchFile, check_own_text, fetch_own_text, shuffled

# Texts of any characters that UTF-8 can hold, and often of those that separate lines somewhere.
TEXT = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from('\n\r\0\u2028\x85\ufeff"\\')))


def json_lines(texts: Sequence[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"id": number, key: text}) + "\n" for number, text in enumerate(texts)).encode()


def write_folder(path: Path, texts: Sequence[str]) -> None:
    path.mkdir()
    for number, text in enumerate(texts):
        (path / f"{number:03}.txt").write_bytes(text.encode("utf-8"))


KINDS: dict[str, Callable[[Path, Sequence[str]], object]] = {
    "own": write_folder,
    "own.jsonl": lambda path, texts: path.write_bytes(json_lines(texts)),
    "own.jsonl.zst": lambda path, texts: path.write_bytes(zstandard.compress(json_lines(texts))),
    "own.jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(json_lines(texts))),
    "own.parquet": lambda path, texts: parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=2),
}


def fetch_settings(*paths: Path, **changes: Any) -> FetchFile:
    names = [str(path) for path in paths]
    return FetchFile.model_validate({"source": "file", "path": names, "column": "text", "shuffle_seed": None} | changes)


def fetched(folder: Path, *paths: Path, **changes: Any) -> list[str]:
    """The documents that are made of the paths in a new folder."""
    folder.mkdir()
    number = fetch_own_text(fetch_settings(*paths, **changes), folder)
    texts = list(read_texts(documents_path(folder)))
    assert len(list(folder.iterdir())) == 1, "nothing but the documents file is left"
    assert number == len(texts)
    return texts


@pytest.mark.parametrize("name", KINDS)
@settings(deadline=None, max_examples=25)
@given(texts=st.lists(TEXT, min_size=1, max_size=8))
def test_every_text_comes_back_from_every_kind_of_file(name: str, texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        KINDS[name](folder / name, texts)
        assert fetched(folder / "out", folder / name) == texts


@settings(deadline=None)
@given(texts=st.lists(TEXT, min_size=1, max_size=30), seed=st.integers())
def test_a_seed_orders_all_documents_alike_whatever_files_hold_them(texts: list[str], seed: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_folder(folder / "own", texts)
        (folder / "own.jsonl").write_bytes(json_lines(texts))
        once = fetched(folder / "once", folder / "own", shuffle_seed=seed)
        assert fetched(folder / "again", folder / "own.jsonl", shuffle_seed=seed) == once
        assert sorted(once) == sorted(texts)


def test_the_order_of_a_seed_never_changes(tmp_path: Path) -> None:
    lines = [b"%d\n" % number for number in range(8)]
    orders = {seed: [int(line) for line in shuffled(iter(lines), seed, tmp_path)] for seed in (0, 1337)}
    assert orders == {0: [7, 5, 2, 4, 6, 1, 0, 3], 1337: [1, 4, 7, 2, 0, 5, 6, 3]}


def test_the_documents_of_a_folder_come_in_the_order_of_their_names_without_hidden_ones(tmp_path: Path) -> None:
    own = tmp_path / "own"
    for name in ("b.txt", "a/z.MD", "a/y.txt", ".hidden.txt", ".git/x.txt", "a/.b/c.md", "notes.rst", "deep/er/a.md"):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text(name)
    (own / "folder.txt").mkdir()
    assert fetched(tmp_path / "out", own) == ["a/y.txt", "a/z.MD", "b.txt", "deep/er/a.md"]


def test_several_paths_are_read_one_after_another_and_stay_as_they_were(tmp_path: Path) -> None:
    for name, write in KINDS.items():
        write(tmp_path / name, [f"{name} 1", f"{name} 2"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    texts = fetched(tmp_path / "out", *(tmp_path / name for name in reversed(KINDS)))
    assert texts == [f"{name} {number}" for name in reversed(KINDS) for number in (1, 2)]
    assert (tmp_path / "out/docs.jsonl.zst").exists(), "compressed as some of its sources are"
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("name", ["own.jsonl", "own.parquet"])
def test_the_text_may_stand_under_another_key(name: str, tmp_path: Path) -> None:
    texts = ["one", "two"]
    if name == "own.jsonl":
        (tmp_path / name).write_bytes(json_lines(texts, "body"))
    else:
        parquet.write_table(pyarrow.table({"text": ["x", "y"], "body": texts}), tmp_path / name)
    assert fetched(tmp_path / "out", tmp_path / name, column="body") == texts


def refused(*paths: Path, **changes: Any) -> str:
    """The message with which the paths are refused before anything is written."""
    with pytest.raises(UserError) as caught:
        check_own_text(fetch_settings(*paths, **changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_faults_are_told_before_anything_is_written(tmp_path: Path) -> None:
    """Also those of the last of several paths."""
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_bytes(json_lines(["one"]))
    bad.write_bytes(json_lines(["one"], "body"))
    assert (
        "bad.jsonl, line 1: expected an object with the key `text`, which fetch.column names; found `id`, `body`"
        in (refused(good, bad))
    )
    bad.write_bytes(b"[]\n")
    assert "bad.jsonl, line 1: expected an object with the key `text`, found list" in refused(good, bad)
    bad.write_bytes(b"")
    assert "bad.jsonl: no documents (fetch.path)" in refused(good, bad)
    absent = refused(good, tmp_path / "absent")
    assert "absent: no such file or folder (fetch.path); a queued experiment runs in a copy" in absent
    (tmp_path / "empty").mkdir()
    assert "empty: no .txt or .md file in this folder (fetch.path)" in refused(good, tmp_path / "empty")
    (tmp_path / "empty/latin.txt").write_bytes(b"caf\xe9 cr\xe8me")
    assert "latin.txt: expected UTF-8 text, found 0xE9 as byte 4" in refused(good, tmp_path / "empty")
    parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), tmp_path / "x.parquet")
    other = refused(tmp_path / "x.parquet", good, column="words")
    assert "x.parquet: expected a column `words`, which fetch.column names; found `body`, `id`" in other


@pytest.mark.parametrize("content", [gzip.compress(json_lines(["one"] * 99))[:-9], b"no gzip", b"\x1f\x8b\x08\0" * 9])
def test_a_damaged_gzip_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl.gz").write_bytes(content)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"own\.jsonl\.gz: damaged gzip stream"):
        fetch_own_text(fetch_settings(tmp_path / "own.jsonl.gz"), tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_bytes(json_lines(["one"]))
    (tmp_path / "own.jsonl").chmod(0)
    assert "own.jsonl: cannot be read (Permission denied)" in refused(tmp_path / "own.jsonl")


def test_what_else_a_line_of_json_holds_does_not_matter(tmp_path: Path) -> None:
    """Neither a number longer than Python reads (4300 digits), nor a byte order mark at the beginning."""
    own = tmp_path / "own.jsonl"
    own.write_bytes(b'\xef\xbb\xbf{"id": %s, "text": "one"}\n' % (b"7" * 5000))
    assert fetched(tmp_path / "out", own) == ["one"]
    own.write_bytes(b'{"tree": %s, "text": "one"}\n' % (b"[" * 100_000 + b"]" * 100_000))
    assert "own.jsonl, line 1: more brackets inside one another than Python's JSON reader takes" in refused(own)


def test_a_fault_found_late_leaves_the_documents_of_before(experiment: Experiment) -> None:
    experiment.stage("fetch")
    before = (experiment.folder / "data/docs/docs.jsonl").read_bytes()
    with (experiment.folder / "corpus.jsonl").open("a") as file:
        file.write('{"text": 1}\n')
    assert "corpus.jsonl, line 25: `text` is int, expected a string" in experiment.fails("fetch")
    assert (experiment.folder / "data/docs/docs.jsonl").read_bytes() == before


@given(TEXT, TEXT)
def test_hashes_are_equal_for_equal_texts_alone(one: str, other: str) -> None:
    assert (text_hash(one) == text_hash(other)) == (one == other)


def test_the_path_on_the_command_line_leaves_what_was_chosen_before(experiment: Experiment) -> None:
    chosen = {"column": "body", "shuffle_seed": 3}
    experiment.set_params(experiment.params | {"fetch": experiment.params["fetch"] | chosen})
    write_folder(experiment.folder / "märz # 1", ["one"])
    experiment.stage("use_data", "märz # 1")
    written = yaml.safe_load((experiment.folder / "params.yaml").read_text(encoding="utf-8"))
    assert written == experiment.params | {"fetch": {"source": "file", "path": "märz # 1"} | chosen}


def test_the_column_on_the_command_line_is_written_too(experiment: Experiment) -> None:
    (experiment.folder / "own.jsonl").write_bytes(json_lines(["one"], key="body"))
    assert "an object with the key `text`" in experiment.fails("use_data", "own.jsonl")
    experiment.stage("use_data", "own.jsonl", "body")
    written = yaml.safe_load((experiment.folder / "params.yaml").read_text(encoding="utf-8"))["fetch"]
    assert (written["path"], written["column"]) == ("own.jsonl", "body")


def test_a_path_on_the_command_line_that_will_not_do_is_told_with_its_key(experiment: Experiment) -> None:
    assert "params.yaml: fetch.path: . holds data/docs, which is" in experiment.fails("use_data", ".")


def test_a_folder_of_ones_own_becomes_tokens(experiment: Experiment) -> None:
    texts = list(read_texts(experiment.folder / "corpus.jsonl"))
    write_folder(experiment.folder / "own", texts)
    experiment.set_params(experiment.params | {"fetch": experiment.params["fetch"] | {"shuffle_seed": 1337}})
    experiment.stage("use_data", "own")
    assert "fetch: 24 documents of own" in experiment.stage("fetch").stdout
    experiment.stage("tokenize")
    meta = json.loads((experiment.folder / "artifacts/tokens/meta.json").read_text())
    assert (meta["val_documents"], meta["train_documents"]) == (4, 20)

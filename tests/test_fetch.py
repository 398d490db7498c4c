"""Fetching: real sdists through real pip without a network, local files, and a hub served on this machine."""

import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import zstandard
from conftest import Experiment
from pyarrow import parquet
from test_bytes import byte_pieces, write_model

from fairway.runtime.errors import UserError
from fairway.tokens.documents import documents_path, read_texts
from fairway.tokens.hub import FetchHub, adopt_export, fetch_hub
from fairway.tokens.sdists import read_folder
from fairway.tokens.shards import open_shard, shard_paths, write_shard
from fairway.tokens.tokenizer import TokenizeSettings
from fairway.tokens.validation import load_validation, open_sidecars, verify_tokens

# A build backend inside the sdist itself: pip needs nothing else to read the package's metadata.
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
BACKEND = """
import os
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    os.makedirs(os.path.join(folder, "guide-1.0.dist-info"))
    with open(os.path.join(folder, "guide-1.0.dist-info", "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: guide\\nVersion: 1.0\\n")
    return "guide-1.0.dist-info"
def build_wheel(*arguments):
    raise SystemExit("nothing is to be built")
"""
FILES = {
    "guide-1.0/pyproject.toml": PYPROJECT.encode(),
    "guide-1.0/backend.py": BACKEND.encode(),
    "guide-1.0/PKG-INFO": b"Metadata-Version: 2.1\nName: guide\nVersion: 1.0\n",
    "guide-1.0/README.txt": b"not in the folder",
    "guide-1.0/docs-old/x.txt": b"nor this",
    "guide-1.0/docs/a.txt": b"first\r\n\n  indented\n",
    "guide-1.0/docs/deep/b.txt": "é \u2028 中文\n".encode(),
    "guide-1.0/docs/c.rst": b"third",
    "guide-1.0/docs/code.py": b"not a document",
    "guide-1.0/docs/latin.txt": b"\xe9\xff",
    "guide-1.0/docs/blank.txt": b" \n",
}


def write_sdist(path: Path, files: dict[str, bytes], *, extra: list[tarfile.TarInfo] | None = None) -> str:
    """Write a .tar.gz; returns its SHA-256."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in extra or []:
            tar.addfile(member)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def shelf(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """An experiment that fetches `guide` 1.0, with pip shut off from the network and told of one folder."""
    links = experiment.folder / "links"
    links.mkdir()
    sha256 = write_sdist(links / "guide-1.0.tar.gz", FILES)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    set_fetch(experiment, sha256=sha256)
    return experiment


def set_fetch(experiment: Experiment, **changes: Any) -> None:
    sdist = {"name": "guide", "version": "1.0", "folder": "docs", "sha256": "0" * 64} | changes
    fetch = {"source": "sdists", "sdists": [sdist], "suffixes": [".txt", ".rst"]}
    experiment.set_params(experiment.params | {"fetch": fetch})


def written(experiment: Experiment) -> list[dict[str, str]]:
    lines = (experiment.folder / "data/docs/docs.jsonl").read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def test_the_documents_of_an_sdist_are_ordered_by_the_hash_of_their_path(shelf: Experiment) -> None:
    output = shelf.stage("fetch").stdout
    documents = written(shelf)
    paths = ["guide-1.0/docs/a.txt", "guide-1.0/docs/deep/b.txt", "guide-1.0/docs/c.rst"]
    assert [d["path"] for d in documents] == sorted(paths, key=lambda path: hashlib.sha256(path.encode()).digest())
    assert {d["path"]: d["text"].encode() for d in documents} == {path: FILES[path] for path in paths}
    assert "3 documents" in output
    assert "left out 2 files that are blank or not UTF-8" in output


def test_another_sha256_is_refused_before_the_package_runs(shelf: Experiment) -> None:
    links = shelf.folder / "links"
    ran = shelf.folder / "ran"
    tampered = write_sdist(
        links / "guide-1.0.tar.gz", FILES | {"guide-1.0/backend.py": f"open({str(ran)!r}, 'w')".encode()}
    )
    expected = shelf.params["fetch"]["sdists"][0]["sha256"]
    error = shelf.fails("fetch")
    assert f"guide 1.0: the sdist's SHA-256 is {tampered}, expected {expected}" in error
    assert not ran.exists()
    assert not (shelf.folder / "data/docs").exists()


def test_a_package_that_pip_cannot_find_is_named(shelf: Experiment) -> None:
    set_fetch(shelf, name="absent-guide")
    assert "absent-guide 1.0: pip could not download it (No matching distribution found" in shelf.fails("fetch")


def test_a_folder_without_documents_is_an_error(shelf: Experiment) -> None:
    sha256 = shelf.params["fetch"]["sdists"][0]["sha256"]
    set_fetch(shelf, folder="manual", sha256=sha256)
    assert "guide 1.0: no .txt or .rst file with text in manual/" in shelf.fails("fetch")


def test_only_regular_files_inside_the_folder_are_read(tmp_path: Path) -> None:
    link = tarfile.TarInfo("top/docs/link.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    files = {"top/docs/a.txt": b"a", "top/docs/../../b.txt": b"b", "/top/docs/c.txt": b"c", "docs/d.txt": b"d"}
    write_sdist(tmp_path / "x.tar.gz", files, extra=[link])
    assert dict(read_folder(tmp_path / "x.tar.gz", "docs", [".txt"])) == {"top/docs/a.txt": b"a"}
    assert not (tmp_path / "b.txt").exists()


def test_a_damaged_archive_is_an_error(tmp_path: Path) -> None:
    write_sdist(tmp_path / "x.tar.gz", {"top/docs/a.txt": bytes(5000)})
    (tmp_path / "x.tar.gz").write_bytes((tmp_path / "x.tar.gz").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"x\.tar\.gz: damaged archive"):
        list(read_folder(tmp_path / "x.tar.gz", "docs", [".txt"]))


def fetch_file(experiment: Experiment, name: str, content: bytes) -> None:
    (experiment.folder / name).write_bytes(content)
    experiment.set_params(experiment.params | {"fetch": experiment.params["fetch"] | {"path": name}})


TEXTS = ["one", "", "zwei \u2028\u2029\x85 drei", "\U0001f600"]
LINES = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", LINES),
        ("x.jsonl", LINES[:-1]),
        ("x.jsonl.zst", zstandard.compress(LINES)),
        ("x.jsonl.zst", zstandard.compress(LINES[:30]) + zstandard.compress(LINES[30:])),
    ],
    ids=["plain", "no-last-newline", "zstandard", "zstandard-frames"],
)
def test_a_local_file_is_passed_on_in_order(name: str, content: bytes, experiment: Experiment) -> None:
    fetch_file(experiment, name, content)
    experiment.stage("fetch")
    copied = documents_path(experiment.folder / "data/docs")
    assert copied.name == name.replace("x.", "docs.")
    assert list(read_texts(copied)) == TEXTS
    assert list(read_texts(copied, start=2)) == TEXTS[2:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": "b"\n', "x.jsonl, line 2: not JSON"),
        ("x.jsonl", b'{"text": "a"}\n\n', "x.jsonl, line 2: not JSON"),
        ("x.jsonl", b'{"text": "\xff"}\n', "x.jsonl, line 1: not JSON"),
        ("x.jsonl", b'{"body": "a"}\n', "x.jsonl, line 1: expected an object with the key `text`"),
        ("x.jsonl", b'"text"\n', "x.jsonl, line 1: expected an object with the key `text`"),
        ("x.jsonl", b'{"text": "a"}\n{"text": 3}\n', "x.jsonl, line 2: `text` is int, expected a string"),
        ("x.jsonl", b'{"text": "\\ud800"}\n', "x.jsonl, line 1: `text` has a lone surrogate"),
        ("x.jsonl", b"", "x.jsonl: no documents"),
        (
            "x.txt",
            b"text",
            "x.txt: expected a folder of .txt and .md files, or one of .jsonl, .jsonl.zst,",
        ),
        ("x.jsonl.zst", LINES, "x.jsonl.zst: damaged zstandard stream"),
        ("x.jsonl.zst", zstandard.compress(LINES)[:-9], "x.jsonl.zst: damaged zstandard stream (it ends inside"),
        ("x.jsonl.zst", b"", "x.jsonl.zst: damaged zstandard stream (it ends inside"),
    ],
)
def test_a_bad_local_file_is_refused_in_one_line(
    name: str, content: bytes, message: str, experiment: Experiment
) -> None:
    fetch_file(experiment, name, content)
    assert message in experiment.fails("fetch")
    assert not (experiment.folder / "data/docs").exists()


def test_a_missing_local_file_is_named(experiment: Experiment) -> None:
    fetch_file(experiment, "x.jsonl", LINES)
    (experiment.folder / "x.jsonl").unlink()
    assert "x.jsonl: no such file" in experiment.fails("fetch")


def write_parquet(experiment: Experiment, columns: dict[str, list[Any]]) -> None:
    parquet.write_table(pyarrow.table(columns), experiment.folder / "x.parquet", row_group_size=2)
    experiment.set_params(experiment.params | {"fetch": experiment.params["fetch"] | {"path": "x.parquet"}})


def test_the_text_column_of_a_parquet_file_is_passed_on_in_order(experiment: Experiment) -> None:
    write_parquet(experiment, {"id": list(range(len(TEXTS))), "text": TEXTS})
    experiment.stage("fetch")
    assert list(read_texts(documents_path(experiment.folder / "data/docs"))) == TEXTS


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"]}, "x.parquet: expected a column `text`, which fetch.column names; found `body`"),
        ({"text": [1]}, "x.parquet: expected a column `text` of strings, found int64"),
        ({"text": ["a", None]}, "x.parquet, row 2: `text` is null, expected a string"),
        ({"text": pyarrow.array([], pyarrow.string())}, "x.parquet: no documents"),
    ],
)
def test_a_bad_parquet_file_is_refused_in_one_line(
    columns: dict[str, list[Any]], message: str, experiment: Experiment
) -> None:
    write_parquet(experiment, columns)
    assert message in experiment.fails("fetch")


def test_a_damaged_or_missing_parquet_file_is_an_error(experiment: Experiment) -> None:
    write_parquet(experiment, {"text": TEXTS})
    path = experiment.folder / "x.parquet"
    path.write_bytes(path.read_bytes()[:-8])
    assert "x.parquet: not a readable Parquet file" in experiment.fails("fetch")
    path.unlink()
    assert "x.parquet: no such file" in experiment.fails("fetch")


COMMIT = "9bb295ddab0e05d785b879661af7260fed5140fc"
PREFIX = f"/datasets/owner/golf/resolve/{COMMIT}/datasets/"


@dataclass
class Hub:
    """What the server has (path below `datasets/` to content), what it lies about, and what it was asked for."""

    files: dict[str, bytes]
    endpoint: str = ""
    # Files whose content is not what their checksum promises.
    wrong: set[str] = field(default_factory=set)
    # Files whose first transfer breaks off after ten of eleven parts.
    cut: set[str] = field(default_factory=set)
    # (path, Range header) of every GET.
    gets: list[tuple[str, str | None]] = field(default_factory=list)


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._head(self.path.removeprefix(PREFIX), start=0)

        def do_GET(self) -> None:
            name = self.path.removeprefix(PREFIX)
            asked = self.headers.get("Range")
            hub.gets.append((name, asked))
            start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
            if not self._head(name, start=start):
                return
            content = hub.files[name][start:]
            if name in hub.wrong:
                content = bytes(len(content))
            if name in hub.cut:
                hub.cut.remove(name)
                content = content[: len(content) * 10 // 11]
                self.close_connection = True
            self.wfile.write(content)

        def _head(self, name: str, *, start: int) -> bool:
            content = hub.files.get(name)
            self.send_response(404 if content is None else 206 if start else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content) - start) if content is not None else "0")
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            elif name.endswith(".json"):
                blob = b"blob %d\0" % len(content) + content
                self.send_header("ETag", f'"{hashlib.sha1(blob).hexdigest()}"')
            else:
                self.send_header("X-Linked-ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Linked-Size", str(len(content)))
            self.end_headers()
            return content is not None

        def log_message(self, *arguments: Any) -> None:
            """Nothing on stderr."""

    return Handler


def published_files(folder: Path) -> dict[str, bytes]:
    """A published export in small: a plain variant and a CaseOps one, three training shards each."""

    def shard(*tokens: int) -> bytes:
        write_shard(folder / "shard.bin", np.array(tokens, dtype=np.uint16))
        return (folder / "shard.bin").read_bytes()

    operators = dict(enumerate("\ue001\ue002\ue003\ue004", start=4))
    plain = write_model(folder / "plain.model", byte_pieces(4) | {260: "a", 261: "▁a", 262: "▁"}, 263)
    caseops = write_model(folder / "caseops.model", operators | byte_pieces(8) | {264: "a", 265: "▁"}, 266)
    stats = {"docs_val": 2, "tokens_val": 5, "files_val": 1, "files_train": 3}
    names = {"plain": ("fineweb10B_sp263", 263), "caseops": ("fineweb10B_sp266_caseops", 266)}
    tokenizers = [{"name": key, "model_path": f"tokenizers/{key}.model"} for key in names]
    datasets = [
        {"name": name, "tokenizer_name": key, "vocab_size": vocab_size, "stats": stats}
        for key, (name, vocab_size) in names.items()
    ]
    datasets[1]["val_bytes_glob"] = "datasets/fineweb10B_sp266_caseops/fineweb_val_bytes_*.bin"
    files = {"manifest.json": json.dumps({"tokenizers": tokenizers, "datasets": datasets}).encode()}
    files |= {f"tokenizers/{path.name}": path.read_bytes() for path in (plain, caseops)}
    for key, (name, _) in names.items():
        val = (1, 260, 261, 1, 262) if key == "plain" else (1, 4, 264, 1, 264)
        files[f"datasets/{name}/fineweb_val_000000.bin"] = shard(*val)
        for index in range(3):
            files[f"datasets/{name}/fineweb_train_{index:06d}.bin"] = shard(1, *[259 + index] * 1000)
    files["datasets/fineweb10B_sp266_caseops/fineweb_val_bytes_000000.bin"] = shard(0, 0, 1, 0, 1)
    return files


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    made = Hub(published_files(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(made))
    made.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


def hub_settings(hub: Hub, **changes: Any) -> FetchHub:
    settings = {"source": "hub", "repository": "owner/golf", "revision": COMMIT, "root": "datasets", "train_shards": 2}
    return FetchHub.model_validate(settings | {"variant": "fineweb10B_sp263", "endpoint": hub.endpoint} | changes)


def fetch_into(tmp_path: Path, hub: Hub, name: str = "docs", **changes: Any) -> Path:
    (tmp_path / name).mkdir()
    fetch_hub(hub_settings(hub, **changes), tmp_path / name, cache=tmp_path / "cache")
    return tmp_path / name


def adopt(fetched: Path, tmp_path: Path, **changes: Any) -> tuple[Path, dict[str, Any]]:
    named = {"model": None, "trainer": "lossless", "transform": "none", "fused_pairs": 0, "vocab_size": 263} | changes
    settings: dict[str, Any] = {"val_documents": 2, "val_limit_documents": None, "shard_tokens": 1000} | named
    folder = tmp_path / "tokens"
    folder.mkdir()
    meta = adopt_export(fetched, folder, TokenizeSettings(**settings))
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder, meta


def test_the_asked_for_shards_come_with_their_tokenizer(hub: Hub, tmp_path: Path) -> None:
    folder = fetch_into(tmp_path, hub)
    names = {"fineweb_train_000000.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"}
    assert {path.name for path in folder.iterdir()} == names | {"tokenizer.model", "hub.json"}
    for name in names:
        assert (folder / name).read_bytes() == hub.files[f"datasets/fineweb10B_sp263/{name}"]


def test_published_shards_become_tokens(hub: Hub, tmp_path: Path) -> None:
    folder, meta = adopt(fetch_into(tmp_path, hub), tmp_path)
    verify_tokens(folder, vocab_size=263)
    assert (meta["train_tokens"], meta["val_tokens"], meta["val_documents"]) == (2002, 5, 2)
    assert meta["dropped_train_documents"] is None, "not looked for"
    assert meta["val_bytes"] == 3
    assert load_validation(folder, seq_len=4, vocab_size=263).bytes.tolist() == [1, 2, 0, 0]


def test_a_variant_with_byte_sidecars_brings_them(hub: Hub, tmp_path: Path) -> None:
    fetched = fetch_into(tmp_path, hub, variant="fineweb10B_sp266_caseops")
    folder, meta = adopt(fetched, tmp_path, vocab_size=266, transform="caseops")
    verify_tokens(folder, vocab_size=266)
    assert meta["val_bytes"] == 2
    assert load_validation(folder, seq_len=4, vocab_size=266).bytes.tolist() == [0, 1, 0, 1]


def test_a_limit_cuts_published_validation_shards_and_their_sidecars(hub: Hub, tmp_path: Path) -> None:
    fetched = fetch_into(tmp_path, hub, variant="fineweb10B_sp266_caseops")
    whole = load_tokens(fetched)
    folder, meta = adopt(fetched, tmp_path, vocab_size=266, transform="caseops", val_limit_documents=1)
    verify_tokens(folder, vocab_size=266)
    assert (meta["val_documents"], meta["held_out_documents"]) == (1, 2)
    kept = load_tokens(folder)
    end = [place for place, token in enumerate(whole[0]) if token == 1][1]
    assert kept == (whole[0][:end], whole[1][:end])
    assert load_tokens(fetched) == whole, "what was fetched stays as it was"


def load_tokens(folder: Path) -> tuple[list[int], list[int]]:
    """The tokens of the validation shards, and the bytes of their sidecars."""
    shards = [open_shard(path, vocab_size=None) for path in shard_paths(folder, "val")]
    return np.concatenate(shards).tolist(), np.concatenate(open_sidecars(folder)).tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 300}, "tokenize.vocab_size: expected 263, as fineweb10B_sp263 has it"),
        ({"val_documents": 3}, "tokenize.val_documents: expected 2"),
        ({"transform": "caseops"}, "tokenize.transform: expected none"),
        ({"model": "x.model"}, "tokenize.model: expected null"),
    ],
)
def test_settings_that_disagree_with_the_export_are_refused(
    changes: dict[str, Any], message: str, hub: Hub, tmp_path: Path
) -> None:
    fetched = fetch_into(tmp_path, hub)
    with pytest.raises(UserError, match=message):
        adopt(fetched, tmp_path, **changes)


def test_shards_that_changed_or_miss_documents_are_refused(hub: Hub, tmp_path: Path) -> None:
    hub.files["datasets/fineweb10B_sp263/fineweb_val_000000.bin"] = hub.files[
        "datasets/fineweb10B_sp263/fineweb_train_000000.bin"
    ]
    fetched = fetch_into(tmp_path, hub)
    with pytest.raises(UserError, match=r"the validation shards hold \(1, 1001\) .*, the manifest says \(2, 5\)"):
        adopt(fetched, tmp_path)
    shard = fetched / "fineweb_train_000001.bin"
    content = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(content[:-1] + b"\0")
    (tmp_path / "tokens").rename(tmp_path / "old")
    with pytest.raises(UserError, match=r"fineweb_train_000001\.bin: SHA-256 \w{16}\.\.\., expected"):
        adopt(fetched, tmp_path)


def test_what_the_cache_holds_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    fetch_into(tmp_path, hub)
    hub.gets.clear()
    fetch_into(tmp_path, hub, "more", train_shards=3)
    assert hub.gets == [("datasets/fineweb10B_sp263/fineweb_train_000002.bin", None)]
    complete = hub_settings(hub, endpoint="http://127.0.0.1:9")
    (tmp_path / "offline").mkdir()
    fetch_hub(complete, tmp_path / "offline", cache=tmp_path / "cache")
    assert (tmp_path / "offline/fineweb_train_000001.bin").is_file()


def test_a_cut_connection_goes_on_where_it_broke_off(hub: Hub, tmp_path: Path) -> None:
    name = "datasets/fineweb10B_sp263/fineweb_train_000001.bin"
    # The library writes, and therefore keeps, 10 MiB at a time.
    chunk = 10 * 2**20
    hub.files[name] += b"\x04\x01" * (chunk * 6 // 10)
    hub.cut.add(name)
    folder = fetch_into(tmp_path, hub)
    assert (folder / "fineweb_train_000001.bin").read_bytes() == hub.files[name]
    assert [asked for path, asked in hub.gets if path == name] == [None, f"bytes={chunk}-"]


def test_a_file_that_is_not_what_the_hub_promises_is_refused_and_forgotten(hub: Hub, tmp_path: Path) -> None:
    name = "datasets/fineweb10B_sp263/fineweb_train_000001.bin"
    promised = hashlib.sha256(hub.files[name]).hexdigest()
    for wrong in ("manifest.json", name):
        hub.wrong = {wrong}
        with pytest.raises(UserError, match=rf"owner/golf@{COMMIT}, datasets/{wrong}: checksum \w+, the hub promises"):
            fetch_into(tmp_path, hub, f"wrong-{len(wrong)}", train_shards=2)
        hub.wrong.clear()
    fetched = fetch_into(tmp_path, hub)
    assert hashlib.sha256((fetched / "fineweb_train_000001.bin").read_bytes()).hexdigest() == promised


def test_a_file_that_the_hub_does_not_have_is_named(hub: Hub, tmp_path: Path) -> None:
    del hub.files["datasets/fineweb10B_sp263/fineweb_train_000001.bin"]
    with pytest.raises(UserError, match=r"fineweb_train_000001\.bin: 404") as caught:
        fetch_into(tmp_path, hub)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "fineweb10B_sp1"}, "fetch.variant: owner/golf has no fineweb10B_sp1, only fineweb10B_sp263"),
        ({"train_shards": 4}, r"fetch.train_shards \(4\): fineweb10B_sp263 has 3 training shards"),
        ({"repository": "a/b/c"}, "a/b/c@"),
    ],
)
def test_what_the_manifest_does_not_offer_is_refused(
    changes: dict[str, Any], message: str, hub: Hub, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        fetch_into(tmp_path, hub, **changes)


@pytest.mark.parametrize("manifest", [b"[]", b"{", b'{"datasets": [{}], "tokenizers": []}'])
def test_a_manifest_of_another_kind_is_refused(manifest: bytes, hub: Hub, tmp_path: Path) -> None:
    hub.files["manifest.json"] = manifest
    with pytest.raises(UserError, match=r"manifest\.json is not understood"):
        fetch_into(tmp_path, hub)


@pytest.mark.long
def test_a_hub_out_of_reach_is_told_in_one_line(tmp_path: Path) -> None:
    """The library tries for half a minute before it gives up."""
    with pytest.raises(UserError, match=r"manifest\.json: not in the cache, and http://127\.0\.0\.1:9 is out of reach"):
        fetch_into(tmp_path, Hub({}, endpoint="http://127.0.0.1:9"))

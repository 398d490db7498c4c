"""The validation stream by document: what each cost, and that its text is the text that was scored."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import Experiment
from hypothesis import given
from hypothesis import strategies as st
from reports import Figures

from fairway.reporting.by_document import PASSAGE_TOKENS, Stream, Texts, read_documents, read_nats, read_stream, title
from fairway.runtime.errors import UserError
from fairway.tokens import caseops
from fairway.tokens.fused_pairs import as_json, free_ids, fuse, learn_pairs
from fairway.tokens.tokenizer import BOS, Tokenizer, train_tokenizer

EVALUATOR = "sliding"
PLAIN = {"transform": "none", "fused_pairs": []}


@pytest.fixture(scope="module")
def tokens(tokenized: Experiment) -> Path:
    return tokenized.folder / "artifacts/tokens"


def test_documents_hold_all_bits_and_bytes_of_the_score(one: Figures) -> None:
    artifacts = one.folder / "artifacts"
    nats_N = read_nats(artifacts, [1337], EVALUATOR)
    stream = read_stream(artifacts / "tokens", one.meta["vocab_size"], len(nats_N))
    metrics = json.loads((artifacts / f"evaluate/1337/{EVALUATOR}/metrics.json").read_text())
    assert int(stream.bytes_D.sum()) == metrics["bytes"]
    assert float(stream.bits_D(nats_N).sum()) / metrics["bytes"] == pytest.approx(metrics["val_bpb"])
    assert len(stream.starts_D) == one.meta["val_documents"]


def test_the_table_tells_each_document_as_it_was_fetched(one: Figures, evaluated: Experiment) -> None:
    corpus = [json.loads(line)["text"] for line in (evaluated.folder / "corpus.jsonl").read_text().splitlines()]
    reading = read_documents(one.folder / "artifacts", one.meta, [1337], EVALUATOR)
    assert [row.number for row in reading.rows] == [1, 2, 3, 4]
    assert reading.documents == 4
    for row, text in zip(reading.rows, corpus, strict=False):
        assert row.title.rstrip(" …") == text[: len(row.title.rstrip(" …"))]
        assert 3 < row.xz_bpb < 8
    # All but the last, which the stream cuts to whole rows.
    assert [row.size_bytes for row in reading.rows[:3]] == [len(text.encode()) for text in corpus[:3]]
    passage = "".join(piece.text for piece in reading.passage)
    assert len(reading.passage) == PASSAGE_TOKENS
    assert passage == corpus[0][: len(passage)]


def test_shades_follow_bits(one: Figures) -> None:
    for piece in read_documents(one.folder / "artifacts", one.meta, [1337], EVALUATOR).passage:
        assert piece.shade == [piece.bits < 1, piece.bits < 2, piece.bits < 4, piece.bits < 8, True].index(True)


def test_documents_are_means_over_seeds_of_one_stream(one: Figures) -> None:
    one.add_seeds({42: 0.0})
    artifacts = one.folder / "artifacts"
    path = artifacts / f"evaluate/42/{EVALUATOR}/nats.npz"
    alone = read_nats(artifacts, [1337], EVALUATOR)
    np.savez(path, nats=alone + 1.0)
    np.testing.assert_allclose(read_nats(artifacts, [1337, 42], EVALUATOR), alone + 0.5)
    np.savez(path, nats=alone[:-1])
    with pytest.raises(UserError, match=r"nats\.npz: \d+ targets, expected \d+ as of seed 1337"):
        read_nats(artifacts, [1337, 42], EVALUATOR)


def test_more_scores_than_tokens_are_refused(tokens: Path) -> None:
    with pytest.raises(UserError, match=r"targets, expected the 999999 that were scored"):
        read_stream(tokens, 320, 999_999)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_every_target_belongs_to_one_document(lengths: list[int]) -> None:
    """Documents of so many tokens behind their BOS; an empty one still takes its BOS."""
    ids = [token for length in lengths for token in [BOS, *range(10, 10 + length)]] + [10]
    tokens_N1 = np.array(ids)
    begins = np.flatnonzero(tokens_N1 == BOS) - 1
    stream = Stream(tokens_N1, np.ones(len(ids) - 1, dtype=np.int64), np.union1d([0], begins[begins >= 0]))
    parts = [stream.document(i).tolist() for i in range(len(stream.starts_D))]
    assert [token for part in parts for token in part] == ids[1:]
    assert [len(part) for part in parts] == stream.bytes_D.tolist()
    assert stream.bits_D(np.full(len(ids) - 1, math.log(2))).tolist() == pytest.approx(stream.bytes_D.tolist())


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60))
def test_pieces_are_the_text(tokens: Path, text: str) -> None:
    ids = np.array([BOS, *Tokenizer(tokens / "tokenizer.model").encode(text)])
    pieces = Texts(tokens, PLAIN).pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


def test_half_a_character_shows_as_one_that_is_missing(tokens: Path) -> None:
    ids = Tokenizer(tokens / "tokenizer.model").encode("☃")
    assert Texts(tokens, PLAIN).pieces(np.array(ids[:2])) == ["", "\ufffd"]


def test_caseops_gives_capitals_back_through_fused_pairs_too(tmp_path: Path) -> None:
    text = "Hello THERE, McDonald and iPhone\n" * 3
    model = train_tokenizer(iter([text * 40]), vocab_size=290, trainer="lossless", transform="caseops")
    (tmp_path / "tokenizer.model").write_bytes(model)
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    ids = np.array(tokenizer.encode(caseops.encode(text)))
    pairs = learn_pairs(ids, free_ids(tokenizer))
    for used in ([], pairs):
        pieces = Texts(tmp_path, {"transform": "caseops", "fused_pairs": as_json(used)}).pieces(fuse(ids, used))
        assert "".join(pieces) == text
    assert len(fuse(ids, pairs)) < len(ids)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A title\nand more", "A title"),
        ("=====\n\n  The title\n=====", "The title"),
        ("word " * 40, "word " * 11 + "word …"),
        ("", ""),
        ("...\n", ""),
    ],
)
def test_a_title_is_the_first_line_with_letters(text: str, expected: str) -> None:
    assert title(text) == expected

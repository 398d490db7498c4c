"""Pairs of tokens that become one token: nothing is lost, and bytes stay what they are."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from test_caseops import TEXTS

from fairway.runtime.errors import UserError
from fairway.tokens import caseops
from fairway.tokens.encoding import CaseOpsEncoder
from fairway.tokens.export import tokenize_documents
from fairway.tokens.fused_pairs import (
    NEVER,
    Pair,
    as_json,
    free_ids,
    from_json,
    fuse,
    fuse_shards,
    fuse_with_bytes,
    learn_pairs,
    unfuse,
)
from fairway.tokens.shards import Split, open_shard, shard_paths, sidecar_paths
from fairway.tokens.tokenizer import BOS, Tokenizer, TokenizeSettings, train_tokenizer
from fairway.tokens.validation import verify_tokens

VOCAB_SIZE = 320
SPLITS: tuple[Split, ...] = ("train", "val")
# Few different tokens, so that pairs repeat, overlap and hold one another.
TOKENS = st.lists(st.integers(1, 4), max_size=60).map(lambda ids: np.array(ids, dtype=np.uint16))
SETTINGS: dict[str, Any] = {"trainer": "lossless", "transform": "caseops", "vocab_size": VOCAB_SIZE, "val_documents": 2}
SETTINGS |= {"model": None, "val_limit_documents": None, "shard_tokens": 500}


@settings(max_examples=300)
@given(TOKENS, TOKENS, st.integers(1, 5))
def test_fused_tokens_come_back(learned_from: np.ndarray, tokens: np.ndarray, count: int) -> None:
    pairs = learn_pairs(learned_from, range(100, 100 + count))
    fused = fuse(tokens, from_json(json.loads(json.dumps(as_json(pairs)))))
    assert unfuse(fused, pairs).tolist() == tokens.tolist()
    assert (fused.dtype, unfuse(fused, pairs).dtype) == (tokens.dtype, tokens.dtype)
    assert (fused == BOS).sum() == (tokens == BOS).sum(), "documents stay apart"


@settings(max_examples=100)
@given(TOKENS, st.integers(0, 2**32 - 1))
def test_bytes_go_with_their_tokens(tokens: np.ndarray, seed: int) -> None:
    """Each token of the result has the bytes of the tokens it stands for."""
    pairs = learn_pairs(tokens, range(100, 103))
    token_bytes = np.random.default_rng(seed).integers(0, 9, len(tokens))
    fused, fused_bytes = fuse_with_bytes(tokens, token_bytes, pairs)
    ends = np.cumsum([len(unfuse(np.array([token]), pairs)) for token in fused]).astype(int)
    assert np.cumsum(fused_bytes).tolist() == np.cumsum(token_bytes)[ends - 1].tolist()


def test_the_most_frequent_pair_comes_first_and_may_be_in_later_ones() -> None:
    tokens = np.array([BOS, 5, 6, 7, 8, 5, 6, 7, 9, 5, 6, BOS, 5, 6], dtype=np.uint16)
    assert learn_pairs(tokens, [90, 91, 92]) == [Pair(5, 6, 90), Pair(90, 7, 91)], "a third pair occurs but once"
    assert fuse(tokens, [Pair(5, 6, 90), Pair(90, 7, 91)]).tolist() == [BOS, 91, 8, 91, 9, 90, BOS, 90]


def test_a_run_of_equal_tokens_becomes_pairs_from_its_beginning() -> None:
    tokens = np.array([7, 7, 7, 8, 7, 7, 7, 7], dtype=np.uint16)
    assert fuse(tokens, [Pair(7, 7, 90)]).tolist() == [90, 7, 8, 90, 90]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ["Anna", "Berlin", "Chopin", "Dora", "Emil", "Fritz", "Gauss", "Hilbert"]
    texts = [
        " ".join(f"{names[(i + j) % 8]} met NASA. The {names[j % 8]} wrote {i * j}." for j in range(9))
        for i in range(40)
    ]
    path = tmp_path_factory.mktemp("fused") / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def _tokenized(documents: Path, folder: Path, count: int) -> dict[str, Any]:
    folder.mkdir()
    meta = tokenize_documents(documents, folder, TokenizeSettings(**(SETTINGS | {"fused_pairs": count})))
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    verify_tokens(folder, vocab_size=VOCAB_SIZE)
    return meta


def _all(paths: list[Path]) -> np.ndarray:
    return np.concatenate([open_shard(path, vocab_size=None) for path in paths])


def test_documents_and_finished_shards_are_fused_alike(documents: Path, tmp_path: Path) -> None:
    """And lose neither tokens nor bytes by it. Only at the ends of shards do finished ones keep a pair."""
    plain, fused = (_tokenized(documents, tmp_path / str(count), count) for count in (0, 13))
    pairs = from_json(fused["fused_pairs"])
    assert len(pairs) == 13
    assert plain["val_bytes"] == fused["val_bytes"]
    kept = {split: _all(shard_paths(tmp_path / "0", split)) for split in SPLITS}
    for split in SPLITS:
        found = _all(shard_paths(tmp_path / "13", split))
        assert len(found) < 0.9 * len(kept[split])
        assert unfuse(found, pairs).tolist() == kept[split].tolist()
    learned, digests = fuse_shards(tmp_path / "0", 13)
    assert set(digests) == {path.name for path in (tmp_path / "0").glob("*.bin")}
    for split in SPLITS:
        assert unfuse(_all(shard_paths(tmp_path / "0", split)), learned).tolist() == kept[split].tolist()
    assert _all(sidecar_paths(tmp_path / "0")).sum() == plain["val_bytes"]


@settings(max_examples=60)
@given(text=TEXTS)
def test_no_text_has_a_free_id_and_every_text_comes_back(documents: Path, text: str) -> None:
    encoder = _encoder(documents)
    ids = encoder.tokenizer.encode(caseops.encode(text))
    assert not set(ids) & set(free_ids(encoder.tokenizer))
    tokens = encoder.document(text, "val", "here").tokens
    assert caseops.decode(encoder.tokenizer.decode(unfuse(tokens, encoder.pairs)[1:].tolist())) == text


_ENCODERS: list[CaseOpsEncoder] = []


def _encoder(documents: Path) -> CaseOpsEncoder:
    if not _ENCODERS:
        texts = [json.loads(line)["text"] for line in documents.read_text(encoding="utf-8").splitlines()]
        path = documents.with_name("pairs.model")
        path.write_bytes(train_tokenizer(iter(texts), vocab_size=VOCAB_SIZE, trainer="lossless", transform="caseops"))
        tokens = np.concatenate([CaseOpsEncoder(path).document(text, "train", "here").tokens for text in texts])
        _ENCODERS.append(CaseOpsEncoder(path, learn_pairs(tokens, free_ids(Tokenizer(path)))))
    return _ENCODERS[0]


def test_free_ids_are_those_of_bytes_that_utf_8_never_has(documents: Path) -> None:
    every_character = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)])).encode("utf-8")
    assert set(every_character) == set(range(256)) - set(NEVER)
    assert len(free_ids(_encoder(documents).tokenizer)) == len(NEVER) == 13


def test_pairs_without_caseops_or_byte_pieces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fused_pairs \(3\) must be 0 unless transform is caseops"):
        TokenizeSettings(**(SETTINGS | {"transform": "none", "fused_pairs": 3}))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["no byte pieces"] * 9), model_writer=model, vocab_size=15, minloglevel=2
    )
    (tmp_path / "plain.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match=r"tokenize\.fused_pairs: expected 0, since the tokenizer has no byte pieces"):
        free_ids(Tokenizer(tmp_path / "plain.model"))

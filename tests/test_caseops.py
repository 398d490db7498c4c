"""CaseOps v1: the published vectors, losslessness on any text, and the bytes in the sidecar."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from conftest import Experiment, write_corpus
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as proto

from fairway.runtime.errors import UserError
from fairway.tokens.caseops import OPERATORS, decode, encode, original_pieces
from fairway.tokens.documents import read_texts
from fairway.tokens.encoding import CaseOpsEncoder
from fairway.tokens.shards import open_shard, shard_paths, sidecar_paths
from fairway.tokens.tokenizer import check_tokenizer, train_tokenizer
from fairway.tokens.validation import load_validation, verify_tokens

GOLDEN = json.loads((Path(__file__).parent / "golden" / "caseops.json").read_text(encoding="utf-8"))
VOCAB_SIZE = 340

# Letters of both cases, operators, the operator of another scheme, accents, combining marks, emoji, folding characters.
TEXTS = st.text(
    st.one_of(
        st.sampled_from("abzABZ 19_'-\n\ue000\ue001\ue002\ue003\ue004\u0301éÉßİΣ\U0001f600ＡＢ™ﬁ▁"),
        st.characters(codec="utf-8"),
    )
)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["category"])
def test_a_golden_text_is_encoded_decoded_and_counted_as_published(case: dict) -> None:
    assert encode(case["text"]) == case["transformed"]
    assert decode(case["transformed"]) == case["text"]
    counts = [len(piece.encode("utf-8")) for piece in original_pieces(case["surfaces"])]
    assert counts == case["token_bytes"]
    assert case["original_utf8_bytes"] - sum(counts) == case["unattributed_bytes"]


@pytest.mark.parametrize("case", GOLDEN["decode_cases"], ids=lambda case: case["note"])
def test_text_that_no_encoder_writes_is_decoded_as_published(case: dict) -> None:
    assert decode(case["transformed"]) == case["text"]


@pytest.mark.parametrize("case", GOLDEN["decode_errors"], ids=lambda case: case["note"])
def test_malformed_text_is_refused(case: dict) -> None:
    with pytest.raises(ValueError, match="malformed CaseOps text"):
        decode(case["transformed"])


def check_lossless(text: str) -> None:
    encoded = encode(text)
    assert decode(encoded) == text
    assert not any("A" <= character <= "Z" for character in encoded)
    assert len(encoded) - len(text) == sum(encoded.count(operator) for operator in OPERATORS) - sum(
        text.count(operator) for operator in OPERATORS
    )


@settings(max_examples=500, deadline=None)
@given(text=TEXTS)
@example("\ue001")
@example("A\ue002b\ue003C\ue004D")
def test_every_text_comes_back(text: str) -> None:
    check_lossless(text)


@pytest.mark.long
@settings(max_examples=20_000, deadline=None)
@given(text=TEXTS)
def test_very_many_texts_come_back(text: str) -> None:
    check_lossless(text)


@settings(max_examples=500, deadline=None)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 40)))
def test_pieces_cut_anywhere_stand_for_the_whole_text(text: str, cuts: list[int]) -> None:
    encoded = encode(text)
    edges = sorted({0, len(encoded), *(cut for cut in cuts if cut <= len(encoded))})
    surfaces = [encoded[start:end] for start, end in pairwise(edges)]
    assert "".join(original_pieces(surfaces)) == text


def test_encoding_takes_linear_time() -> None:
    """A quadratic search would take hours."""
    assert encode("a" * 1_000_000) == "a" * 1_000_000
    assert len(encode("aB" * 500_000)) == 1_500_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("caseops") / "docs.jsonl")


def train(corpus: Path, trainer: Literal["lossless", "published"]) -> Path:
    path = corpus.with_name(f"{trainer}.model")
    path.write_bytes(train_tokenizer(read_texts(corpus), vocab_size=VOCAB_SIZE, trainer=trainer, transform="caseops"))
    return path


@pytest.fixture(scope="module")
def published(corpus: Path) -> CaseOpsEncoder:
    return CaseOpsEncoder(train(corpus, "published"))


@pytest.fixture(scope="module")
def lossless(corpus: Path) -> CaseOpsEncoder:
    return CaseOpsEncoder(train(corpus, "lossless"))


def test_a_trained_tokenizer_reserves_the_operators(published: CaseOpsEncoder) -> None:
    model = published.tokenizer.model
    assert [model.id_to_piece(4 + i) for i in range(4)] == list(OPERATORS)
    pieces = [model.id_to_piece(i) for i in range(264, VOCAB_SIZE)]
    assert not any("A" <= character <= "Z" for piece in pieces for character in piece)
    assert published.tokenizer.encode(encode("The NASA"))[0] == 4


def test_the_sidecar_has_an_entry_for_every_token(published: CaseOpsEncoder) -> None:
    document = published.document("The É\U0001f600 end.", "val", "here")
    assert document.token_bytes is not None
    assert len(document.token_bytes) == len(document.tokens)
    assert (document.tokens[:2].tolist(), document.token_bytes[:2].tolist()) == ([1, 4], [0, 0])
    assert int(document.token_bytes.sum()) == len("The É\U0001f600 end.".encode())


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_a_lossless_tokenizer_counts_every_byte(lossless: CaseOpsEncoder, text: str) -> None:
    counts = lossless.document(text, "val", "here").token_bytes
    assert counts is not None
    assert int(counts.sum()) == len(text.encode("utf-8"))


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_a_folding_tokenizer_counts_every_byte_but_whitespace_at_the_ends(published: CaseOpsEncoder, text: str) -> None:
    counts = published.document(f"x{text}x", "val", "here").token_bytes
    assert counts is not None
    assert int(counts.sum()) == len(f"x{text}x".encode())


def test_whitespace_at_the_ends_is_charged_to_no_token(published: CaseOpsEncoder) -> None:
    counts = published.document(" \n Hello  you\u3000\n", "val", "here").token_bytes
    assert counts is not None
    assert int(counts.sum()) == len("Hello  you")


def test_train_and_validation_tokens_are_the_same(published: CaseOpsEncoder) -> None:
    text = "MixedCase text with ▁ and \ue001 and É\U0001f600\n twice  spaced"
    validation, training = (published.document(text, split, "here") for split in ("val", "train"))
    assert validation.tokens.tolist() == training.tokens.tolist()
    assert training.token_bytes is None


def test_a_token_of_too_many_bytes_is_an_error(published: CaseOpsEncoder) -> None:
    with pytest.raises(UserError, match=r"here: one token stands for 70001 bytes; the sidecar holds 65535"):
        published.document("a" + " " * 70_000 + "b", "val", "here")


def test_a_tokenizer_without_the_operators_is_refused(corpus: Path) -> None:
    plain = corpus.with_name("plain.model")
    model = train_tokenizer(read_texts(corpus), vocab_size=VOCAB_SIZE, trainer="lossless", transform="none")
    plain.write_bytes(model)
    check_tokenizer(plain, vocab_size=VOCAB_SIZE, operators="")
    with pytest.raises(UserError, match=r"plain\.model: ids 4 to 7 are not U\+E001 to U\+E004"):
        check_tokenizer(plain, vocab_size=VOCAB_SIZE, operators=OPERATORS)


@pytest.mark.parametrize("trainer", ["lossless", "published"])
def test_the_stage_writes_a_sidecar_that_validation_reads(experiment: Experiment, trainer: str) -> None:
    params = experiment.params
    params["tokenize"] |= {"transform": "caseops", "trainer": trainer, "vocab_size": VOCAB_SIZE, "shard_tokens": 500}
    params["model"]["vocab_size"] = VOCAB_SIZE
    experiment.set_params(params)
    experiment.stage("fetch")
    experiment.stage("tokenize")
    folder = experiment.folder / "artifacts/tokens"
    verify_tokens(folder, vocab_size=VOCAB_SIZE)
    meta = json.loads((folder / "meta.json").read_text())
    texts = list(read_texts(experiment.folder / "data/docs/docs.jsonl"))[: meta["val_documents"]]
    # The documents of the test corpus end in one newline, which folding strips.
    stripped = len(texts) if trainer == "published" else 0
    assert meta["val_text_bytes"] == sum(len(text.encode("utf-8")) for text in texts) == meta["val_bytes"] + stripped
    tokens, sidecars = shard_paths(folder, "val"), sidecar_paths(folder)
    assert [open_shard(path, vocab_size=None).shape for path in tokens] == [
        open_shard(path, vocab_size=None).shape for path in sidecars
    ]
    assert len(sidecars) > 1
    assert int(load_validation(folder, seq_len=1, vocab_size=VOCAB_SIZE).bytes.sum()) == meta["val_bytes"]
    first = np.concatenate([open_shard(path, vocab_size=None) for path in sidecars])
    assert first[0] == 0


def test_user_defined_pieces_are_what_the_model_records(published: CaseOpsEncoder, corpus: Path) -> None:
    recorded = proto.ModelProto.FromString(corpus.with_name("published.model").read_bytes())
    assert list(recorded.trainer_spec.user_defined_symbols) == list(OPERATORS)

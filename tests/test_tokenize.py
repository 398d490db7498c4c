"""Documents to shards: nothing lost, splits apart, bytes accounted for, and faults told before work begins."""

import json
import lzma
import re
import shutil
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from conftest import Experiment, write_corpus
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as proto
from test_bytes import byte_pieces, write_model

from fairway.runtime.errors import UserError
from fairway.tokens.documents import read_texts
from fairway.tokens.encoding import LineBatch, PlainEncoder, encode_batch
from fairway.tokens.export import check_documents, compressed_bytes, export, held_out_hashes
from fairway.tokens.shards import open_shard, shard_paths
from fairway.tokens.tokenizer import Tokenizer, TokenizeSettings, train_tokenizer
from fairway.tokens.validation import load_validation, verify_tokens

VOCAB_SIZE = 320
VAL_DOCUMENTS = 4


def train(texts: Iterator[str], *, vocab_size: int = VOCAB_SIZE) -> bytes:
    return train_tokenizer(texts, vocab_size=vocab_size, trainer="lossless", transform="none")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "docs.jsonl")


@pytest.fixture(scope="module")
def model(corpus: Path) -> Path:
    path = corpus.with_name("tokenizer.model")
    path.write_bytes(train(read_texts(corpus)))
    return path


@pytest.fixture(scope="module")
def encoder(model: Path) -> PlainEncoder:
    return PlainEncoder(model, VOCAB_SIZE)


@pytest.fixture(scope="module")
def folding_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that, like the published ones, strips and merges whitespace."""
    path = tmp_path_factory.mktemp("folding") / "tokenizer.model"
    return write_model(path, byte_pieces(4) | {260: "a", 261: "▁", 262: "▁a"}, VOCAB_SIZE)


def test_the_special_tokens_have_the_challenges_ids(model: Path) -> None:
    tokenizer = Tokenizer(model).model
    ids = (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id())
    assert ids == (0, 1, 2, 3)
    assert [tokenizer.id_to_piece(4 + value) for value in (0, 255)] == ["<0x00>", "<0xFF>"]
    assert tokenizer.vocab_size() == VOCAB_SIZE


def test_training_twice_gives_the_same_model(corpus: Path, model: Path) -> None:
    assert train(read_texts(corpus)) == model.read_bytes()


def test_every_digit_is_its_own_piece(encoder: PlainEncoder) -> None:
    pieces = encoder.tokenizer.model.encode("1999", out_type=str)
    assert [piece.strip("▁") for piece in pieces if piece != "▁"] == ["1", "9", "9", "9"]


@settings(deadline=None)
@given(text=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\t\r\0▁aé1"))))
@example(" leading, trailing  and  inner \n\n")
@example("▁ a literal U+2581 ▁▁ ▁\n▁")
@example("<s> <unk> <0x41> </s> ▅ \ufeff\u200b")
def test_every_text_comes_back_and_its_tokens_count_its_bytes(encoder: PlainEncoder, text: str) -> None:
    document = encoder.document(text, "val", "here")
    assert document.tokens[0] == 1
    assert encoder.tokenizer.decode(document.tokens[1:].tolist()) == text
    assert document.token_bytes is not None
    assert int(document.token_bytes.sum()) == len(text.encode("utf-8"))


def test_a_folding_tokenizer_counts_the_text_it_decodes_to(folding_model: Path) -> None:
    lines = [json.dumps({"text": text}).encode() for text in (" a  a ", "é\n", "")]
    encoded = encode_batch(
        PlainEncoder(folding_model, VOCAB_SIZE), LineBatch("x", "val", 1, lines), held_out=frozenset()
    )
    assert encoded.tokens.tolist() == [1, 260, 262, 1, 4 + 0xC3, 4 + 0xA9, 4 + 0x0A, 1]
    assert encoded.text_bytes == len(" a  a é\n".encode())
    assert encoded.counted_bytes == len("a aé\n".encode())


def test_a_tokenizer_without_byte_fallback_is_refused(tmp_path: Path) -> None:
    encoder = PlainEncoder(write_model(tmp_path / "m.model", {4: "a", 5: "▁"}, VOCAB_SIZE), VOCAB_SIZE)
    batch = LineBatch("x", "train", 7, [b'{"text": "a"}', b'{"text": "ab"}'])
    with pytest.raises(UserError, match=r"x, line 8: the tokens count 1 bytes and decode to \d: no byte fallback"):
        encode_batch(encoder, batch, held_out=frozenset())


def run_export(
    corpus: Path,
    model: Path,
    folder: Path,
    *,
    shard_tokens: int = 100_000,
    workers: int = 1,
    limit: int | None = None,
) -> dict[str, Any]:
    folder.mkdir()
    settings = TokenizeSettings(
        model=None,
        trainer="lossless",
        transform="none",
        fused_pairs=0,
        vocab_size=VOCAB_SIZE,
        val_documents=VAL_DOCUMENTS,
        val_limit_documents=limit,
        shard_tokens=shard_tokens,
    )
    held_out = held_out_hashes(corpus, settings)
    return export(corpus, model, folder, settings=settings, held_out=held_out, workers=workers)


def stream(folder: Path, split: Literal["train", "val"]) -> np.ndarray:
    return np.concatenate([open_shard(path, vocab_size=VOCAB_SIZE) for path in shard_paths(folder, split)])


def test_the_first_documents_validate_and_the_others_train(
    corpus: Path, model: Path, encoder: PlainEncoder, tmp_path: Path
) -> None:
    meta = run_export(corpus, model, tmp_path / "out", shard_tokens=1000)
    documents = [[1, *encoder.tokenizer.encode(text)] for text in read_texts(corpus)]
    assert stream(tmp_path / "out", "val").tolist() == list(chain(*documents[:VAL_DOCUMENTS]))
    assert stream(tmp_path / "out", "train").tolist() == list(chain(*documents[VAL_DOCUMENTS:]))
    assert (meta["val_documents"], meta["train_documents"]) == (VAL_DOCUMENTS, len(documents) - VAL_DOCUMENTS)
    assert meta["train_tokens"] == sum(map(len, documents[VAL_DOCUMENTS:]))
    shards = [open_shard(path, vocab_size=None) for path in shard_paths(tmp_path / "out", "train")]
    assert {len(shard) for shard in shards[:-1]} == {1000}


@pytest.mark.parametrize("batch_bytes", [300, 1 << 20])
def test_of_what_is_held_out_a_limit_keeps_the_first_documents_alone(
    batch_bytes: int,
    corpus: Path,
    model: Path,
    encoder: PlainEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fairway.tokens.export.BATCH_BYTES", batch_bytes)
    meta = run_export(corpus, model, tmp_path / "out", limit=2)
    documents = [[1, *encoder.tokenizer.encode(text)] for text in read_texts(corpus)]
    assert stream(tmp_path / "out", "val").tolist() == list(chain(*documents[:2]))
    assert stream(tmp_path / "out", "train").tolist() == list(chain(*documents[VAL_DOCUMENTS:]))
    assert (meta["val_documents"], meta["held_out_documents"]) == (2, VAL_DOCUMENTS)


@settings(deadline=None, max_examples=30)
@given(drawn=st.lists(st.sampled_from(["", "a", "a ", "é\n", "\u2581", "a text", "A text"]), min_size=5, max_size=20))
def test_no_text_that_validates_is_trained_on(encoder: PlainEncoder, model: Path, drawn: list[str]) -> None:
    """And nothing else is lost: documents are the held-out ones, those that train, and those that are dropped."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        documents = folder / "docs.jsonl"
        documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in drawn))
        meta = run_export(documents, model, folder / "out", limit=2)
        texts = {split: decoded(encoder, folder / "out", split) for split in SPLITS if meta[f"{split}_documents"]}
    held_out = drawn[:VAL_DOCUMENTS]
    kept = [text for text in drawn[VAL_DOCUMENTS:] if text not in held_out]
    assert texts["val"] == held_out[:2]
    assert texts.get("train", []) == kept
    assert meta["dropped_train_documents"] == len(drawn) - VAL_DOCUMENTS - len(kept)


SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")


def decoded(encoder: PlainEncoder, folder: Path, split: Literal["train", "val"]) -> list[str]:
    """The documents of a split, each of which begins with BOS."""
    tokens = stream(folder, split)
    starts = np.flatnonzero(tokens == 1)
    assert starts[0] == 0
    return [encoder.tokenizer.decode(document[1:].tolist()) for document in np.split(tokens, starts[1:])]


def test_copies_of_held_out_documents_teach_neither_tokenizer_nor_network(
    experiment: Experiment, tokenized: Experiment
) -> None:
    """With them behind the training documents all artifacts are the same as without, but for the count."""
    corpus = experiment.folder / "corpus.jsonl"
    lines = corpus.read_text().splitlines(keepends=True)
    corpus.write_text("".join([*lines, *lines[:VAL_DOCUMENTS]]))
    experiment.stage("fetch")
    printed = experiment.stage("tokenize").stdout
    assert "tokenize: 4 documents are not trained on, since their text is that of a document held out" in printed
    made, without = (
        json.loads((each.folder / "artifacts/tokens/meta.json").read_text()) for each in (experiment, tokenized)
    )
    assert (without["dropped_train_documents"], without["repeated_train_documents"]) == (0, 0)
    assert made == without | {"dropped_train_documents": VAL_DOCUMENTS}


def test_text_that_a_published_tokenizer_folds_to_more_bytes_is_told(experiment: Experiment) -> None:
    """U+FDFA, of three bytes, is folded to a phrase of 33."""
    corpus = experiment.folder / "corpus.jsonl"
    folded = [json.dumps({"text": "\ufdfa" * many}) + "\n" for many in range(1, VAL_DOCUMENTS + 1)]
    corpus.write_text("".join(folded) + corpus.read_text())
    experiment.params["tokenize"]["trainer"] = "published"
    experiment.set_params(experiment.params)
    experiment.stage("fetch")
    printed = experiment.stage("tokenize").stdout
    meta = json.loads((experiment.folder / "artifacts/tokens/meta.json").read_text())
    assert meta["val_bytes"] == 11 * meta["val_text_bytes"] == 330
    assert "tokenize: the tokenizer folds text: 330 bytes are counted for 30 bytes of validation text" in printed


def test_a_split_without_text_is_refused(experiment: Experiment, folding_model: Path) -> None:
    def refused(*texts: str) -> str:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (experiment.folder / "corpus.jsonl").write_text(lines)
        experiment.stage("fetch")
        error = experiment.fails("tokenize")
        assert not (experiment.folder / "artifacts/tokens").exists()
        return error

    copies = refused("a", "b", "c", "d", "a", "d")
    assert "docs.jsonl: every document behind the first 4 (tokenize.val_documents) repeats one of them" in copies
    assert "docs.jsonl: the first 4 documents, which validate, are all empty" in refused("", "", "", "", "a")
    shutil.copy(folding_model, experiment.folder / "given.model")
    experiment.params["tokenize"]["model"] = "given.model"
    experiment.set_params(experiment.params)
    folded = refused(" ", "  ", " ", "", "a")
    assert "docs.jsonl: the tokenizer leaves nothing of the documents that validate, so that no byte" in folded


def test_the_number_of_processes_changes_nothing(
    corpus: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fairway.tokens.export.BATCH_BYTES", 2000)
    metas = [run_export(corpus, model, tmp_path / str(workers), workers=workers) for workers in (1, 2, 3)]
    assert metas[0] == metas[1] == metas[2]


def test_a_fault_in_a_worker_process_is_told_with_its_line(
    corpus: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fairway.tokens.export.BATCH_BYTES", 2000)
    bad = tmp_path / "docs.jsonl"
    bad.write_bytes(corpus.read_bytes() + b'{"text": 1}\n')
    with pytest.raises(UserError, match=r"docs\.jsonl, line 25: `text` is int, expected a string"):
        run_export(bad, model, tmp_path / "out", workers=2)


def test_validation_bytes_are_the_raw_bytes_of_the_text(tokenized: Experiment) -> None:
    folder = tokenized.folder / "artifacts/tokens"
    meta = json.loads((folder / "meta.json").read_text())
    texts = list(read_texts(tokenized.folder / "data/docs/docs.jsonl"))
    raw = sum(len(text.encode("utf-8")) for text in texts[:VAL_DOCUMENTS])
    assert meta["val_bytes"] == meta["val_text_bytes"] == raw
    assert meta["compressed_val_bytes"] == compressed_bytes(texts[:VAL_DOCUMENTS])
    verify_tokens(folder, vocab_size=VOCAB_SIZE)
    # Rows of one token cut nothing off.
    assert int(load_validation(folder, seq_len=1, vocab_size=VOCAB_SIZE).bytes.sum()) == raw


def test_the_tokenizer_is_trained_on_the_training_split_only(tokenized: Experiment) -> None:
    texts = read_texts(tokenized.folder / "data/docs/docs.jsonl", start=VAL_DOCUMENTS)
    trained = train(texts)
    assert (tokenized.folder / "artifacts/tokens/tokenizer.model").read_bytes() == trained


def test_a_given_model_is_used_as_it_is(experiment: Experiment, folding_model: Path) -> None:
    shutil.copy(folding_model, experiment.folder / "given.model")
    (experiment.folder / "corpus.jsonl").write_text('{"text": " a  a "}\n' * 4 + '{"text": "a"}\n')
    experiment.params["tokenize"]["model"] = "given.model"
    experiment.set_params(experiment.params)
    experiment.stage("fetch")
    experiment.stage("tokenize")
    folder = experiment.folder / "artifacts/tokens"
    meta = json.loads((folder / "meta.json").read_text())
    assert (folder / "tokenizer.model").read_bytes() == folding_model.read_bytes()
    assert (meta["val_bytes"], meta["val_text_bytes"]) == (4 * len("a a"), 4 * len(" a  a "))
    verify_tokens(folder, vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize(("share", "held_out"), [(0.25, 6), (0.01, 1), (0.55, 13)])
def test_a_share_of_the_documents_may_validate(experiment: Experiment, share: float, held_out: int) -> None:
    """Of 24 documents, rounded, and at least one."""
    experiment.params["tokenize"] |= {"val_documents": share}
    experiment.set_params(experiment.params)
    experiment.stage("fetch")
    experiment.stage("tokenize")
    meta = json.loads((experiment.folder / "artifacts/tokens/meta.json").read_text())
    assert meta["val_documents"] == meta["held_out_documents"] == held_out
    assert meta["train_documents"] + meta["dropped_train_documents"] == 24 - held_out


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5, -0.1])
def test_what_is_neither_a_number_nor_a_share_is_refused(experiment: Experiment, share: float) -> None:
    with pytest.raises(ValueError, match=r"val_documents"):
        TokenizeSettings.model_validate(experiment.params["tokenize"] | {"val_documents": share})


def test_faults_are_told_before_any_work(experiment: Experiment, model: Path) -> None:
    folder, settings = experiment.folder, experiment.params["tokenize"]

    def refused(**changes: object) -> str:
        with pytest.raises(UserError) as caught:
            check_documents(folder / "data/docs", TokenizeSettings.model_validate(settings | changes))
        return str(caught.value)

    assert "data/docs: no docs.jsonl or docs.jsonl.zst" in experiment.fails("tokenize")
    experiment.stage("fetch")
    assert "docs.jsonl: 24 documents, expected more than tokenize.val_documents = 24" in refused(val_documents=24)
    assert "absent.model: no such file" in refused(model="absent.model")
    (folder / "cut.model").write_bytes(model.read_bytes()[:100])
    assert "cut.model: not a SentencePiece model" in refused(model=str(folder / "cut.model"))
    write_model(folder / "small.model", {4: "a"}, VOCAB_SIZE - 1)
    wrong = refused(model=str(folder / "small.model"))
    assert "small.model: 319 pieces, expected tokenize.vocab_size = 320" in wrong
    swapped = proto.ModelProto.FromString(model.read_bytes())
    swapped.pieces[1].piece, swapped.pieces[2].piece = "</s>", "<s>"
    (folder / "swapped.model").write_bytes(swapped.SerializeToString())
    assert "swapped.model: the id of BOS is 2, expected 1" in refused(model=str(folder / "swapped.model"))
    (folder / "data/docs/docs.jsonl").write_bytes(b"")
    assert "docs.jsonl: no documents" in experiment.fails("tokenize")
    assert not (folder / "artifacts/tokens").exists()


def test_a_vocabulary_too_large_for_the_text_is_an_error() -> None:
    with pytest.raises(
        UserError, match=r"tokenize\.vocab_size \(4000\): the training split is only enough for \d+ pieces"
    ):
        train(iter(["a small text"]), vocab_size=4000)


def test_the_vocabulary_that_the_error_names_is_one_that_fits() -> None:
    with pytest.raises(UserError, match=r"more text, or \d+ here and as model\.vocab_size, will do") as caught:
        train(iter(["a small text"]), vocab_size=4000)
    fits = int(re.findall(r"\d+", str(caught.value))[-1])
    assert train(iter(["a small text"]), vocab_size=fits)
    with pytest.raises(UserError):
        train(iter(["a small text"]), vocab_size=fits + 1)


def test_a_vocabulary_too_small_for_the_characters_is_an_error() -> None:
    text = "".join(chr(code) for code in range(0x4E00, 0x4F00))
    with pytest.raises(
        UserError, match=r"tokenize\.vocab_size \(300\): SentencePiece cannot train on this text: Vocab"
    ):
        train(iter([text]), vocab_size=300)


def test_blank_training_text_is_an_error() -> None:
    with pytest.raises(UserError, match="SentencePiece cannot train on this text: it is empty"):
        train(iter(["", ""]), vocab_size=300)


def test_published_settings_fold_text_and_lossless_ones_keep_it(corpus: Path, tmp_path: Path) -> None:
    text = "  ﬁne\u00a0 ½\n"
    expected: dict[Literal["published", "lossless"], str] = {"published": "fine 1⁄2", "lossless": text}
    for trainer, decoded in expected.items():
        model = train_tokenizer(read_texts(corpus), vocab_size=VOCAB_SIZE, trainer=trainer, transform="none")
        (tmp_path / "m.model").write_bytes(model)
        tokenizer = Tokenizer(tmp_path / "m.model")
        assert tokenizer.decode(tokenizer.encode(text)) == decoded


def test_published_settings_are_those_recorded_in_the_published_models(corpus: Path) -> None:
    """data.md 6.1."""
    model = train_tokenizer(read_texts(corpus), vocab_size=VOCAB_SIZE, trainer="published", transform="none")
    recorded = proto.ModelProto.FromString(model)
    trainer, normalizer = recorded.trainer_spec, recorded.normalizer_spec
    assert (trainer.model_type, trainer.byte_fallback, trainer.split_digits) == (2, True, True)
    assert trainer.character_coverage == pytest.approx(0.999)
    assert (trainer.max_sentence_length, trainer.allow_whitespace_only_pieces) == (4192, False)
    assert (trainer.pad_id, trainer.bos_id, trainer.eos_id, trainer.unk_id) == (0, 1, 2, 3)
    assert (normalizer.name, normalizer.add_dummy_prefix) == ("nmt_nfkc", False)
    assert (normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces) == (True, True)


def test_compressors_see_the_texts_as_one_stream() -> None:
    texts = ["Ünïcode text, ", "Ünïcode text, "] * 50
    sizes = compressed_bytes(texts)
    assert sizes["xz"] == len(lzma.compress("".join(texts).encode(), preset=9 | lzma.PRESET_EXTREME))
    assert set(sizes) == {"xz", "zstd"}
    assert max(sizes.values()) < 120

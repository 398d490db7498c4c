"""Texts packed by a network come back byte for byte, in about as many bits as its score says, or are refused."""

import math
import shutil
import zlib
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Experiment, tiny_params, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import lively_network, random_stream, sliding

from fairway.decoding import packed_text
from fairway.decoding.lanes import Lanes
from fairway.decoding.language import Language
from fairway.decoding.packed_text import NUMBER, pack, unpack
from fairway.decoding.spelling import Reader, Spelling
from fairway.decoding.token_coder import PRECISION, Decoder, Encoder, counts
from fairway.model.config import ModelConfig
from fairway.model.gpt import GPT
from fairway.runtime.errors import UserError
from fairway.tokens import caseops
from fairway.tokens.documents import read_texts
from fairway.tokens.fused_pairs import free_ids, fuse, learn_pairs
from fairway.tokens.tokenizer import BOS, Trainer, Transform, train_tokenizer

# Every way in which a text and a tokenizer may get on: folded, capitals as operators, or kept as it is.
KINDS: list[tuple[Trainer, Transform]] = [("lossless", "none"), ("published", "none"), ("lossless", "caseops")]
KINDS += [("published", "caseops")]
# What tokenizers are known to lose, or to read as something else.
HARD = st.sampled_from(
    ["", " ", "  a", "\0", "\r\n", "\ufeff", "▁", "NASA", "ﬁ", "é", "e\u0301", "1999", "<0x41>", "<s>"]
)
TEXTS = st.lists(st.one_of(st.text(max_size=6), HARD, st.sampled_from(caseops.OPERATORS)), max_size=8).map("".join)


def quiet(more: int, total: int) -> None:
    """Shows nothing."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of each kind."""
    found = tmp_path_factory.mktemp("tokenizers")
    corpus = write_corpus(found / "corpus.jsonl")
    for trainer, transform in KINDS:
        made = train_tokenizer(read_texts(corpus), vocab_size=320, trainer=trainer, transform=transform)
        (found / f"{trainer}-{transform}.model").write_bytes(made)
    return found


@lru_cache
def spelling(folder: Path, trainer: Trainer, transform: Transform) -> Spelling:
    """With CaseOps some pairs are one token each."""
    path = folder / f"{trainer}-{transform}.model"
    plain = Spelling(path, transform, [])
    if transform == "none":
        return plain
    tokens = np.concatenate([plain.encode(text) for text in read_texts(folder / "corpus.jsonl")])
    return Spelling(path, transform, learn_pairs(tokens, free_ids(plain.tokenizer)))


def tiny_network(seed: int = 1) -> GPT:
    """For rows of 64 of 320 tokens; it has not learned anything."""
    model = GPT(ModelConfig.model_validate(tiny_params(Path("none"))["model"] | {"embed_init_std": 0.1}))
    model.init_weights(seed)
    return model.eval()


@pytest.fixture(scope="module")
def language(folder: Path) -> Language:
    return Language(tiny_network(), spelling(folder, "published", "caseops"), b"f" * 32, "model.bin")


@pytest.mark.parametrize(("trainer", "transform"), KINDS)
@given(text=TEXTS)
def test_every_text_is_spelled_by_every_tokenizer(
    folder: Path, trainer: Trainer, transform: Transform, text: str
) -> None:
    spelled = spelling(folder, trainer, transform)
    ids = spelled.encode(text)
    assert spelled.decode(ids) == text
    assert BOS not in ids
    reader = Reader(spelled)
    assert "".join(str(reader.feed(token)) for token in ids) == text


@pytest.mark.parametrize(("trainer", "transform"), KINDS)
def test_plain_text_takes_no_more_tokens_than_the_tokenizer_makes_of_it(
    folder: Path, trainer: Trainer, transform: Transform
) -> None:
    text = next(read_texts(folder / "corpus.jsonl")).partition("\n")[0]
    spelled = spelling(folder, trainer, transform)
    coded = caseops.encode(text) if transform == "caseops" else text
    expected = fuse(np.array(spelled.tokenizer.encode(coded)), spelled.pairs)
    assert spelled.encode(text) == expected.tolist()
    assert len(spelled.pairs) == (13 if transform == "caseops" else 0)


def test_a_reader_leaves_out_what_no_text_goes_on_with(folder: Path) -> None:
    spelled = spelling(folder, "lossless", "caseops")
    title, *_ = (spelled.tokenizer.model.piece_to_id(operator) for operator in caseops.OPERATORS)
    half = spelled.tokenizer.model.piece_to_id("<0xC3>")
    reader = Reader(spelled)
    assert [reader.feed(token) for token in (BOS, title, title, half, half)] == [None, "", None, "", None]


def test_a_tokenizer_without_byte_pieces_is_refused(tmp_path: Path) -> None:
    import sentencepiece

    prefix = tmp_path / "bare"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g"] * 9), model_prefix=str(prefix), vocab_size=12, minloglevel=2
    )
    with pytest.raises(UserError, match="byte fallback"):
        Spelling(prefix.with_suffix(".model"), "none", [])


@pytest.mark.parametrize("record", ["r1150", "r1172", "r1488", "r1958"])
def test_lanes_predict_what_the_evaluator_sliding_does(record: str) -> None:
    """By windows that begin half a row apart, over several rows of every network; no lane knows of another."""
    model, targets = lively_network(record), 45
    streams = [torch.cat([torch.tensor([BOS]), random_stream(seed, targets - 1)]) for seed in (1, 2, 3)]
    lanes = Lanes(model, 3)
    found_NBV = torch.stack([lanes.step(tokens_B) for tokens_B in torch.stack(streams, 1)[:-1]])
    evaluator = sliding(stride=model.config.seq_len // 2, batch_windows=4)
    for lane, stream in enumerate(streams):
        expected_NV = evaluator.log_probs(model, stream, range(targets))
        torch.testing.assert_close(found_NBV[:, lane].double(), expected_NV, atol=2e-4, rtol=2e-4)


@settings(max_examples=12)
@given(text=TEXTS, repeated=st.integers(1, 12))
def test_every_text_comes_back(language: Language, text: str, repeated: int) -> None:
    data = (text * repeated).encode("utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_text, "LANE_BYTES", 50)
        patch.setattr(packed_text, "MOST_LANES", 5)
        patch.setattr(packed_text, "GROUP", 2)
        patch.setattr(packed_text, "SHORT_LANES", 100)
        patch.setattr(packed_text, "LINE_CHARACTERS", 8)
        assert unpack(pack(data, language, quiet), language, quiet) == data


def test_a_packed_text_is_as_long_as_the_score_says(language: Language) -> None:
    text = "".join(f"number {i}, " for i in range(150))[:2000].encode()
    tokens_N1 = torch.tensor([BOS, *language.spelling.encode(text.decode())])
    evaluator = sliding(stride=language.model.config.seq_len // 2, batch_windows=8)
    claimed_bits = float(evaluator.score(language.model, tokens_N1, lambda _: None).sum()) / math.log(2)
    around = packed_text.HEADER.size + 2 + 2 * NUMBER.size
    assert len(pack(text, language, quiet)) - around == pytest.approx(claimed_bits / 8, abs=8, rel=1e-3)


def test_texts_that_are_not_utf_8_are_refused(language: Language) -> None:
    with pytest.raises(UserError, match=r"^not UTF-8 text: invalid start byte at byte 2; expected a text file$"):
        pack(b"ab\xff", language, quiet)
    with pytest.raises(UserError, match="not UTF-8"):
        pack(b"a\xed\xa0\x80", language, quiet)


TEXT = b"A text of one line, and more.\n" * 3


@pytest.fixture(scope="module")
def packed(language: Language) -> bytes:
    return pack(TEXT, language, quiet)


def test_a_file_cut_anywhere_is_refused(language: Language, packed: bytes) -> None:
    for length in range(len(packed)):
        with pytest.raises(UserError):
            unpack(packed[:length], language, quiet)
    with pytest.raises(UserError):
        unpack(packed + b"\0", language, quiet)


def test_a_file_with_any_byte_flipped_is_refused(language: Language, packed: bytes) -> None:
    for place in range(len(packed)):
        damaged = bytearray(packed)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(UserError):
            unpack(bytes(damaged), language, quiet)


@settings(max_examples=30)
@given(data=st.data())
def test_damage_under_a_right_checksum_gives_no_other_text(language: Language, packed: bytes, data: Any) -> None:
    """As somebody may write it on purpose."""
    body = bytearray(packed[: -NUMBER.size])
    place = data.draw(st.integers(0, len(body) - 1))
    body[place] ^= data.draw(st.integers(1, 255))
    with suppress(UserError):
        assert unpack(bytes(body) + NUMBER.pack(zlib.crc32(body)), language, quiet) == TEXT


def test_another_model_refuses_the_file_and_names_both(language: Language, packed: bytes) -> None:
    other = replace(language, fingerprint=b"g" * 32, source="other.bin")
    mine, its = (b"f" * 16).hex(), (b"g" * 16).hex()
    with pytest.raises(UserError, match=rf"packed by the model {mine}, expected the same; other.bin .* {its}$"):
        unpack(packed, other, quiet)


def test_another_rounding_is_told(language: Language, packed: bytes) -> None:
    """A network with the same fingerprint that computes something else stands for another machine."""
    with pytest.raises(UserError, match="expected the kind of processor"):
        unpack(packed, replace(language, model=tiny_network(seed=2)), quiet)


@given(st.lists(st.lists(st.integers(0, 59), min_size=2, max_size=2), min_size=1, max_size=30), st.integers(0, 99))
def test_tokens_come_back_from_their_code(tokens: list[list[int]], seed: int) -> None:
    """Two at a time, each of a distribution of its own."""
    generator = torch.Generator().manual_seed(seed)
    rows = (3 * torch.randn(len(tokens), 2, 60, generator=generator)).log_softmax(-1)
    encoder = Encoder()
    for pair, row in zip(tokens, rows, strict=True):
        encoder.push(np.array(pair), row)
    decoder = Decoder(encoder.words())
    assert [decoder.pop(row).tolist() for row in rows] == tokens
    bits = -float(rows.double().gather(2, torch.tensor(tokens)[..., None]).sum()) / np.log(2)
    assert abs(32 * len(encoder.words()) - bits) <= 64 + 1e-4 * bits


@pytest.mark.parametrize("spread", [0.0, 5.0, 80.0])
def test_counts_are_whole_leave_no_token_out_and_add_up(spread: float) -> None:
    found = counts((spread * torch.randn(3, 300, generator=torch.Generator().manual_seed(1))).log_softmax(-1))
    assert (found.dtype, int(found.min()) >= 1, found.sum(1).tolist()) == (np.int64, True, [2**PRECISION] * 3)


def test_the_commands_pack_unpack_and_refuse(finished_copy: Experiment) -> None:
    made, text = finished_copy, "Texts — of ANY kind.\n" * 20

    def zip(*arguments: str, ok: bool = True) -> str:
        done = made.run("python", "-m", "fairway.zip", *arguments, ok=ok)
        assert ok or len(done.stderr.splitlines()) == 1, done.stderr
        return done.stdout if ok else done.stderr

    (made.folder / "text.md").write_text(text)
    printed = zip("pack", "text.md")
    assert all(f"{name} " in printed for name in ("fairway.zip", "xz -9e", "zstd -19", "brotli -q 11")), printed
    assert "tokens/s" in printed
    assert "text.md.fwz: already there" in zip("pack", "text.md", ok=False)
    assert "text.md: already there" in zip("unpack", "text.md.fwz", ok=False)
    again = zip("unpack", "text.md.fwz", "again.md")
    assert (made.folder / "again.md").read_text() == text
    assert [word for word in printed.split() if len(word) == 64] == [
        word.rstrip(",") for word in again.split() if len(word.rstrip(",")) == 64
    ]
    (made.folder / "binary").write_bytes(b"\xff")
    assert zip("pack", "binary", ok=False).startswith("error: binary: not UTF-8 text")
    assert not (made.folder / "binary.fwz").exists()
    assert "none.md: No such file" in zip("pack", "none.md", ok=False)
    assert "usage: python -m fairway.zip" in zip("compress", "text.md", ok=False)
    # What `make pack` without FILE= gives.
    assert zip("pack", "", ok=False).endswith("; found: pack ''\n")
    assert "ends in .fwz" in zip("unpack", "text.md", ok=False)
    shutil.copy(made.folder / "text.md.fwz", made.folder / "cut.fwz")
    (made.folder / "cut.fwz").write_bytes((made.folder / "cut.fwz").read_bytes()[:-1])
    assert zip("unpack", "cut.fwz", ok=False).startswith("error: cut.fwz: damaged")
    shutil.rmtree(made.folder / "artifacts/compress")
    assert "model.bin: no such file; `make repro` makes it" in zip("unpack", "text.md.fwz", "x", ok=False)


def test_samples_go_on_from_the_prompt_the_same_for_the_same_seed(finished_copy: Experiment) -> None:
    def sample(*arguments: str, ok: bool = True) -> str:
        done = finished_copy.run("python", "-m", "fairway.sample", *arguments, ok=ok)
        return done.stdout if ok else done.stderr

    first = sample("Thé text", "--tokens", "30", "--temperature", "1.5")
    assert first.startswith("Thé text")
    assert len(first) > len("Thé text\n")
    assert sample("Thé text", "--tokens", "30", "--temperature", "1.5", "--seed", "1") == first
    assert sample("Thé text", "--tokens", "30", "--temperature", "1.5", "--seed", "2") != first
    likeliest = {sample("a", "--tokens", "5", "--temperature", "0", "--seed", seed) for seed in "12"}
    assert len(likeliest) == 1
    assert sample("a", "--tokens", "0") == "a\n"
    assert sample("a", "--temperature", "-1", ok=False) == "error: --temperature -1.0: expected 0 or more\n"

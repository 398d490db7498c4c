"""The validation stream by document: what each cost, its text, and a passage with the bits of every token.

A document begins at its BOS. Target p of the stream is token p + 1, so that the targets of a document begin with its
BOS, which stands for no bytes. Text is what the scored tokens stand for, and is never taken from elsewhere: published
shards come without documents.

Legend: N targets of the stream, D documents in it.
"""

import codecs
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairway.runtime.errors import UserError
from fairway.runtime.files import read_array
from fairway.tokens import caseops
from fairway.tokens.export import compressed_bytes
from fairway.tokens.fused_pairs import bytes_by_id, from_json
from fairway.tokens.tokenizer import BOS, Tokenizer
from fairway.tokens.validation import load_validation


@dataclass(frozen=True)
class Stream:
    """The scored part of the validation stream: tokens (N + 1,), bytes of the targets (N,), and the first target of
    each document (D,), all int64."""

    tokens_N1: np.ndarray
    bytes_N: np.ndarray
    starts_D: np.ndarray

    @property
    def bytes_D(self) -> np.ndarray:
        """The bytes (D,) int64 of each document."""
        sums: np.ndarray = np.add.reduceat(self.bytes_N, self.starts_D)
        return sums

    def bits_D(self, nats_N: np.ndarray) -> np.ndarray:
        """The bits (D,) float64 of each document, where the targets have these nats (N,)."""
        sums: np.ndarray = np.add.reduceat(nats_N, self.starts_D) / math.log(2)
        return sums

    def document(self, number: int, most: int | None = None) -> np.ndarray:
        """The tokens (n,) of a document as far as they are targets, or the first `most` of them."""
        ends = np.append(self.starts_D[1:], len(self.bytes_N))
        begin, end = int(self.starts_D[number]), int(ends[number])
        return self.tokens_N1[begin + 1 : min(end, begin + most) + 1 if most else end + 1]


def read_stream(tokens: Path, vocab_size: int, targets: int) -> Stream:
    """The first `targets` targets of the stream in a token folder, which are as many as were scored.

    Raises UserError if a shard is missing or damaged, or if the stream is shorter than that.
    """
    whole = load_validation(tokens, seq_len=1, vocab_size=vocab_size)
    if len(whole.bytes) < targets:
        raise UserError(f"{tokens}: {len(whole.bytes)} targets, expected the {targets} that were scored")
    tokens_N1 = whole.tokens[: targets + 1].numpy()
    begins = np.flatnonzero(tokens_N1 == BOS) - 1
    return Stream(tokens_N1, whole.bytes[:targets].numpy(), np.union1d([0], begins[begins >= 0]))


def read_nats(artifacts: Path, seeds: list[int], evaluator: str) -> np.ndarray:
    """The nats (N,) float64 of every target by an evaluator, the mean over seeds.

    Raises UserError if the scores of a seed are missing, or of another stream than those of the first.
    """
    total = np.zeros(0)
    for seed in seeds:
        path = artifacts / f"evaluate/{seed}/{evaluator}/nats.npz"
        nats_N = read_array(path, "nats", f"python -m stages.evaluate {seed} {evaluator}").astype(np.float64)
        if seed != seeds[0] and len(nats_N) != len(total):
            raise UserError(f"{path}: {len(nats_N)} targets, expected {len(total)} as of seed {seeds[0]}")
        total = nats_N if seed == seeds[0] else total + nats_N
    return total / len(seeds)


class Texts:
    """What tokens stand for, token by token.

    A character that is spelled in several byte pieces belongs to the last of them, and a capital spelled by CaseOps to
    the letter behind its operator. A piece that ends inside a character at the end of a text shows U+FFFD for it.
    """

    def __init__(self, tokens: Path, meta: dict[str, Any]) -> None:
        """`meta` is the tokens' meta.json. Raises UserError if there is no tokenizer.model in the folder."""
        self.bytes_by_id = bytes_by_id(Tokenizer(tokens / "tokenizer.model"), from_json(meta["fused_pairs"]))
        self.transform = meta["transform"]

    def pieces(self, ids: np.ndarray) -> list[str]:
        """The text of each token; joined together, the text of all of them."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        decoded = [utf8.decode(self.bytes_by_id[token] or b"") for token in ids]
        if decoded:
            decoded[-1] += utf8.decode(b"", final=True)
        if self.transform == "none":
            return decoded
        decoder = caseops.Decoder()
        return [decoder.feed(text) for text in decoded]


# How many characters of a document's first line are its title.
TITLE = 60


def title(text: str) -> str:
    """The first words of a document: of its first line with letters, or nothing if there is none."""
    lines = (line.strip() for line in text.splitlines())
    line = next((line for line in lines if any(character.isalnum() for character in line)), "")
    return line if len(line) <= TITLE else line[:TITLE].rsplit(" ", 1)[0] + " …"


@dataclass(frozen=True)
class Row:
    """A document in the table: its number in the stream counted from 1, its bytes, and bits per byte.

    `xz_bpb` is what `xz -9e` makes of this document alone.
    """

    number: int
    title: str
    size_bytes: int
    bpb: float
    xz_bpb: float


@dataclass(frozen=True)
class Piece:
    """A token of the passage: its text, its bits, and the shade that it is drawn in, 0 to 4."""

    text: str
    bits: float
    shade: int


@dataclass(frozen=True)
class Reading:
    """The documents that cost most, of `documents` in all, and the beginning of the first one, token by token."""

    documents: int
    rows: list[Row]
    passage: list[Piece]


# How many documents the table holds, and how many tokens the passage.
MOST_DOCUMENTS = 20
PASSAGE_TOKENS = 240
# The bits from which on a token has the shades 1 to 4.
SHADES = (1, 2, 4, 8)


def read_documents(artifacts: Path, meta: dict[str, Any], seeds: list[int], evaluator: str) -> Reading:
    """The documents as an evaluator scored them, means over seeds; `meta` is the tokens' meta.json.

    Documents without a byte are left out. Raises UserError if scores or tokens are missing.
    """
    tokens = artifacts / "tokens"
    nats_N = read_nats(artifacts, seeds, evaluator)
    stream = read_stream(tokens, meta["vocab_size"], len(nats_N))
    texts = Texts(tokens, meta)
    bits_D, bytes_D = stream.bits_D(nats_N), stream.bytes_D
    known = np.flatnonzero(bytes_D > 0)
    costliest = np.sort(known[np.argsort(-bits_D[known], kind="stable")[:MOST_DOCUMENTS]])
    rows = []
    for number in costliest.tolist():
        text, size = "".join(texts.pieces(stream.document(number))), int(bytes_D[number])
        xz = compressed_bytes([text])["xz"]
        rows.append(Row(number + 1, title(text), size, float(bits_D[number]) / size, 8 * xz / size))
    first = stream.document(0, PASSAGE_TOKENS)
    bits = nats_N[: len(first)] / math.log(2)
    passage = [
        Piece(text, float(cost), sum(cost >= shade for shade in SHADES))
        for text, cost in zip(texts.pieces(first), bits, strict=True)
    ]
    return Reading(len(known), rows, passage)

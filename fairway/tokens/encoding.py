"""Documents to tokens: a document becomes BOS and its ids, and the bytes that its tokens stand for are counted.

Consecutive lines of the documents file go in, their tokens and totals come out. No such batch of lines depends on
another, so any number of processes may share the work without changing the result. A line whose text is held out for
validation is left out of training. There is one encoder for each value of tokenize.transform. Each checks that no byte
of a document is lost or counted twice, since bytes are what a score is divided by (data.md 8).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fairway.runtime.errors import UserError
from fairway.tokens import caseops
from fairway.tokens.documents import parse_text, text_hash
from fairway.tokens.fused_pairs import Pair, fuse, fuse_with_bytes
from fairway.tokens.shards import Split
from fairway.tokens.tokenizer import BOS, Tokenizer, Transform, byte_table

# The largest count of bytes that fits into an entry of a sidecar, which is a uint16.
MAX_TOKEN_BYTES = 2**16 - 1


@dataclass(frozen=True)
class LineBatch:
    """Consecutive lines of a documents file, all of one split; `first` is the number of the first line, from 1."""

    source: str
    split: Split
    first: int
    lines: Sequence[bytes]


@dataclass(frozen=True)
class Document:
    """The tokens (n,) uint16 of one document, BOS first, and the bytes (n,) that each stands for.

    The bytes are None where neither a sidecar nor a total needs them.
    """

    tokens: np.ndarray
    token_bytes: np.ndarray | None


@dataclass(frozen=True)
class Encoded:
    """What a batch of lines became: its tokens (n,) uint16, its byte sidecar (n,) uint16 or None, and totals of bytes.

    documents are the lines that became tokens, dropped those left out since their text is held out for validation.
    text_bytes are the UTF-8 bytes of the texts; counted_bytes are those that the tokens stand for.
    """

    tokens: np.ndarray
    sidecar: np.ndarray | None
    documents: int
    dropped: int
    text_bytes: int
    counted_bytes: int


class DocumentEncoder(Protocol):
    """Encodes one document at a time."""

    # Whether the bytes of validation tokens are to be kept in a file beside them.
    writes_sidecar: bool

    def document(self, text: str, split: Split, where: str) -> Document:
        """The tokens of a text and their bytes. `where` (file and line) begins the message of a UserError."""


class PlainEncoder:
    """Encodes text as it is, and counts bytes by the token's id (byte_table).

    The counts are checked against the text that the tokens decode to.
    """

    writes_sidecar = False

    def __init__(self, model: Path, vocab_size: int) -> None:
        self.tokenizer = Tokenizer(model)
        self.table = byte_table(model, vocab_size)

    def document(self, text: str, split: Split, where: str) -> Document:
        """As DocumentEncoder's. Raises UserError if bytes are lost, as they are without byte fallback."""
        ids = self.tokenizer.encode(text)
        tokens = np.array([BOS, *ids], dtype=np.uint16)
        token_bytes = np.zeros(len(tokens), dtype=np.int32)
        token_bytes[1:] = self.table.count(tokens[:-1], tokens[1:])
        decoded = self.tokenizer.decode(ids)
        if self.tokenizer.keeps_whitespace and decoded != text:
            raise UserError(f"{where}: the tokens do not decode to the text, though the tokenizer keeps whitespace")
        counted, expected = int(token_bytes.sum()), len(decoded.encode("utf-8"))
        if counted != expected:
            raise UserError(f"{where}: the tokens count {counted} bytes and decode to {expected}: no byte fallback?")
        return Document(tokens, token_bytes)


class CaseOpsEncoder:
    """Encodes text in CaseOps spelling, and counts the bytes of the original text that each piece stands for.

    The counts of validation tokens go into a sidecar, since they do not follow from the ids. Together the pieces must
    stand for the whole document, except for whitespace at its ends; that is checked. In the end `pairs` are fused.
    """

    writes_sidecar = True

    def __init__(self, model: Path, pairs: Sequence[Pair] = ()) -> None:
        self.tokenizer, self.pairs = Tokenizer(model), pairs

    def document(self, text: str, split: Split, where: str) -> Document:
        """As DocumentEncoder's, with bytes for validation only.

        Raises UserError if a piece stands for more bytes than an entry of a sidecar holds, or if text is lost.
        """
        encoded = caseops.encode(text)
        if split == "train":
            return Document(fuse(np.array([BOS, *self.tokenizer.encode(encoded)], dtype=np.uint16), self.pairs), None)
        ids, surfaces = self.tokenizer.encode_with_surfaces(encoded)
        pieces = caseops.original_pieces(surfaces)
        self._require_whole(text, "".join(pieces), where)
        counts = np.array([0, *(len(piece.encode("utf-8")) for piece in pieces)])
        tokens, counts = fuse_with_bytes(np.array([BOS, *ids], dtype=np.uint16), counts, self.pairs)
        if (most := counts.max()) > MAX_TOKEN_BYTES:
            raise UserError(f"{where}: one token stands for {most} bytes; the sidecar holds {MAX_TOKEN_BYTES}")
        return Document(tokens, counts.astype(np.uint16))

    def _require_whole(self, text: str, counted: str, where: str) -> None:
        """Raise UserError unless `counted` is `text` without ends that the tokenizer drops, such as whitespace."""
        start = text.find(counted)
        ends = text[:start] + text[start + len(counted) :]
        if start < 0 or self.tokenizer.encode(ends):
            raise UserError(f"{where}: the tokens do not stand for the whole text")


def make_encoder(model: Path, vocab_size: int, transform: Transform, pairs: Sequence[Pair]) -> DocumentEncoder:
    """The encoder of tokenize.transform, for the SentencePiece model in the file `model`; only CaseOps has pairs."""
    return PlainEncoder(model, vocab_size) if transform == "none" else CaseOpsEncoder(model, pairs)


def make_batch_encoder(
    model: Path, vocab_size: int, transform: Transform, pairs: Sequence[Pair], held_out: frozenset[bytes]
) -> Callable[[LineBatch], Encoded]:
    """encode_batch for the encoder that make_encoder gives, and the hashes of the held-out texts."""
    return partial(encode_batch, make_encoder(model, vocab_size, transform, pairs), held_out=held_out)


def encode_batch(encoder: DocumentEncoder, batch: LineBatch, *, held_out: frozenset[bytes]) -> Encoded:
    """The tokens, sidecar and totals of a batch of lines. Raises UserError naming the line at fault.

    Lines of the training split whose text has its hash (text_hash) in `held_out` are dropped.
    """
    documents: list[Document] = []
    text_bytes = 0
    for number, line in enumerate(batch.lines, start=batch.first):
        where = f"{batch.source}, line {number}"
        text = parse_text(line, where)
        if batch.split == "train" and text_hash(text) in held_out:
            continue
        text_bytes += len(text.encode("utf-8"))
        documents.append(encoder.document(text, batch.split, where))
    counts = [document.token_bytes for document in documents if document.token_bytes is not None]
    return Encoded(
        tokens=np.concatenate([np.zeros(0, dtype=np.uint16), *(document.tokens for document in documents)]),
        sidecar=np.concatenate(counts) if counts and encoder.writes_sidecar else None,
        documents=len(documents),
        dropped=len(batch.lines) - len(documents),
        text_bytes=text_bytes,
        counted_bytes=sum(int(count.sum()) for count in counts),
    )


# What a worker process encodes batches with, from one to the next. What workers run stands in this file, which does not
# import PyTorch: that would take each of them two seconds.
_encode: Callable[[LineBatch], Encoded]


def start_worker(*encoder_arguments: Any) -> None:
    """Runs once in each worker process, before its first batch."""
    global _encode
    _encode = make_batch_encoder(*encoder_arguments)


def encode_in_worker(batch: LineBatch) -> Encoded:
    """Runs in a worker process, for each of its batches."""
    return _encode(batch)

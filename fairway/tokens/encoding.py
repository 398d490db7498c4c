"""Documents to tokens: [BOS] + ids each, with the bytes checked as they are counted.

A batch of lines goes in, its tokens and totals come out; batches are independent, so any number of processes may share
the work and the result is the same. The two encoders are the two values of tokenize.transform.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from fairway.runtime.errors import UserError
from fairway.tokens import caseops
from fairway.tokens.documents import parse_text
from fairway.tokens.shards import Split
from fairway.tokens.tokenizer import BOS, Tokenizer, Transform, byte_table

MAX_TOKEN_BYTES = 2**16 - 1


@dataclass(frozen=True)
class Batch:
    """Consecutive lines of one documents file and split; `first` is the number of the first line, from 1."""

    source: str
    split: Split
    first: int
    lines: Sequence[bytes]


@dataclass(frozen=True)
class Document:
    """Tokens (n,) uint16 of one document, BOS first, and their bytes (n,), or None where nobody will ask."""

    tokens: np.ndarray
    token_bytes: np.ndarray | None


@dataclass(frozen=True)
class Encoded:
    """Tokens (n,) uint16 of a batch, its byte sidecar (n,) uint16 if it has one, and its byte totals.

    text_bytes: UTF-8 bytes of the texts as they are; counted_bytes: those that the tokens count.
    """

    tokens: np.ndarray
    sidecar: np.ndarray | None
    text_bytes: int
    counted_bytes: int


class DocumentEncoder(Protocol):
    """Encodes one document at a time. `where` (file and line) begins the message of a UserError."""

    writes_sidecar: bool

    def document(self, text: str, split: Split, where: str) -> Document:
        """Tokens and, wherever bytes matter, their bytes."""


class PlainEncoder:
    """Bytes by the table of bytes.py; they are those of the text that the tokens decode to, which is asserted."""

    writes_sidecar = False

    def __init__(self, model: Path, vocab_size: int) -> None:
        self.tokenizer = Tokenizer(model)
        self.table = byte_table(model, vocab_size)

    def document(self, text: str, split: Split, where: str) -> Document:
        """Raises UserError if bytes are lost, which a tokenizer without byte fallback brings about."""
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
    """Bytes of the original text by the surfaces of its pieces; they go into a sidecar beside the validation tokens.

    Together the pieces stand for the whole document but for whitespace at its ends, which is asserted.
    """

    writes_sidecar = True

    def __init__(self, model: Path) -> None:
        self.tokenizer = Tokenizer(model)

    def document(self, text: str, split: Split, where: str) -> Document:
        """Raises UserError if a piece stands for more bytes than a sidecar entry holds, or if text is lost."""
        encoded = caseops.encode(text)
        if split == "train":
            return Document(np.array([BOS, *self.tokenizer.encode(encoded)], dtype=np.uint16), None)
        ids, surfaces = self.tokenizer.encode_with_surfaces(encoded)
        pieces = caseops.original_pieces(surfaces)
        self._require_whole(text, "".join(pieces), where)
        counts = [0, *(len(piece.encode("utf-8")) for piece in pieces)]
        if max(counts) > MAX_TOKEN_BYTES:
            raise UserError(f"{where}: one token stands for {max(counts)} bytes; the sidecar holds {MAX_TOKEN_BYTES}")
        return Document(np.array([BOS, *ids], dtype=np.uint16), np.array(counts, dtype=np.uint16))

    def _require_whole(self, text: str, counted: str, where: str) -> None:
        start = text.find(counted)
        ends = text[:start] + text[start + len(counted) :]
        if start < 0 or self.tokenizer.encode(ends):
            raise UserError(f"{where}: the tokens do not stand for the whole text")


def make_encoder(model: Path, vocab_size: int, transform: Transform) -> DocumentEncoder:
    """The encoder that tokenize.transform names."""
    return PlainEncoder(model, vocab_size) if transform == "none" else CaseOpsEncoder(model)


def encode_batch(encoder: DocumentEncoder, batch: Batch) -> Encoded:
    """Tokens, sidecar and totals of a batch. Raises UserError naming the line at fault."""
    documents: list[Document] = []
    text_bytes = 0
    for number, line in enumerate(batch.lines, start=batch.first):
        where = f"{batch.source}, line {number}"
        text = parse_text(line, where)
        text_bytes += len(text.encode("utf-8"))
        documents.append(encoder.document(text, batch.split, where))
    counts = [document.token_bytes for document in documents if document.token_bytes is not None]
    return Encoded(
        tokens=np.concatenate([document.tokens for document in documents]),
        sidecar=np.concatenate(counts) if counts and encoder.writes_sidecar else None,
        text_bytes=text_bytes,
        counted_bytes=sum(int(count.sum()) for count in counts),
    )

"""One SentencePiece model, as the stages use it.

SentencePiece writes a space as U+2581 and reads every U+2581 back as a space. A tokenizer that keeps whitespace is to
lose nothing at all, so there a U+2581 of the text itself is spelled in its three byte pieces, which decode to itself.

Train a SentencePiece BPE tokenizer, with the challenge's settings or with those that lose nothing.

Common to both: byte fallback, split digits, no dummy prefix, character coverage 0.999, ids 0 to 3 = pad, bos, eos, unk,
everything else the library's default. Method: byte-pair encoding, arXiv:1508.07909; SentencePiece, arXiv:1808.06226.
Source: train_tokenizer of the challenge's exporter.

Bytes of text that each token stands for, looked up by id: the denominator of bits per byte.

A token counts the UTF-8 bytes of its piece; a leading U+2581 is a space, one byte, unless the token before is a
boundary (BOS), since the published tokenizers strip a document's leading space. Byte pieces count 1, control and
unknown pieces 0. Method: build_sentencepiece_luts of the challenge's train_gpt.py. Added here: tokenizers that keep
whitespace (those that Fairway trains), whose every U+2581 is a space of the text, wherever it stands.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
from pydantic import Field

from fairway.runtime.errors import UserError
from fairway.runtime.settings import Section
from fairway.tokens import caseops

Transform = Literal["none", "caseops"]
# Operators of a transform, which its tokenizers reserve from id 4 on.
RESERVED: dict[Transform, str] = {"none": "", "caseops": caseops.OPERATORS}


class TokenizeSettings(Section):
    """Documents to token shards."""

    # A given SentencePiece model, or null to train one on the training split.
    model: str | None
    # How one is trained: lossless, or published with the challenge's folding of text (tokens/tokenizer.py).
    trainer: Literal["lossless", "published"]
    # none, or caseops: capitals as operators (tokens/caseops.py).
    transform: Literal["none", "caseops"]
    vocab_size: int = Field(gt=259, le=65536)
    val_documents: int = Field(gt=0)
    shard_tokens: int = Field(gt=0, lt=2**31)


SPACE = "\u2581"
BOS = 1


class Tokenizer:
    """Text to ids and back. Raises UserError if the file is missing or no SentencePiece model."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected a SentencePiece model")
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise UserError(f"{path}: not a SentencePiece model") from None
        # A lone space comes out as just that: no stripping and no dummy prefix.
        self.keeps_whitespace = "".join(self.model.encode(" ", out_type=str)) == SPACE
        self._literal_space = [self.model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode("utf-8")]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without BOS."""
        head, *others = self._parts(text)
        ids: list[int] = self.model.encode(head)
        for part in others:
            ids += [*self._literal_space, *self.model.encode(part)]
        return ids

    def encode_with_surfaces(self, text: str) -> tuple[list[int], list[str]]:
        """The ids of a text, and for each the stretch of text that it came from: all but a character's last byte piece
        have none."""
        ids: list[int] = []
        surfaces: list[str] = []
        for index, part in enumerate(self._parts(text)):
            if index:
                ids += self._literal_space
                surfaces += ["", "", SPACE]
            for piece in self.model.encode_as_proto(part).pieces:
                ids.append(piece.id)
                surfaces.append(piece.surface)
        return ids, surfaces

    def decode(self, ids: list[int]) -> str:
        """The text of some ids."""
        return self.model.decode(ids)

    def _parts(self, text: str) -> list[str]:
        """The text, cut at each U+2581 of its own if that has to be spelled out."""
        return text.split(SPACE) if self.keeps_whitespace and SPACE in text else [text]


def check_tokenizer(path: Path, *, vocab_size: int, operators: str) -> None:
    """Raises UserError unless `path` is a model of vocab_size pieces with BOS 1 and `operators` from id 4 on."""
    model = Tokenizer(path).model
    if model.vocab_size() != vocab_size:
        raise UserError(f"{path}: {model.vocab_size()} pieces, expected tokenize.vocab_size = {vocab_size}")
    if model.bos_id() != BOS:
        raise UserError(f"{path}: the id of BOS is {model.bos_id()}, expected {BOS}")
    if "".join(model.id_to_piece(4 + i) for i in range(len(operators))) != operators:
        raise UserError(f"{path}: ids 4 to 7 are not U+E001 to U+E004, which tokenize.transform = caseops needs")


Trainer = Literal["lossless", "published"]

SETTINGS: dict[Trainer, dict[str, Any]] = {
    # Text as it is: a document comes back byte for byte, so its bytes are the raw bytes of the file.
    "lossless": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        # Indentation becomes one token instead of one per space.
        "allow_whitespace_only_pieces": True,
        # Documents are whole "sentences"; the default of 4192 bytes would drop the longer ones.
        "max_sentence_length": 2**30,
    },
    # Text folded (NFKC and more) and its whitespace merged and stripped, as in the published tokenizers.
    "published": {"normalization_rule_name": "nmt_nfkc"},
}


def train_tokenizer(texts: Iterator[str], *, vocab_size: int, trainer: Trainer, transform: Transform) -> bytes:
    """A trained model, serialized; the same texts give the same bytes.

    Raises UserError if the texts are too few for vocab_size pieces, or hold too many characters for it.
    """
    if trainer == "published":
        # The exporter cleaned the text it trained on, and only that.
        texts = (cleaned for text in texts if (cleaned := text.replace("\0", " ").strip()))
    if transform == "caseops":
        texts = map(caseops.encode, texts)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            user_defined_symbols=list(RESERVED[transform]),
            # The pieces do not depend on the number of threads, but the model records it.
            num_threads=1,
            minloglevel=2,
            **SETTINGS[trainer],
        )
    except RuntimeError as error:
        reason = str(error).strip().rpartition("] ")[2]
        raise UserError(
            f"params.yaml: tokenize.vocab_size ({vocab_size}): SentencePiece cannot train on this text: {reason}"
        ) from None
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if pieces != vocab_size:
        raise UserError(
            f"params.yaml: tokenize.vocab_size ({vocab_size}): the training split is only enough for {pieces} pieces"
        )
    return model.getvalue()


@dataclass(frozen=True)
class ByteTable:
    """Per id (V,): bytes without the leading space (int16), has a leading space (bool), hides the next one (bool)."""

    base: np.ndarray
    lead: np.ndarray
    boundary: np.ndarray

    def count(self, previous: np.ndarray, current: np.ndarray) -> np.ndarray:
        """Bytes (N,) int32 of the tokens `current` (N,), each behind the token `previous` (N,)."""
        return self.base[current].astype(np.int32) + (self.lead[current] & ~self.boundary[previous])


def byte_table(tokenizer_model: Path, vocab_size: int) -> ByteTable:
    """The table of a SentencePiece model; ids beyond its pieces count nothing.

    Raises UserError if the model cannot be read or has more than vocab_size pieces.
    """
    tokenizer = Tokenizer(tokenizer_model)
    model = tokenizer.model
    pieces = model.vocab_size()
    if pieces > vocab_size:
        raise UserError(f"{tokenizer_model}: {pieces} pieces, expected at most tokenize.vocab_size = {vocab_size}")
    base = np.zeros(vocab_size, dtype=np.int16)
    lead = np.zeros(vocab_size, dtype=bool)
    boundary = np.ones(vocab_size, dtype=bool)
    for i in range(pieces):
        if model.is_control(i) or model.is_unknown(i) or model.is_unused(i):
            continue
        boundary[i] = False
        if model.is_byte(i):
            base[i] = 1
            continue
        piece = model.id_to_piece(i)
        lead[i] = piece.startswith(SPACE) and not tokenizer.keeps_whitespace
        text = piece.replace(SPACE, " ") if tokenizer.keeps_whitespace else piece.removeprefix(SPACE)
        base[i] = len(text.encode("utf-8"))
    return ByteTable(base, lead, boundary)

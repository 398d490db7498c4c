"""The SentencePiece tokenizer: its settings, its use, its training, and the bytes of text that each token stands for.

There are two kinds. The published tokenizers fold text (NFKC and more) and merge and strip its whitespace. Those that
Fairway trains by default keep whitespace and lose nothing: a document comes back byte for byte. SentencePiece writes a
space as U+2581 and reads every U+2581 back as a space. To lose nothing, a U+2581 that the text itself contains is
therefore spelled in its three byte pieces, which decode to that character.

Both kinds are trained with byte fallback, split digits, no dummy prefix, character coverage 0.999, and the ids 0 to 3
for pad, bos, eos and unk; everything that is not named below is the library's default (data.md 6.1).

The bytes of tokens are what a score is divided by. A token counts the UTF-8 bytes of its piece. A leading U+2581 counts
as a space, one byte, unless the token before it is a boundary such as BOS, since the published tokenizers strip the
space at the beginning of a document. Byte pieces count 1, control and unknown pieces 0 (data.md 8.2). In a tokenizer
that keeps whitespace every U+2581 is a space of the text, wherever it stands; this case was added here.

Method: byte-pair encoding, arXiv:1508.07909; SentencePiece, arXiv:1808.06226. Source: train_tokenizer of the
challenge's exporter; build_sentencepiece_luts of its train_gpt.py.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
from pydantic import Field, model_validator

from fairway.runtime.errors import UserError
from fairway.runtime.settings import Section
from fairway.tokens import caseops

Transform = Literal["none", "caseops"]
# The operators of each transform. Tokenizers for it reserve the ids from 4 on for them.
RESERVED: dict[Transform, str] = {"none": "", "caseops": caseops.OPERATORS}


class TokenizeSettings(Section):
    """How documents become token shards."""

    # A given SentencePiece model, or null to train one on the training split.
    model: str | None
    # How one is trained: lossless, or published with the challenge's folding of text (tokens/tokenizer.py).
    trainer: Literal["lossless", "published"]
    # none, or caseops: capitals as operators (tokens/caseops.py).
    transform: Literal["none", "caseops"]
    # How many frequent pairs of tokens become one token each (tokens/fused_pairs.py); only with caseops.
    fused_pairs: int = Field(ge=0, le=13)
    vocab_size: int = Field(gt=259, le=65536)
    # A number of documents, or, below 1, a share of them.
    val_documents: int | float = Field(gt=0)
    # Of these, only the first so many are scored; null: all.
    val_limit_documents: int | None = Field(gt=0)
    shard_tokens: int = Field(gt=0, lt=2**31)

    @model_validator(mode="after")
    def _pairs(self) -> "TokenizeSettings":
        if self.fused_pairs and self.transform != "caseops":
            raise ValueError(f"fused_pairs ({self.fused_pairs}) must be 0 unless transform is caseops")
        return self

    @model_validator(mode="after")
    def _share(self) -> "TokenizeSettings":
        if isinstance(self.val_documents, float) and self.val_documents >= 1:
            raise ValueError(f"val_documents ({self.val_documents}): expected a whole number, or a share below 1")
        return self

    @model_validator(mode="after")
    def _limit(self) -> "TokenizeSettings":
        counted = isinstance(self.val_documents, int)
        if counted and self.val_limit_documents is not None and self.val_limit_documents > self.val_documents:
            raise ValueError(
                f"val_limit_documents ({self.val_limit_documents}) exceeds val_documents ({self.val_documents})"
            )
        return self

    def with_counts(self, documents: int) -> "TokenizeSettings":
        """The same for so many documents in all, of which at least one validates: val_documents is their number."""
        if isinstance(self.val_documents, int):
            return self
        return self.model_copy(update={"val_documents": max(1, round(self.val_documents * documents))})

    @property
    def held_out(self) -> int:
        """How many documents are not trained on. Raises TypeError on a share: with_counts comes first."""
        if isinstance(self.val_documents, float):
            raise TypeError(f"val_documents is a share ({self.val_documents}), of an unknown number of documents")
        return self.val_documents

    @property
    def scored_documents(self) -> int:
        """How many documents the validation shards hold."""
        return min(self.val_limit_documents or self.held_out, self.held_out)


# How SentencePiece writes a space.
SPACE = "\u2581"
# The id of the token that begins every document.
BOS = 1


def load_model(path: Path) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model read from a file. Raises UserError if the file is missing or no such model."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a SentencePiece model")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise UserError(f"{path}: not a SentencePiece model") from None


def keeps_whitespace(model: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether every space of a text comes back.

    A model that strips whitespace makes no piece of a lone space; one with a dummy prefix makes two spaces of it.
    """
    return "".join(model.encode(" ", out_type=str)) == SPACE


class Tokenizer:
    """A SentencePiece model that encodes and decodes texts. Raises UserError as load_model does."""

    def __init__(self, path: Path) -> None:
        self.model = load_model(path)
        self.keeps_whitespace = keeps_whitespace(self.model)
        self._literal_space = [self.model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode("utf-8")]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without a BOS before them."""
        head, *others = self._parts(text)
        ids: list[int] = self.model.encode(head)
        for part in others:
            ids += [*self._literal_space, *self.model.encode(part)]
        return ids

    def encode_with_surfaces(self, text: str) -> tuple[list[int], list[str]]:
        """The ids of a text without BOS, and for each id its surface: the stretch of text that it came from.

        Where a character is spelled in byte pieces, its last piece has the character as surface and the others nothing.
        """
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
        """The text that the ids stand for."""
        return self.model.decode(ids)

    def _parts(self, text: str) -> list[str]:
        """The text between the U+2581 that have to be spelled in byte pieces; one part where none has to be."""
        return text.split(SPACE) if self.keeps_whitespace and SPACE in text else [text]


def check_tokenizer(path: Path, *, vocab_size: int, operators: str) -> None:
    """Raise UserError unless `path` is a model of vocab_size pieces with BOS as id 1 and `operators` from id 4 on."""
    model = load_model(path)
    if model.vocab_size() != vocab_size:
        raise UserError(f"{path}: {model.vocab_size()} pieces, expected tokenize.vocab_size = {vocab_size}")
    if model.bos_id() != BOS:
        raise UserError(f"{path}: the id of BOS is {model.bos_id()}, expected {BOS}")
    if "".join(model.id_to_piece(4 + i) for i in range(len(operators))) != operators:
        raise UserError(f"{path}: ids 4 to 7 are not U+E001 to U+E004, which tokenize.transform = caseops needs")


Trainer = Literal["lossless", "published"]

# What differs between the two kinds of tokenizers, as options of SentencePiece's trainer.
TRAINER_OPTIONS: dict[Trainer, dict[str, Any]] = {
    # The text is left as it is, so that a document comes back byte for byte.
    "lossless": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        # An indentation may become one token, instead of one for each space.
        "allow_whitespace_only_pieces": True,
        # To the library a document is one sentence, and it drops sentences above its default of 4192 bytes.
        "max_sentence_length": 2**30,
    },
    # The text is folded (NFKC and more), and its whitespace is merged and stripped by default.
    "published": {"normalization_rule_name": "nmt_nfkc"},
}


def train_tokenizer(texts: Iterator[str], *, vocab_size: int, trainer: Trainer, transform: Transform) -> bytes:
    """Train a tokenizer on texts; return the content of its model file. The same texts give the same bytes.

    Raises UserError if the texts are too few for vocab_size pieces, or hold too many different characters for it.
    """
    if trainer == "published":
        # The challenge's exporter cleaned the text that it trained on so, but not the text that it tokenized.
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
            # The number of threads does not change the pieces, but it is written into the model file.
            num_threads=1,
            minloglevel=2,
            **TRAINER_OPTIONS[trainer],
        )
    except RuntimeError as error:
        reason = str(error).strip().rpartition("] ")[2]
        if "sentences_.empty()" in reason:
            reason = "it is empty"
        raise UserError(
            f"params.yaml: tokenize.vocab_size ({vocab_size}): SentencePiece cannot train on this text: {reason}"
        ) from None
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if pieces != vocab_size:
        raise UserError(
            f"params.yaml: tokenize.vocab_size ({vocab_size}): the training split is only enough for {pieces} pieces; "
            f"more text, or {pieces} here and as model.vocab_size, will do"
        )
    return model.getvalue()


@dataclass(frozen=True)
class ByteTable:
    """What byte counts need of each of the V ids: three arrays (V,).

    base (int16) is the piece's bytes without a leading space, lead (bool) whether it has a leading space, and boundary
    (bool) whether the leading space of the token behind it counts nothing.
    """

    base: np.ndarray
    lead: np.ndarray
    boundary: np.ndarray

    def count(self, previous: np.ndarray, current: np.ndarray) -> np.ndarray:
        """The bytes (N,) int32 that the tokens `current` (N,) stand for; `previous` (N,) are the tokens before them."""
        return self.base[current].astype(np.int32) + (self.lead[current] & ~self.boundary[previous])


def byte_table(tokenizer_model: Path, vocab_size: int) -> ByteTable:
    """The table of a SentencePiece model, for vocab_size ids. Ids beyond the model's pieces count nothing.

    Raises UserError if the model cannot be read or has more than vocab_size pieces.
    """
    model = load_model(tokenizer_model)
    pieces, keeps = model.vocab_size(), keeps_whitespace(model)
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
        lead[i] = piece.startswith(SPACE) and not keeps
        text = piece.replace(SPACE, " ") if keeps else piece.removeprefix(SPACE)
        base[i] = len(text.encode("utf-8"))
    return ByteTable(base, lead, boundary)

"""Bytes of text that each token stands for, looked up by id: the denominator of bits per byte.

A token counts the UTF-8 bytes of its piece; a leading U+2581 is a space, one byte, unless the token before is a
boundary (BOS), since the published tokenizers strip a document's leading space. Byte pieces count 1, control and
unknown pieces 0. Method: build_sentencepiece_luts of the challenge's train_gpt.py. Added here: tokenizers that keep
whitespace (those that Fairway trains), whose every U+2581 is a space of the text, wherever it stands.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.errors import UserError
from stages.tokenize.tokenizer import SPACE, Tokenizer


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

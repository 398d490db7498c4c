"""Any text as tokens, and back, character for character, whatever the tokenizer can represent.

A tokenizer may fold characters, merge whitespace, or know no piece for a character. A token is therefore used only
where it stands for exactly the stretch of text that it came from. Everything else is spelled in byte pieces, of which
every tokenizer with byte fallback has 256. What comes out is the bytes of the tokens one behind the other.

Pairs that are one token each (tokens/fused_pairs.py) are fused in the end: such a token is the bytes of both.

A tokenizer for CaseOps encodes and spells CaseOps text, which can stand for every text (tokens/caseops.py).
"""

import codecs
from collections.abc import Sequence
from copy import copy
from pathlib import Path

import numpy as np

from fairway.runtime.errors import UserError
from fairway.tokens import caseops
from fairway.tokens.fused_pairs import Pair, bytes_by_id, fuse
from fairway.tokens.tokenizer import Tokenizer, Transform


class Spelling:
    """Texts as ids of a SentencePiece model. Raises UserError if the file is none, or without all 256 byte pieces."""

    def __init__(self, path: Path, transform: Transform, pairs: Sequence[Pair]) -> None:
        self.tokenizer, self.transform, self.pairs = Tokenizer(path), transform, pairs
        model = self.tokenizer.model
        self._byte_ids = [model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        if not all(map(model.is_byte, self._byte_ids)):
            raise UserError(f"{path}: expected a tokenizer with byte fallback, which can spell any text")
        self._bytes = bytes_by_id(self.tokenizer, pairs)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without a BOS before them."""
        if self.transform == "caseops":
            text = caseops.encode(text)
        ids: list[int] = []
        # Up to where the text is in `ids`, and up to where pieces have been met in it: they come in its order.
        done = met = 0
        for index, surface in zip(*self.tokenizer.encode_with_surfaces(text), strict=True):
            begin = text.find(surface, met)
            if begin < 0:
                continue
            met = begin + len(surface)
            if surface and self._bytes[index] == surface.encode("utf-8"):
                ids += [*self._spelled(text[done:begin]), index]
                done = met
        ids += self._spelled(text[done:])
        fused: list[int] = fuse(np.array(ids, dtype=np.int64), self.pairs).tolist()
        return fused

    def _spelled(self, text: str) -> list[int]:
        return [self._byte_ids[byte] for byte in text.encode("utf-8")]

    def decode(self, ids: Sequence[int]) -> str:
        """The text that encode made these ids of. Raises ValueError if there is no such text."""
        text = b"".join(map(self.bytes_of, ids)).decode("utf-8")
        return caseops.decode(text) if self.transform == "caseops" else text

    def bytes_of(self, index: int) -> bytes:
        """What an id adds to the text, in CaseOps spelling if that is the tokenizer's. Raises ValueError if nothing."""
        found = self._bytes[index] if 0 <= index < len(self._bytes) else None
        if found is None:
            raise ValueError(f"token {index} stands for no text")
        return found


class Reader:
    """Reads a text token by token, which may be one that Spelling never writes."""

    def __init__(self, spelling: Spelling) -> None:
        self.spelling = spelling
        self._utf8, self._case = codecs.getincrementaldecoder("utf-8")(), caseops.Decoder()

    def feed(self, index: int) -> str | None:
        """The characters that a token completes, or None if no text goes on so; the token is then left out."""
        before = self._utf8.getstate(), copy(self._case)
        try:
            text = self._utf8.decode(self.spelling.bytes_of(index))
            return self._case.feed(text) if self.spelling.transform == "caseops" else text
        except ValueError:
            self._utf8.setstate(before[0])
            self._case = before[1]
            return None

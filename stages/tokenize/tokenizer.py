"""One SentencePiece model, as the stages use it.

SentencePiece writes a space as U+2581 and reads every U+2581 back as a space. A tokenizer that keeps whitespace is to
lose nothing at all, so there a U+2581 of the text itself is spelled in its three byte pieces, which decode to itself.
"""

from pathlib import Path

import sentencepiece

from stages.errors import UserError

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

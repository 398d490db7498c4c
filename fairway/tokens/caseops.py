"""CaseOps v1 (`lossless_caps_caseops_v1`): a spelling of text in which operators stand for capitals.

    "The NASA Launch" -> TITLE "the" " " ALLCAPS "nasa" " " TITLE "launch"

`The` and `the` then share their pieces, and the vocabulary need not hold both. TITLE and ALLCAPS stand before a word,
CAPNEXT before one letter, and ESC before an operator that the text itself contains. A word is a longest run of ASCII
letters; everything else passes through unchanged. decode(encode(s)) == s for every string s.

Source: PR #1729 (@romeerp), used by PR #1855 and #1958; rules in data.md 7.
"""

import re
from collections.abc import Sequence

TITLE, ALLCAPS, CAPNEXT, ESC = OPERATORS = "\ue001\ue002\ue003\ue004"

# A word with a capital, or an operator. The look-behind lets a match start only where a word begins. Without it a long
# word would be searched anew from each of its letters, which takes time in proportion to the square of its length.
_MARKED = re.compile(f"(?<![A-Za-z])[a-z]*[A-Z][A-Za-z]*|[{OPERATORS}]")


def encode(text: str) -> str:
    """The text with operators for its ASCII capitals. It is longer than the text by the number of operators."""
    return _MARKED.sub(_mark, text)


def _mark(match: re.Match[str]) -> str:
    """What is written for a word with a capital, or for an operator."""
    word = match[0]
    if word in OPERATORS:
        return ESC + word
    if len(word) > 1 and word.isupper():
        return ALLCAPS + word.lower()
    head = TITLE + word[0].lower() if word[0].isupper() else word[0]
    return head + "".join(CAPNEXT + letter.lower() if letter.isupper() else letter for letter in word[1:])


def decode(text: str) -> str:
    """The text that `encode` turned into `text`. Raises ValueError if the operators make no sense."""
    decoder = Decoder()
    decoded = decoder.feed(text)
    decoder.close()
    return decoded


def original_pieces(surfaces: Sequence[str]) -> list[str]:
    """The part of the original text that each piece stands for.

    `surfaces` are the stretches of the encoded text that the pieces came from. Operators stand for nothing, and a
    character behind ESC belongs to the piece that holds it. SentencePiece gives an empty surface to all but the last
    byte piece of a character, and leaves whitespace at the ends of the text out of every surface. The UTF-8 length of
    a part is the piece's count of bytes. Raises ValueError if the surfaces are not encoded text.
    """
    decoder = Decoder()
    pieces = [decoder.feed(surface) for surface in surfaces]
    decoder.close()
    return pieces


class Decoder:
    """Decodes encoded text that comes in pieces: an operator at the end of a piece works on the next piece.

    Like the published decoder it also reads text that `encode` never writes, such as a raw capital, or CAPNEXT at the
    start of a word.
    """

    def __init__(self) -> None:
        self._escaped = False
        # TITLE or ALLCAPS while the operator waits for its word, otherwise "".
        self._word_mode = ""
        self._cap_next = False
        self._in_word = False
        self._all_caps = False

    def feed(self, text: str) -> str:
        """The original characters of this piece. Raises ValueError on operators that make no sense."""
        return "".join([self._step(character) for character in text])

    def close(self) -> None:
        """End the text. Raises ValueError if an operator still waits for its letter or word."""
        self._require(not (self._escaped or self._word_mode or self._cap_next))

    def _step(self, character: str) -> str:
        if self._escaped:
            return self._literal(character)
        if character in OPERATORS:
            self._operator(character)
            return ""
        if character.isascii() and character.isalpha():
            return self._letter(character)
        self._require(not (self._word_mode or self._cap_next))
        self._in_word = self._all_caps = False
        return character

    def _literal(self, character: str) -> str:
        letter = character.isascii() and character.isalpha()
        self._require(letter or not self._word_mode)
        self._escaped = False
        self._in_word = letter
        self._all_caps &= letter
        return character

    def _operator(self, operator: str) -> None:
        if operator == ESC:
            self._escaped = True
        elif operator == CAPNEXT:
            self._require(not self._cap_next)
            self._cap_next = True
        else:
            self._require(not (self._word_mode or self._in_word or self._cap_next))
            self._word_mode = operator

    def _letter(self, letter: str) -> str:
        # An operator for a whole word can wait inside a word only if an escaped letter stood right behind it.
        self._require(not (self._in_word and self._word_mode))
        self._all_caps |= self._word_mode == ALLCAPS
        upper = self._word_mode or self._cap_next or (self._in_word and self._all_caps)
        self._word_mode, self._cap_next, self._in_word = "", False, True
        return letter.upper() if upper else letter

    def _require(self, ok: bool) -> None:
        if not ok:
            raise ValueError("malformed CaseOps text")

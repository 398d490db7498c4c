"""CaseOps v1 (`lossless_caps_caseops_v1`): capitals become operators, so that `The` and `the` share their pieces.

    "The NASA Launch" -> T "the" " " A "nasa" " " T "launch"

T (TITLE) and A (ALLCAPS) stand before a word, C (CAPNEXT) before one letter, E (ESC) before an operator that the text
itself contains. A word is a maximal run of ASCII letters; everything else passes through. decode(encode(s)) == s for
every string s. Source: PR #1729 (@romeerp), used by PR #1855 and #1958.
"""

import re
from collections.abc import Sequence

TITLE, ALLCAPS, CAPNEXT, ESC = OPERATORS = "\ue001\ue002\ue003\ue004"

# Words with a capital, and operators. The look-behind keeps the search linear: it starts at words' beginnings only.
_MARKED = re.compile(f"(?<![A-Za-z])[a-z]*[A-Z][A-Za-z]*|[{OPERATORS}]")


def encode(text: str) -> str:
    """The text without ASCII capitals; longer than it by the number of operators."""
    return _MARKED.sub(_mark, text)


def _mark(match: re.Match[str]) -> str:
    word = match[0]
    if word in OPERATORS:
        return ESC + word
    if len(word) > 1 and word.isupper():
        return ALLCAPS + word.lower()
    head = TITLE + word[0].lower() if word[0].isupper() else word[0]
    return head + "".join(CAPNEXT + letter.lower() if letter.isupper() else letter for letter in word[1:])


def decode(text: str) -> str:
    """The text that `encode` came from. Raises ValueError if the operators make no sense."""
    decoder = Decoder()
    decoded = decoder.feed(text)
    decoder.close()
    return decoded


def original_pieces(surfaces: Sequence[str]) -> list[str]:
    """The part of the original text that each piece stands for, from the pieces' surfaces in the encoded text.

    Its UTF-8 length is the piece's byte count: operators stand for nothing, and a character after ESC belongs to the
    piece that holds it. SentencePiece gives all but the last byte piece of a character an empty surface, and leaves
    leading and trailing whitespace out of every surface. Raises ValueError if the surfaces are not encoded text.
    """
    decoder = Decoder()
    pieces = [decoder.feed(surface) for surface in surfaces]
    decoder.close()
    return pieces


class Decoder:
    """Decodes encoded text that comes in pieces; what is pending at the end of one carries over to the next.

    It also reads text that `encode` never writes (a raw capital, C at the start of a word), as the published one does.
    """

    def __init__(self) -> None:
        self._escaped = False
        # TITLE or ALLCAPS while it waits for its word, else "".
        self._word_mode = ""
        self._cap_next = False
        self._in_word = False
        self._all_caps = False

    def feed(self, text: str) -> str:
        """The original characters that end in this piece. Raises ValueError on operators that make no sense."""
        return "".join([self._step(character) for character in text])

    def close(self) -> None:
        """Raises ValueError if an operator still waits for its letter."""
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
        # A word mode inside a word can only come of an escaped letter between the two.
        self._require(not (self._in_word and self._word_mode))
        self._all_caps |= self._word_mode == ALLCAPS
        upper = self._word_mode or self._cap_next or (self._in_word and self._all_caps)
        self._word_mode, self._cap_next, self._in_word = "", False, True
        return letter.upper() if upper else letter

    def _require(self, ok: bool) -> None:
        if not ok:
            raise ValueError("malformed CaseOps text")

"""The format of packed texts: a text of any length as few bytes, by a language model that both sides have.

    magic "fwz" | version u8 | model's fingerprint, 16 bytes | SHA-256 of the text, 32 bytes | bytes of the text u64
    for each lane: tokens u16, or u32 in a text of more than SHORT_LANES bytes
    for each group of lanes: words u32, and as many words of code, u32 each
    CRC-32 of all before, u32

Numbers are little-endian. The text is cut into lanes, whose number follows from its length. Each is tokenized and
predicted for itself, so that up to GROUP of them go through the network together (lanes.py). Every lane begins without
knowing anything; with lanes of LANE_BYTES that costs 0.4 % on the laptop default's validation text.

Packing and unpacking compute the same distributions from the same tokens in the same shapes and by one thread. On the
same kind of machine with the same PyTorch they are the same to the last bit. On another, the last digits may differ,
and then the text that comes out is another one, which its SHA-256 tells. A damaged file is told by the CRC-32.

Legend: B lanes, T tokens of a lane, V vocabulary.
"""

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import torch

from fairway.decoding.lanes import Lanes
from fairway.decoding.language import Language
from fairway.decoding.token_coder import Decoder, Encoder
from fairway.model.gpt import GPT
from fairway.runtime.errors import UserError
from fairway.tokens.tokenizer import BOS

MAGIC, VERSION = b"fwz", 1
HEADER = struct.Struct("<3sB16s32sQ")
NUMBER = struct.Struct("<I")
FINGERPRINT_BYTES = 16
# About so many bytes of text are in a lane, as long as there are not more than MOST_LANES.
LANE_BYTES, MOST_LANES = 2048, 128
# A lane ends behind a line's end, if there is one among so many characters.
LINE_CHARACTERS = 256
# Up to so many bytes of text no lane can have 65,536 tokens.
SHORT_LANES = 4 * LANE_BYTES * MOST_LANES
# Lanes that go through the network together.
GROUP = 32
# A byte of text takes at most so many tokens: a capital is three bytes of an operator and a letter in CaseOps spelling.
MOST_TOKENS = 4

# Is told how many more tokens were coded, and how many there are.
Coded = Callable[[int, int], None]


def pack(text: bytes, language: Language, coded: Coded) -> bytes:
    """Pack a text. Raises UserError if it is not UTF-8."""
    try:
        pieces = _pieces(text.decode("utf-8"), _lanes(len(text)))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text: {error.reason} at byte {error.start}; expected a text file") from None
    lanes = [np.array(language.spelling.encode(piece), np.int64) for piece in pieces]
    parts = [
        HEADER.pack(MAGIC, VERSION, _named(language), hashlib.sha256(text).digest(), len(text)),
        np.array([len(tokens) for tokens in lanes], _count_type(len(text))).tobytes(),
    ]
    total = sum(map(len, lanes))
    for group in _groups(len(lanes)):
        words = _encode(lanes[group], language.model, lambda more: coded(more, total))
        parts += [NUMBER.pack(len(words)), words.astype("<u4").tobytes()]
    body = b"".join(parts)
    return body + NUMBER.pack(zlib.crc32(body))


def unpack(data: bytes, language: Language, coded: Coded) -> bytes:
    """The text that was packed, byte for byte.

    Raises UserError if `data` is no packed text, or a damaged one, or packed by another model; and if another text
    comes out, which another kind of machine or PyTorch may cause.
    """
    digest, size, lengths, codes = _read(data, language)
    try:
        pieces = []
        for group, words in zip(_groups(len(lengths)), codes, strict=True):
            lanes = _decode(lengths[group], words, language.model, lambda more: coded(more, int(lengths.sum())))
            pieces += [language.spelling.decode(tokens) for tokens in lanes]
        text = "".join(pieces).encode("utf-8")
    except ValueError:
        text = b""
    if len(text) != size or hashlib.sha256(text).digest() != digest:
        raise UserError(
            f"the text that comes out is not the one packed (SHA-256 {digest.hex()}): expected the kind of processor "
            f"and the PyTorch that packed it, since others round otherwise (here PyTorch {torch.__version__})"
        )
    return text


def _read(data: bytes, language: Language) -> tuple[bytes, int, np.ndarray, list[np.ndarray]]:
    """SHA-256 and bytes of the text, tokens of each lane, and words of each group."""
    if len(data) < HEADER.size + NUMBER.size or not data.startswith(MAGIC):
        raise UserError("not a text packed by fairway.zip, or only the beginning of one")
    _, version, fingerprint, digest, size = HEADER.unpack_from(data)
    if version != VERSION:
        raise UserError(f"packed in version {version} of the format, expected {VERSION}")
    body = memoryview(data)[: -NUMBER.size]
    if zlib.crc32(body) != NUMBER.unpack(data[-NUMBER.size :])[0]:
        raise UserError("damaged: the checksum does not match")
    if fingerprint != _named(language):
        raise UserError(
            f"packed by the model {fingerprint.hex()}, expected the same; {language.source} and its tokenizer are "
            f"{_named(language).hex()}"
        )
    try:
        lengths, codes = _parts(body[HEADER.size :], _lanes(size), _count_type(size))
    except (struct.error, ValueError):
        lengths, codes = np.zeros(0, np.int64), []
    if len(lengths) != _lanes(size) or lengths.sum() > MOST_TOKENS * size:
        raise UserError("damaged: its parts do not have the lengths that it names")
    return digest, size, lengths, codes


def _parts(data: memoryview, lanes: int, counts: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Tokens of each lane and words of each group. Raises ValueError or struct.error unless they fill the data."""
    found = np.frombuffer(data, counts, lanes)
    lengths, place, codes = found.astype(np.int64), found.nbytes, []
    for _ in _groups(lanes):
        [words] = NUMBER.unpack_from(data, place)
        codes.append(np.frombuffer(data, "<u4", words, place + NUMBER.size).astype(np.uint32))
        place += NUMBER.size * (1 + words)
    if place != len(data):
        raise ValueError("more than its parts")
    return lengths, codes


def _named(language: Language) -> bytes:
    """As much of a language's fingerprint as a packed text holds."""
    return language.fingerprint[:FINGERPRINT_BYTES]


def _lanes(text_bytes: int) -> int:
    """The number of lanes of a text."""
    return min(-(-text_bytes // LANE_BYTES), MOST_LANES)


def _count_type(text_bytes: int) -> str:
    """The type of the counts of tokens."""
    return "<u2" if text_bytes <= SHORT_LANES else "<u4"


def _groups(lanes: int) -> list[slice]:
    """Which lanes go through the network together."""
    return [slice(begin, begin + GROUP) for begin in range(0, lanes, GROUP)]


def _pieces(text: str, lanes: int) -> list[str]:
    """The text cut into so many pieces of about the same length."""
    ends = [0]
    for lane in range(1, lanes):
        end = len(text) * lane // lanes
        ends.append(text.rfind("\n", max(ends[-1], end - LINE_CHARACTERS), end) + 1 or end)
    return [text[begin:end] for begin, end in zip(ends, [*ends[1:], len(text)], strict=True)][:lanes]


def _encode(lanes: list[np.ndarray], model: GPT, coded: Callable[[int], None]) -> np.ndarray:
    """The code of some lanes' tokens (T,) int64 each: (W,) uint32."""
    lengths_B = np.array([len(tokens) for tokens in lanes])
    tokens_BT = _begun(lengths_B)
    for row_T, tokens in zip(tokens_BT, lanes, strict=True):
        row_T[1 : 1 + len(tokens)] = tokens
    encoder = Encoder()
    for step, going_B, log_probs_BV in _predictions(model, tokens_BT, lengths_B):
        encoder.push(tokens_BT[going_B, step], log_probs_BV[going_B])
        coded(int(going_B.sum()))
    return encoder.words()


def _decode(lengths_B: np.ndarray, words: np.ndarray, model: GPT, coded: Callable[[int], None]) -> list[list[int]]:
    """The tokens of some lanes. Raises ValueError if the words are no code by this model."""
    tokens_BT, decoder = _begun(lengths_B), Decoder(words)
    for step, going_B, log_probs_BV in _predictions(model, tokens_BT, lengths_B):
        tokens_BT[going_B, step] = decoder.pop(log_probs_BV[going_B])
        coded(int(going_B.sum()))
    return [row_T[1 : 1 + length].tolist() for row_T, length in zip(tokens_BT, lengths_B, strict=True)]


def _begun(lengths_B: np.ndarray) -> np.ndarray:
    """Room for the tokens of lanes behind their BOS, (B, 1 + T) int64. BOS also stands where there are none."""
    return np.full((len(lengths_B), 1 + int(lengths_B.max())), BOS)


def _predictions(
    model: GPT, tokens_BT: np.ndarray, lengths_B: np.ndarray
) -> Iterator[tuple[int, np.ndarray, torch.Tensor]]:
    """For each place from 1 on: which lanes have a token there (B,) bool, and all lanes' log-probabilities (B, V).

    Tokens are read when the next place is asked for, so that a decoder can write them there before.
    """
    lanes = Lanes(model, len(lengths_B))
    for step in range(1, tokens_BT.shape[1]):
        log_probs_BV = lanes.step(torch.from_numpy(tokens_BT[:, step - 1].copy()))
        yield step, lengths_B >= step, log_probs_BV

"""Pairs of tokens that often stand side by side, each written as one token.

SentencePiece never joins an operator of CaseOps with what stands beside it, so that the space before a capitalised word
is a token of its own: every sixteenth token of English text is a space before TITLE. The bytes C0, C1 and F5 to FF are
in no UTF-8 text, and the ids of their pieces in no tokens. These ids stand for the most frequent pairs of the training
text, found one after the other, so that a pair may hold an earlier one. BOS is in no pair: documents stay apart.

The same text is fewer tokens then, so that a training step and a window see more of it. What is weighed does not grow.
unfuse(fuse(tokens)) is tokens again, for all tokens without those ids.

Method: the merges of byte-pair encoding (arXiv:1508.07909), applied to tokens. Source: PR #2109, which fuses the space
with each of three operators. Ours: the pairs are counted, and there are up to thirteen.

Legend: n tokens, m tokens after pairs have become one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fairway.runtime.errors import UserError
from fairway.runtime.files import file_sha256
from fairway.tokens.shards import open_shard, shard_paths, sidecar_paths, write_shard
from fairway.tokens.tokenizer import BOS, SPACE, Tokenizer

# The bytes that no UTF-8 text contains.
NEVER = (0xC0, 0xC1, *range(0xF5, 0x100))
# Pairs are counted on the first so many training tokens. More would find the same frequent ones.
COUNTED_TOKENS = 4_000_000


@dataclass(frozen=True)
class Pair:
    """The tokens `first` and `second`, side by side, are written as `fused`."""

    first: int
    second: int
    fused: int


def free_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of the byte pieces that no text needs. Raises UserError if the model has no byte pieces."""
    ids = [tokenizer.model.piece_to_id(f"<0x{byte:02X}>") for byte in NEVER]
    if not all(map(tokenizer.model.is_byte, ids)):
        raise UserError("params.yaml: tokenize.fused_pairs: expected 0, since the tokenizer has no byte pieces")
    return ids


def learn_pairs(tokens: np.ndarray, ids: Sequence[int]) -> list[Pair]:
    """For each of `ids` the pair that is most frequent in tokens (n,) by then; fewer if no pair occurs twice."""
    pairs: list[Pair] = []
    for fused in ids:
        inside = (tokens[:-1] != BOS) & (tokens[1:] != BOS)
        both, counts = np.unique(tokens[:-1][inside].astype(np.int64) << 16 | tokens[1:][inside], return_counts=True)
        if not len(both) or counts.max() < 2:
            break
        # Of several that are equally frequent, the first in the order of ids.
        most = int(both[counts.argmax()])
        pairs.append(Pair(most >> 16, most & 0xFFFF, fused))
        tokens = fuse(tokens, pairs[-1:])
    return pairs


def fuse(tokens: np.ndarray, pairs: Iterable[Pair]) -> np.ndarray:
    """The tokens (m,), of the dtype of `tokens` (n,), in which the pairs are one token each, taken in their order."""
    for pair in pairs:
        tokens, _ = _fuse_one(tokens, pair)
    return tokens


def fuse_with_bytes(
    tokens: np.ndarray, token_bytes: np.ndarray, pairs: Iterable[Pair]
) -> tuple[np.ndarray, np.ndarray]:
    """The same, and the bytes (m,) that they stand for, of the dtype of `token_bytes` (n,)."""
    for pair in pairs:
        tokens, at = _fuse_one(tokens, pair)
        token_bytes = token_bytes.copy()
        token_bytes[at] += token_bytes[at + 1]
        token_bytes = np.delete(token_bytes, at + 1)
    return tokens, token_bytes


def _fuse_one(tokens: np.ndarray, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """The tokens (m,) with this pair as one token each, and where in `tokens` (n,) they began: places (n - m,)."""
    at = np.flatnonzero((tokens[:-1] == pair.first) & (tokens[1:] == pair.second))
    if pair.first == pair.second:
        at = _apart(at)
    fused = tokens.copy()
    fused[at] = pair.fused
    return np.delete(fused, at + 1), at


def _apart(places: np.ndarray) -> np.ndarray:
    """Of ascending places every second one in each run of neighbours, so that no token is in two pairs."""
    run_begins = np.flatnonzero(np.diff(places, prepend=-2) > 1)
    lengths = np.diff(run_begins, append=len(places))
    return places[(np.arange(len(places)) - np.repeat(run_begins, lengths)) % 2 == 0]


def unfuse(tokens: np.ndarray, pairs: Sequence[Pair]) -> np.ndarray:
    """The tokens (n,) that fuse made `tokens` (m,) of."""
    for pair in reversed(pairs):
        at = np.flatnonzero(tokens == pair.fused)
        tokens = np.insert(tokens, at + 1, pair.second)
        tokens[at + np.arange(len(at))] = pair.first
    return tokens


def bytes_by_id(tokenizer: Tokenizer, pairs: Iterable[Pair]) -> list[bytes | None]:
    """The UTF-8 bytes that each id stands for, in CaseOps spelling if that is the tokenizer's; None if no text.

    A fused id stands for the bytes of both tokens of its pair.
    """
    found = [_piece_bytes(tokenizer, index) for index in range(tokenizer.model.vocab_size())]
    for pair in pairs:
        found[pair.fused] = b"".join(found[part] or b"" for part in (pair.first, pair.second))
    return found


def _piece_bytes(tokenizer: Tokenizer, index: int) -> bytes | None:
    model = tokenizer.model
    if model.is_control(index) or model.is_unknown(index) or model.is_unused(index):
        return None
    piece: str = model.id_to_piece(index)
    # A byte piece is called "<0x0A>", say.
    return bytes([int(piece[3:5], 16)]) if model.is_byte(index) else piece.replace(SPACE, " ").encode("utf-8")


def fuse_shards(folder: Path, count: int) -> tuple[list[Pair], dict[str, str]]:
    """Fuse up to `count` pairs in all shards of a token folder; the pairs, and the new SHA-256 of its files by name.

    Pairs are learned from the first training shard. One that lies across two shards stays as it is. Files are written
    anew, since a linked one is another folder's too.
    """
    first = open_shard(shard_paths(folder, "train")[0], vocab_size=None)
    pairs = learn_pairs(first[:COUNTED_TOKENS], free_ids(Tokenizer(folder / "tokenizer.model"))[:count])
    for path in shard_paths(folder, "train"):
        _rewrite(path, fuse(open_shard(path, vocab_size=None), pairs))
    for path, sidecar in zip(shard_paths(folder, "val"), sidecar_paths(folder), strict=True):
        tokens, token_bytes = (open_shard(file, vocab_size=None) for file in (path, sidecar))
        for file, values in zip((path, sidecar), fuse_with_bytes(tokens, token_bytes, pairs), strict=True):
            _rewrite(file, values)
    return pairs, {path.name: file_sha256(path) for path in folder.glob("*.bin")}


def _rewrite(path: Path, values: np.ndarray) -> None:
    path.unlink()
    write_shard(path, values)


def as_json(pairs: Iterable[Pair]) -> list[list[int]]:
    """What meta.json says of the pairs."""
    return [[pair.first, pair.second, pair.fused] for pair in pairs]


def from_json(found: Iterable[Sequence[int]]) -> list[Pair]:
    """The pairs that as_json wrote down."""
    return [Pair(*numbers) for numbers in found]

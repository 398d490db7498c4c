"""The part of the validation stream that experiments run on, and the order in which its targets are coded.

The part is small, but the evaluator learns twice within it. Three kinds of parts are tried, with the evaluator's
settings as they are. One is the beginning of the stream, in whole rows. The others are whole documents in the order of
the stream: the shortest ones, so that an evaluator that learns after so many documents learns from short ones, or the
shortest ones and some long ones, for an evaluator that needs so many tokens for a step. The smaller of these two is
taken where a beginning would have to be twice as long.

How far one must look is read off the evaluator's own layout: what it learns from a chunk shows in the next chunk, and
so a part of three chunks has two steps of learning in it, if their documents are long enough for a step. Chunks from
which nothing is ever learned are all alike, and one will do.

In the order of the stream a decoder is told nothing but the first token before it begins. (How many tokens there are is
known to everybody.) An evaluator that visits documents in an order of its own is causal in that order at best, and only
for a decoder that is told beforehand where documents start. What that takes is counted in bits (accounting.py).

Legend: N targets. Target p is token p + 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fairway.certification.black_box import KEPT_STATES, Baseline, BlackBox
from fairway.evaluation.document_batches import Document, documents
from fairway.runtime.errors import UserError
from fairway.tokens.tokenizer import BOS

# A beginning may be so many times as long as the documents that will do.
LONGER = 2
# Long documents are tried too where the shortest that will do are more than this share of the stream.
# One in so many is then a long one, longer than this share of all documents. So many numbers of them are tried.
MUCH, LONG_EVERY, LONG_FROM, LONG_TRIALS = 0.25, 8, 0.9, 100


@dataclass(frozen=True)
class Excerpt:
    """Tokens (N+1,) int64, what they are, and whether the evaluator learns anywhere in the whole stream."""

    tokens_N1: Tensor
    what: str
    learns: bool


def choose_excerpt(box: BlackBox, tokens_N1: Tensor, *, tokens: int) -> Excerpt:
    """The shortest part with two steps of learning (or all there are), a document's start and so many targets.

    What even the whole stream has not got is not asked for. Raises UserError if the evaluator cannot take that stream.
    """
    whole = box.begin(tokens_N1)
    chunks, learns = whole.chunks, any(map(whole.learns, range(whole.chunks)))
    starts, targets = bool((tokens_N1[1:] == BOS).any()), min(tokens, len(tokens_N1) - 1)

    def holds(part_N1: Tensor) -> bool:
        # The last token is only predicted, so that a document which starts with it is not seen.
        if len(part_N1) - 1 < targets or (starts and not bool((part_N1[1:-1] == BOS).any())):
            return False
        try:
            part = box.begin(part_N1)
        except UserError:
            return False
        return not learns or (part.chunks >= min(chunks, KEPT_STATES + 1) and any(map(part.learns, range(part.chunks))))

    beginning, by_document = _beginning(box, tokens_N1, holds), _shortest_documents(tokens_N1, holds)
    if len(by_document[0]) > MUCH * len(tokens_N1):
        by_document = min(by_document, _with_long_ones(tokens_N1, holds), key=lambda part: len(part[0]))
    part_N1, what = beginning if len(beginning[0]) <= LONGER * len(by_document[0]) else by_document
    return Excerpt(part_N1, what, learns=learns)


def _beginning(box: BlackBox, tokens_N1: Tensor, holds: Callable[[Tensor], bool]) -> tuple[Tensor, str]:
    seq_len, targets = box.model.config.seq_len, len(tokens_N1) - 1
    rows = _smallest(lambda rows: holds(tokens_N1[: rows * seq_len + 1]), -(-targets // seq_len))
    part_N1 = tokens_N1[: rows * seq_len + 1]
    if len(part_N1) == len(tokens_N1):
        return tokens_N1, f"the whole stream of {targets:,} targets"
    return part_N1, f"the first {len(part_N1) - 1:,} targets of the stream"


def _shortest_documents(tokens_N1: Tensor, holds: Callable[[Tensor], bool]) -> tuple[Tensor, str]:
    ascending = sorted(documents(tokens_N1.cpu()), key=lambda document: document.targets)
    count = _smallest(lambda count: holds(_joined(tokens_N1, ascending[:count])), len(ascending))
    part_N1 = _joined(tokens_N1, ascending[:count])
    return part_N1, f"the {count:,} shortest documents, in the order of the stream, {len(part_N1) - 1:,} targets"


def _with_long_ones(tokens_N1: Tensor, holds: Callable[[Tensor], bool]) -> tuple[Tensor, str]:
    ascending = sorted(documents(tokens_N1.cpu()), key=lambda document: document.targets)
    long_ones = ascending[int(LONG_FROM * len(ascending)) :]

    def part(count: int) -> Tensor:
        return _joined(tokens_N1, ascending[: count * (LONG_EVERY - 1)] + long_ones[:count])

    # Beyond these, a document would be taken twice. They are tried in turn, because one more document can undo what
    # held before: it changes which ones an evaluator puts into a batch.
    most = len(ascending) // (LONG_EVERY + 2)
    count = next((count for count in range(1, most + 1, -(-most // LONG_TRIALS) or 1) if holds(part(count))), None)
    if count is None:
        return tokens_N1, "the whole stream"
    long = f"{count:,} long ones" if count > 1 else "a long one"
    what = f"the {count * (LONG_EVERY - 1):,} shortest documents and {long}, in the order of the stream"
    return part(count), f"{what}, {len(part(count)) - 1:,} targets"


def _joined(tokens_N1: Tensor, docs: list[Document]) -> Tensor:
    """The documents' tokens in the order of the stream, and the one behind the last of them, which it predicts."""
    in_order = sorted(docs, key=lambda document: document.begin)
    pieces = [tokens_N1[document.begin : document.begin + document.targets] for document in in_order]
    end = in_order[-1].begin + in_order[-1].targets
    return torch.cat([*pieces, tokens_N1[end : end + 1]])


def _smallest(holds: Callable[[int], bool], most: int) -> int:
    """The smallest number of 1 ... most for which `holds`, if it holds for all larger ones; `most` if for none.

    It is looked for upwards, since large numbers take long to look at.
    """
    least, reach = 1, 1
    while reach < most and not holds(reach):
        least, reach = reach + 1, min(2 * reach, most)
    while least < reach:
        middle = (least + reach) // 2
        if holds(middle):
            reach = middle
        else:
            least = middle + 1
    return reach


def short_beginning(box: BlackBox, tokens_N1: Tensor) -> Tensor:
    """As short a beginning as the evaluator takes: a row and a quarter, or twice that, or four times, ..."""
    length = box.model.config.seq_len * 5 // 4
    while length < len(tokens_N1) - 1 and not box.fits(tokens_N1[: length + 1]):
        length *= 2
    return tokens_N1[: length + 1]


@dataclass(frozen=True)
class Order:
    """All N positions in order of coding (N,) int64, and which tokens are given (N+1,) bool: known before the first."""

    name: Literal["stream", "visits"]
    positions: Tensor
    given_N1: Tensor

    def unknown(self, index: int) -> Tensor:
        """Which tokens (N+1,) bool are not known when the target at an index of the order is predicted."""
        unknown_N1 = torch.zeros_like(self.given_N1)
        unknown_N1[self.positions[index:] + 1] = True
        return unknown_N1 & ~self.given_N1

    def up_to(self, index: int, count: int) -> Tensor:
        """Which positions (N,) bool are the last `count` that are predicted up to that index, itself included."""
        marked_N = torch.zeros(len(self.positions), dtype=torch.bool)
        marked_N[self.positions[max(index + 1 - count, 0) : index + 1]] = True
        return marked_N

    def edges(self, base: Baseline) -> list[int]:
        """The indices of the first targets that are predicted behind the first chunk and behind the second.

        There are fewer where there are fewer chunks. What a pass learns from a chunk shows there for the first time.
        """
        chunk_I = base.chunk_N[self.positions]
        found = [(chunk_I > chunk).nonzero()[:1, 0].tolist() for chunk in range(KEPT_STATES)]
        return list(dict.fromkeys(index for indices in found for index in indices))

    def given_starts(self, base: Baseline) -> int:
        """How many of the given tokens start a document, but for the first token, which is always given."""
        return int((self.given_N1 & (base.tokens_N1.cpu() == BOS))[1:].sum())

    def given_others(self, base: Baseline) -> int:
        """How many other tokens are given."""
        return int((self.given_N1 & (base.tokens_N1.cpu() != BOS))[1:].sum())


def stream_order(base: Baseline) -> Order:
    """One target behind the other."""
    N = len(base.times_N)
    return Order("stream", torch.arange(N), torch.arange(N + 1) == 0)


def visiting_order(base: Baseline) -> Order:
    """As the evaluator does it; given are document starts, and tokens it reads before it has predicted them."""
    N = len(base.times_N)
    positions = base.visited
    rank_N = torch.empty(N, dtype=torch.int64)
    rank_N[positions] = torch.arange(N)
    given_N1 = base.tokens_N1.cpu() == BOS
    given_N1[0] = True
    given_N1[1:N] |= rank_N[1:] < rank_N[:-1]
    return Order("visits", positions, given_N1)

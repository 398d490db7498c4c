"""Documents of a stream in batches, in the order in which PR #1855 visits them, and cuts of the documents of a batch.

A cut is a run of targets, the same in every document of a batch: these are scored together. Lengths ascend within a
batch, so the documents that have any of them are its last rows, and rows that have ended are left out as the batch goes
on. What is left is taken in groups of few different shapes, because each shape is recorded once (adapter_steps.py): a
group has a power of two of rows, and windows are filled up at their end, which no place before can see, to a multiple
of LENGTHS.

Legend: R rows of a group, C targets of a cut, T tokens of a window, M scored targets of a group, N targets of a stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairway.tokens.tokenizer import BOS


@dataclass(frozen=True)
class Document:
    """The tokens begin ... begin + targets of a stream. The last one is predicted too, and begins the next document."""

    begin: int
    targets: int


def documents(tokens_N1: Tensor) -> list[Document]:
    """The documents of a stream (N+1,) in its order; every target belongs to one of them."""
    begins = (tokens_N1 == BOS).nonzero()[:, 0].tolist()
    begins = sorted({0, *begins})
    ends = [*begins[1:], len(tokens_N1) - 1]
    return [Document(begin, end - begin) for begin, end in zip(begins, ends, strict=True) if end > begin]


def by_length(docs: list[Document], size: int) -> list[list[Document]]:
    """Batches of `size` documents of like length, the longest first, which is the order of visits.

    Within a batch lengths ascend. Batches are filled from the shortest document on, so that the first may be smaller.
    """
    ascending = sorted(docs, key=lambda document: document.targets)
    return [ascending[begin : begin + size] for begin in range(0, len(ascending), size)][::-1]


def phase_ends(batches: list[list[Document]], prefix: int, phases: int, lanes: int) -> list[int]:
    """After how many batches each phase of global training comes.

    Phase p of 1 ... `phases` is due once prefix·p/phases documents are done. Each of the other lanes is then still at
    work on a batch, which is finished before the phase. Phases for which the stream is too short are left out.
    """
    done = torch.tensor([len(batch) for batch in batches]).cumsum(0)
    ends: list[int] = []
    for phase in range(phases):
        boundary = prefix * (phase + 1) // phases
        reached = int((done < boundary).sum()) + 1
        end = max(reached, ends[-1] + 1 if ends else 1) + lanes - 1
        if reached > len(batches) or end >= len(batches):
            break
        ends.append(end)
    return ends


def lanes_of(batches: list[list[Document]], lanes: int, *, independent: bool, seq_len: int) -> list[int]:
    """The lane of each batch: in turn, as PR #1855's order of visits wants it.

    Where batches are `independent`, so that lanes change no result, each goes to the lane with the least work so far.
    """
    if not independent:
        return [index % lanes for index in range(len(batches))]
    work, found = [0.0] * lanes, []
    for batch in batches:
        least = work.index(min(work))
        work[least] += sum(_tokens_read(document, seq_len) for document in batch)
        found.append(least)
    return found


def _tokens_read(document: Document, seq_len: int) -> float:
    """The tokens in the windows of all targets: target i has i of them before it, at most `seq_len`."""
    growing = min(document.targets, seq_len)
    return growing * (document.targets - growing / 2)


def wanted_batches(batches: list[list[Document]], wanted: Tensor | None, *, independent: bool) -> list[list[Document]]:
    """The batches up to the last one with a target in `wanted`, a bool tensor (N,) on the CPU; None means all.

    Of `independent` batches, which learn nothing from each other, only those with such a target.
    """
    if wanted is None:
        return batches
    has_wanted = [
        any(bool(wanted[document.begin : document.begin + document.targets].any()) for document in batch)
        for batch in batches
    ]
    if independent:
        return [batch for batch, has in zip(batches, has_wanted, strict=True) if has]
    return batches[: len(batches) - [*has_wanted[::-1], True].index(True)]


# Windows have a multiple of so many tokens, or as many as a row of the network, and a group has at most so many tokens:
# with 32 rows of 2048 the evaluation of r1958 takes 24 GiB. Multiples of 128 would leave less to compute, but 46 shapes
# to record instead of 26 for documents such as the challenge's.
LENGTHS, GROUP_TOKENS = 256, 65536


def window_length(docs: Sequence[Document], end: int, seq_len: int) -> int:
    """How many tokens the windows of a cut have that ends with so many targets of each document."""
    longest = min(max(document.targets for document in docs), end, seq_len)
    return min(-(-longest // LENGTHS) * LENGTHS, seq_len)


def row_groups(docs: Sequence[Document], begin: int, length: int) -> list[slice]:
    """Groups of the rows that have targets from `begin` on, in ascending order; `docs` ascend in length.

    A group that is not full holds rows that have ended, as far as there are any.
    """
    going = sum(document.targets > begin for document in docs)
    groups, end, most = [], len(docs), _power_of_two(max(1, GROUP_TOKENS // length))
    while going > 0:
        rows = min(_power_of_two(2 * going - 1), most)
        if rows > end:
            rows = _power_of_two(end)
        groups.append(slice(end - rows, end))
        going, end = going - rows, end - rows
    return groups[::-1]


def _power_of_two(at_most: int) -> int:
    return 1 << (at_most.bit_length() - 1)


@dataclass(frozen=True)
class Windows:
    """What a group reads: tokens (R, T), and of every target of the cut its column there and the target (R, C)."""

    tokens_RT: Tensor
    columns_RC: Tensor
    targets_RC: Tensor
    # 1 for documents with more targets behind the cut: only they learn from it.
    goes_on_R: Tensor


class Cut:
    """The windows of a group of documents in which the targets begin ... begin + C - 1 of each are scored.

    A document's window ends where these targets end, or with the document, and has at most seq_len tokens. A document
    that has ended before keeps its last window and scores nothing. Where `ends_known`, the window of a document that
    ends within the cut begins earlier by what it is shorter. A decoder that does not know the end cannot do that.
    """

    def __init__(
        self, docs: Sequence[Document], begin: int, size: int, seq_len: int, *, ends_known: bool = True
    ) -> None:
        self.size, self.length = size, window_length(docs, begin + size, seq_len)
        targets_R = torch.tensor([document.targets for document in docs])
        first_R = torch.tensor([document.begin for document in docs])
        end_R = targets_R.clamp(max=begin + size)
        # Where in its document each window begins.
        from_R = ((end_R if ends_known else torch.full_like(end_R, begin + size)) - seq_len).clamp(min=0)
        goes_on_R = targets_R > begin + size
        self.learns = bool(goes_on_R.any())
        # By row: where its window begins in the stream, how many tokens it has, the column of the cut's first target,
        # and whether the document goes on behind the cut. This is all that the device is told of a cut.
        self.table_R4 = torch.stack([first_R + from_R, end_R - from_R, begin - from_R, goes_on_R.long()], 1)
        place_C = begin + torch.arange(size)
        inside_RC = place_C < end_R[:, None]
        # Which of the R·C places are scored, and their positions in the stream.
        self.scored_M = inside_RC.flatten().nonzero()[:, 0]
        self.positions_M = (first_R[:, None] + place_C)[inside_RC]


def windows(tokens_N1: Tensor, table_R4: Tensor, length: int, size: int) -> Windows:
    """The windows of a cut (Cut.table_R4), on the device of the stream."""
    begin_R1, width_R1, first_R1, goes_on_R1 = table_R4.split(1, 1)
    place_T, last = torch.arange(length, device=tokens_N1.device), len(tokens_N1) - 1
    columns_RC = first_R1 + torch.arange(size, device=tokens_N1.device)
    return Windows(
        tokens_RT=tokens_N1[(begin_R1 + place_T).clamp(max=last)] * (place_T < width_R1),
        columns_RC=columns_RC,
        targets_RC=tokens_N1[(begin_R1 + columns_RC + 1).clamp(max=last)] * (columns_RC < width_R1),
        goes_on_R=goes_on_R1[:, 0],
    )

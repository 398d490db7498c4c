"""Which windows of a stream are scored, as data: where each starts, and which of its places it scores.

A window that starts at token w reads the tokens w, w+1, ..., w + length - 1 of the stream, and scores its places first,
..., length - 1. The place at offset i predicts token w + i + 1, which is called target or position w + i.

Legend: N targets, T tokens of a window, W windows, M scored places of all windows, D documents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fairway.model.embedding import BOS


@dataclass(frozen=True)
class Windows:
    """Three columns (W,) int64: first token, first scored offset, and number of tokens inside the stream."""

    start: Tensor
    first: Tensor
    length: Tensor

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, which: slice | Tensor) -> "Windows":
        return Windows(self.start[which], self.first[which], self.length[which])

    def positions(self) -> Tensor:
        """Every scored position in order of scoring, (M,) int64, M = Σ(length - first)."""
        return self._runs_from(self.start + self.first)

    def rows(self, seq_len: int, width: int) -> Tensor:
        """The same places as rows of the last `width` places of every window, (W, width) taken in order: (M,) int64."""
        return self._runs_from(torch.arange(len(self)) * width + self.first - (seq_len - width))

    def _runs_from(self, begin: Tensor) -> Tensor:
        """For every window as many consecutive numbers as it scores places, from `begin` on."""
        counts = self.length - self.first
        return begin.repeat_interleave(counts) + _counted(counts)


def _counted(counts: Tensor) -> Tensor:
    """0, 1, ..., counts[0] - 1, 0, 1, ..., counts[1] - 1, and so on: (Σ counts,) int64."""
    return torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)


def scored_once(targets: int, *, seq_len: int, stride: int) -> Windows:
    """The list that scores each of N targets once: of PR #1493 and #1958, there called with stride 64.

    The first window scores all it reads, each later one its last `stride` places (fewer at the end of the stream), so
    that a target sees at least seq_len - stride + 1 tokens. Needs 0 < stride <= seq_len.
    """
    start = torch.arange(0, max(targets - (seq_len - stride), 1), stride)
    length = (start + seq_len).clamp(max=targets) - start
    first = torch.where(start == 0, 0, seq_len - stride)
    return Windows(start, first, length)


def published(targets: int, *, seq_len: int, stride: int) -> Windows:
    """The list of PR #549, #1150, #1172 and #1488: as scored_once, but windows go on to the very end of the stream.

    Windows that the end cuts short score their last `stride` places too, so the last targets are scored up to
    seq_len / stride times, with ever less context. Kept because published digits contain it.
    """
    start = torch.arange(0, targets, stride)
    length = (start + seq_len).clamp(max=targets) - start
    first = torch.where(start == 0, 0, (length - stride).clamp(min=0))
    return Windows(start, first, length)


def within_documents(tokens_N1: Tensor, *, seq_len: int, stride: int) -> Windows:
    """The list of scored_once for each document of a stream (N+1,) by itself, one document after the other.

    No window reaches over the start of a document, and what is scored in a document does not depend on where in the
    stream it stands. A document begins with BOS and predicts the BOS of the next one as its last target; what comes
    before the first BOS counts as a document too. One of at most seq_len targets is a single window.
    """
    is_start_N = (tokens_N1[:-1] == BOS).cpu()
    is_start_N[0] = True
    begin_D = is_start_N.nonzero()[:, 0]
    targets_D = torch.cat([begin_D[1:], torch.tensor([len(is_start_N)])]) - begin_D
    counts_D = 1 + ((targets_D - seq_len).clamp(min=0) + stride - 1) // stride
    offset = stride * _counted(counts_D)
    length = (targets_D.repeat_interleave(counts_D) - offset).clamp(max=seq_len)
    first = torch.where(offset == 0, 0, seq_len - stride)
    return Windows(begin_D.repeat_interleave(counts_D) + offset, first, length)


def by_chunk(windows: Windows, *, targets: int, chunk_tokens: int) -> list[Windows]:
    """The windows of each chunk of the stream: a window belongs where its first scored position lies.

    The chunks are [0, chunk_tokens), [chunk_tokens, 2·chunk_tokens), ...; the last may be shorter.
    """
    chunks = -(-targets // chunk_tokens)
    # All lists are in order of the first scored position, so that chunks are runs of windows.
    chunk = ((windows.start + windows.first) // chunk_tokens).clamp(max=chunks - 1)
    return _cut(windows, torch.bincount(chunk, minlength=chunks).cumsum(0).tolist())


def runs(windows: Windows, marked: Tensor) -> list[Windows]:
    """The windows in order, cut wherever `marked` (W,) changes."""
    cuts = ((marked.diff() != 0).nonzero()[:, 0] + 1).tolist()
    return _cut(windows, [*cuts, len(windows)])


def _cut(windows: Windows, ends: list[int]) -> list[Windows]:
    return [windows[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def in_groups(windows: Windows, size: int) -> list[Windows]:
    """The windows in order, `size` at a time, the last group ragged."""
    return [windows[begin : begin + size] for begin in range(0, len(windows), size)]

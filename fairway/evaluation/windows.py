"""Overlapping windows over a stream of N targets, as data: where each starts, and which of its places it scores.

Legend: N targets, T tokens of a window, W windows. Position p, 0 <= p < N, predicts token p + 1 of the stream. A window
that starts at w reads tokens w, w+1, ... and scores the positions w + first ... w + length - 1.

Windows that begin a constant number of tokens apart, with what depends on tokens alone computed once per token.

Embeddings and value embeddings of a token are the same in every window, and so are the first layer's queries, keys and
values, but for a window's first OVERLAP places, which look back at nothing. From the first layer's attention on, hidden
states differ: a window's context begins with it.

Legend: B windows, T tokens of a window, L tokens of the stretch that they cover, P = OVERLAP, U = L + B·P rows of x0, X
wanted places, D model width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fairway.evaluation.kv_cache import OVERLAP
from fairway.model.attention import Shared
from fairway.model.gpt import GPT
from fairway.model.precision import rms_norm
from fairway.model.rope import rotary_table


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
        within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        return begin.repeat_interleave(counts) + within


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


def by_chunk(windows: Windows, *, targets: int, chunk_tokens: int) -> list[Windows]:
    """The windows of each chunk of the stream: a window belongs where its first scored position lies.

    The chunks are [0, chunk_tokens), [chunk_tokens, 2·chunk_tokens), ...; the last may be shorter.
    """
    chunks = -(-targets // chunk_tokens)
    # Both lists are in order of the first scored position, so that chunks are runs of windows.
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


def overlapping_hidden(model: GPT, tokens_L: Tensor, *, spacing: int, last: int | None) -> Tensor:
    """As model.hidden of the stretch's windows of seq_len tokens, spacing apart, at their last X places: (B, X, D).

    `last`: X, or None for all T.
    """
    seq_len = model.config.seq_len

    def windows(x: Tensor) -> Tensor:
        # Views (B, T) or (B, D, T), whose windows overlap in memory.
        return x.unfold(0, seq_len, spacing)

    # Rows of x0: the stretch's places, then the windows' first ones.
    first_BPD = model._embed(windows(tokens_L)[:, :OVERLAP])
    x0_1UD = torch.cat([model._embed(tokens_L[None]), first_BPD.flatten(0, 1)[None]], 1)
    row_U = torch.arange(x0_1UD.size(1), device=tokens_L.device)
    rows_BT = windows(row_U[: len(tokens_L)]).contiguous()
    # Attention sees differences of angles, so that a row's is that of its place in the stretch.
    places_U = torch.cat([row_U[: len(tokens_L)], rows_BT[:, :OVERLAP].flatten()]).double()
    rows_BT[:, :OVERLAP] = row_U[len(tokens_L) :].view(-1, OVERLAP)
    values = model.ve(tokens_L[None], x0_1UD.dtype) if model.ve is not None else {}
    shared = Shared(
        x0_BTD=x0_1UD,
        rope=rotary_table(model.config.rope, seq_len, places_U, x0_1UD.dtype),
        segments=None,
        longest=seq_len,
        value_embeddings={layer: windows(value_1LD[0]).mT for layer, value_1LD in values.items()},
        rows_BT=rows_BT,
        spacing=spacing,
        last=last,
    )
    return rms_norm(model._layers(x0_1UD, shared, looped=True))

"""Windows of a stream: which of them are scored, and how those that overlap go through the network together.

Which windows are scored is data: where each starts, and which of its places it scores. A window that starts at token w
reads the tokens w, w+1, ..., w + length - 1 of the stream, and scores its places first, ..., length - 1. The place at
offset i predicts token w + i + 1, which is called target or position w + i.

Where windows begin a constant number of tokens apart, what depends on tokens alone is computed once per token. The
embedding and value embeddings of a token are the same in every window that it stands in, and so are its queries, keys
and values in the first layer. The exception is a window's first LOOK_BACK places: there the embedding cannot look back
at tokens outside the window. From the first layer's attention on, hidden states differ from window to window, because
what attention sees begins with the window. So x0 is stored by row: first one row for each token of the stretch that the
windows cover, then LOOK_BACK rows for each window's first places.

Legend: N targets, T tokens of a window, W windows of a list, M scored places of all windows, S starts of documents. Of
windows that go through the network: B windows, L tokens of the stretch, P = LOOK_BACK, U = L + B·P rows of x0, X wanted
places, D model width, H query heads, K key/value heads, E width of a head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fairway.model.attention import rotary_table
from fairway.model.causal_attention import WithinRows
from fairway.model.context import Context, by_row, placed
from fairway.model.embedding import BOS, LOOK_BACK
from fairway.model.gpt import GPT
from fairway.model.kernels import fused, powers_of_two


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
    begin_S = is_start_N.nonzero()[:, 0]
    targets_S = torch.cat([begin_S[1:], torch.tensor([len(is_start_N)])]) - begin_S
    counts_S = 1 + ((targets_S - seq_len).clamp(min=0) + stride - 1) // stride
    offset = stride * _counted(counts_S)
    length = (targets_S.repeat_interleave(counts_S) - offset).clamp(max=seq_len)
    first = torch.where(offset == 0, 0, seq_len - stride)
    return Windows(begin_S.repeat_interleave(counts_S) + offset, first, length)


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


@dataclass(frozen=True, eq=False)
class WithinWindows:
    """A way to attend (model.context.Attend) within windows `spacing` apart; `rows_BT` as in Context.

    Queries, keys and values may be by row, as the first layer's are, or by place.
    """

    rows_BT: Tensor
    spacing: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, application: int) -> Tensor:
        """Attention of the places, (B, X, H, E); without a gradient where they are by row."""
        if all(by_row(x, self.rows_BT) for x in (q, k, v)) and self._has_kernel(q, k):
            from fairway.model.kernels.nested import nested_attention

            return nested_attention(q, k, v, self.rows_BT, self.spacing)
        q, k, v = (placed(x, self.rows_BT) for x in (q, k, v))
        return WithinRows()(q, k, v, application)

    def _has_kernel(self, q: Tensor, k: Tensor) -> bool:
        """Whether the fused kernel takes such queries and keys, and windows of this length and spacing."""
        if not (fused(q) and powers_of_two(*q.shape[2:], k.size(2))):
            return False
        from fairway.model.kernels.nested import SMALLEST, block_size

        return min(block_size(self.spacing, self.rows_BT.size(1)), q.size(3)) >= SMALLEST


def overlapping_hidden(model: GPT, tokens_L: Tensor, *, spacing: int, wanted: int | None) -> Tensor:
    """What model.hidden gives of each window of a stretch of tokens: (B, X, D).

    Windows have seq_len tokens and begin `spacing` tokens apart; the last one ends with the stretch. `wanted`: see
    GPT.hidden.
    """
    seq_len = model.config.seq_len

    def windows(x: Tensor) -> Tensor:
        # Views (B, T) or (B, D, T), whose windows overlap in memory.
        return x.unfold(0, seq_len, spacing)

    first_BPD = model.embed_tokens(windows(tokens_L)[:, :LOOK_BACK])
    x0_1UD = torch.cat([model.embed_tokens(tokens_L[None]), first_BPD.flatten(0, 1)[None]], 1)
    row_U = torch.arange(x0_1UD.size(1), device=tokens_L.device)
    rows_BT = windows(row_U[: len(tokens_L)]).contiguous()
    # Attention only sees differences of positions, so that a row may have its token's position in the stretch.
    positions_U = torch.cat([row_U[: len(tokens_L)], rows_BT[:, :LOOK_BACK].flatten()]).double()
    rows_BT[:, :LOOK_BACK] = row_U[len(tokens_L) :].view(-1, LOOK_BACK)
    values = model.value_embeddings(tokens_L[None])
    context = Context(
        x0_BTD=x0_1UD,
        rope=rotary_table(model.config.rope, seq_len, positions_U, x0_1UD.dtype),
        value_embeddings={layer: windows(value_1LD[0]).mT for layer, value_1LD in values.items()},
        attend=WithinWindows(rows_BT, spacing),
        rows_BT=rows_BT,
    )
    return model.run_layers(context, wanted=wanted)

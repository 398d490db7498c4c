"""Documents of a stream, in the batches and in the order in which PR #1855 visits them, and their windows.

Legend: N targets, B documents of a batch, T tokens of a window, C targets of a cut, D model width.
"""

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


def up_to_wanted(batches: list[list[Document]], wanted: Tensor | None) -> list[list[Document]]:
    """The batches up to the last one with a target in `wanted`, a bool tensor (N,) on the CPU; None means all."""
    if wanted is None:
        return batches
    wanted_batches = [
        number
        for number, batch in enumerate(batches, start=1)
        if any(bool(wanted[document.begin : document.begin + document.targets].any()) for document in batch)
    ]
    return batches[: max(wanted_batches, default=0)]


class Cut:
    """The windows of a batch of documents in which the targets begin ... begin + C - 1 of each are scored.

    A document's window ends where these targets end, or with the document, and has at most seq_len tokens, C <=
    seq_len. A shorter window than the others' is filled up with tokens 0. A document that has ended before keeps its
    last window and scores nothing.
    """

    def __init__(self, tokens_N1: Tensor, batch: list[Document], begin: int, size: int, seq_len: int) -> None:
        device = tokens_N1.device
        first_B = torch.tensor([document.begin for document in batch], device=device)
        targets_B = torch.tensor([document.targets for document in batch], device=device)
        end_B = targets_B.clamp(max=begin + size)
        # Where in its document each window begins.
        from_B = (end_B - seq_len).clamp(min=0)
        place_BT = from_B[:, None] + torch.arange(min(begin + size, seq_len), device=device)
        index_BT = (first_B[:, None] + place_BT).clamp(max=len(tokens_N1) - 1)
        self.tokens_BT = tokens_N1[index_BT] * (place_BT < end_B[:, None])
        place_BC = begin + torch.arange(size, device=device).expand(len(batch), -1)
        self.inside_BC = place_BC < end_B[:, None]
        self.positions_BC = first_B[:, None] + place_BC
        self.targets_BC = tokens_N1[(self.positions_BC + 1).clamp(max=len(tokens_N1) - 1)] * self.inside_BC
        # Counted in the last C places of a window: as it ends with its targets, the scored ones lie there.
        self.columns_BC = (place_BC - from_B[:, None] - (place_BT.size(1) - size)) * self.inside_BC
        # Documents with more targets after these: only they learn from them.
        self.goes_on_B = targets_B > begin + size

    def scored(self, hid_BCD: Tensor) -> Tensor:
        """The hidden states (B, C, D) of the targets, in order, from those of the windows' last C places.

        Those of targets that are not inside_BC are of some place or other.
        """
        return hid_BCD[torch.arange(len(hid_BCD), device=hid_BCD.device)[:, None], self.columns_BC]

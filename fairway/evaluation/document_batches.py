"""Documents of a stream, in the batches and in the order in which PR #1855 visits them.

Legend: N targets.
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

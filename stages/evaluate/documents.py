"""Documents of a stream, and the order in which PR #1855 visits them: in batches of like length, longest first.

Legend: N targets, I documents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.embedding import BOS


@dataclass(frozen=True)
class Document:
    """Tokens begin ... begin + targets of a stream: its own and the next document's start token, which it predicts."""

    begin: int
    targets: int


def documents(tokens_N1: Tensor) -> list[Document]:
    """The documents of a stream (N+1,), in order; together they have every target once."""
    begins = (tokens_N1 == BOS).nonzero()[:, 0].tolist()
    begins = sorted({0, *begins})
    ends = [*begins[1:], len(tokens_N1) - 1]
    return [Document(begin, end - begin) for begin, end in zip(begins, ends, strict=True) if end > begin]


def by_length(docs: list[Document], size: int) -> list[list[Document]]:
    """Batches of `size` documents in ascending length, dealt from the shortest on; the longest batch comes first."""
    ascending = sorted(docs, key=lambda document: document.targets)
    return [ascending[begin : begin + size] for begin in range(0, len(ascending), size)][::-1]


def phase_ends(batches: list[list[Document]], prefix: int, phases: int, lanes: int) -> list[int]:
    """Behind how many batches each phase of global training stands.

    Phase p of 1 ... `phases` is due once prefix·p/phases documents are done; each other lane then still has a batch in
    its hands. Phases that the stream is too short for are left out.
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

"""How long the challenge's validation documents are, and random streams of documents as long.

Legend: N targets of a stream, V vocabulary.

The lengths of the 50,000 documents were never published as such. The logs of PR #1855 (its three seeds) name the
shortest and the longest document of every 64 neighbours in order of length that their first GPU came to, 213 of 782
groups. KNOTS holds every eighth or so of those figures; lengths between them are interpolated. The total so found is
0.8 % below the true one of 47,851,520 targets (evaluate.md of the records, section 1.1).
"""

import numpy as np
import torch
from torch import Tensor

from fairway.tokens.tokenizer import BOS

CHALLENGE_DOCUMENTS = 50_000
# Place of a document among 50,000 in ascending length, counted from 1, and its targets: one for every token after its
# start token, and one for the start token of the next document.
KNOTS = (
    *((129, 88), (576, 106), (1_985, 134), (3_969, 165), (7_936, 221), (11_776, 278), (15_808, 350), (19_969, 439)),
    *((23_936, 537), (28_097, 658), (32_000, 798), (35_968, 986), (38_977, 1_176), (41_985, 1_444), (43_969, 1_695)),
    *((45_761, 2_053), (46_529, 2_305), (47_297, 2_652), (48_128, 3_282), (48_256, 3_396), (48_961, 4_520)),
    *((49_281, 5_522), (49_344, 5_748), (49_729, 9_243), (49_985, 30_338), (50_000, 97_113)),
)


def document_targets(count: int) -> list[int]:
    """Targets of `count` documents in ascending order: the challenge's, or as many taken from them at equal distances.

    Between two knots the logarithm of a length is linear in that of the number of documents that are no shorter.
    """
    places = (np.arange(count) + 0.5) * (CHALLENGE_DOCUMENTS / count) + 0.5
    knot_places, knot_targets = np.array(KNOTS, dtype=np.float64).T
    no_shorter = np.log(CHALLENGE_DOCUMENTS + 1 - knot_places)
    # np.interp wants what it looks up in to ascend.
    logs = np.interp(
        np.log(CHALLENGE_DOCUMENTS + 1 - places), no_shorter[::-1], np.log(knot_targets)[::-1], left=np.log(KNOTS[0][1])
    )
    return [int(length) for length in np.exp(logs).round()]


def documents_for(targets: int) -> int:
    """How many documents of the challenge's lengths have about so many targets together, at least one."""
    mean = sum(document_targets(CHALLENGE_DOCUMENTS)) / CHALLENGE_DOCUMENTS
    return max(1, round(targets / mean))


def document_stream(lengths: list[int], *, vocab_size: int, seed: int) -> Tensor:
    """Documents of random tokens with so many targets each, in an order drawn from the seed: (N+1,) int64."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator)
    targets = torch.tensor(lengths)[order]
    tokens_N1 = torch.randint(BOS + 1, vocab_size, (int(targets.sum()) + 1,), generator=generator)
    tokens_N1[targets.cumsum(0) - targets] = BOS
    return tokens_N1

"""The search for the column of codes that comes nearest to a column of weights, of all that the trellis allows.

What a code costs is its squared error; the cheapest path through the states of codec/trellis.py is found by dynamic
programming (Viterbi 1967). Going down the rows one by one would make a GPU wait for each. So the rows are cut into
blocks of a few, which are searched at the same time, each from every state that it may begin in. Neighbouring blocks
are joined, and joined ones again, until one is left; then the states in between are read from there back to the blocks,
and in all blocks at once from row to row. For 8,192 rows that takes 8 + 10 steps there and as many back.

The search fits GPTQ as it is: within a column all rows have the same weight in what GPTQ lowers, and the error that is
left is handed on to the columns still to come.

Legend: N columns side by side, R rows, G blocks of B rows, S states (A those in which a block begins, Z those in which
it ends).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fairway.codec.trellis import STATES, next_states

COSETS = 4
# Rows of a block. Longer ones take more steps, shorter ones more work in joining them.
BLOCK_ROWS = 8


def trellis_codes(x_NR: Tensor, step_NR: Tensor, largest: int) -> Tensor:
    """The codes (N, R), float32, within ±largest, whose products with their steps come nearest to x, in float32."""
    rows = x_NR.size(1)
    target, weight = (F.pad(part, (0, -rows % BLOCK_ROWS)) for part in (x_NR / step_NR, step_NR.square()))
    codes_NRJ = _nearest_by_coset(target, largest)
    cost_NGBJ = (weight[..., None] * (target[..., None] - codes_NRJ).square()).unflatten(1, (-1, BLOCK_ROWS))
    coset_NGB = _cheapest_path(cost_NGBJ)
    return codes_NRJ.gather(2, coset_NGB.flatten(1)[..., None])[:, :rows, 0]


def _nearest_by_coset(target_NR: Tensor, largest: int) -> Tensor:
    """The nearest code of each coset 4·k + j within ±largest, (N, R, J)."""
    j = torch.arange(COSETS, device=target_NR.device, dtype=target_NR.dtype)
    codes = ((target_NR[..., None] - j) / COSETS).round() * COSETS + j
    codes = torch.where(codes > largest, codes - COSETS * ((codes - largest) / COSETS).ceil(), codes)
    return torch.where(codes < -largest, codes + COSETS * ((-largest - codes) / COSETS).ceil(), codes)


def _steps_into(device: torch.device) -> tuple[Tensor, Tensor]:
    """The two steps that lead into each state: the state that they come from, and the coset of the code, (S, 2) int64.

    The code's lowest two bits are the index's lowest one and the state's.
    """
    following = torch.from_numpy(next_states()).long()
    state, bit = torch.meshgrid(torch.arange(STATES), torch.arange(2), indexing="ij")
    into = following.flatten().argsort(stable=True).view(STATES, 2)
    source, coset = state.flatten()[into], (2 * bit + (state & 1)).flatten()[into]
    return source.to(device), coset.to(device)


def _cheapest_path(cost_NGBJ: Tensor) -> Tensor:
    """The coset of every code on the cheapest path that begins in state 0, int64 (N, G, B)."""
    (columns, blocks, rows, _), device = cost_NGBJ.shape, cost_NGBJ.device
    source_S2, coset_S2 = _steps_into(device)
    cost_NGAS = torch.full((STATES, STATES), torch.inf, device=device).fill_diagonal_(0.0).repeat(columns, blocks, 1, 1)
    chosen_B = []
    for row in range(rows):
        cost_NGAS2 = cost_NGAS[..., source_S2] + cost_NGBJ[:, :, None, row][..., coset_S2]
        cost_NGAS, chosen = cost_NGAS2.min(-1)
        chosen_B.append(chosen)
    begin_NG, state_NG = _states_between(cost_NGAS)
    coset = torch.empty(columns, blocks, rows, dtype=torch.int64, device=device)
    for row in reversed(range(rows)):
        of_begin = chosen_B[row].gather(2, begin_NG[..., None, None].expand(-1, -1, 1, STATES))[:, :, 0]
        step = of_begin.gather(2, state_NG[..., None])[..., 0]
        coset[:, :, row], state_NG = coset_S2[state_NG, step], source_S2[state_NG, step]
    return coset


def _states_between(cost_NGAZ: Tensor) -> tuple[Tensor, Tensor]:
    """The states in which each block begins and ends on the cheapest path through all of them, int64 (N, G) each."""
    blocks, device = cost_NGAZ.size(1), cost_NGAZ.device
    # Blocks of no rows, in which a state stays what it is, make the number of blocks a power of two.
    empty_AZ = torch.full((STATES, STATES), torch.inf, device=device).fill_diagonal_(0.0)
    empty_NGAZ = empty_AZ.expand(len(cost_NGAZ), (1 << (blocks - 1).bit_length()) - blocks, -1, -1)
    cost_NGAZ = torch.cat([cost_NGAZ, empty_NGAZ], 1)
    middles = []
    while cost_NGAZ.size(1) > 1:
        upper, lower = cost_NGAZ[:, 0::2], cost_NGAZ[:, 1::2]
        # Over the states in which the upper block ends and the lower one begins.
        cost_NGAZ, middle = (upper[..., :, None, :] + lower.mT[..., None, :, :]).min(-1)
        middles.append(middle.flatten(2))
    begin_NG = torch.zeros(len(cost_NGAZ), 1, dtype=torch.int64, device=device)
    end_NG = cost_NGAZ[:, :, 0].argmin(-1)
    for middle in reversed(middles):
        between = middle.gather(2, (begin_NG * STATES + end_NG)[..., None])[..., 0]
        begin_NG, end_NG = torch.stack([begin_NG, between], 2).flatten(1), torch.stack([between, end_NG], 2).flatten(1)
    return begin_NG[:, :blocks], end_NG[:, :blocks]

"""Sums over lanes: the same to the last bit, whoever has the lanes."""

from pathlib import Path

import torch
from forks import ranks
from torch import Tensor

from fairway.adaptation.trainable import sum_gradients, sum_over_lanes
from fairway.runtime.distributed import alone, start_world

LANES = 8
LIKE = [torch.empty(40, 30), torch.empty(7)]


def lane_results(lane: int) -> list[Tensor | None]:
    """Numbers of very different sizes, so that the order of summation shows; now and then nothing."""
    random = torch.Generator().manual_seed(lane)
    first, second = (torch.randn(x.shape, generator=random) * 10.0 ** (lane - 4) for x in LIKE)
    return [first, None if lane == 2 else second]


def add_up_as_one_of_several() -> None:
    """Leave this rank's sums in the current folder."""
    with start_world() as world:
        for lanes in (1, 2, LANES):
            torch.save(sum_over_lanes(LIKE, lanes, lane_results, world), f"{lanes}_{world.rank}.pt")


def test_three_processes_add_up_to_the_same_bits_as_one(tmp_path: Path) -> None:
    ranks(add_up_as_one_of_several, tmp_path, processes=3)
    for lanes in (1, 2, LANES):
        expected = sum_over_lanes(LIKE, lanes, lane_results, alone(torch.device("cpu")))
        for rank in range(3):
            assert all(map(torch.equal, torch.load(tmp_path / f"{lanes}_{rank}.pt"), expected))
    exact = sum(first.double() for first, _ in map(lane_results, range(LANES)) if first is not None)
    torch.testing.assert_close(expected[0].double(), exact, rtol=1e-5, atol=1e-3)


def share_own_numbers() -> None:
    """Leave in the current folder what this rank has after rank 0 shared its numbers."""
    with start_world() as world:
        numbers = [torch.arange(5.0).to(dtype) + 10 * world.rank for dtype in (torch.float32, torch.bfloat16)]
        for tensor in numbers:
            world.share(tensor)
        torch.save(numbers, f"{world.rank}.pt")


def test_what_the_first_process_shares_all_have(tmp_path: Path) -> None:
    ranks(share_own_numbers, tmp_path, processes=3)
    for rank in range(3):
        assert all(numbers.tolist() == [0, 1, 2, 3, 4] for numbers in torch.load(tmp_path / f"{rank}.pt"))


def test_gradients_are_those_of_the_sum() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    frozen = torch.nn.Parameter(torch.ones(3))

    def gradients(lane: int) -> list[Tensor | None]:
        (gradient,) = torch.autograd.grad((lane + 1) * weight.float().square().sum(), weight)
        return [gradient, None]

    sum_gradients([weight, frozen], 3, gradients, alone(torch.device("cpu")))
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.tolist() == [12.0, 24.0]
    assert frozen.grad is not None
    assert not frozen.grad.any()

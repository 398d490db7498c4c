"""Gradients summed over the micro-batches of a step, in the layout in which the ranks exchange them.

Matrices of one shape lie in one stack (P, O, I), padded so that the ranks divide it evenly. All other gradients lie in
one flat buffer. Each micro-batch adds g/M, so that the sum over all ranks is the mean over all micro-batches.

A gradient g is clipped to g * min(1, c / (|g| + 1e-6)), where |g| is the L2 norm over all parameters. Either each
micro-batch is clipped (PR #1150, #1172 and #1958, where each of 8 ranks clipped its own) or the mean (PR #1488); see
training.md 2.12.

Legend: M micro-batches of a step over all ranks, P matrices of a stack with its padding, O rows (outputs), I columns
(inputs).
"""

import torch
from torch import Tensor
from torch.nn import Parameter

from fairway.runtime.distributed import World

# Parameters with their names.
Named = list[tuple[str, Parameter]]


class Stack:
    """Matrices of one shape (O, I), and the sum of their gradients, `total` (P, O, I), which is zero in the padding."""

    def __init__(self, members: Named, world: World) -> None:
        self.names = [name for name, _ in members]
        self.parameters: list[Tensor] = [parameter for _, parameter in members]
        self.padded = -(-len(members) // world.size) * world.size
        first = self.parameters[0]
        self.total = torch.zeros(self.padded, *first.shape, device=first.device)


class Gradients:
    """The gradients of a step in float32, for the parameters of the groups matrix, table and scalar."""

    def __init__(self, groups: dict[str, Named], world: World, *, micro_batches: int) -> None:
        self.groups, self.micro_batches = groups, micro_batches
        by_shape: dict[torch.Size, Named] = {}
        for name, parameter in groups["matrix"]:
            by_shape.setdefault(parameter.shape, []).append((name, parameter))
        # The largest stack is first, so that the longest exchange starts earliest. Stacks of equal size keep the order
        # in which the network registers them.
        self.stacks = sorted((Stack(members, world) for members in by_shape.values()), key=lambda s: -s.total.numel())
        others = [parameter for group in ("table", "scalar") for _, parameter in groups[group]]
        self.flat = torch.zeros(sum(p.numel() for p in others), device=self.stacks[0].total.device)
        pieces = self.flat.split([p.numel() for p in others])
        self.views: dict[Tensor, Tensor] = {p: piece.view_as(p) for p, piece in zip(others, pieces, strict=True)}
        for stack in self.stacks:
            self.views |= zip(stack.parameters, stack.total.unbind(0), strict=False)
        # Parameters listed by group and dtype: a multi-tensor kernel takes tensors of one dtype in one launch, and
        # norms are told by group. Each list stands behind the number of its group.
        self.lists = [
            (index, [p for _, p in members if p.dtype == dtype])
            for index, members in enumerate(groups.values())
            for dtype in dict.fromkeys(p.dtype for _, p in members)
        ]
        # L2 norms of the micro-batches' gradients before clipping, by group (G,) and over all parameters (0-d): this
        # rank's share of their means over the micro-batches of all ranks. They are not norms of the step's gradient,
        # which is smaller, since what differs from micro-batch to micro-batch cancels in the mean.
        self.norms = torch.zeros(len(groups), device=self.flat.device)
        self.norm = torch.zeros((), device=self.flat.device)

    def clear(self) -> None:
        """Begin a step: everything back to zero."""
        torch._foreach_zero_([self.flat, self.norms, self.norm, *(stack.total for stack in self.stacks)])

    @torch.no_grad()
    def add(self, max_norm: float | None) -> None:
        """Add the gradients that a micro-batch left in the parameters' .grad, and clear those.

        They are clipped to max_norm first, unless it is None.
        """
        grads = [[_take(p) for p in parameters] for _, parameters in self.lists]
        squares = torch.zeros_like(self.norms)
        for (index, _), listed in zip(self.lists, grads, strict=True):
            squares[index] += torch.stack(torch._foreach_norm(listed, dtype=torch.float32)).square().sum()
        norm = squares.sum().sqrt()
        self.norms += squares.sqrt() / self.micro_batches
        self.norm += norm / self.micro_batches
        scale = torch.full_like(squares[0], 1 / self.micro_batches)
        if max_norm is not None:
            scale *= clip_factor(norm, max_norm)
        for (_, parameters), listed in zip(self.lists, grads, strict=True):
            torch._foreach_mul_(listed, scale)
            torch._foreach_add_([self.views[p] for p in parameters], listed)

    def of(self, group: str) -> list[Tensor]:
        """The gradients of a group's parameters, each in its parameter's dtype."""
        return [self.views[p].to(p.dtype) for _, p in self.groups[group]]


def _take(p: Parameter) -> Tensor:
    """Take a parameter's gradient away from it; it is zero where the loss does not depend on the parameter."""
    grad, p.grad = p.grad, None
    return torch.zeros_like(p) if grad is None else grad


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """The factor (0-d, on the device) that shortens a gradient of this L2 norm to max_norm, or 1 if it is shorter."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)

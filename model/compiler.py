"""The network, and what is built around it, for torch.compile."""

from collections.abc import Callable
from typing import Any

import torch

from model.backends import attention_backend


def compiled(function: Callable[..., Any], *, backend: Any = "inductor", fullgraph: bool = False) -> Callable[..., Any]:
    """The function compiled for fixed shapes, for which the attention kernel is chosen once."""
    # Marked here and not where it is defined: marking imports the compiler, which takes a second that most runs on a
    # CPU need not spend.
    torch.compiler.assume_constant_result(attention_backend)
    return torch.compile(function, dynamic=False, backend=backend, fullgraph=fullgraph)


def compiled_on_gpu(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The function compiled for a GPU; on a CPU as it is, where compiling takes longer than it saves."""
    return compiled(function) if device.type == "cuda" else function

"""The same numbers twice on the same machine."""

import os

import torch

# cuBLAS reads this once, when its first handle is made, which may be in training; without it torch refuses
# deterministic matrix products later.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def make_deterministic() -> None:
    """Have torch choose kernels whose sums have a fixed order, in this process."""
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True)
    else:
        # The same, but for the compiler, which it need not import then.
        torch.set_deterministic_debug_mode("error")
    # Filling fresh memory with NaN finds reads of uninitialised values, at a cost for every tensor made.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

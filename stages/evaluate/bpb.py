"""The score of the challenge: bits per byte of the validation text."""

import math

from torch import Tensor


def bpb(nats: Tensor, target_bytes: Tensor) -> float:
    """Bits per byte from the nats (N,) and the bytes (N,) of every target: Σ nats / (ln 2 · Σ bytes), in float64."""
    return float(nats.double().sum()) / (math.log(2) * int(target_bytes.sum()))

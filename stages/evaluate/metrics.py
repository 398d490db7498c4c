"""The figures of an evaluation."""

from typing import Any

from torch import Tensor

from stages.errors import UserError
from stages.evaluate.bpb import bpb
from stages.evaluate.collect import Scores


def measure(scores: Scores, target_bytes: Tensor) -> dict[str, Any]:
    """val_bpb, val_loss (nats per scored target), targets, how often they were scored in all, and bytes so counted.

    `target_bytes` (N,) int64. Raises UserError if any score is not finite.
    """
    if not scores.nats_N.isfinite().all():
        raise UserError(
            "some targets have no finite score: the network overflows, as trained or once it has adapted "
            "(params.yaml: lower its lr)"
        )
    nats_N, bytes_N = scores.nats_N * scores.times_N, target_bytes * scores.times_N
    scored = int(scores.times_N.sum())
    return {
        "val_bpb": bpb(nats_N, bytes_N),
        "val_loss": float(nats_N.sum()) / scored,
        "targets": len(nats_N),
        "scored": scored,
        "bytes": int(bytes_N.sum()),
    }

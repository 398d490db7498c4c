"""The verbs: one file per stage of the pipeline, started as `python -m stages.<name>`."""

# This import sets how OpenMP's threads wait, which must happen before a stage imports PyTorch.
import fairway  # noqa: F401

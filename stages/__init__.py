"""The verbs: one file per stage of the pipeline, started as `python -m stages.<name>` in the project's folder."""

import os
import warnings
from pathlib import Path

# This import sets how OpenMP's threads wait, which must happen before a stage imports PyTorch.
import fairway  # noqa: F401

# What PyTorch's compiler, Triton and FlashAttention-4 have compiled is kept beside the artifacts: the next stage or run
# then loads it, which saves a minute. FlashAttention-4 keeps nothing unless it is told to. All three read these
# variables when they compile for the first time; one that is set already stays as it is.
CACHE = Path("artifacts/cache").absolute()
for _variable, _value in {
    "TORCHINDUCTOR_CACHE_DIR": CACHE / "inductor",
    "TRITON_CACHE_DIR": CACHE / "triton",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": 1,
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": CACHE / "flash_attention",
}.items():
    os.environ.setdefault(_variable, str(_value))

# FlashAttention-4's compiler says for every kernel that it leaves an argument out, between the lines of the progress.
warnings.filterwarnings("ignore", "Argument .* cannot be converted to a JitArgument", UserWarning)

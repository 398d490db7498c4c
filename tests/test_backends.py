"""Which attention backend is chosen, by what is installed and which GPU is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from fairway.model.backends import attention_backend

CUDA = torch.device("cuda")
MODULES = {"flash4": "flash_attn/cute/__init__.py", "flash3": "flash_attn_interface.py"}


@pytest.mark.parametrize(
    ("installed", "generation", "head_dim", "packed", "expected"),
    [
        ([], 9, 64, True, "flash2"),
        ([], 9, 64, False, "cudnn"),
        ([], 8, 64, False, "flash2"),
        (["flash3"], 9, 64, True, "flash3"),
        (["flash3"], 9, 64, False, "flash3"),
        # FlashAttention-3 is written for Hopper GPUs alone.
        (["flash3"], 8, 64, True, "flash2"),
        (["flash3"], 10, 64, True, "flash2"),
        (["flash3", "flash4"], 9, 64, True, "flash4"),
        (["flash4"], 10, 64, False, "flash4"),
        # FlashAttention-4's gradients of narrower heads are wrong.
        (["flash3", "flash4"], 9, 16, True, "flash3"),
        (["flash4"], 9, 16, True, "flash2"),
        (["flash4"], 9, 32, True, "flash4"),
    ],
)
def test_the_backend_follows_the_gpu_and_what_is_installed(
    installed: list[str],
    generation: int,
    head_dim: int,
    packed: bool,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in installed:
        (tmp_path / MODULES[name]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / MODULES[name]).touch()
    if "flash4" in installed:
        (tmp_path / "flash_attn/__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    assert attention_backend(CUDA, torch.bfloat16, head_dim, length=256, packed=packed) == expected


def test_a_cpu_attends_plainly() -> None:
    assert attention_backend(torch.device("cpu"), torch.float32, 64, length=256, packed=True) == "plain"


def test_stages_keep_compiled_code_beside_the_artifacts_unless_told_where(tmp_path: Path) -> None:
    flash = "FLASH_ATTENTION_CUTE_DSL_CACHE"
    names = ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", f"{flash}_DIR", f"{flash}_ENABLED"]
    show = f"import os, stages; print(*map(os.environ.get, {names}))"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "TRITON_CACHE_DIR": "/elsewhere"}
    done = subprocess.run([sys.executable, "-c", show], cwd=tmp_path, env=environment, capture_output=True, text=True)
    cache = tmp_path / "artifacts/cache"
    assert done.stdout.split() == [f"{cache}/inductor", "/elsewhere", f"{cache}/flash_attention", "1"], done.stderr

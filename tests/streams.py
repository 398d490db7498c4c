"""What the tests of evaluators share: golden arrays, networks of any row length, and streams of random tokens."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from test_model import small_network
from test_model_golden import golden as golden_model
from test_model_golden import golden_config
from torch import Tensor

from fairway.evaluation.lora_adapters import LoraAdapters, draw_factors, numbers_of_a_set
from fairway.evaluation.sliding import SlidingEvaluator, SlidingSettings
from fairway.model.gpt import GPT

# Of an evaluator's settings, what most tests leave as the simplest form has it.
PLAIN_FIT: dict[str, Any] = {"lr_end": None, "fitted_on": "batch", "bias": False}
PLAIN_WINDOWS: dict[str, Any] = {"published_window_list": False, "within_documents": False}
PLAIN_TTT: dict[str, Any] = {"freeze": "blocks", "fake_quantize": "none", "slot": None}


@lru_cache
def golden(name: str) -> dict[str, Any]:
    """Arrays of tests/golden/<name>.npz by name; `config` is the parsed configuration."""
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as arrays:
        found: dict[str, Any] = {key: arrays[key] for key in arrays.files if key != "config_json"}
        return found | {"config": json.loads(arrays["config_json"].tobytes())}


def golden_tokens(name: str, key: str) -> Tensor:
    """A golden stream, (N+1,) int64."""
    return torch.from_numpy(golden(name)[key].astype(np.int64))


def golden_network(record: str, seq_len: int) -> GPT:
    """The network of golden/model_<record>.npz for rows of another length."""
    arrays = golden_model(record)
    model = GPT(golden_config(record, arrays["config"]).model_copy(update={"seq_len": seq_len}))
    model.load_state_dict({k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")})
    return model.eval()


def lively_network(record: str = "r1150") -> GPT:
    """A small network for rows of 16 of 40 tokens, every parameter moved off its initial value."""
    return small_network(record).eval()


def shallow_network(record: str = "r1150") -> GPT:
    """A network like lively_network, but of four layers, for tests of which the network is not the subject."""
    return small_network(record, shallow=True).eval()


def drawn_adapters(model: GPT, rows: int, *, rank: int = 2, seed: int = 1) -> LoraAdapters:
    """Adapters at scale 2 with drawn first factors, which add nothing yet."""
    numbers = torch.zeros(rows, numbers_of_a_set(model.config, rank)[1])
    adapters = LoraAdapters(model.config, numbers, rank, scale=2.0)
    adapters.set_first(draw_factors(model.config, rows, rank, seed))
    return adapters


def random_stream(seed: int, targets: int) -> Tensor:
    """(N+1,) int64 tokens of lively_network's vocabulary."""
    return torch.randint(2, 40, (targets + 1,), generator=torch.Generator().manual_seed(seed))


def sliding(*, stride: int, batch_windows: int) -> SlidingEvaluator:
    """The evaluator by sliding windows that scores each target once."""
    return SlidingEvaluator(SlidingSettings(stride=stride, batch_windows=batch_windows, **PLAIN_WINDOWS))


def checksums(model: GPT, start: dict[str, Tensor], names: list[str]) -> np.ndarray:
    """The golden files' figures of how far each parameter has moved since `start`: (names, 3) float64."""
    now = dict(model.named_parameters())
    rows = []
    for name in names:
        change = (now[name].detach() - start[name]).double().flatten().numpy()
        wave = np.cos(0.37 * np.arange(change.size))
        rows.append([change.sum(), (change**2).sum(), (change * wave).sum()])
    return np.array(rows)

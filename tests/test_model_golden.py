"""The four networks against vectors produced by the published programs (fp32, CPU).

tests/golden/model_*.npz hold perturbed parameters, so that every path which starts at zero is active, and what the
original program of that pull request computed from them: every block's output, loss and gradients. Their rows are
longer than the RoPE reference length, so the stretched branch runs.
"""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fairway.model.attention import frequencies, rotary_table
from fairway.model.config import AttnGate, Bigram, Loop, ModelConfig, Rope, Smear, ValueEmbedding
from fairway.model.embedding import bigram_bucket
from fairway.model.gpt import GPT

RECORDS = ("r1150", "r1172", "r1488", "r1958")
CASES = [(record, "plain") for record in RECORDS] + [("r1958", case) for case in ("loop", "docs", "docs_loop")]
CASES_WITH_GRADIENTS = [*CASES[:4], ("r1958", "docs_loop")]


@lru_cache
def golden(record: str) -> dict[str, Any]:
    """Arrays by name, as tensors; `config` is the parsed configuration."""
    with np.load(Path(__file__).parent / "golden" / f"model_{record}.npz") as arrays:
        found: dict[str, Any] = {name: torch.tensor(arrays[name]) for name in arrays.files if name != "config_json"}
        return found | {"config": json.loads(arrays["config_json"].tobytes())}


def golden_config(record: str, c: dict[str, Any]) -> ModelConfig:
    """The network that a golden configuration describes; what only the name of the record tells is told here."""
    early = record != "r1958"
    return ModelConfig(
        vocab_size=c["V"],
        layers=c["L"],
        width=c["d"],
        heads=c["H"],
        kv_heads=c["K"],
        mlp_hidden=c["m"],
        seq_len=c["T"],
        softcap=c["softcap"],
        embed_init_std=5e-3,
        table_dtype="float32",
        skip_gate_dtype="float32",
        qk_gain=c["q_gain0"],
        rope=Rope(
            dims=c["rope_dims"], base=c["rope_base"], reference_len=c.get("rope_ref_len"), bf16_frequencies=not early
        ),
        xsa_last_layers=c["xsa_last_n"],
        skip="gated" if record in ("r1172", "r1958") else "plain",
        smear=Smear(kind="static", window=0) if early else Smear(kind="gated", window=c["gate_window"]),
        bigram=Bigram(buckets=c["bigram_buckets"], width=c["bigram_dim"], proj_init=1.0) if early else None,
        value_embedding=ValueEmbedding(width=c["ve_dim"], layers=c["ve_layers"], proj_init=1.0) if early else None,
        value_residual=record == "r1488",
        attn_gate=None if early else AttnGate(window=c["gate_window"], scale=c["gate_scale"]),
        lanes_from=None if early else c["parallel_start"],
        loop=None if early else Loop(first=c["loop_start"], last=c["loop_end"], repeats=c["num_loops"]),
    )


def golden_network(record: str) -> GPT:
    """The network with the golden parameters: names and shapes must match exactly."""
    arrays = golden(record)
    model = GPT(golden_config(record, arrays["config"]))
    model.load_state_dict({k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")})
    return model


def _arguments(record: str, case: str) -> dict[str, Any]:
    segments = golden(record)["cu_seqlens"] if "docs" in case else None
    return {"segments": segments, "looped": "loop" in case}


def _close(found: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(found, expected.view_as(found), rtol=0, atol=atol)


@pytest.mark.parametrize(("record", "case"), CASES)
def test_hidden_state_logits_and_loss_match_the_record(record: str, case: str) -> None:
    arrays, model = golden(record), golden_network(record)
    with torch.no_grad():
        hidden = model.hidden(arrays["tokens"], **_arguments(record, case))
        loss = model(arrays["tokens"], arrays["targets"], **_arguments(record, case))
        _close(model.logits(hidden), arrays[f"{case}/logits"], atol=5e-4)
    _close(hidden, arrays[f"{case}/final_hidden"], atol=5e-4)
    _close(loss, arrays[f"{case}/loss"], atol=2e-5)


@pytest.mark.parametrize(("record", "case"), CASES_WITH_GRADIENTS)
def test_every_block_output_matches_the_record(record: str, case: str) -> None:
    arrays, model = golden(record), golden_network(record)
    outputs: list[tuple[int, Tensor]] = []

    def note(index: int) -> Callable[..., None]:
        return lambda _module, _inputs, output: outputs.append((index, output[0]))

    for i in range(model.config.layers):
        model.get_submodule(f"layer{i}").register_forward_hook(note(i))
    if model.lanes is not None:
        model.lanes.register_forward_hook(
            lambda _module, inputs, output: outputs.append((inputs[0].attn.index, torch.stack(output)))
        )
    with torch.no_grad():
        model.hidden(arrays["tokens"], **_arguments(record, case))
    assert [index for index, _ in outputs] == arrays[f"{case}/layers_in_order"].tolist()
    for step, (_, output) in enumerate(outputs):
        _close(output, arrays[f"{case}/after{step:02d}"], atol=5e-4)


@pytest.mark.parametrize(("record", "case"), CASES_WITH_GRADIENTS)
def test_gradients_match_the_record(record: str, case: str) -> None:
    arrays, model = golden(record), golden_network(record)
    model(arrays["tokens"], arrays["targets"], **_arguments(record, case)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = nn.utils.get_total_norm(gradients.values())
    torch.testing.assert_close(norm, arrays[f"{case}/grad_norm"].squeeze(), rtol=1e-4, atol=0)
    prefix = f"{case}/grad/"
    for name in (key.removeprefix(prefix) for key in arrays if key.startswith(prefix)):
        expected = arrays[prefix + name]
        assert (gradients[name] - expected).norm() <= 1e-3 * expected.norm(), name


@pytest.mark.parametrize("record", RECORDS)
def test_rotary_table_matches_the_record(record: str) -> None:
    arrays = golden(record)
    rope, length = golden_config(record, arrays["config"]).rope, arrays["config"]["T"]
    cos, sin = rotary_table(rope, length, torch.arange(length, dtype=torch.float32), torch.float32)
    _close(frequencies(rope, length, cos.device), arrays["rope_omega"], atol=1e-7)
    _close(cos.squeeze(1), arrays["rope_cos"], atol=1e-5)
    _close(sin.squeeze(1), arrays["rope_sin"], atol=1e-5)


@pytest.mark.parametrize("record", RECORDS[:3])
def test_bigram_buckets_match_the_record(record: str) -> None:
    arrays = golden(record)
    found = bigram_bucket(arrays["tokens"], arrays["config"]["bigram_buckets"])
    assert torch.equal(found, arrays["bigram_bucket"])

"""Rounding: parity with the records' rule (golden/gptq_rtn.npz), and what holds for any weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.codec.codes import (
    Quantized,
    code_histogram,
    dequantize,
    entropy_bits,
    load_codes,
    save_codes,
    tensor_class,
)
from fairway.quantization.clip import (
    coarse_scales,
    nearest,
    nearest_codes,
    percentile_scales,
    plain_rows,
    searched_rows,
)
from fairway.quantization.quantize_weights import QuantizeSettings, quantization_report, quantize_state
from fairway.runtime.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
PERCENTILES = [0.999, 0.9995, 0.9999, 0.99999, 1.0]
TABLE_PERCENTILE = 0.9999984


@pytest.fixture(scope="module")
def rtn() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "gptq_rtn.npz") as arrays:
        return dict(arrays)


def _settings(**changes: object) -> QuantizeSettings:
    section = yaml.safe_load((REPOSITORY / "params.yaml").read_text())["quantize"]
    return QuantizeSettings.model_validate(section | changes)


def _searched(
    weight: torch.Tensor, *, bits: int = 6, percentiles: list[float] = PERCENTILES, min_clip: float = 0.0
) -> tuple[Quantized, int]:
    return searched_rows(weight, percentile_scales(weight, percentiles, bits=bits, min_clip=min_clip), bits=bits)


def _plain(weight: torch.Tensor, *, percentile: float, min_clip: float) -> Quantized:
    return plain_rows(weight, percentile_scales(weight, [percentile], bits=8, min_clip=min_clip)[0], bits=8)


def _equal_share(codes: torch.Tensor, golden: np.ndarray) -> float:
    return float((codes.numpy() == golden).mean())


@pytest.mark.parametrize("case", range(7))
def test_searched_rows_match_the_records(rtn: dict[str, np.ndarray], case: int) -> None:
    weight = torch.from_numpy(rtn[f"rtn{case}/W"])
    matrix, best = _searched(weight, min_clip=1.0)
    assert best == int(rtn[f"rtn{case}/pct_index"][0])
    np.testing.assert_array_equal(matrix.scale.float().numpy(), rtn[f"rtn{case}/scale"])
    assert _equal_share(matrix.codes, rtn[f"rtn{case}/codes"]) >= 0.999
    np.testing.assert_allclose(matrix.dequantize().numpy(), rtn[f"rtn{case}/deq"], atol=1e-6)


@pytest.mark.parametrize("case", range(3))
def test_plain_rows_match_the_records(rtn: dict[str, np.ndarray], case: int) -> None:
    weight = torch.from_numpy(rtn[f"rtn{case}/W"])
    matrix = _plain(weight, percentile=TABLE_PERCENTILE, min_clip=1.0)
    np.testing.assert_array_equal(matrix.scale.float().numpy(), rtn[f"int8_{case}/scale"])
    assert _equal_share(matrix.codes, rtn[f"int8_{case}/codes"]) >= 0.999


def test_a_whole_state_matches_the_records(rtn: dict[str, np.ndarray]) -> None:
    names = {
        "embed.token": "tok_emb.weight",
        "layer0.mlp.up": "blocks.0.mlp.fc.weight",
        "layer0.attn.q": "blocks.0.attn.c_q.weight",
        "layer0.attn_scale": "blocks.0.attn_scale",
        "skip.weight": "skip_weights",
    }
    weights = {name: torch.from_numpy(rtn[f"state/{original}"]) for name, original in names.items()}
    settings = _settings(min_clip=1.0, passthrough_elements=65536)
    state, chosen = quantize_state(weights, settings)
    for name, original in names.items():
        value = state[name]
        if isinstance(value, Quantized):
            np.testing.assert_array_equal(value.scale.float().numpy(), rtn[f"state_scale/{original}"])
            assert _equal_share(value.codes, rtn[f"state_codes/{original}"]) >= 0.999
        else:
            np.testing.assert_array_equal(value.float().numpy(), rtn[f"state_deq/{original}"])
    report = quantization_report(weights, state, chosen, settings)
    assert [report[name]["bits"] for name in names] == [8, 6, 16, 16, 16]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("embed.token", "embed"),
        ("bigram.table", "other"),
        ("bigram.proj", "attn"),
        ("ve.proj", "attn"),
        ("layer3.attn.gate_w", "attn"),
        ("layer10.mlp.down", "mlp"),
        ("layer0.attn_scale", "other"),
        ("lanes.post", "other"),
    ],
)
def test_classes_are_those_of_the_records(name: str, kind: str) -> None:
    assert tensor_class(name) == kind


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    bits=st.integers(4, 8),
    magnitude=st.integers(-12, 4),
    min_clip=st.sampled_from([0.0, 1.0]),
)
def test_rounding_is_within_half_a_step(
    seed: int, rows: int, columns: int, bits: int, magnitude: int, min_clip: float
) -> None:
    """At percentile 1 nothing is clipped, so every weight lies within half a step, whatever its magnitude."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**magnitude
    weight[0] = 0.0
    matrix, _ = _searched(weight, bits=bits, percentiles=[1.0], min_clip=min_clip)
    # float16 rounds a scale by 2^-11, or by half of the smallest float16: the largest code feels that Q times.
    slack = (matrix.scale.float() * 2.0**-11 + 2.0**-25) * 2 ** (bits - 1)
    error = (weight - matrix.dequantize()).abs()
    assert bool((error <= matrix.scale.float()[:, None] / 2 + slack[:, None]).all())
    assert bool((matrix.dequantize()[0] == 0).all())


@given(halves=st.lists(st.integers(-80, 80), min_size=1), step=st.sampled_from([0.25, 1.0, 8.0]))
def test_codes_round_halves_to_even_and_stay_in_bounds(halves: list[int], step: float) -> None:
    """As Python's round does, which is exact for halves of a power of two."""
    expected = [max(-31, min(31, round(half / 2))) for half in halves]
    weight, scale = torch.tensor([halves]) / 2 * step, torch.tensor([step])
    assert nearest(weight, scale, 31).tolist() == [expected]
    codes = nearest_codes(weight, scale, bits=6)
    assert (codes.dtype, codes.tolist()) == (torch.int8, [expected])


@pytest.mark.parametrize("magnitude", [1e-3, 1e-5, 3e-7, 1e-9, 0.0])
def test_tables_of_tiny_weights_keep_usable_scales(magnitude: float) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)) * magnitude
    matrix = _plain(weight, percentile=1.0, min_clip=0.0)
    assert bool((matrix.scale > 0).all())
    assert float((weight - matrix.dequantize()).abs().max()) <= max(magnitude / 2, 2.0**-24)


@settings(max_examples=60, deadline=None)
@given(scale=st.floats(2.0**-20, 2.0**13, width=32), bits=st.integers(2, 9))
def test_coarse_scales_are_near_and_few(scale: float, bits: int) -> None:
    octave = coarse_scales(torch.linspace(1.0, 2.0, 5000), bits)
    assert len(octave.unique()) == 2**bits + 1
    assert float(coarse_scales(torch.tensor(scale), bits)) == pytest.approx(scale, rel=2.0 ** -(bits + 1))


def test_codes_of_coarse_scales_are_as_good() -> None:
    """Same bits, same error but for a percent: and only a handful of different scales to pack."""
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(4))
    sigmas = {"attn": 10.0, "mlp": 10.0, "embed": 10.0, "other": 10.0}
    found = {}
    for bits in (3, 10):
        settings, weights = _settings(clip_sigmas=sigmas, scale_mantissa_bits=bits), {"layer0.mlp.up": weight}
        state, chosen = quantize_state(weights, settings)
        report = quantization_report(weights, state, chosen, settings)
        found[bits] = state["layer0.mlp.up"], report["layer0.mlp.up"]
    assert len(found[3][0].scale.unique()) < 8 < len(found[10][0].scale.unique())  # type: ignore[union-attr]
    assert found[3][1]["entropy_bits"] == pytest.approx(found[10][1]["entropy_bits"], abs=0.02)
    assert found[3][1]["mse"] == pytest.approx(found[10][1]["mse"], rel=0.05)


def test_rows_of_one_weight_are_clipped_by_its_distance_from_zero() -> None:
    weight = torch.tensor([[0.5], [-3.0], [0.0]])
    sigmas = {"attn": 4.0, "mlp": 4.0, "embed": 4.0, "other": 4.0}
    state, _ = quantize_state({"layer0.mlp.up": weight}, _settings(clip_sigmas=sigmas, passthrough_elements=0))
    assert float((dequantize(state)["layer0.mlp.up"] - weight).abs().max()) < 3.0 / 31 * 4


def test_more_bits_never_cost_accuracy() -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(2))
    errors = []
    for bits in (4, 5, 6, 7, 8):
        matrix, _ = _searched(weight, bits=bits)
        errors.append(float((weight - matrix.dequantize()).square().mean()))
    assert errors == sorted(errors, reverse=True)


def test_bits_follow_the_class() -> None:
    weights = {
        "layer0.attn.q": torch.randn(40, 64),
        "layer0.mlp.up": torch.randn(40, 64),
        "ve.table": torch.randn(40, 64),
    }
    bits = {"attn": 4, "mlp": 5, "embed": 7, "other": 8}
    state, _ = quantize_state(weights, _settings(bits=bits, passthrough_elements=0))
    assert [value.bits for value in state.values() if isinstance(value, Quantized)] == [4, 5, 8]


def test_bfloat16_weights_are_widened_first() -> None:
    weight = torch.randn(16, 48).bfloat16()
    narrow, _ = _searched(weight)
    wide, _ = _searched(weight.float())
    assert torch.equal(narrow.codes, wide.codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e5])
@pytest.mark.parametrize("shape", [(8,), (80, 80)])
def test_a_weight_that_is_not_finite_names_its_tensor(bad: float, shape: tuple[int, ...]) -> None:
    weight = torch.zeros(shape)
    weight.view(-1)[3] = bad
    with pytest.raises(UserError, match=r"tensor layer1\.mlp\.up: 1 of \d+ weights are not finite"):
        quantize_state({"layer1.mlp.up": weight}, _settings())


def test_entropy_of_equal_shares_is_their_logarithm() -> None:
    codes = torch.tensor([[-3, 0, 1, 5]] * 6, dtype=torch.int8)
    assert entropy_bits(code_histogram(codes)) == pytest.approx(2.0)


def test_codes_survive_the_disk(tmp_path: Path) -> None:
    weights = {
        "bigram.scale": torch.tensor(0.05),
        "bigram.table": torch.randn(90, 64),
        "layer0.attn.q": torch.randn(80, 80),
    }
    state, _ = quantize_state(weights, _settings(passthrough_elements=64))
    save_codes(tmp_path, state)
    found = load_codes(tmp_path)
    assert found.keys() == state.keys()
    for name, weight in dequantize(state).items():
        assert torch.equal(weight, dequantize(found)[name])


def test_a_damaged_codes_file_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"codes.safetensors: no such file; `python -m stages.quantize \S+` makes it"):
        load_codes(tmp_path)
    state, _ = quantize_state({"layer0.attn.q": torch.randn(80, 80)}, _settings())
    save_codes(tmp_path, state)
    data = (tmp_path / "codes.safetensors").read_bytes()
    (tmp_path / "codes.safetensors").write_bytes(data[:-7])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_codes(tmp_path)

"""GPTQ, its Hessians and the low-rank correction: parity with the records (golden/gptq_*.npz), and what must hold."""

import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, Experiment
from test_model_golden import golden_network
from torch import Tensor

from fairway.codec.artifact import load_artifact
from fairway.codec.codes import Quantized, load_codes
from fairway.codec.container import pack
from fairway.model.gpt import GPT
from fairway.params import Params
from fairway.quantization.calibrate import calibrate, collect_hessians, generate_text, random_rows
from fairway.quantization.clip import nearest_codes, percentile_scales, sigma_scales
from fairway.quantization.gptq import factorize, gptq, gptq_codes
from fairway.quantization.lqer import low_rank, quantize_factors
from fairway.quantization.quantize_weights import QuantizeSettings, quantization_report, quantize_state
from fairway.runtime.errors import UserError
from fairway.runtime.files import save_tensors

GOLDEN = Path(__file__).parent / "golden"
PERCENTILES = [0.999, 0.9995, 0.9999, 0.99999, 1.0]
GPTQ = {
    "classes": ["attn", "mlp"],
    "damping": 0.01,
    "block_size": 128,
    "calibration": "train",
    "path": None,
    "batches": 2,
    "batch_rows": 2,
}
CPU = torch.device("cpu")


@lru_cache
def _golden(record: str) -> dict[str, Any]:
    with np.load(GOLDEN / f"gptq_{record}.npz") as arrays:
        found: dict[str, Any] = {name: torch.tensor(arrays[name]) for name in arrays.files if name != "config_json"}
        return found | {"config": json.loads(arrays["config_json"].tobytes())}


def _settings(**changes: object) -> QuantizeSettings:
    section = yaml.safe_load((REPOSITORY / "params.yaml").read_text())["quantize"]
    return QuantizeSettings.model_validate(section | {"method": "gptq", "gptq": GPTQ} | changes)


def _random(rows: int, columns: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights and the Hessian of correlated inputs."""
    rng = torch.Generator().manual_seed(seed)
    X = torch.randn(4 * columns, columns, generator=rng) @ torch.randn(columns, columns, generator=rng)
    return torch.randn(rows, columns, generator=rng), X.T @ X


def _equal_share(codes: Tensor, golden: Tensor) -> float:
    return float((codes == golden).float().mean())


@pytest.mark.parametrize("case", range(4))
def test_gptq_with_percentiles_matches_r1172(case: int) -> None:
    z = _golden("r1172")
    W, H = z[f"case{case}/W"], z[f"case{case}/H"]
    scales = percentile_scales(W, PERCENTILES, bits=6, min_clip=1.0)
    ((matrix, best),) = gptq(W[None], H[None], scales[None], bits=6, damping=0.01, block_size=128, grid="scalar")
    assert best == int(z[f"case{case}/pct_index"])
    assert torch.equal(matrix.scale.float(), z[f"case{case}/scale"])
    assert _equal_share(matrix.codes, z[f"case{case}/codes"]) >= 0.995
    error = (z[f"case{case}/X"] @ (matrix.dequantize() - W).T).square().mean()
    torch.testing.assert_close(error, z[f"case{case}/out_mse"][0], rtol=0.02, atol=0)


@pytest.mark.parametrize("case", range(2))
def test_gptq_with_sigmas_matches_r1958(case: int) -> None:
    z = _golden("r1958")
    W, H = z[f"case{case}/W"], z[f"case{case}/H"]
    bits = {31: 6, 63: 7}[int(z[f"case{case}/clip_range"])]
    scales = sigma_scales(W, float(z[f"case{case}/clip_sigmas"]), bits=bits)
    ((matrix, _),) = gptq(W[None], H[None], scales[None, None], bits=bits, damping=0.01, block_size=128, grid="scalar")
    assert torch.equal(matrix.scale.float(), z[f"case{case}/scale"])
    assert _equal_share(matrix.codes, z[f"case{case}/codes"]) >= 0.995


@pytest.mark.parametrize("record", ["r1172", "r1958"])
def test_hessians_match_the_record(record: str) -> None:
    """r1172 damps at collection; we only do so in the solver."""
    z = _golden(record)
    names = z["config"]["hessian_names_all"]
    found = collect_hessians(golden_network(record), [batch[:, :-1] for batch in z["calib_tokens"]], names)
    if record == "r1172":
        found = {name: H + 0.01 * H.diagonal().mean() * torch.eye(len(H)) for name, H in found.items()}
    for name, trace in zip(names, z["hessian_trace_all"], strict=True):
        torch.testing.assert_close(found[name].trace(), trace, rtol=1e-4, atol=0)
        if f"hessian/{name}" in z:
            assert float((found[name] - z[f"hessian/{name}"]).norm() / z[f"hessian/{name}"].norm()) < 1e-4


def test_a_network_quantized_with_its_own_hessians_matches_r1172() -> None:
    """Damping once by 2.01 % is damping twice by 1 %."""
    z, model = _golden("r1172"), golden_network("r1172")
    names = [name.removeprefix("model_codes/") for name in z if name.startswith("model_codes/")]
    hessians = collect_hessians(model, [batch[:, :-1] for batch in z["calib_tokens"]], names)
    weights = {name: model.state_dict()[name] for name in names}
    settings = _settings(min_clip=1.0, passthrough_elements=0, gptq=GPTQ | {"damping": 0.0201})
    state, _ = quantize_state(weights, settings, hessians=hessians)
    for name in names:
        value = state[name]
        assert isinstance(value, Quantized)
        assert torch.equal(value.scale.float(), z[f"model_scale/{name}"])
        assert _equal_share(value.codes, z[f"model_codes/{name}"]) >= 0.995


def test_a_whole_state_matches_r1958() -> None:
    z = _golden("r1958")
    names = {"embed.token": "tok_emb.weight", "layer0.mlp.up": "blocks.0.mlp.fc.weight"}
    weights = {name: z[f"sd/{original}"] for name, original in names.items()}
    hessians = {name: z[f"sd_hessian/{original}"] for name, original in names.items()}
    settings = _settings(
        bits={"attn": 6, "mlp": 6, "embed": 7, "other": 6},
        clip_sigmas={"attn": 13.0, "mlp": 11.5, "embed": 14.0, "other": 12.85},
        lqer={"rank": 4, "tensors": 1, "group": 64},
        passthrough_elements=65536,
        gptq=GPTQ | {"classes": ["attn", "mlp", "embed"]},
    )
    state, chosen = quantize_state(weights, settings, hessians=hessians)
    report = quantization_report(weights, state, chosen, settings)
    assert [report[name]["corrected"] for name in names] == [False, True]
    for name, original in names.items():
        value = state[name]
        assert isinstance(value, Quantized)
        assert torch.equal(value.scale.float(), z[f"sd_quant/{original}.scale"])
        assert _equal_share(value.codes, z[f"sd_quant/{original}.q"]) >= 0.995
    # The sign of a singular pair is a convention, and the grids are not symmetric: compare how much error is left.
    golden, W = z["sd_deq_sample/blocks.0.mlp.fc.weight"], weights["layer0.mlp.up"][::41]
    value = state["layer0.mlp.up"]
    assert isinstance(value, Quantized)
    left, golden_left = (float((W - deq).norm()) for deq in (value.dequantize()[::41], golden))
    assert left == pytest.approx(golden_left, rel=0.01)


@pytest.mark.parametrize("case", range(2))
def test_low_rank_factors_match_r1958(case: int) -> None:
    z = _golden("r1958")
    A, B = z[f"case{case}/lqer/A_float"], z[f"case{case}/lqer/B_float"]
    found = quantize_factors(A, B, group=64)
    assert torch.equal(found.a, z[f"case{case}/lqer/A_codes"])
    assert torch.equal(found.b, z[f"case{case}/lqer/B_codes"])
    assert torch.equal(found.a_scale.float(), z[f"case{case}/lqer/A_scale"].view(1))
    assert torch.equal(found.b_scale.float(), z[f"case{case}/lqer/B_scale"])
    U, S, Vh = torch.linalg.svd(z[f"case{case}/W"] - z[f"case{case}/deq"], full_matrices=False)
    assert float((U[:, :4] * S[:4] @ Vh[:4] - A @ B).norm() / (A @ B).norm()) < 1e-3


def test_a_correction_of_structured_error_removes_most_of_it() -> None:
    rng = torch.Generator().manual_seed(3)
    E = torch.randn(96, 2, generator=rng) @ torch.randn(2, 64, generator=rng)
    assert float((E - low_rank(E, rank=4, group=64).product()).norm() / E.norm()) < 0.6


def test_with_uncorrelated_inputs_gptq_is_rounding_to_nearest() -> None:
    W, _ = _random(20, 48)
    scale = sigma_scales(W, 4.0, bits=6)
    codes = gptq_codes(
        W[None], scale[None], factorize(3.0 * torch.eye(48)[None], damping=0.01), largest=31, block_size=16
    )
    assert torch.equal(codes[0], nearest_codes(W, scale, bits=6))


@pytest.mark.parametrize("seed", range(5))
def test_gptq_lowers_the_error_of_the_output(seed: int) -> None:
    W, H = _random(32, 64, seed=seed)
    scale = sigma_scales(W, 6.0, bits=4).half().float()

    def output_error(codes: Tensor) -> float:
        E = W - codes.float() * scale[:, None]
        return float((E @ H * E).sum())

    codes = gptq_codes(W[None], scale[None], factorize(H[None], damping=0.01), largest=7, block_size=128)[0]
    assert output_error(codes) < output_error(nearest_codes(W, scale, bits=4))


def test_neither_scale_nor_block_size_of_the_hessian_matters() -> None:
    W, H = _random(16, 80)
    scale = sigma_scales(W, 4.0, bits=6)[None]
    codes = [
        gptq_codes(W[None], scale, factorize(factor * H[None], damping=0.01), largest=31, block_size=block_size)
        for factor, block_size in ((1.0, 128), (64.0, 128), (1.0, 7))
    ]
    assert all(_equal_share(other, codes[0]) > 0.995 for other in codes)


def test_matrices_of_one_shape_together_are_each_as_alone() -> None:
    pairs = [_random(12, 40, seed=seed) for seed in range(3)]
    W, H = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    scales = torch.stack([percentile_scales(w, PERCENTILES, bits=6, min_clip=0.0) for w in W])
    together = gptq(W, H, scales, bits=6, damping=0.01, block_size=16, grid="scalar")
    for n, (matrix, best) in enumerate(together):
        ((alone, alone_best),) = gptq(
            W[n : n + 1], H[n : n + 1], scales[n : n + 1], bits=6, damping=0.01, block_size=16, grid="scalar"
        )
        assert best == alone_best
        assert _equal_share(matrix.codes, alone.codes) > 0.995


def test_inputs_that_never_fire_get_no_weight() -> None:
    W, H = _random(8, 24)
    H[5] = H[:, 5] = 0.0
    codes = gptq_codes(
        W[None], sigma_scales(W, 4.0, bits=6)[None], factorize(H[None], damping=0.01), largest=31, block_size=8
    )
    assert bool((codes[0, :, 5] == 0).all())
    assert bool((codes[0, :, 4] != 0).any())


def test_a_hessian_that_is_not_finite_is_told_in_one_line() -> None:
    W, H = _random(8, 24)
    H[3, 3] = torch.nan
    with pytest.raises(UserError, match=r"quantize\.gptq: a Hessian is not finite"):
        gptq(
            W[None],
            H[None],
            sigma_scales(W, 4.0, bits=6)[None, None],
            bits=6,
            damping=0.01,
            block_size=8,
            grid="scalar",
        )


def test_hessians_change_only_the_classes_that_have_one() -> None:
    names = ["layer0.attn.q", "layer0.attn.k", "layer0.mlp.up", "embed.token"]
    weights = {name: _random(32, 64, seed=n)[0] for n, name in enumerate(names)}
    settings = _settings(passthrough_elements=64)
    plain, _ = quantize_state(weights, settings)
    mixed, _ = quantize_state(weights, settings, hessians={name: _random(32, 64, seed=9)[1] for name in names[:2]})
    changed = [not torch.equal(plain[name].codes, mixed[name].codes) for name in names]  # type: ignore[union-attr]
    assert changed == [True, True, False, False]


def test_a_group_that_does_not_divide_is_told_in_one_line() -> None:
    weights = {"layer0.attn.q": torch.randn(32, 66)}
    with pytest.raises(
        UserError, match=r"quantize\.lqer\.group \(64\) must divide 4 \* 66, the rank and columns of layer0\.attn\.q"
    ):
        quantize_state(weights, _settings(passthrough_elements=64, lqer={"rank": 4, "tensors": 1, "group": 64}))


@pytest.mark.parametrize("shape", [(3, 96), (96, 3), (1, 32)])
def test_a_correction_has_no_more_rank_than_its_matrix(shape: tuple[int, int]) -> None:
    weights = {"layer0.attn.q": torch.randn(shape, generator=torch.Generator().manual_seed(1))}
    lqer = {"rank": 8, "tensors": 1, "group": 3 if 3 in shape else 32}
    plain, corrected = (
        quantize_state(weights, _settings(passthrough_elements=0, lqer=settings))[0]["layer0.attn.q"]
        for settings in (None, lqer)
    )
    assert isinstance(plain, Quantized)
    assert isinstance(corrected, Quantized)
    assert corrected.correction is not None
    assert corrected.correction.b.shape == (min(shape), shape[1])
    errors = [float((weights["layer0.attn.q"] - matrix.dequantize()).norm()) for matrix in (plain, corrected)]
    assert errors[1] < errors[0]


@pytest.fixture(scope="module")
def calibrated(tokenized: Experiment) -> tuple[dict[str, Any], GPT, Path]:
    """Raw params, an initial network, and a token folder."""
    model = GPT(Params.model_validate(tokenized.params).model)
    model.init_weights(5)
    return tokenized.params, model, tokenized.folder / "artifacts/tokens"


@pytest.mark.parametrize("calibration", ["train", "validation", "text", "generated"])
def test_every_calibration_gives_a_hessian_for_every_matrix(
    calibration: str, calibrated: tuple[dict[str, Any], GPT, Path], tmp_path: Path
) -> None:
    raw, model, tokens = calibrated
    (tmp_path / "text.txt").write_text("some words of a text " * 100)
    changes = {"calibration": calibration, "path": str(tmp_path / "text.txt") if calibration == "text" else None}
    raw = raw | {"quantize": raw["quantize"] | {"method": "gptq", "gptq": GPTQ | changes | {"batch_rows": 1}}}
    params = Params.model_validate(raw)
    arguments = params.model, params.quantize.gptq, model.state_dict(), Path("weights"), tokens
    hessians = calibrate(*arguments, seed=1, device=CPU)
    assert len(hessians) == 6 * model.config.layers
    assert all(bool(H.isfinite().all()) and float(H.trace()) > 0 for H in hessians.values())
    again = calibrate(*arguments, seed=1, device=CPU)
    assert all(torch.equal(H, again[name]) for name, H in hessians.items())


def test_without_the_section_nothing_is_calibrated(calibrated: tuple[dict[str, Any], GPT, Path]) -> None:
    raw, model, tokens = calibrated
    params = Params.model_validate(raw)
    assert (
        calibrate(params.model, params.quantize.gptq, model.state_dict(), Path("weights"), tokens, seed=1, device=CPU)
        == {}
    )


def test_rows_are_drawn_once_each_and_a_short_text_is_refused() -> None:
    text = np.arange(100)
    rows = torch.cat(list(random_rows(lambda start, count: text[start : start + count], 100, (3, 3, 10), seed=0)))
    assert rows.shape == (9, 10)
    assert len(rows[:, 0].unique()) == 9
    with pytest.raises(
        UserError, match=r"params\.yaml: quantize\.gptq\.calibration: 100 tokens, expected at least 128"
    ):
        next(random_rows(lambda start, count: text[start : start + count], 100, (1, 1, 128), seed=0))


def test_generated_text_depends_on_its_seed_alone(calibrated: tuple[dict[str, Any], GPT, Path]) -> None:
    _, model, _ = calibrated
    first, again, other = (torch.cat(list(generate_text(model, (2, 2, 8), seed=seed))) for seed in (1, 1, 2))
    assert first.shape == (4, 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_stages_run_with_every_mechanism_on(experiment: Experiment, tokenized: Experiment) -> None:
    shutil.copytree(tokenized.folder / "artifacts", experiment.folder / "artifacts")
    model = GPT(Params.model_validate(experiment.params).model)
    model.init_weights(5)
    (experiment.folder / "artifacts/adapt/1337").mkdir(parents=True)
    save_tensors(experiment.folder / "artifacts/adapt/1337/weights.safetensors", model.state_dict())
    experiment.params["quantize"] |= {
        "method": "gptq",
        "gptq": GPTQ | {"classes": ["attn", "mlp", "embed"], "calibration": "validation"},
        "clip_sigmas": {"attn": 13.0, "mlp": 11.5, "embed": 14.0, "other": 14.0},
        "lqer": {"rank": 4, "tensors": 3, "group": 64},
        "target_bytes": 16_500,
    }
    experiment.params["compress"]["codec"] = "ans"
    experiment.set_params(experiment.params)
    experiment.stage("quantize", "1337")
    made = experiment.folder / "artifacts/quantize/1337"
    report = json.loads((made / "quantize.json").read_text())
    assert report["calibration"] == "validation"
    assert sum(facts.get("corrected", False) for facts in report["tensors"].values()) == 3
    packed = pack(model.config, load_codes(made), codec="ans")
    assert 0.999 * 16_500 <= len(packed) <= 16_500
    (made / "model.bin").write_bytes(packed)
    load_artifact(made / "model.bin", CPU)

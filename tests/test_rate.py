"""The steps that fill a given number of bytes."""

import math
from typing import Any

import pytest
import torch
import yaml
from conftest import REPOSITORY
from torch import Tensor

from fairway.codec.codes import Quantized, QuantizedState, code_histogram, entropy_bits
from fairway.quantization.quantize_weights import QuantizeSettings, quantize_state
from fairway.quantization.rate import quantize_to_size, wider_by
from fairway.runtime.errors import UserError

SIGMAS = {"attn": 10.0, "mlp": 8.0, "embed": 10.0, "other": 10.0}


def _settings(**changes: object) -> QuantizeSettings:
    section = yaml.safe_load((REPOSITORY / "params.yaml").read_text())["quantize"]
    return QuantizeSettings.model_validate(section | changes)


def _weights() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {f"layer{i}.mlp.up": torch.randn(96, 64, generator=rng) * (1 + i) for i in range(3)}


def _entropy_bytes(state: QuantizedState) -> int:
    """A compressor that needs no time: order-0 entropy."""
    matrices = [value for value in state.values() if isinstance(value, Quantized)]
    return math.ceil(sum(m.codes.numel() * entropy_bits(code_histogram(m.codes)) for m in matrices) / 8)


@pytest.mark.parametrize("clip", [{}, {"min_clip": 30.0}, {"clip_sigmas": SIGMAS}, {"scale_mantissa_bits": 4}])
@pytest.mark.parametrize("share", [0.95, 0.7, 0.5])
def test_the_target_is_filled_and_never_exceeded(clip: dict[str, Any], share: float) -> None:
    target = int(share * _entropy_bytes(quantize_state(_weights(), _settings(**clip))[0]))
    settings = _settings(**clip, target_bytes=target)
    state, _, coarseness = quantize_to_size(_weights(), settings, {}, _entropy_bytes)
    assert 0.999 * target <= _entropy_bytes(state) <= target
    assert coarseness > 1


@pytest.mark.parametrize("share", [0.95, 0.7, 0.5])
def test_where_all_steps_jump_at_once_the_target_is_nearly_filled(share: float) -> None:
    """One scale for all rows, and 8 to choose from in an octave: at most an eighth of an octave, in bits, is lost."""
    clip = {"min_clip": 30.0, "scale_mantissa_bits": 3}
    target = int(share * _entropy_bytes(quantize_state(_weights(), _settings(**clip))[0]))
    state, _, coarseness = quantize_to_size(_weights(), _settings(**clip, target_bytes=target), {}, _entropy_bytes)
    assert 0.9 * target <= _entropy_bytes(state) <= target
    assert coarseness > 1


@pytest.mark.parametrize("bits", [2, 3, 6])
def test_scales_keep_their_few_bits_however_wide_the_steps(bits: int) -> None:
    settings = _settings(clip_sigmas=SIGMAS, scale_mantissa_bits=bits)
    for coarseness in (1.0, 1.234, 1.7):
        state, _ = quantize_state(_weights(), settings, coarseness=coarseness)
        for value in state.values():
            assert isinstance(value, Quantized)
            mantissa, _ = torch.frexp(value.scale.float())
            assert torch.equal(mantissa * 2 ** (bits + 1), (mantissa * 2 ** (bits + 1)).round())


def test_few_compressions_are_enough() -> None:
    tried = []

    def measure(state: QuantizedState) -> int:
        tried.append(_entropy_bytes(state))
        return tried[-1]

    quantize_to_size(_weights(), _settings(target_bytes=8000), {}, measure)
    assert len(tried) <= 5


def test_codes_that_fit_stay_as_they_are() -> None:
    plain, _ = quantize_state(_weights(), _settings())
    state, _, coarseness = quantize_to_size(_weights(), _settings(target_bytes=10**6), {}, _entropy_bytes)
    assert coarseness == 1.0
    assert all(torch.equal(plain[name].codes, state[name].codes) for name in plain)  # type: ignore[union-attr]


def test_without_a_target_nothing_is_measured() -> None:
    def measure(state: QuantizedState) -> int:
        raise AssertionError("compressed for nothing")

    quantize_to_size(_weights(), _settings(), {}, measure)


def test_a_size_below_everything_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"quantize\.target_bytes: 10 bytes cannot be met, the last try took \d+"):
        quantize_to_size(_weights(), _settings(target_bytes=10), {}, lambda state: 100 + _entropy_bytes(state))


def test_a_target_below_what_stays_float16_is_refused_in_one_line() -> None:
    settings = _settings(target_bytes=10, passthrough_elements=10**6)
    with pytest.raises(UserError, match=r"passthrough_elements \(1000000\), they stay float16 and take 77$"):
        quantize_to_size(_weights(), settings, {}, lambda state: 77)


def test_doubling_the_steps_saves_a_bit_a_weight() -> None:
    settings = _settings(clip_sigmas=SIGMAS, bits={"attn": 8, "mlp": 8, "embed": 8, "other": 8})
    state, _ = quantize_state(_weights(), settings)
    weights = sum(weight.numel() for weight in _weights().values())
    assert wider_by(state, -weights // 8) == pytest.approx(2.0, rel=0.01)
    assert wider_by(state, 0) == pytest.approx(1.0, rel=1e-4)

"""Norms and rotary embedding against their formulas; bfloat16 roundings where the release makes them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ascend_v4.operators.contracts.norm import head_rms_norm, rms_norm
from ascend_v4.operators.contracts.rope import plan_rope, rope_frequencies, rotate
from tests.operators.number_formats import numpy_of, to_bf16


def test_rms_norm_divides_by_the_root_of_mean_square_plus_eps():
    x, weight = torch.randn(4, 33), torch.randn(33)
    values = numpy_of(x)
    want = values / np.sqrt((values**2).mean(-1, keepdims=True) + 0.25) * numpy_of(weight)
    np.testing.assert_allclose(numpy_of(rms_norm(x, weight, eps=0.25)), want, rtol=2e-6, atol=1e-7)


def test_rms_norm_rounds_a_bfloat16_row_once_after_its_weight():
    x, weight = torch.randn(6, 64).to(torch.bfloat16), torch.randn(64).to(torch.bfloat16)
    values = numpy_of(x)
    want = values / np.sqrt((values**2).mean(-1, keepdims=True) + 1e-6) * numpy_of(weight)
    got = numpy_of(rms_norm(x, weight, eps=1e-6))
    low, high = to_bf16(want - 1e-6 * np.abs(want)), to_bf16(want + 1e-6 * np.abs(want))
    assert ((got == low) | (got == high)).all()


def test_head_norm_rounds_every_step_to_bfloat16():
    # squares of multiples of 1/8 sum exactly, so that the mean is one number whatever the order
    q = (torch.randint(-31, 32, (40, 4, 64)) / 8).to(torch.bfloat16)
    values = numpy_of(q)
    mean = to_bf16(to_bf16(values * values).mean(-1, keepdims=True))
    inverse = to_bf16(1 / np.sqrt(to_bf16(mean + 1e-6)))
    np.testing.assert_array_equal(
        numpy_of(head_rms_norm(q, eps=1e-6, rounded_once=False)), to_bf16(values * inverse)
    )


def test_head_norm_adds_a_large_eps_before_the_root():
    q = (torch.randint(-31, 32, (40, 4, 64)) / 8).to(torch.bfloat16)
    values = numpy_of(q)
    mean = to_bf16(to_bf16(values * values).mean(-1, keepdims=True))
    inverse = to_bf16(1 / np.sqrt(to_bf16(mean + 3.0)))
    np.testing.assert_array_equal(
        numpy_of(head_rms_norm(q, eps=3.0, rounded_once=False)), to_bf16(values * inverse)
    )


def test_head_norm_of_float32_rounds_nothing():
    q = torch.randn(5, 3, 48)
    values = numpy_of(q)
    want = values / np.sqrt((values**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(
        numpy_of(head_rms_norm(q, eps=1e-6, rounded_once=False)), want, rtol=2e-6, atol=1e-7
    )


def yarn(
    rope_dim: int, *, theta: float, factor: float, original: int, beta_fast: float, beta_slow: float
) -> list[float]:
    """Frequencies channel by channel: fast channels as they are, slow ones divided, a ramp between."""

    def channel(turns: float) -> float:
        return rope_dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(math.floor(channel(beta_fast)), 0)
    high = min(math.ceil(channel(beta_slow)), rope_dim - 1)
    frequencies = []
    for index in range(rope_dim // 2):
        share = min(max((index - low) / (high - low), 0.0), 1.0)
        plain = theta ** (-2 * index / rope_dim)
        frequencies.append(plain * (1 - share) + plain / factor * share)
    return frequencies


RELEASE = {"theta": 160000.0, "factor": 16.0, "original": 65536, "beta_fast": 32.0, "beta_slow": 1.0}


@pytest.mark.parametrize(
    "constants",
    [
        RELEASE,
        {**RELEASE, "factor": 4.0},
        {"theta": 10000.0, "factor": 8.0, "original": 256, "beta_fast": 16.0, "beta_slow": 2.0},
        {"theta": 500.0, "factor": 2.0, "original": 4096, "beta_fast": 1000.0, "beta_slow": 0.01},
    ],
    ids=["release", "factor-4", "short", "clamped"],
)
@pytest.mark.parametrize("rope_dim", [16, 64])
def test_yarn_stretches_slow_channels(constants, rope_dim):
    want = yarn(rope_dim, **constants)
    settings = {name: value for name, value in constants.items() if name != "original"}
    got = rope_frequencies(rope_dim, original_positions=constants["original"], **settings)
    np.testing.assert_allclose(numpy_of(got.frequencies), want, rtol=2e-6)


def test_the_releases_ramp_runs_from_channel_15_to_25():
    got = numpy_of(
        rope_frequencies(
            64, theta=160000.0, factor=16.0, original_positions=65536, beta_fast=32.0, beta_slow=1.0
        ).frequencies
    )
    plain = np.array([160000.0 ** (-2 * index / 64) for index in range(32)])
    np.testing.assert_allclose(got[:16], plain[:16], rtol=2e-6)
    np.testing.assert_allclose(got[25:], plain[25:] / 16, rtol=2e-6)
    assert (got[16:25] < plain[16:25] * 0.999).all()
    assert (got[16:25] > plain[16:25] / 16 * 1.001).all()


def test_factor_one_is_plain_rope():
    want = [10000.0 ** (-2 * index / 32) for index in range(16)]
    np.testing.assert_allclose(numpy_of(rope_frequencies(32, theta=10000.0).frequencies), want, rtol=2e-6)


def turned(x: np.ndarray, positions: list[int], frequencies: np.ndarray, *, sign: float) -> np.ndarray:
    """Pairs of neighbours among the last channels, turned by float32 angles."""
    out, first = x.copy(), x.shape[-1] - 2 * len(frequencies)
    for token, position in enumerate(positions):
        angles = (np.float32(position) * frequencies.astype(np.float32)).astype(np.float64)
        for index, angle in enumerate(angles):
            even, odd = x[token, :, first + 2 * index], x[token, :, first + 2 * index + 1]
            cosine, sine = math.cos(angle), sign * math.sin(angle)
            out[token, :, first + 2 * index] = even * cosine - odd * sine
            out[token, :, first + 2 * index + 1] = even * sine + odd * cosine
    return out


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_last_channels_turn_in_pairs(dtype, inverse):
    frequencies = rope_frequencies(16, theta=10000.0)
    positions = [0, 1, 2, 127, 128, 4095, 1048575]
    x = torch.randn(len(positions), 3, 40).to(dtype)
    want = turned(numpy_of(x), positions, numpy_of(frequencies.frequencies), sign=-1.0 if inverse else 1.0)
    got = x.clone()
    rotate(got, plan_rope(torch.tensor(positions), frequencies), inverse=inverse)
    bound = 2.0**-8 if dtype is torch.bfloat16 else 1e-6
    np.testing.assert_allclose(numpy_of(got), want, atol=bound * np.abs(want).max())
    assert torch.equal(got[..., :24], x[..., :24])
    assert torch.equal(got[0], x[0])


def test_turning_back_restores_the_input():
    rows = plan_rope(torch.arange(5, 300, 7), rope_frequencies(32, theta=160000.0))
    x = torch.randn(43, 2, 48)
    there_and_back = x.clone()
    rotate(there_and_back, rows)
    assert (there_and_back - x).abs().max() > 0.1
    rotate(there_and_back, rows, inverse=True)
    torch.testing.assert_close(there_and_back, x, rtol=0, atol=1e-6)

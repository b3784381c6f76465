"""Linear layers against the release's blockwise products, written as loops over scale blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ascend_v4.operators.contracts import linear as linear_module
from ascend_v4.operators.contracts.linear import float32_linear, grouped_linear, linear, prepare_linear
from ascend_v4.operators.contracts.quantize import ActivationFormat, StoredWeight, WeightFormat
from tests.operators.number_formats import e2m1_value, e4m3_value, e8m0_value, fake_fp8, numpy_of, to_bf16

ROUNDING = 2e-6
"""Float32 sums of a few hundred products against float64."""


def fp8_weight(outputs: int, inputs: int) -> StoredWeight:
    codes = torch.randint(0, 127, (outputs, inputs)).to(torch.uint8) | (
        torch.randint(0, 2, (outputs, inputs)).to(torch.uint8) * 128
    )
    scale = torch.randint(110, 120, (-(-outputs // 128), -(-inputs // 128))).to(torch.uint8)
    return StoredWeight(codes.view(torch.float8_e4m3fn), scale, WeightFormat.FP8_BLOCK)


def fp4_weight(outputs: int, inputs: int) -> StoredWeight:
    codes = torch.randint(-128, 128, (outputs, inputs // 2)).to(torch.int8)
    scale = torch.randint(118, 124, (outputs, inputs // 32)).to(torch.uint8)
    return StoredWeight(codes, scale, WeightFormat.FP4_GROUP)


def real_numbers(weight: StoredWeight) -> np.ndarray:
    """A weight decoded code by code."""
    assert weight.scale is not None
    codes, scale = weight.codes.view(torch.uint8).tolist(), weight.scale.tolist()
    if weight.format is WeightFormat.FP8_BLOCK:
        return np.array(
            [
                [e4m3_value(code) * e8m0_value(scale[n // 128][k // 128]) for k, code in enumerate(row)]
                for n, row in enumerate(codes)
            ]
        )
    nibbles = [[half for code in row for half in (code & 15, code >> 4)] for row in codes]
    return np.array(
        [
            [e2m1_value(code) * e8m0_value(scale[n][k // 32]) for k, code in enumerate(row)]
            for n, row in enumerate(nibbles)
        ]
    )


def release_product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Activations quantised per 128 inputs; partial products per 128 inputs, summed."""
    quantised = fake_fp8(x, group=128)
    total = np.zeros((len(x), len(weight)))
    for low in range(0, x.shape[1], 128):
        total += quantised[:, low : low + 128] @ weight[:, low : low + 128].T
    return total


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("make", [fp8_weight, fp4_weight])
def test_quantised_linear_is_the_releases_blockwise_product(make, copy):
    x, weight = torch.randn(3, 288), make(140, 288)
    got = linear(x, prepare_linear(weight, copy=copy), activation=ActivationFormat.FP8_GROUP)
    want = release_product(numpy_of(x), real_numbers(weight))
    np.testing.assert_allclose(numpy_of(got), want, atol=ROUNDING * np.abs(want).max())


def test_128_inputs_share_one_activation_scale():
    x, weight = torch.randn(3, 256) * 1e-3, fp8_weight(40, 256)
    # one large input per group sets the scale; its weights are zero, so that only the small ones are seen
    x[:, [0, 200]] = 448.0
    weight.codes.view(torch.uint8)[:, [0, 200]] = 0
    got = linear(x, weight, activation=ActivationFormat.FP8_GROUP)
    want = release_product(numpy_of(x), real_numbers(weight))
    assert np.abs(want).max() > 0
    np.testing.assert_allclose(numpy_of(got), want, atol=ROUNDING * np.abs(want).max())


def test_bfloat16_results_are_rounded_once():
    x, weight = torch.randn(4, 160).to(torch.bfloat16), fp8_weight(64, 160)
    got = linear(x, weight, activation=ActivationFormat.FP8_GROUP)
    assert got.dtype is torch.bfloat16
    want = release_product(numpy_of(x), real_numbers(weight))
    low, high = to_bf16(want - 1e-5 * np.abs(want).max()), to_bf16(want + 1e-5 * np.abs(want).max())
    assert ((numpy_of(got) >= low) & (numpy_of(got) <= high)).all()


def test_without_activation_format_the_input_is_not_quantised():
    x, weight = torch.randn(3, 96), fp4_weight(20, 96)
    want = numpy_of(x) @ real_numbers(weight).T
    got = linear(x, weight, activation=ActivationFormat.NONE)
    np.testing.assert_allclose(numpy_of(got), want, atol=ROUNDING * np.abs(want).max())


def test_float32_linear_stays_in_float32_for_bfloat16_input():
    x = torch.randn(3, 96).to(torch.bfloat16)
    weight = StoredWeight(torch.randn(20, 96).to(torch.bfloat16), None, WeightFormat.PLAIN)
    got = float32_linear(x, weight)
    assert got.dtype is torch.float32
    want = numpy_of(x) @ numpy_of(weight.codes).T
    np.testing.assert_allclose(numpy_of(got), want, atol=ROUNDING * np.abs(want).max())


@pytest.mark.parametrize("copy", [True, False])
def test_each_group_of_heads_has_its_own_rows_of_the_weight(copy):
    x, weight = torch.randn(5, 3, 64), fp8_weight(3 * 24, 64)
    got = grouped_linear(x, prepare_linear(weight, copy=copy), activation=ActivationFormat.NONE)
    matrix = real_numbers(weight)
    assert got.shape == (5, 3, 24)
    for group in range(3):
        want = numpy_of(x)[:, group] @ matrix[group * 24 : (group + 1) * 24].T
        np.testing.assert_allclose(numpy_of(got)[:, group], want, atol=ROUNDING * np.abs(want).max())


@pytest.mark.parametrize("make", [fp8_weight, fp4_weight])
def test_a_weight_widened_in_slices_gives_the_same_product(make, monkeypatch):
    x, weight = torch.randn(3, 64), make(700, 64)
    whole = linear(x, weight, activation=ActivationFormat.FP8_GROUP)
    monkeypatch.setattr(linear_module, "SLICE_BYTES", 1)
    sliced = linear(x, weight, activation=ActivationFormat.FP8_GROUP)
    torch.testing.assert_close(sliced, whole, rtol=1e-6, atol=1e-6)

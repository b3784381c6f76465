"""Number formats against their definitions: every code, every tie, scales at the edge."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from ascend_v4.errors import ContractError
from ascend_v4.operators.contracts.quantize import (
    IndexFormat,
    StoredWeight,
    WeightFormat,
    dequantize_fp4_group,
    dequantize_fp8_block,
    fake_quantize_fp4,
    fake_quantize_fp8,
    hadamard_matrix,
    quantize_index,
    scale_to_float32,
)
from tests.operators.number_formats import (
    E2M1_MAGNITUDES,
    E4M3_MAGNITUDES,
    e2m1_value,
    e4m3_value,
    e8m0_value,
    fake_fp4,
    fake_fp8,
    numpy_of,
    to_bf16,
)

FORMATS = {
    "fp8": (fake_quantize_fp8, fake_fp8, E4M3_MAGNITUDES),
    "fp4": (fake_quantize_fp4, fake_fp4, E2M1_MAGNITUDES),
}
DTYPES = (torch.float32, torch.bfloat16)


def all_bytes() -> torch.Tensor:
    return torch.arange(256, dtype=torch.int64).to(torch.uint8)


def test_every_scale_byte_is_its_power_of_two():
    want = [e8m0_value(code) for code in range(256)]
    got = numpy_of(scale_to_float32(all_bytes()))
    np.testing.assert_array_equal(got, want)
    assert got[0] == 2.0**-127


def test_every_fp8_code_is_dequantised_to_its_value():
    codes = all_bytes().view(torch.float8_e4m3fn).view(2, 128)
    scale = torch.tensor([[130]], dtype=torch.uint8)
    want = np.array([e4m3_value(code) * 8 for code in range(256)]).reshape(2, 128)
    np.testing.assert_array_equal(numpy_of(dequantize_fp8_block(codes, scale)), want)


def test_fp8_blocks_take_their_own_scale_and_the_last_ones_are_short():
    codes = torch.full((130, 257), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)  # 1.0
    scale = torch.tensor([[127, 128, 129], [0, 254, 1]], dtype=torch.uint8)
    got = numpy_of(dequantize_fp8_block(codes, scale))
    for row in range(130):
        for column in range(257):
            assert got[row, column] == e8m0_value(int(scale[row // 128, column // 128]))


def test_every_fp4_byte_holds_the_even_input_in_its_low_nibble():
    codes = all_bytes().view(torch.int8).view(16, 16)
    scale = torch.arange(120, 136, dtype=torch.int64).to(torch.uint8).view(16, 1)
    got = numpy_of(dequantize_fp4_group(codes, scale))
    for code in range(256):
        row, column = divmod(code, 16)
        factor = e8m0_value(120 + row)
        assert got[row, 2 * column] == e2m1_value(code & 15) * factor
        assert got[row, 2 * column + 1] == e2m1_value(code >> 4) * factor


def test_fp4_groups_of_32_inputs_take_their_own_scale():
    codes = torch.full((2, 48), 0x22, dtype=torch.int8)  # 1.0, 1.0
    scale = torch.tensor([[127, 128, 129], [1, 0, 254]], dtype=torch.uint8)
    got = numpy_of(dequantize_fp4_group(codes, scale))
    want = np.array([[e8m0_value(int(code)) for code in row for _ in range(32)] for row in scale])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("width", "group"), [(128, 128), (200, 64), (33, 32), (1, 32), (127, 128)])
def test_fake_quantisation_equals_the_definition(name, dtype, width, group):
    ours, oracle, _ = FORMATS[name]
    values = (torch.randn(5, width) * torch.tensor([[1e-3], [0.3], [1.0], [40.0], [3e4]])).to(dtype)
    got = ours(values, group=group)
    assert got.dtype == dtype
    np.testing.assert_array_equal(numpy_of(got), oracle(numpy_of(values), group=group))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("exponent", [-9, 0, 5])
def test_every_tie_between_two_codes_goes_to_the_even_one(name, dtype, exponent):
    ours, oracle, magnitudes = FORMATS[name]
    ties = [(low + high) / 2 for low, high in pairwise(magnitudes)]
    one_group = [magnitudes[-1], *ties, *(-tie for tie in ties)]
    values = (torch.tensor([one_group], dtype=torch.float64) * 2.0**exponent).to(dtype)
    got = numpy_of(ours(values, group=len(one_group)))
    np.testing.assert_array_equal(got, oracle(numpy_of(values), group=len(one_group)))
    upward = np.abs(got[0, 1:]) > np.abs(numpy_of(values)[0, 1:])
    assert 0.4 < upward.mean() < 0.6


@pytest.mark.parametrize("name", FORMATS)
def test_the_scale_is_the_smallest_power_of_two_that_fits(name):
    ours, oracle, magnitudes = FORMATS[name]
    largest = torch.tensor(magnitudes[-1], dtype=torch.float32)
    just_above = torch.nextafter(largest, torch.tensor(torch.inf))
    just_below = torch.nextafter(largest, torch.tensor(0.0))
    for amax in (largest, just_above, just_below, largest * 2**20, just_above * 2**20):
        values = torch.stack((amax, amax * 0.3, -amax / 1000)).view(1, 3)
        np.testing.assert_array_equal(
            numpy_of(ours(values, group=3)), oracle(numpy_of(values), group=3), err_msg=str(amax)
        )


@pytest.mark.parametrize("name", FORMATS)
def test_tiny_groups_use_the_floor_scale_and_subnormal_codes(name):
    ours, oracle, magnitudes = FORMATS[name]
    step = 2.0**-22 * magnitudes[1] if name == "fp8" else 2.0**-127
    values = torch.tensor([[0.0, -0.0, step, -1.5 * step, 2.5 * step, 0.4 * step]], dtype=torch.float32)
    got = numpy_of(ours(values, group=6))
    np.testing.assert_array_equal(got, oracle(numpy_of(values), group=6))
    np.testing.assert_array_equal(got[0], [0.0, 0.0, step, -2 * step, 2 * step, 0.0])


@pytest.mark.parametrize("name", FORMATS)
def test_roundings_go_up_as_often_as_down(name):
    ours, _, _ = FORMATS[name]
    values = torch.rand(400, 128) + 0.5
    rounded = ours(values, group=32)
    moved = rounded != values
    share = (rounded > values)[moved].double().mean().item()
    # five standard deviations of a fair coin
    assert abs(share - 0.5) < 2.5 / math.sqrt(int(moved.sum()))


def sylvester(width: int) -> np.ndarray:
    signs = [[(-1) ** bin(row & column).count("1") for column in range(width)] for row in range(width)]
    return np.array(signs) * width**-0.5


@pytest.mark.parametrize("width", [1, 32, 128])
def test_hadamard_is_in_sylvester_order(width):
    np.testing.assert_allclose(numpy_of(hadamard_matrix(width)), sylvester(width), rtol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 256])
def test_index_values_are_rotated_rounded_and_quantised(dtype, width):
    # whole numbers and a width whose root is a power of two: the rotation is exact, then rounds to bfloat16
    values = torch.randint(-40, 41, (6, width)).to(dtype)
    rotated = numpy_of(values) @ sylvester(width)
    rotated = to_bf16(rotated) if dtype is torch.bfloat16 else rotated
    got = quantize_index(values, format=IndexFormat.FP4_GROUP)
    np.testing.assert_array_equal(numpy_of(got), fake_fp4(rotated, group=32))


def test_index_values_of_the_release_width_are_quantised_alike_wherever_no_rounding_is_near_a_tie():
    values = torch.randn(64, 128).to(torch.bfloat16)
    rotated = numpy_of(values) @ sylvester(128)
    low, high = (fake_fp4(to_bf16(rotated * factor), group=32) for factor in (1 - 1e-6, 1 + 1e-6))
    sure = low == high
    got = numpy_of(quantize_index(values, format=IndexFormat.FP4_GROUP))
    np.testing.assert_array_equal(got[sure], low[sure])
    assert sure.mean() > 0.99


def test_plain_index_values_stay_as_they_are():
    values = torch.randn(3, 40)
    assert torch.equal(quantize_index(values, format=IndexFormat.PLAIN), values)


RELEASE_WEIGHTS = (WeightFormat.PLAIN, WeightFormat.FP8_BLOCK, WeightFormat.FP4_GROUP)


def random_weight(format: WeightFormat, outputs: int, inputs: int) -> StoredWeight:
    if format is WeightFormat.PLAIN:
        return StoredWeight(torch.randn(outputs, inputs).to(torch.bfloat16), None, format)
    codes = torch.randint(0, 255, (outputs, inputs), dtype=torch.uint8)
    if format is WeightFormat.FP8_BLOCK:
        scale = torch.randint(100, 140, (-(-outputs // 128), -(-inputs // 128))).to(torch.uint8)
        return StoredWeight((codes & 0xFE).view(torch.float8_e4m3fn), scale, format)
    if format is WeightFormat.INT8_CHANNEL:
        return StoredWeight(codes.view(torch.int8), torch.rand(outputs), format)
    if format is WeightFormat.INT4_CHANNEL:
        return StoredWeight(codes[: outputs // 2].view(torch.int8), torch.rand(outputs), format)
    scale = torch.randint(100, 140, (outputs, inputs // 32)).to(torch.uint8)
    if format is WeightFormat.MXFP8:
        return StoredWeight((codes & 0xFE).view(torch.float8_e4m3fn), scale, format)
    return StoredWeight(codes[:, : inputs // 2].view(torch.int8), scale, format)


@pytest.mark.parametrize("format", RELEASE_WEIGHTS, ids=lambda each: each.name)
@pytest.mark.parametrize(("low", "high"), [(0, 128), (128, 300), (256, 300), (0, 300)])
def test_rows_of_a_weight_are_those_rows(format, low, high):
    weight = random_weight(format, 300, 192)
    part = weight.rows(low, high)
    assert (part.num_outputs, part.num_inputs) == (high - low, 192)
    assert torch.equal(part.to_float32(), weight.to_float32()[low:high])


def test_a_float32_weight_is_not_copied():
    weight = StoredWeight(torch.randn(3, 4), None, WeightFormat.PLAIN)
    assert weight.to_float32().data_ptr() == weight.codes.data_ptr()


@pytest.mark.parametrize("format", [WeightFormat.FP8_BLOCK, WeightFormat.FP4_GROUP])
def test_a_quantised_weight_without_scale_is_refused(format):
    weight = StoredWeight(random_weight(format, 4, 32).codes, None, format)
    with pytest.raises(ContractError, match="needs a scale"):
        weight.to_float32()

"""Conversions between weight formats against an independent decoder, brute force and other converters."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_v4.errors import CheckpointError, ContractError
from ascend_v4.operators.contract import CATALOG
from ascend_v4.operators.contracts.transcode import (
    Rounding,
    RowStats,
    bf16_to_int8,
    fp4_to_int4,
    fp4_to_int8,
    fp8_to_int8,
)
from ascend_v4.operators.contracts.transcode_exact import (
    bf16_to_fp4,
    bf16_to_fp8,
    derive_fp4_scale,
    derive_fp8_scale,
    fp4_to_bf16,
    fp8_scale_to_mx,
    fp8_to_bf16,
    int8_to_fp4,
    mx_scale_to_fp8,
    negative_zeros,
)
from ascend_v4.operators.select import load_backend, select
from ascend_v4.operators.testing import transcode
from ascend_v4.operators.testing.cases import CPU, Case

load_backend("cpu")
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
PROVIDERS = ("reference", "native")
CASES = [
    Case(CATALOG[name], implementation, recipe, torch.float32, CPU, True)
    for name, recipes in transcode.recipes().items()
    for implementation in (*CATALOG[name].implementations, None)
    for recipe in recipes
]


@pytest.fixture(params=PROVIDERS)
def run(request):
    """Calls an operator by one provider, the reference where an operator has no native kernel."""

    def call(operator, *args, **kwargs):
        native = [each for each in operator.implementations if each.provider == "native"]
        if request.param == "reference" or not native:
            return operator.reference(*args, **kwargs)
        if native[0].unusable() is not None:
            pytest.skip(native[0].unusable())
        return native[0].call(*args, **kwargs)

    return call


def decode_fp4(codes, scale):
    """The real numbers of FP4 weights, float64, written without the project's tables."""
    packed = codes.numpy().view(np.uint8)
    nibbles = np.empty((packed.shape[0], packed.shape[1] * 2), np.uint8)
    nibbles[:, 0::2], nibbles[:, 1::2] = packed & 15, packed >> 4
    real = E2M1[nibbles & 7] * np.where(nibbles & 8, -1.0, 1.0)
    return real * np.repeat(np.ldexp(1.0, scale.numpy().astype(int) - 127), 32, axis=1)


def decode_fp8(codes, blocks):
    """The real numbers of FP8 weights, float64, from sign, exponent and fraction."""
    raw = codes.view(torch.uint8).numpy().astype(int)
    exponent, fraction = raw >> 3 & 15, raw & 7
    magnitude = np.where(
        exponent > 0, np.ldexp(8.0 + fraction, exponent - 10), np.ldexp(fraction.astype(float), -9)
    )
    factors = np.ldexp(1.0, blocks.numpy().astype(int) - 127)
    wide = np.repeat(np.repeat(factors, 128, 0), 128, 1)[: raw.shape[0], : raw.shape[1]]
    return magnitude * np.where(raw & 128, -1.0, 1.0) * wide


def drawn_fp4(seed, num_rows, num_inputs, *, span):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (num_rows, num_inputs // 2), generator=generator, dtype=torch.uint8)
    scale = torch.randint(0, span + 1, (num_rows, num_inputs // 32), generator=generator) + 117
    return codes.view(torch.int8), scale.to(torch.uint8)


def drawn_fp8(seed, num_rows, num_inputs):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (num_rows, num_inputs), generator=generator, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] ^= 1
    blocks = torch.randint(112, 116, (-(-num_rows // 128), -(-num_inputs // 128)), generator=generator)
    return codes.view(torch.float8_e4m3fn), blocks.to(torch.uint8)


def to_int8(run, codes, scale, rounding=Rounding.EXACT):
    out = torch.empty(codes.shape[0], codes.shape[1] * 2, dtype=torch.int8)
    row_scale = torch.empty(len(codes))
    stats = run(fp4_to_int8, codes, scale, out, row_scale, rounding=rounding)
    return out, row_scale, RowStats.of(stats)


def to_int4(run, codes, scale, parts=1):
    out = torch.empty(len(codes) // 2, codes.shape[1] * 2, dtype=torch.int8)
    row_scale, bias = torch.empty(len(codes)), torch.empty(len(codes), parts)
    stats = run(fp4_to_int4, codes, scale, out, row_scale, bias)
    low, high = (out << 4) >> 4, out >> 4
    return torch.stack((low, high), 1).flatten(0, 1), row_scale, bias, RowStats.of(stats)


def decoded(codes, row_scale):
    return codes.numpy().astype(np.float64) * row_scale.numpy().astype(np.float64)[:, None]


def squared(values):
    return (values**2).sum(-1)


def quantize_like_the_release(weights):
    """FP4 codes and scale bytes: the smallest power of two that keeps a group within 6."""
    groups = weights.reshape(len(weights), -1, 32)
    exponent = np.ceil(np.log2(np.abs(groups).max(-1) / 6.0)).astype(int)
    scaled = groups / np.ldexp(1.0, exponent)[..., None]
    code = np.abs(np.abs(scaled)[..., None] - E2M1).argmin(-1).astype(np.uint8)
    nibbles = (code | np.where(scaled < 0, 8, 0).astype(np.uint8)).reshape(len(weights), -1)
    packed = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return torch.from_numpy(packed.view(np.int8)), torch.from_numpy((exponent + 127).astype(np.uint8))


def test_rows_whose_scales_span_three_decode_to_the_identical_numbers(run):
    codes, scale = drawn_fp4(1, 40, 256, span=3)
    out, row_scale, stats = to_int8(run, codes, scale)
    assert np.array_equal(decoded(out, row_scale), decode_fp4(codes, scale))
    assert (stats.exact_rows, stats.changed_weights, stats.squared_error) == (40, 0, 0.0)
    assert out.abs().max() <= 96


def test_gaussian_weights_are_exact_as_a_whole(run):
    weights = np.random.default_rng(2).normal(0, 0.02, (48, 2048))
    codes, scale = quantize_like_the_release(weights)
    out, row_scale, stats = to_int8(run, codes, scale)
    assert stats.exact_rows == 48
    assert np.array_equal(decoded(out, row_scale), decode_fp4(codes, scale))
    assert stats.absmax_squared_error > 0


def test_a_row_is_exact_whenever_some_power_of_two_holds_it(run):
    codes, scale = drawn_fp4(3, 400, 64, span=9)
    codes[::3] &= 0x22
    codes[1::3, :16] &= 0x11
    real = decode_fp4(codes, scale)
    possible = np.zeros(len(codes), bool)
    for exponent in range(-30, 10):
        whole = real / np.ldexp(1.0, exponent)
        possible |= (np.rint(whole) == whole).all(1) & (np.abs(whole).max(1) <= 127)
    out, row_scale, stats = to_int8(run, codes, scale)
    same = (decoded(out, row_scale) == real).all(1)
    assert np.array_equal(same[possible], np.ones(possible.sum(), bool))
    assert stats.exact_rows == same.sum()
    assert 0 < possible.sum() < len(codes)


def test_every_exact_row_of_wide_spans_keeps_its_numbers_and_the_others_lose_only_small_groups(run):
    codes, scale = drawn_fp4(4, 60, 512, span=6)
    out, row_scale, stats = to_int8(run, codes, scale)
    real, got = decode_fp4(codes, scale), decoded(out, row_scale)
    power = np.log2(row_scale.numpy()) % 1 == 0
    large = np.repeat(scale.numpy() >= scale.numpy().max(1, keepdims=True) - 3, 32, axis=1)
    assert power.any()
    assert np.array_equal(got[power][large[power]], real[power][large[power]])
    assert stats.changed_weights == (got != real).sum()
    assert stats.squared_error == pytest.approx(squared(got - real).sum(), rel=1e-12)
    assert stats.squared_norm == pytest.approx(squared(real).sum(), rel=1e-12)


def test_each_row_takes_the_scale_of_smaller_squared_error(run):
    codes, scale = drawn_fp4(5, 300, 64, span=12)
    out, row_scale, stats = to_int8(run, codes, scale)
    absmax_out, absmax_scale, absmax_stats = to_int8(run, codes, scale, Rounding.ABSMAX)
    real = decode_fp4(codes, scale)
    amax = np.abs(real).max(1)
    step = np.ldexp(1.0, np.ceil(np.log2(amax / 127.0)).astype(int))
    power_error = squared(np.rint(real / step[:, None]) * step[:, None] - real)
    absmax_error = squared(decoded(absmax_out, absmax_scale) - real)
    error = squared(decoded(out, row_scale) - real)
    assert np.allclose(error, np.minimum(power_error, absmax_error), rtol=1e-12, atol=0)
    assert (power_error > absmax_error).any()
    assert (power_error < absmax_error).any()
    assert stats.absmax_squared_error == absmax_stats.squared_error


def test_absmax_gives_what_other_converters_give(run):
    codes, scale = drawn_fp4(6, 64, 256, span=5)
    out, row_scale, _ = to_int8(run, codes, scale, Rounding.ABSMAX)
    weights = torch.from_numpy(decode_fp4(codes, scale)).float()
    want = weights.abs().amax(1, keepdim=True) / 127
    assert torch.equal(row_scale, want.squeeze(1))
    assert torch.equal(out, torch.round(weights / want).to(torch.int8))


def test_the_int8_scale_is_a_power_of_two_as_low_as_the_row_fits(run):
    codes, scale = drawn_fp4(7, 20, 64, span=0)
    out, row_scale, _ = to_int8(run, codes, scale)
    largest = out.abs().amax(1)
    assert torch.equal(row_scale, torch.exp2(torch.log2(row_scale).round()))
    assert bool(((largest == 64) | (largest == 96)).all())


def test_a_row_of_zeros_has_scale_one(run):
    codes = torch.tensor([[0] * 16, [-0x78] * 16], dtype=torch.int8)
    scale = torch.tensor([[0], [254]], dtype=torch.uint8)
    out, row_scale, stats = to_int8(run, codes, scale)
    packed, int4_scale, bias, _ = to_int4(run, codes, scale)
    assert row_scale.tolist() == int4_scale.tolist() == [1.0, 1.0]
    assert not out.any()
    assert not packed.any()
    assert not bias.any()
    assert stats.exact_rows == 2


def test_groups_of_zeros_do_not_count_toward_the_span(run):
    codes, scale = drawn_fp4(8, 10, 96, span=2)
    codes[:, 16:32] = -0x80
    scale[:, 1] = 3
    codes[:, 32:48] = 0
    scale[:, 2] = 200
    codes[:, 16:32] &= 0x08
    _, _, stats = to_int8(run, codes, scale)
    assert stats.exact_rows == 10


@pytest.mark.parametrize("byte", [0, 1, 60, 200, 253, 254])
def test_scales_at_the_ends_of_the_format_stay_finite_and_normal(run, byte):
    codes, scale = drawn_fp4(9, 6, 64, span=0)
    scale[:] = byte
    out, row_scale, stats = to_int8(run, codes, scale)
    real = decode_fp4(codes, scale)
    assert bool((row_scale >= 2.0**-126).all())
    assert bool(row_scale.isfinite().all())
    assert np.abs(decoded(out, row_scale) - real).max() <= row_scale.max().item() / 2
    assert byte <= 1 or stats.exact_rows == 6


def brute_int4_error(real, *, steps):
    """Least squared error of a row over a fine grid of scales."""
    amax = np.abs(real).max()
    best = np.inf
    for scale in amax / 7 * np.linspace(0.05, 1.3, steps):
        codes = np.clip(np.rint(real / scale), -7, 7)
        best = min(best, squared(codes * scale - real))
    return best


def test_int4_search_is_no_worse_than_brute_force_and_better_than_absmax(run):
    codes, scale = drawn_fp4(10, 24, 64, span=4)
    got, row_scale, _, stats = to_int4(run, codes, scale)
    real = decode_fp4(codes, scale)
    error = squared(decoded(got, row_scale) - real)
    brute = np.array([brute_int4_error(row, steps=3000) for row in real])
    absmax = np.abs(real).max(1, keepdims=True) / 7
    absmax_error = squared(np.rint(real / absmax) * absmax - real)
    assert (error <= brute * (1 + 1e-9)).all()
    assert np.allclose(error, brute, rtol=2e-3)
    assert (error <= absmax_error * (1 + 1e-6)).all()
    assert stats.squared_error == pytest.approx(error.sum(), rel=1e-12)
    assert stats.absmax_squared_error == pytest.approx(absmax_error.sum(), rel=1e-6)
    assert got.abs().max() <= 7


def test_int4_clips_a_row_with_one_outlier(run):
    codes, scale = drawn_fp4(11, 2, 512, span=0)
    codes &= 0x33
    codes[:, 0] = 0x07
    got, row_scale, _, stats = to_int4(run, codes, scale)
    assert bool((row_scale < torch.from_numpy(np.abs(decode_fp4(codes, scale)).max(1) / 7)).all())
    assert stats.squared_error < stats.absmax_squared_error
    assert bool((got[:, 0] == 7).all())


@pytest.mark.parametrize("parts", [1, 3, 16, 96])
def test_int4_bias_is_eight_times_the_scaled_sums(run, parts):
    codes, scale = drawn_fp4(12, 6, 96, span=3)
    got, row_scale, bias, _ = to_int4(run, codes, scale, parts)
    sums = decoded(got, row_scale).reshape(6, parts, -1).sum(-1)
    assert np.array_equal(bias.numpy(), (8 * sums).astype(np.float32))


def test_fp8_rows_are_scaled_by_their_largest_magnitude(run):
    codes, blocks = drawn_fp8(13, 200, 300)
    codes.view(torch.uint8)[7] = 0
    out, row_scale = torch.empty(200, 300, dtype=torch.int8), torch.empty(200)
    stats = RowStats.of(run(fp8_to_int8, codes, blocks, out, row_scale, first_row=0))
    weights = torch.from_numpy(decode_fp8(codes, blocks)).float()
    want = (weights.abs().amax(1) / 127).masked_fill(weights.abs().amax(1) == 0, 1.0)
    error = squared(decoded(out, row_scale) - weights.double().numpy())
    assert torch.equal(row_scale, want)
    assert torch.equal(out, torch.round(weights / want[:, None]).to(torch.int8))
    assert stats.squared_error == pytest.approx(error.sum(), rel=1e-4)
    assert stats.squared_norm == pytest.approx(weights.double().square().sum().item(), rel=1e-4)
    assert stats.changed_weights == (decoded(out, row_scale) != weights.double().numpy()).sum()
    assert stats.exact_rows == 1


def test_plain_rows_are_scaled_by_their_largest_magnitude(run):
    weights = torch.randn(30, 200, generator=torch.Generator().manual_seed(14)).to(torch.bfloat16)
    weights[3] = 0
    weights[4] = torch.arange(200) % 128
    weights[4, 0] = -127
    out, row_scale = torch.empty(30, 200, dtype=torch.int8), torch.empty(30)
    stats = RowStats.of(run(bf16_to_int8, weights, out, row_scale))
    want = (weights.float().abs().amax(1) / 127).masked_fill(weights.abs().amax(1) == 0, 1.0)
    assert torch.equal(row_scale, want)
    assert torch.equal(out, torch.round(weights.float() / want[:, None]).to(torch.int8))
    assert stats.exact_rows == 2


def test_bf16_holds_every_fp4_number_and_sign(run):
    codes, scale = drawn_fp4(15, 253, 64, span=0)
    scale[:] = torch.arange(253, dtype=torch.uint8)[:, None]
    out = torch.empty(253, 64, dtype=torch.bfloat16)
    run(fp4_to_bf16, codes, scale, out)
    real = decode_fp4(codes, scale)
    assert np.array_equal(out.double().numpy(), real)
    assert np.array_equal(np.signbit(out.double().numpy()), np.signbit(real))


def test_bf16_holds_every_fp8_number_and_sign(run):
    every = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    codes = every.repeat(2, 1).view(torch.float8_e4m3fn)
    blocks = torch.tensor([[20, 230]], dtype=torch.uint8)
    out = torch.empty(codes.shape, dtype=torch.bfloat16)
    run(fp8_to_bf16, codes, blocks, out, first_row=0)
    real = decode_fp8(codes, blocks)
    assert np.array_equal(out.double().numpy(), real)
    assert np.array_equal(np.signbit(out.double().numpy()), np.signbit(real))


def test_mx_scales_give_the_numbers_of_the_blocks_and_the_way_back():
    codes, blocks = drawn_fp8(16, 300, 416)
    wide = torch.empty(300, 13, dtype=torch.uint8)
    fp8_scale_to_mx.reference(blocks, wide, first_row=0)
    factors = np.repeat(np.ldexp(1.0, wide.numpy().astype(int) - 127), 32, axis=1)
    raw = decode_fp8(codes, torch.full_like(blocks, 127))
    assert np.array_equal(raw * factors, decode_fp8(codes, blocks))
    again = torch.empty_like(blocks)
    mx_scale_to_fp8.reference(wide, again)
    assert torch.equal(again, blocks)


def test_mx_scales_that_differ_inside_a_block_are_refused():
    wide = torch.full((130, 8), 120, dtype=torch.uint8)
    wide[129, 6] = 121
    with pytest.raises(CheckpointError, match="row 129, group 6"):
        mx_scale_to_fp8.reference(wide, torch.empty(2, 2, dtype=torch.uint8))


def test_negative_zeros_are_marked_and_counted(run):
    codes, _ = drawn_fp4(17, 9, 96, span=0)
    bitmap = torch.empty(9, 12, dtype=torch.uint8)
    count = run(negative_zeros, codes, bitmap)
    packed = codes.numpy().view(np.uint8)
    marked = np.stack((packed & 15, packed >> 4), -1).reshape(9, 96) == 8
    assert np.array_equal(np.unpackbits(bitmap.numpy(), axis=1, bitorder="little"), marked)
    assert count.tolist() == [marked.sum()]


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.binary(min_size=64, max_size=64), st.lists(st.integers(117, 120), min_size=4, max_size=4))
def test_release_bytes_come_back_from_exact_rows(code_bytes, scale_bytes):
    codes = torch.frombuffer(bytearray(code_bytes), dtype=torch.int8).view(2, 32)
    scale = torch.tensor(scale_bytes, dtype=torch.uint8).view(2, 2)
    int8, row_scale = torch.empty(2, 64, dtype=torch.int8), torch.empty(2)
    bitmap, again = torch.empty(2, 8, dtype=torch.uint8), torch.empty_like(codes)
    fp4_to_int8(codes, scale, int8, row_scale, rounding=Rounding.EXACT)
    negative_zeros(codes, bitmap)
    stats = RowStats.of(int8_to_fp4(int8, row_scale, scale, bitmap, again))
    assert torch.equal(again, codes)
    assert stats.exact_rows == 2


def test_rounded_rows_go_back_to_the_nearest_code_and_say_so():
    codes, scale = drawn_fp4(18, 30, 128, span=0)
    int8, row_scale, _ = to_int8(fp4_rounded_by_reference, codes, scale, Rounding.ABSMAX)
    again = torch.empty_like(codes)
    stats = RowStats.of(int8_to_fp4.reference(int8, row_scale, scale, None, again))
    assert np.array_equal(decode_fp4(again, scale), decode_fp4(codes, scale))
    assert stats.exact_rows == 0
    assert stats.squared_error > 0


def fp4_rounded_by_reference(operator, *args, **kwargs):
    return operator.reference(*args, **kwargs)


def test_a_bitmap_that_marks_a_number_is_refused():
    int8 = torch.zeros(1, 32, dtype=torch.int8)
    int8[0, 9] = 2
    bitmap = torch.tensor([[0, 2, 0, 0]], dtype=torch.uint8)
    scale = torch.full((1, 1), 127, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="row 0, column 9"):
        int8_to_fp4.reference(int8, torch.ones(1), scale, bitmap, torch.empty(1, 16, dtype=torch.int8))


def test_release_bytes_come_back_from_bf16_with_the_kept_scales():
    codes, scale = drawn_fp4(19, 20, 96, span=7)
    real, again = torch.empty(20, 96, dtype=torch.bfloat16), torch.empty_like(codes)
    fp4_to_bf16.reference(codes, scale, real)
    bf16_to_fp4.reference(real, scale, again)
    fp8, blocks = drawn_fp8(20, 140, 200)
    fp8_real, fp8_again = torch.empty(140, 200, dtype=torch.bfloat16), torch.empty_like(fp8)
    fp8_to_bf16.reference(fp8, blocks, fp8_real, first_row=0)
    bf16_to_fp8.reference(fp8_real, blocks, fp8_again, first_row=0)
    assert torch.equal(again, codes)
    assert torch.equal(fp8_again.view(torch.uint8), fp8.view(torch.uint8))


def test_derived_scales_hold_the_identical_numbers():
    codes, scale = drawn_fp4(21, 20, 96, span=7)
    codes[3] = 0
    real, derived = torch.empty(20, 96, dtype=torch.bfloat16), torch.empty(20, 3, dtype=torch.uint8)
    again = torch.empty_like(codes)
    fp4_to_bf16.reference(codes, scale, real)
    derive_fp4_scale.reference(real, derived)
    bf16_to_fp4.reference(real, derived, again)
    fp8, blocks = drawn_fp8(22, 140, 200)
    fp8_real, fp8_derived = torch.empty(140, 200, dtype=torch.bfloat16), torch.empty_like(blocks)
    fp8_again = torch.empty_like(fp8)
    fp8_to_bf16.reference(fp8, blocks, fp8_real, first_row=0)
    derive_fp8_scale.reference(fp8_real, fp8_derived)
    bf16_to_fp8.reference(fp8_real, fp8_derived, fp8_again, first_row=0)
    assert np.array_equal(decode_fp4(again, derived), decode_fp4(codes, scale))
    assert np.array_equal(decode_fp8(fp8_again, fp8_derived), decode_fp8(fp8, blocks))


def test_numbers_without_an_fp4_or_fp8_form_are_refused():
    numbers = torch.ones(1, 32, dtype=torch.bfloat16)
    numbers[0, 5] = 1.25
    group, block = torch.empty(1, 1, dtype=torch.uint8), torch.empty(1, 1, dtype=torch.uint8)
    derive_fp4_scale.reference(numbers, group)
    with pytest.raises(CheckpointError, match="row 0, column 5"):
        bf16_to_fp4.reference(numbers, group, torch.empty(1, 16, dtype=torch.int8))
    numbers[0, 7] = 1.0078125
    derive_fp8_scale.reference(numbers, block)
    with pytest.raises(CheckpointError, match="row 0, column 7"):
        bf16_to_fp8.reference(numbers, block, torch.empty(1, 32, dtype=torch.uint8), first_row=0)


@pytest.mark.parametrize("target", ["int8", "int4", "bf16"])
def test_a_nan_scale_of_fp4_is_refused_with_its_place(run, target):
    codes, scale = drawn_fp4(23, 6, 96, span=1)
    scale[4, 2] = 255
    convert = {
        "int8": lambda: to_int8(run, codes, scale),
        "int4": lambda: to_int4(run, codes, scale),
        "bf16": lambda: run(fp4_to_bf16, codes, scale, torch.empty(6, 96, dtype=torch.bfloat16)),
    }[target]
    with pytest.raises(CheckpointError, match="row 4"):
        convert()


@pytest.mark.parametrize("damage", ["code", "scale"])
@pytest.mark.parametrize("target", ["int8", "bf16"])
def test_a_nan_in_fp8_is_refused_with_its_row(run, target, damage):
    codes, blocks = drawn_fp8(24, 140, 140)
    if damage == "code":
        codes.view(torch.uint8)[128, 139] = 0xFF
    else:
        blocks[1, 1] = 255
    out, row_scale = torch.empty(140, 140, dtype=torch.int8), torch.empty(140)
    wide = torch.empty(140, 140, dtype=torch.bfloat16)
    convert = {
        "int8": lambda: run(fp8_to_int8, codes, blocks, out, row_scale, first_row=0),
        "bf16": lambda: run(fp8_to_bf16, codes, blocks, wide, first_row=0),
    }[target]
    with pytest.raises(CheckpointError, match="row 128"):
        convert()


def test_plain_weights_that_are_not_finite_are_refused_with_their_row(run):
    for wrong in (float("nan"), float("-inf")):
        weights = torch.ones(3, 40, dtype=torch.bfloat16)
        weights[2, 39] = wrong
        with pytest.raises(CheckpointError, match="row 2"):
            run(bf16_to_int8, weights, torch.empty(3, 40, dtype=torch.int8), torch.empty(3))


@pytest.mark.parametrize("byte", [0, 250])
def test_fp8_numbers_beyond_bf16_are_refused(run, byte):
    codes = torch.tensor([[0x01, 0x7E]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    blocks = torch.tensor([[byte]], dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="row 0"):
        run(fp8_to_bf16, codes, blocks, torch.empty(1, 2, dtype=torch.bfloat16), first_row=0)


def test_shapes_that_do_not_belong_together_are_refused(run):
    codes, scale = drawn_fp4(25, 3, 64, span=1)
    out, row_scale = torch.empty(3, 64, dtype=torch.int8), torch.empty(3)
    with pytest.raises(ContractError, match="do not make"):
        run(fp4_to_int8, codes, scale[:, :1], out, row_scale, rounding=Rounding.EXACT)
    with pytest.raises(ContractError, match="do not fit"):
        run(fp4_to_int8, codes, scale, out, torch.empty(2), rounding=Rounding.EXACT)
    with pytest.raises(ContractError, match="even"):
        run(fp4_to_int4, codes, scale, out[:1], row_scale, torch.empty(3, 1))
    with pytest.raises(ContractError, match="divide"):
        run(fp4_to_int4, codes[:2], scale[:2], out[:1], row_scale[:2], torch.empty(2, 5))
    fp8, blocks = drawn_fp8(26, 100, 64)
    with pytest.raises(ContractError, match="block scales"):
        run(fp8_to_int8, fp8, blocks, torch.empty(100, 64, dtype=torch.int8), torch.empty(100), first_row=29)
    with pytest.raises(ContractError, match="bitmap"):
        run(negative_zeros, codes, torch.empty(3, 7, dtype=torch.uint8))


def test_runs_of_rows_give_the_rows_of_the_whole_and_statistics_that_add_up(run):
    codes, blocks = drawn_fp8(27, 300, 256)
    whole, whole_scale = torch.empty(300, 256, dtype=torch.int8), torch.empty(300)
    stats = RowStats.of(run(fp8_to_int8, codes, blocks, whole, whole_scale, first_row=0))
    out, row_scale = torch.empty_like(whole), torch.empty_like(whole_scale)
    added = RowStats(0, 0, 0, 0.0, 0.0, 0.0)
    for low, high in ((0, 100), (100, 131), (131, 300)):
        some = run(fp8_to_int8, codes[low:high], blocks, out[low:high], row_scale[low:high], first_row=low)
        added = added + RowStats.of(some)
    assert torch.equal(out, whole)
    assert torch.equal(row_scale, whole_scale)
    assert (added.rows, added.changed_weights) == (300, stats.changed_weights)
    assert added.squared_error == pytest.approx(stats.squared_error, rel=1e-12)


def test_two_threads_convert_as_one_does(run):
    slabs = [drawn_fp4(seed, 64, 256, span=5) for seed in range(8)]
    alone = [to_int8(run, *slab) for slab in slabs]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda slab: to_int8(run, *slab), slabs))
    for (got, got_scale, got_stats), (want, want_scale, want_stats) in zip(together, alone, strict=True):
        assert torch.equal(got, want)
        assert torch.equal(got_scale, want_scale)
        assert got_stats == want_stats


def test_scales_may_be_bytes_or_e8m0(run):
    codes, scale = drawn_fp4(28, 5, 64, span=3)
    as_bytes, byte_scale, _ = to_int8(run, codes, scale)
    as_e8m0, e8m0_scale, _ = to_int8(run, codes, scale.view(torch.float8_e8m0fnu))
    assert torch.equal(as_bytes, as_e8m0)
    assert torch.equal(byte_scale, e8m0_scale)


def test_conversions_run_natively_where_the_extension_was_built():
    choices = select("cpu").choices
    providers = {name: choices[name].provider for name in ("fp4_to_int8", "fp8_to_int8", "fp4_to_bf16")}
    refused = " ".join(reason for name in providers for reason in choices[name].refused)
    assert set(providers.values()) == {"native"} or "native:" in refused


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case.slow else ()) for case in CASES], ids=str
)
def test_implementation_agrees_with_reference(case):
    if case.unusable is not None:
        pytest.skip(case.unusable)
    case.require_correct()


def test_every_conversion_has_cases():
    declared = {name for name, each in CATALOG.items() if each.family.startswith("transcode")}
    assert set(transcode.recipes()) == declared

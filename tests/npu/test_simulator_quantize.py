"""Simulated quantisers against element-by-element arithmetic, and the calls that they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.operators.simulator import elements
from ascend_v4.operators.simulator.formats import unpack_int4
from ascend_v4.operators.simulator.quantize import offset_of_words, scale_of_words
from tests.npu.meta_agreement import called
from tests.npu.vendor_calls import refuses, simulated

A2, A3, A950 = (simulated(chip) for chip in Chip)
DYNAMIC = "npu::npu_dynamic_quant"
STATIC = "npu::npu_quantize"
WORDS = "npu::npu_trans_quant_param"
MX = "npu::npu_dynamic_mx_quant"
GROUPED_MX = "npu::npu_grouped_dynamic_mx_quant"
ANTI_MX = "npu::npu_anti_mx_quant"
BLOCKS = "npu::npu_dynamic_block_quant"
CAST = "npu::npu_dtype_cast"
E4M3 = torch.float8_e4m3fn
FP4_GRID = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def bf16(*shape):
    return torch.randn(*shape).to(torch.bfloat16)


@pytest.mark.parametrize("sim", [A2, A3, A950], ids=["a2", "a3", "950"])
def test_dynamic_quant_divides_each_token_by_its_largest_over_127(sim):
    x = bf16(3, 5, 8)
    codes, scale = called(sim, DYNAMIC, input=x)
    for token in np.ndindex(3, 5):
        row = x[token].float().numpy()
        largest = np.float32(np.abs(row).max()) / np.float32(127)
        assert scale[token] == largest
        assert codes[token].tolist() == np.rint(row / largest).tolist()


def test_dynamic_quant_gives_zeros_and_scale_zero_for_a_row_of_zeros():
    codes, scale = called(A3, DYNAMIC, input=torch.zeros(2, 8, dtype=torch.bfloat16))
    assert not codes.any()
    assert not scale.any()


def test_dynamic_quant_takes_a_row_of_nan_beside_others():
    x = bf16(2, 8)
    x[1] = float("nan")
    codes, scale = called(A3, DYNAMIC, input=x)
    assert torch.equal(codes[0], called(A3, DYNAMIC, input=x[:1])[0][0])
    assert math.isnan(scale[1])


def test_dynamic_quant_to_int4_packs_eight_values_to_an_int32_lowest_first():
    x = bf16(2, 16)
    codes, scale = called(A3, DYNAMIC, input=x, dst_type=16)
    want = (x.float() / scale[:, None]).round()
    assert codes.shape == (2, 2)
    assert torch.equal(unpack_int4(codes).float(), want)
    assert want.abs().max() == 7


@pytest.mark.parametrize("number", [24, 292])
def test_dynamic_quant_knows_both_numbers_of_fp8_on_950(number):
    x = bf16(2, 16)
    codes, scale = called(A950, DYNAMIC, input=x, dst_type=number)
    assert codes.dtype is E4M3
    assert torch.equal(scale, x.float().abs().amax(-1) / 448)


def test_dynamic_quant_smooths_rows_by_their_group():
    x, smooth = bf16(4, 8), bf16(2, 8).abs() + 1
    ends = torch.tensor([1, 4], dtype=torch.int32)
    codes, _scale = called(A3, DYNAMIC, input=x, smooth_scales=smooth, group_index=ends)
    alone, _ = called(A3, DYNAMIC, input=x[1:], smooth_scales=smooth[1])
    assert torch.equal(codes[1:], alone)


@pytest.mark.parametrize(("mode", "axis"), [("perchannel", 0), ("pertensor", (0, 1))])
def test_dynamic_quant_of_channels_and_tensors_is_for_950(mode, axis):
    x = bf16(4, 8)
    _codes, scale = called(A950, DYNAMIC, input=x, quant_mode=mode)
    assert torch.equal(scale.view(-1), (x.float().abs().amax(axis) / 127).view(-1))
    refuses(A3, DYNAMIC, "quant_mode", input=x, quant_mode=mode)


def test_dynamic_quant_takes_no_tokens():
    codes, scale = called(A3, DYNAMIC, input=torch.empty(0, 8, dtype=torch.bfloat16))
    assert codes.shape == (0, 8)
    assert scale.shape == (0,)


@pytest.mark.parametrize(
    ("problem", "given"),
    [
        ("float16 or bfloat16", {"input": torch.randn(2, 8)}),
        ("two axes", {"input": bf16(8)}),
        ("not among", {"input": bf16(2, 8), "dst_type": 24}),
        ("multiple of 8", {"input": bf16(2, 12), "dst_type": 16}),
        ("alike", {"input": bf16(2, 8), "smooth_scales": torch.ones(8)}),
        ("want \\(8,\\)", {"input": bf16(2, 8), "smooth_scales": bf16(7)}),
        ("HiFloat8", {"input": bf16(2, 8), "dst_type_max": 15.0}),
    ],
)
def test_dynamic_quant_refuses(problem, given):
    refuses(A3, DYNAMIC, problem, **given)


@pytest.mark.parametrize("divide", [True, False])
def test_quantize_divides_or_multiplies_along_its_axis(divide):
    x, scales, zero = torch.randn(3, 4), torch.rand(3) + 0.5, torch.tensor([1.0, -2.0, 3.0])
    codes = called(A3, STATIC, input=x, scales=scales, zero_points=zero, dtype=1, axis=0, div_mode=divide)
    factors = scales if divide else 1 / scales
    want = (x.double() / factors[:, None].double() + zero[:, None].double()).round()
    assert (codes.double() - want).abs().max() <= 0


def test_quantize_to_int4_is_what_the_vendors_tests_pack_weights_with():
    weight = torch.randint(-5, 5, (2, 16)).float()
    packed = called(
        A3,
        STATIC,
        input=weight,
        scales=torch.tensor([1.0]),
        zero_points=None,
        dtype=16,
        axis=-1,
        div_mode=False,
    )
    assert torch.equal(unpack_int4(packed).float(), weight)


def test_trans_quant_param_keeps_19_bits_and_an_offset_of_nine():
    scale = torch.tensor([0.3, 1.0, 7.7])
    words = called(A3, WORDS, scale=scale, offset=torch.tensor([-3.0, 255.0, 2.6]))
    back = scale_of_words(words)
    assert torch.all(back <= scale)
    assert torch.all(back > scale * (1 - 2**-9))
    assert torch.equal(offset_of_words(words), torch.tensor([-3.0, 255.0, 3.0]))


def exponent_of(amax, scale_alg, largest, top):
    """The release's two rules, in Python numbers."""
    if amax == 0:
        return 0
    if scale_alg == 0:
        return max(math.floor(math.log2(amax)) - top + 127, 0)
    return math.ceil(math.log2(float(np.float32(amax) / np.float32(largest)))) + 127


@pytest.mark.parametrize("scale_alg", [0, 1])
@pytest.mark.parametrize("width", [64, 96, 40])
def test_dynamic_mx_quant_scales_blocks_of_32_by_powers_of_two(width, scale_alg):
    x = bf16(3, width) * 50
    x[1, :32] = 0
    x[2, 0] = 448.0
    codes, scale = called(A950, MX, input=x, dst_type=24, scale_alg=scale_alg)
    assert scale.shape == (3, -(-width // 64), 2)
    flat = scale.view(3, -1)
    for row in range(3):
        for block in range(-(-width // 32)):
            values = x[row, block * 32 : block * 32 + 32].double()
            want = exponent_of(float(values.abs().max()), scale_alg, 448.0, 8)
            assert flat[row, block] == want
            scaled = (values * 2.0 ** (127 - want)).clamp(-448, 448).float().to(E4M3)
            assert torch.equal(
                codes[row, block * 32 : block * 32 + 32].view(torch.uint8), scaled.view(torch.uint8)
            )


def test_dynamic_mx_quant_pads_an_odd_number_of_scales_with_zero():
    _codes, scale = called(A950, MX, input=bf16(2, 96), dst_type=292)
    assert not scale[:, 1, 1].any()


def test_dynamic_mx_quant_gives_fp4_unless_told_otherwise():
    x = bf16(2, 64)
    codes, scale = called(A950, MX, input=x)
    assert codes.dtype is torch.uint8
    assert codes.shape == (2, 32)
    values = elements.decode_fp4(codes)
    factors = elements.decode_scale(scale).flatten(-2).repeat_interleave(32, -1)
    for got, value, factor in zip(values.view(-1), x.view(-1), factors.view(-1), strict=True):
        ratio = min(abs(float(value / factor)), 6.0)
        assert abs(float(got)) in [
            g for g in FP4_GRID if abs(g - ratio) == min(abs(e - ratio) for e in FP4_GRID)
        ]
        assert got == 0 or (got > 0) == (value > 0)


def test_fp4_ties_go_to_the_even_code():
    halfway = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -2.5, 9.0])
    assert elements.decode_fp4(elements.pack_fp4(elements.fp4_codes(halfway, "rint"))).tolist() == [
        *(0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 0.0, -2.0, 6.0)
    ]
    away = elements.decode_fp4(elements.pack_fp4(elements.fp4_codes(halfway, "round")))
    assert away.tolist() == [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -3.0, 6.0]
    down = elements.decode_fp4(elements.pack_fp4(elements.fp4_codes(halfway, "floor")))
    assert down.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, -0.5, -3.0, 6.0]


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_mx_quantisation_comes_back_along_any_axis(axis):
    x = bf16(64, 96)
    codes, scale = called(A950, MX, input=x, axis=axis, dst_type=24)
    back = called(A950, ANTI_MX, x=codes, mxscale=scale, axis=axis, dst_type=6)
    assert (back - x.float()).abs().max() <= x.float().abs().max() * 2**-3


@pytest.mark.parametrize(
    ("problem", "given"),
    [
        ("float16 or bfloat16", {"input": torch.randn(2, 64)}),
        ("multiple of 32", {"input": bf16(2, 64), "dst_type": 24, "block_size": 48}),
        ("scale_alg", {"input": bf16(2, 64), "scale_alg": 1}),
        ("round_mode", {"input": bf16(2, 64), "dst_type": 24, "round_mode": "floor"}),
        ("even last axis", {"input": bf16(2, 63)}),
        ("torch's own", {"input": bf16(2, 64), "dst_type": 45}),
    ],
)
def test_dynamic_mx_quant_refuses(problem, given):
    refuses(A950, MX, problem, **given)


def test_grouped_mx_quant_takes_blocks_down_the_rows_of_each_group():
    x = bf16(150, 3)
    ends = torch.tensor([40, 40, 140, 150], dtype=torch.int32)
    codes, pairs = called(A950, GROUPED_MX, x=x, group_index=ends, dst_type=24)
    assert pairs.shape == (6, 3, 2)
    for start, end, first in ((0, 40, 0), (40, 140, 2), (140, 150, 5)):
        for block in range(-(-(end - start) // 32)):
            rows = slice(start + block * 32, min(start + block * 32 + 32, end))
            for column in range(3):
                values = x[rows, column].double()
                want = exponent_of(float(values.abs().max()), 0, 448.0, 8)
                assert pairs[first + block // 2, column, block % 2] == want
                scaled = (values * 2.0 ** (127 - want)).clamp(-448, 448).float().to(E4M3)
                assert torch.equal(codes[rows, column].view(torch.uint8), scaled.view(torch.uint8))
    assert not pairs[5, :, 1].any()


@pytest.mark.parametrize(
    ("problem", "changed"),
    [
        ("does not rise", {"group_index": torch.tensor([40, 30, 64], dtype=torch.int32)}),
        ("ends at 60", {"group_index": torch.tensor([40, 60], dtype=torch.int32)}),
        ("must be int32", {"group_index": torch.tensor([64])}),
        ("blocksize", {"blocksize": 64}),
        ("not among", {"dst_type": 296}),
        ("round_mode", {"round_mode": "floor"}),
    ],
)
def test_grouped_mx_quant_refuses(problem, changed):
    given = {"x": bf16(64, 4), "group_index": torch.tensor([40, 64], dtype=torch.int32), "dst_type": 24}
    refuses(A950, GROUPED_MX, problem, **{**given, **changed})


def test_dynamic_block_quant_takes_the_largest_of_each_block():
    x = bf16(130, 256)
    codes, scale = called(A950, BLOCKS, x=x, dst_type=24, row_block_size=128, min_scale=1e-3)
    assert scale.shape == (2, 2)
    assert scale[1, 1] == max(float(x[128:, 128:].float().abs().max()) / 448, 1e-3)
    back = codes.float() * scale.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)
    assert (back - x.float()).abs().max() <= x.float().abs().max() / 16


def test_dtype_cast_packs_fp4_and_unpacks_it():
    x = torch.tensor([[0.5, -6.0, 3.0, 1.5]])
    packed = called(A950, CAST, input=x, dtype=296)
    assert packed.tolist() == [[0x1 | 0xF << 4, 0x5 | 0x3 << 4]]
    assert torch.equal(called(A950, CAST, input=packed, dtype=6, input_dtype=296), x)
    refuses(A3, CAST, "has no", input=x, dtype=24)

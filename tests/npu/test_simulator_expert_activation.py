"""Simulated expert activations against one row at a time, and where the packages' modes differ."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.operators.simulator import elements
from tests.npu.meta_agreement import called
from tests.npu.vendor_calls import call, refuses, simulated

A3, A950 = simulated(Chip.A3), simulated(Chip.A950)
TORCH = "npu::npu_dequant_swiglu_quant"
VLLM = "_C_ascend::npu_dequant_swiglu_quant"
RECIPES = "custom::npu_dequant_swiglu_clamp_quant"
PLAIN = "npu::npu_swiglu_quant"
CLIP = "custom::npu_swiglu_clip_quant"
MX = "npu::npu_swiglu_mx_quant"
VLLM_GROUP = "_C_ascend::npu_swiglu_group_quant"
RECIPES_GROUP = "custom::npu_swiglu_group_quant"
TORCH_GROUP = "npu::npu_swiglu_group_quant"
ROWS, WIDTH = 7, 128
COUNTS = [2, 0, 3]
TOTAL = sum(COUNTS)
GROUP_OF_ROW = [0, 0, 2, 2, 2]
E4M3 = torch.float8_e4m3fn
CLAMPED = {"swiglu_mode": 1, "clamp_limit": 1.5, "glu_alpha": 1.0, "glu_bias": 0.0, "activate_left": True}


def int64(values):
    return torch.tensor(values, dtype=torch.int64)


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def activated(gate, up, *, limit=None, alpha=1.0, bias=0.0):
    """One output, from Python numbers."""
    if limit is not None:
        gate, up = min(gate, limit), max(-limit, min(up, limit))
    return gate * sigmoid(alpha * gate) * (up + bias)


def by_halves(row, **options):
    half = len(row) // 2
    return [activated(row[each], row[half + each], **options) for each in range(half)]


def by_pairs(row, **options):
    return [activated(row[2 * each], row[2 * each + 1], **options) for each in range(len(row) // 2)]


class Int32Case:
    """Raw sums with scales, three groups of which the second is empty, two rows of none."""

    def __init__(self):
        self.x = torch.randint(-3000, 3000, (ROWS, 2 * WIDTH), dtype=torch.int32)
        self.weight_scale = torch.rand(len(COUNTS), 2 * WIDTH) * 0.01
        self.activation_scale = torch.rand(ROWS) * 0.2
        self.values = [
            (
                self.x[row].double() * self.weight_scale[group].double() * self.activation_scale[row].double()
            ).tolist()
            for row, group in enumerate(GROUP_OF_ROW)
        ]

    def given(self, **changed):
        found = {"x": self.x, "weight_scale": self.weight_scale, "activation_scale": self.activation_scale}
        return {**found, "group_index": int64(COUNTS), "quant_mode": 1, "activate_left": True, **changed}


def assert_quantised(codes, scale, rows):
    for row, want in enumerate(rows):
        largest = max(map(abs, want)) / 127
        assert scale[row].item() == pytest.approx(largest, rel=1e-5)
        assert np.abs(codes[row].numpy() - np.array(want) / largest).max() <= 0.501
    assert scale[len(rows) :].isnan().all()
    assert (codes[len(rows) :] == -64).all()


@pytest.mark.parametrize("name", [TORCH, VLLM, RECIPES])
def test_mode_0_takes_halves_in_every_package_and_never_clamps(name):
    case = Int32Case()
    codes, scale = called(A3, name, **case.given(swiglu_mode=0, clamp_limit=0.1))
    assert_quantised(codes, scale, [by_halves(row) for row in case.values])


def test_mode_1_takes_halves_in_vllm_ascend_and_the_recipes_and_columns_in_pairs_in_torch_npu():
    case = Int32Case()
    for name, rule in ((VLLM, by_halves), (RECIPES, by_halves), (TORCH, by_pairs)):
        codes, scale = called(A3, name, **case.given(**CLAMPED))
        assert_quantised(codes, scale, [rule(row, limit=1.5) for row in case.values])


def test_torch_npus_and_the_recipes_defaults_are_not_the_models():
    case = Int32Case()
    codes, scale = call(A3, RECIPES, **case.given(swiglu_mode=1))
    rows = [by_halves(row, limit=7.0, alpha=1.702, bias=1.0) for row in case.values]
    assert_quantised(codes, scale, rows)
    codes, scale = call(A3, TORCH, **case.given(swiglu_mode=1))
    rows = [by_pairs(row, limit=7.0, alpha=1.702, bias=1.0) for row in case.values]
    assert_quantised(codes, scale, rows)


def test_the_side_that_is_activated_is_the_right_one_unless_asked():
    case = Int32Case()
    given = case.given(swiglu_mode=0)
    del given["activate_left"]
    swapped = [row[WIDTH:] + row[:WIDTH] for row in case.values]
    codes, scale = call(A3, TORCH, **given)
    assert_quantised(codes, scale, [by_halves(row) for row in swapped])
    codes, scale = call(A3, VLLM, **given)
    assert_quantised(codes, scale, [by_halves(row) for row in case.values])


def test_bfloat16_rows_take_no_scales_and_smooth_scales_multiply():
    x = torch.randn(ROWS, 2 * WIDTH).bfloat16()
    smooth = torch.rand(len(COUNTS), WIDTH) + 0.5
    given = {"x": x, "group_index": int64(COUNTS), "quant_mode": 1, "quant_scale": smooth, **CLAMPED}
    codes, scale = call(A3, RECIPES, **given)
    rows = [
        (np.array(by_halves(x[row].tolist(), limit=1.5)) * smooth[group].double().numpy()).tolist()
        for row, group in enumerate(GROUP_OF_ROW)
    ]
    assert_quantised(codes, scale, rows)


def test_static_mode_divides_by_the_scale_of_its_group_and_adds_the_offset():
    case = Int32Case()
    scale, offset = torch.rand(len(COUNTS), WIDTH) + 0.5, torch.randn(len(COUNTS), WIDTH)
    given = case.given(quant_mode=0, quant_scale=scale, quant_offset=offset, **CLAMPED)
    codes, undefined_scale = call(A3, RECIPES, **given)
    for row, group in enumerate(GROUP_OF_ROW):
        want = np.array(by_halves(case.values[row], limit=1.5)) / scale[group].double().numpy()
        want = np.clip(want + offset[group].double().numpy(), -128, 127)
        assert np.abs(codes[row].numpy() - want).max() <= 0.501
    assert undefined_scale.isnan().all()


@pytest.mark.parametrize(
    ("problem", "changed"),
    [
        ("int64", {"group_index": torch.tensor(COUNTS, dtype=torch.int32)}),
        ("covers 8 rows", {"group_index": int64([2, 1, 5])}),
        ("needs activate_left", {**CLAMPED, "activate_left": False}),
        ("needs group_index", {**CLAMPED, "group_index": None, "weight_scale": torch.ones(1, 2 * WIDTH)}),
        ("positive and finite", {**CLAMPED, "clamp_limit": 0.0}),
        ("want 0 or 1", {**CLAMPED, "swiglu_mode": 2}),
        ("only quant_mode 1", {"quant_mode": 0}),
        ("needs activation_scale", {"activation_scale": None}),
        ("weight_scale goes with int32", {"weight_scale": None}),
        ("weight_scale is \\(256,\\)", {"weight_scale": torch.ones(2 * WIDTH)}),
        ("multiple of 64", {"x": torch.ones(ROWS, 192, dtype=torch.int32)}),
        ("up to 10496", {"x": torch.ones(ROWS, 2 * 10560, dtype=torch.int32)}),
        ("two axes", {"x": torch.ones(1, ROWS, 2 * WIDTH, dtype=torch.int32)}),
        ("empty", {"x": torch.ones(0, 2 * WIDTH, dtype=torch.int32)}),
        ("int8 results", {"dst_type": 24}),
    ],
)
def test_torch_npus_refuses(problem, changed):
    refuses(A3, TORCH, problem, **Int32Case().given(**changed))


def test_950_has_no_clamping_dequant_swiglu():
    refuses(A950, TORCH, "swiglu_mode 0", **Int32Case().given(**CLAMPED))


def test_swiglu_quant_reads_ends_unless_told_that_they_are_counts():
    x = torch.randn(ROWS, 2 * WIDTH).bfloat16()
    rows = [by_halves(x[row].tolist()) for row in range(TOTAL)]
    given = {"x": x, "activate_left": True, "quant_mode": 1}
    codes, scale = called(A3, PLAIN, **given, group_index=int64([2, 2, 5]))
    assert_quantised(codes, scale, rows)
    codes, scale = call(A3, PLAIN, **given, group_index=int64(COUNTS), group_list_type=1)
    assert_quantised(codes, scale, rows)
    refuses(A3, PLAIN, "negative size", **given, group_index=int64(COUNTS))


def test_swiglu_clip_quant_clips_the_result_and_not_gate_and_up():
    x = torch.randn(ROWS, 2 * WIDTH).bfloat16()
    alpha = torch.tensor([0.5, 0.1, 0.9])
    given = {"x": x, "group_index": int64(COUNTS), "group_alpha": alpha, "activate_left": True}
    codes, scale = called(A3, CLIP, **given)
    for row, group in enumerate(GROUP_OF_ROW):
        want = np.array(by_halves(x[row].tolist()))
        bound = np.abs(want).max() * float(alpha[group])
        assert scale[row].item() == pytest.approx(bound / 127, rel=1e-5)
        assert np.abs(codes[row].numpy() - np.clip(want, -bound, bound) / bound * 127).max() <= 0.501


def decoded(codes, scale):
    return elements.mx_values(codes, scale)


def mx_exponents(values, largest, top, *, rounded_up):
    """E8M0 codes of blocks of 32, from Python numbers."""
    found = []
    for start in range(0, len(values), 32):
        amax = max(map(abs, values[start : start + 32]))
        if rounded_up:
            ratio = float(np.float32(max(amax, 1e-4)) / np.float32(largest))
            found.append(math.ceil(math.log2(ratio)) + 127)
        else:
            found.append(math.floor(math.log2(amax)) - top + 127)
    return found


def near_one_step(got, want):
    """Whether E4M3 values are within a step of what their block can hold."""
    blocks = want.abs().unflatten(-1, (-1, 32)).amax(-1).repeat_interleave(32, -1)
    return bool(((got - want).abs() <= blocks / 8).all())


@pytest.mark.parametrize("number", [24, 292])
def test_swiglu_mx_quant_interleaves_in_mode_1_and_scales_the_rounded_activation(number):
    x = torch.randn(ROWS, 2 * WIDTH).bfloat16() * 3
    codes, scale = called(A950, MX, x=x, dst_type=number, **CLAMPED)
    assert scale.shape == (ROWS, WIDTH // 64, 2)
    for row in range(ROWS):
        want = torch.tensor(by_pairs(x[row].tolist(), limit=1.5)).bfloat16()
        assert scale[row].flatten().tolist() == mx_exponents(want.tolist(), 448.0, 8, rounded_up=False)
        assert near_one_step(decoded(codes[row], scale[row]), want.float())


def test_swiglu_mx_quant_leaves_rows_beyond_the_groups_and_defaults_to_fp4():
    x = torch.randn(ROWS, 2 * WIDTH).bfloat16()
    given = {"x": x, "activate_left": True, "group_index": int64(COUNTS)}
    codes, scale = called(A950, MX, **given, dst_type=24)
    assert codes[TOTAL:].float().isnan().all()
    assert (scale[TOTAL:] == 254).all()
    ends = call(A950, MX, **{**given, "group_index": int64([2, 2, 5])}, group_mode=1, dst_type=24)
    assert torch.equal(ends[0][:TOTAL].view(torch.uint8), codes[:TOTAL].view(torch.uint8))
    packed, _ = called(A950, MX, **given)
    assert packed.shape == (ROWS, WIDTH // 2)
    refuses(A950, MX, "256 at most", x=x, group_index=torch.zeros(257, dtype=torch.int64))
    refuses(A950, MX, "binding takes 0 and 1", x=x, swiglu_mode=2)


def group_given(x, **more):
    return {"x": x, "group_index": int64(COUNTS), "dst_type": E4M3, **more}


def test_mx_is_mode_2_in_vllm_ascend_and_1_in_the_recipes_and_torch_npu():
    x = torch.randn(ROWS, 2 * WIDTH).bfloat16() * 3
    vllm = called(A950, VLLM_GROUP, **group_given(x, topk_weight=None, quant_mode=2, clamp_value=1.5))
    recipes = called(A950, RECIPES_GROUP, **group_given(x, quant_mode=1, round_scale=True, clamp_limit=1.5))
    given = {"x": x, "group_index": int64(COUNTS), "dst_type": 24, "quant_mode": 1, "round_scale": True}
    torch_npu = called(A950, TORCH_GROUP, **given, clamp_limit=1.5)
    for row in range(TOTAL):
        want = by_halves(x[row].tolist(), limit=1.5)
        rounded = torch.tensor(want).bfloat16().tolist()
        for (codes, scale, _origin), up in ((vllm, False), (recipes, True), (torch_npu, True)):
            assert scale.dtype is torch.float8_e8m0fnu
            found = scale[row].view(torch.uint8).flatten().tolist()
            assert found == mx_exponents(want if up else rounded, 448.0, 8, rounded_up=up)
            assert near_one_step(decoded(codes[row], scale[row]), torch.tensor(want))
    for codes, scale, _origin in (vllm, recipes, torch_npu):
        assert codes[TOTAL:].float().isnan().all()
        assert scale[TOTAL:].float().isnan().all()
    assert torch_npu[2].numel() == 0


def test_blocks_of_128_are_mode_1_in_vllm_ascend_and_0_in_the_recipes():
    x = torch.randn(ROWS, 512).bfloat16()
    weight = torch.rand(ROWS)
    vllm = called(A950, VLLM_GROUP, **group_given(x, topk_weight=weight, quant_mode=1))
    recipes = called(A950, RECIPES_GROUP, **group_given(x, weight=weight, quant_mode=0))
    assert torch.equal(vllm[1][:TOTAL], recipes[1][:TOTAL])
    for row in range(TOTAL):
        want = np.array(by_halves(x[row].tolist())) * float(weight[row])
        for block in range(2):
            part = want[block * 128 : block * 128 + 128]
            scale = recipes[1][row, block].item()
            assert scale == pytest.approx(np.abs(part).max() / 448, rel=1e-5)
            got = recipes[0][row, block * 128 : block * 128 + 128].double().numpy() * scale
            assert np.abs(got - part).max() <= np.abs(part).max() / 16


def test_vllm_ascends_mode_3_rounds_scales_up_and_can_give_them_as_e8m0():
    x = torch.randn(ROWS, 512).bfloat16()
    given = group_given(x, topk_weight=None, quant_mode=3, round_scale=True, output_origin=True)
    codes, scale, origin = called(A950, VLLM_GROUP, **given)
    same, bytes_, _ = called(A950, VLLM_GROUP, **given, ue8m0_scale=True)
    assert torch.equal(scale[:TOTAL], bytes_[:TOTAL].float())
    assert torch.equal(codes.view(torch.uint8), same.view(torch.uint8))
    want = torch.tensor([by_halves(x[row].tolist()) for row in range(TOTAL)])
    assert (origin[:TOTAL].float() - want).abs().max() <= 2**-7 * want.abs().max()


@pytest.mark.parametrize(
    ("name", "problem", "changed"),
    [
        (VLLM_GROUP, "here 1 is blocks", {"quant_mode": 0, "topk_weight": None}),
        (VLLM_GROUP, "not simulated", {"quant_mode": 2, "topk_weight": None, "dst_type": 39}),
        (VLLM_GROUP, "group_list_type", {"quant_mode": 2, "topk_weight": None, "group_list_type": 1}),
        (RECIPES_GROUP, "here 0 is blocks", {"quant_mode": 2}),
        (RECIPES_GROUP, "round_scale True only", {"quant_mode": 1}),
        (RECIPES_GROUP, "round_scale False only", {"quant_mode": 0, "round_scale": True}),
        (RECIPES_GROUP, "block_size", {"quant_mode": 1, "round_scale": True, "block_size": 128}),
        (RECIPES_GROUP, "multiple of 256", {"quant_mode": 0, "x": torch.zeros(ROWS, 128).bfloat16()}),
        (RECIPES_GROUP, "float16 or bfloat16", {"quant_mode": 0, "x": torch.zeros(ROWS, 256)}),
        (TORCH_GROUP, "want -1 or more", {"quant_mode": 0, "dst_type": 24, "clamp_limit": 0.0}),
        (TORCH_GROUP, "here 0 is blocks", {"quant_mode": 3, "dst_type": 24}),
    ],
)
def test_group_quantisers_refuse(name, problem, changed):
    given = group_given(torch.zeros(ROWS, 2 * WIDTH).bfloat16())
    refuses(A950, name, problem, **{**given, **changed})

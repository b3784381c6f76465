"""Simulated grouped products, plain and fused, against one product per row, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.operators.simulator import elements
from ascend_v4.operators.simulator.formats import MX_FP4_FRACTAL_BYTES, pack_int4, to_nz
from tests.npu.meta_agreement import called
from tests.npu.vendor_calls import call, refuses, simulated

A3, A950 = simulated(Chip.A3), simulated(Chip.A950)
GROUPED = "npu::npu_grouped_matmul"
LIST = "npu::npu_grouped_matmul.List"
VLLM = "_C_ascend::moe_grouped_matmul"
FUSED = "_C_ascend::grouped_matmul_swiglu_quant_weight_nz"
FUSED_ANY = "_C_ascend::grouped_matmul_swiglu_quant"
FUSED_LIST = "_C_ascend::grouped_matmul_swiglu_quant_weight_nz_tensor_list"
FUSED_V2 = "_C_ascend::grouped_matmul_swiglu_quant_v2"
TORCH_FUSED = "npu::npu_grouped_matmul_swiglu_quant"
TORCH_FUSED_V2 = "npu::npu_grouped_matmul_swiglu_quant_v2"
E4M3 = torch.float8_e4m3fn
BF16, FP16, INT32, E8M0 = 15, 5, 3, 293
EXPERTS, INNER, WIDTH, ROWS = 4, 64, 128, 11
COUNTS = [3, 0, 5, 1]
TOTAL = sum(COUNTS)
EXPERT_OF_ROW = [0] * 3 + [2] * 5 + [3]
ONE = {"split_item": 2, "group_type": 0, "group_list_type": 1}


def int64(values):
    return torch.tensor(values, dtype=torch.int64)


def int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def close(got, want, steps=2.0):
    want = torch.as_tensor(want).double()
    assert (got.double() - want).abs().max() <= steps * 2**-8 * want.abs().max()


def words(scale):
    """Float32 bits widened to int64, as the loaders of int4 weights store scales."""
    return torch.from_numpy(scale.numpy().view(np.uint32).astype(np.int64))


class Int8Case:
    """int8 rows and weights of four experts, the second without rows, two rows of no expert."""

    def __init__(self):
        self.x, self.weight = int8(ROWS, INNER), int8(EXPERTS, INNER, WIDTH)
        self.scale = (torch.rand(EXPERTS, WIDTH) * 0.01).bfloat16()
        self.per_token = torch.rand(ROWS) * 0.02
        self.raw = np.stack(
            [
                self.x[row].numpy().astype(np.int64) @ self.weight[expert].numpy().astype(np.int64)
                for row, expert in enumerate(EXPERT_OF_ROW)
            ]
        )
        per_row = self.scale.double().numpy()[EXPERT_OF_ROW]
        self.product = self.raw * per_row * self.per_token.double().numpy()[:TOTAL, None]

    def given(self, **changed):
        found = {"x": [self.x], "weight": [self.weight], "scale": [self.scale], "output_dtype": BF16}
        return {**found, "per_token_scale": [self.per_token], "group_list": int64(COUNTS), **ONE, **changed}


def test_int8_groups_meet_their_own_weight_and_the_rest_is_poison():
    case = Int8Case()
    (got,) = called(A3, GROUPED, **case.given())
    close(got[:TOTAL], case.product)
    assert got[TOTAL:].isnan().all()


def test_int8_groups_give_raw_sums_without_scales():
    case = Int8Case()
    (raw,) = called(A3, GROUPED, **case.given(output_dtype=INT32, scale=None, per_token_scale=None))
    assert torch.equal(raw[:TOTAL], torch.from_numpy(case.raw).int())
    assert (raw[TOTAL:] < -(2**29)).all()


def test_group_lists_may_be_counts_ends_or_pairs():
    case = Int8Case()
    want = call(A3, GROUPED, **case.given())[0][:TOTAL]
    ends = int64([3, 3, 8, 9])
    pairs = int64([[0, 3], [2, 5], [3, 1], [1, 0]])
    for group_list, kind in ((ends, 0), (pairs, 2)):
        (got,) = call(A3, GROUPED, **case.given(group_list=group_list, group_list_type=kind))
        assert torch.equal(got[:TOTAL], want)


def test_counts_taken_for_ends_are_refused_or_wrong():
    case = Int8Case()
    refuses(A3, GROUPED, "negative size", **case.given(group_list_type=0))
    (wrong,) = call(A3, GROUPED, **case.given(group_list=int64([1, 2, 2, 4]), group_list_type=0))
    (right,) = call(A3, GROUPED, **case.given(group_list=int64([1, 2, 2, 4])))
    assert not torch.equal(wrong[:9].nan_to_num(), right[:9].nan_to_num())


def test_weights_in_fractal_nz_and_in_lists_give_the_same():
    case = Int8Case()
    want = call(A3, GROUPED, **case.given())[0][:TOTAL]
    nz = to_nz(case.weight, "test", fractal_bytes=32)
    (got,) = call(A3, GROUPED, **case.given(weight=[nz]))
    assert torch.equal(got[:TOTAL], want)
    listed = case.given(weight=list(case.weight), scale=list(case.scale))
    assert torch.equal(called(A3, GROUPED, **listed)[0][:TOTAL], want)
    view = case.weight.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(call(A3, GROUPED, **case.given(weight=[view]))[0][:TOTAL], want)


def test_a2_and_a3_take_float32_scales_for_float16_results_only():
    case = Int8Case()
    scale = [case.scale.float()]
    refuses(A3, GROUPED, "scale is torch.float32", **case.given(scale=scale))
    close(call(A3, GROUPED, **case.given(scale=scale, output_dtype=FP16))[0][:TOTAL], case.product)
    close(call(A950, GROUPED, **case.given(scale=scale))[0][:TOTAL], case.product)


@pytest.mark.parametrize(
    ("problem", "changed"),
    [
        ("needs scale", {"output_dtype": None, "scale": None}),
        ("means int8", {"output_dtype": None}),
        ("raw sum", {"output_dtype": INT32}),
        ("transpose them", {"weight": [int8(EXPERTS, WIDTH, INNER)]}),
        ("want \\(4, 128\\)", {"scale": [torch.ones(EXPERTS, 1, WIDTH).bfloat16()]}),
        ("per_token_scale is \\(9,\\)", {"per_token_scale": [torch.ones(TOTAL)]}),
        ("int64", {"group_list": torch.tensor(COUNTS, dtype=torch.int32)}),
        ("covers 12 rows", {"group_list": int64([3, 3, 5, 1])}),
        ("group_list is \\(3,\\)", {"group_list": int64([3, 3, 3])}),
        ("group_type is None", {"group_type": None}),
        ("split_item is 0", {"split_item": 0}),
        ("a list may hold 128", {"weight": [torch.zeros(INNER, WIDTH, dtype=torch.int8)] * 129}),
        ("offset is not supported", {"offset": [torch.ones(4)]}),
        ("must be int32", {"bias": [torch.ones(EXPERTS, WIDTH)]}),
        ("not simulated", {"x": [torch.zeros(ROWS, INNER).bfloat16()]}),
    ],
)
def test_int8_groups_refuse(problem, changed):
    refuses(A3, GROUPED, problem, **Int8Case().given(**changed))


def test_a_list_holds_128_weights_and_not_129():
    x, one = int8(128, 32), torch.ones(32, 32, dtype=torch.int8)
    given = {"x": [x], "output_dtype": INT32, **ONE, "group_list": torch.ones(128, dtype=torch.int64)}
    (raw,) = call(A3, GROUPED, weight=[one] * 128, **given)
    assert torch.equal(raw[:, 0], x.sum(1, dtype=torch.int32))


class Int4Case:
    """int8 rows, weights in [-8, 7], and the bias that belongs to them."""

    def __init__(self, parts=1):
        self.x = int8(ROWS, INNER)
        self.codes = torch.randint(-8, 8, (EXPERTS, INNER, WIDTH), dtype=torch.int8)
        self.scale = torch.rand(EXPERTS, parts, WIDTH) * 0.01
        full = self.scale.double().repeat_interleave(INNER // parts, 1)
        self.weight = self.codes.double() * full
        self.bias = (8 * self.weight.sum(1)).float()
        self.per_token = torch.rand(ROWS) * 0.01
        self.product = torch.stack(
            [
                self.x[row].double() @ self.weight[expert] * self.per_token[row]
                for row, expert in enumerate(EXPERT_OF_ROW)
            ]
        )

    @property
    def packed(self):
        return pack_int4(self.codes)

    @property
    def nz(self):
        pairs = self.packed.view(torch.int8)
        return to_nz(pairs, "test", fractal_bytes=32).view(torch.int32)

    def given(self, **changed):
        found: dict[str, Any] = {
            "x": [self.x],
            "weight": [self.nz],
            "scale": [words(self.scale)],
            "bias": [self.bias],
        }
        found |= {"per_token_scale": [self.per_token], "group_list": int64(COUNTS), "output_dtype": BF16}
        return {**found, **ONE, **changed}


@pytest.mark.parametrize("parts", [1, 2])
def test_int4_weights_with_their_bias_give_the_plain_product(parts):
    case = Int4Case(parts)
    (got,) = called(A3, GROUPED, **case.given())
    close(got[:TOTAL], case.product)
    assert got[TOTAL:].isnan().all()
    assert torch.equal(call(A3, GROUPED, **case.given(weight=[case.packed]))[0][:TOTAL], got[:TOTAL])


def test_int4_weights_show_a_bias_left_out_or_added_twice():
    case = Int4Case()
    refuses(A3, GROUPED, "need bias", **case.given(bias=None))
    for factor in (0, 2):
        (wrong,) = call(A3, GROUPED, **case.given(bias=[case.bias * factor]))
        missing = (case.bias[EXPERT_OF_ROW] * case.per_token[:TOTAL, None] * (factor - 1)).double()
        close(wrong[:TOTAL], case.product + missing)


def test_int4_weights_viewed_before_the_nz_cast_are_refused():
    case = Int4Case()
    wrong = to_nz(case.packed, "test", fractal_bytes=64)
    refuses(A3, GROUPED, "before any view", **case.given(weight=[wrong]))


@pytest.mark.parametrize(
    ("problem", "changed"),
    [
        ("counts", {"group_list_type": 0, "group_list": int64([3, 3, 8, 9])}),
        ("int64 \\[E, 1, N\\]", {"scale": [torch.ones(EXPERTS, 1, WIDTH)]}),
        ("int64 \\[E, 1, N\\]", {"scale": [int64([[1] * WIDTH] * EXPERTS)]}),
        ("need per_token_scale", {"per_token_scale": None}),
        ("not torch.int32", {"output_dtype": INT32}),
    ],
)
def test_int4_weights_refuse(problem, changed):
    refuses(A3, GROUPED, problem, **Int4Case().given(**changed))


def test_float_groups_add_a_float32_bias():
    x, weight = torch.randn(ROWS, 32).bfloat16(), torch.randn(EXPERTS, 32, 48).bfloat16()
    bias = torch.randn(EXPERTS, 48)
    (got,) = called(A3, GROUPED, x=[x], weight=[weight], bias=[bias], group_list=int64(COUNTS), **ONE)
    for row, expert in enumerate(EXPERT_OF_ROW):
        close(got[row], x[row].double() @ weight[expert].double() + bias[expert].double())
    without = call(A3, GROUPED, x=[x], weight=[weight], group_list=int64(COUNTS), **ONE)[0]
    (same,) = called(A3, VLLM, x=x, weight=weight, group_list=int64(COUNTS), **ONE)
    assert torch.equal(same[:TOTAL], without[:TOTAL])
    listed: dict[str, Any] = {
        "x": [x[:TOTAL]],
        "weight": list(weight),
        "group_list": [3, 3, 8, 9],
        "split_item": 3,
    }
    (also,) = called(A3, LIST, **listed)
    assert torch.equal(also, without[:TOTAL])
    refuses(A3, LIST, "ends at 8", **{**listed, "group_list": [3, 3, 8, 8]})


class MxCase:
    """FP8 rows and FP8 or FP4 weights as transposed views of [E, N, K]."""

    def __init__(self, inner=96, width=64, packed=False):
        pairs = -(-inner // 64)
        self.x = torch.randn(ROWS, inner).to(E4M3)
        self.per_token = torch.randint(120, 130, (ROWS, pairs, 2), dtype=torch.uint8)
        self.scale = torch.randint(120, 130, (EXPERTS, width, pairs, 2), dtype=torch.uint8)
        if packed:
            self.stored = torch.randint(0, 256, (EXPERTS, width, inner // 2), dtype=torch.uint8)
            values = elements.decode_fp4(self.stored)
        else:
            self.stored = torch.randn(EXPERTS, width, inner).to(E4M3)
            values = self.stored.float()
        factors = 2.0 ** (self.scale.double().flatten(-2) - 127)
        weight = values.double() * factors.repeat_interleave(32, -1)[..., :inner]
        tokens = 2.0 ** (self.per_token.double().flatten(-2) - 127)
        x = self.x.double() * tokens.repeat_interleave(32, -1)[:, :inner]
        self.product = torch.stack([x[row] @ weight[expert].T for row, expert in enumerate(EXPERT_OF_ROW)])

    def given(self, **changed):
        found = {"x": [self.x], "weight": [self.stored.transpose(1, 2)], "output_dtype": BF16}
        found |= {"scale": [self.scale.transpose(1, 2)], "scale_dtype": E8M0}
        found |= {"per_token_scale": [self.per_token], "per_token_scale_dtype": E8M0}
        return {**found, "group_list": int64(COUNTS), **ONE, **changed}

    def packed_given(self, **changed):
        scale = [self.scale.transpose(1, 2)]
        return self.given(
            **{"scale": None, "scale_dtype": None, "antiquant_scale": scale, "weight_dtype": 296, **changed}
        )


def test_mx_groups_scale_blocks_of_rows_and_weights():
    case = MxCase()
    (got,) = called(A950, GROUPED, **case.given())
    close(got[:TOTAL], case.product)
    assert got[TOTAL:].isnan().all()


def test_mx_groups_take_fp4_weights_with_antiquant_scale():
    case = MxCase(inner=128, packed=True)
    close(called(A950, GROUPED, **case.packed_given())[0][:TOTAL], case.product)
    nz = to_nz(case.stored, "test", fractal_bytes=MX_FP4_FRACTAL_BYTES).transpose(1, 2)
    close(call(A950, GROUPED, **case.packed_given(weight=[nz]))[0][:TOTAL], case.product)
    by_row = call(A950, GROUPED, **case.packed_given(antiquant_scale=[case.scale]))
    close(by_row[0][:TOTAL], case.product)


@pytest.mark.parametrize(
    ("problem", "changed"),
    [
        ("E8M0 scales need", {"scale_dtype": 44}),
        ("E8M0 scales need", {"per_token_scale_dtype": None}),
        ("need scale and per_token_scale", {"scale": None}),
        ("scale is \\(4, 64, 2, 2\\)", {"scale": [MxCase().scale]}),
        ("both be transposed", {"scale": [MxCase().scale.transpose(1, 2).contiguous()]}),
        ("antiquant_scale is not supported", {"antiquant_scale": [MxCase().scale.transpose(1, 2)]}),
        ("output_dtype", {"output_dtype": None}),
        ("x_dtype is not supported", {"x_dtype": 296}),
    ],
)
def test_mx_groups_refuse(problem, changed):
    refuses(A950, GROUPED, problem, **MxCase().given(**changed))


def test_fp4_weights_refuse_scale_and_untransposed_memory():
    case = MxCase(inner=128, packed=True)
    refuses(A950, GROUPED, "scale is not supported", **case.packed_given(scale=[case.scale.transpose(1, 2)]))
    plain = case.stored.transpose(1, 2).contiguous()
    refuses(A950, GROUPED, "transposed view", **case.packed_given(weight=[plain]))
    refuses(A3, GROUPED, "no FP8", **case.packed_given())


def swiglu(product, limit):
    """int8 codes and scales of rows, in float64."""
    gate, up = np.split(np.asarray(product, dtype=np.float64), 2, axis=-1)
    if limit:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    values = gate / (1 + np.exp(-gate)) * up
    scale = np.abs(values).max(-1) / 127
    return np.rint(values / scale[:, None]), scale


def assert_quantised(codes, scale, want):
    assert np.abs(codes.numpy()[:TOTAL].astype(int) - want[0]).max() <= 1
    np.testing.assert_allclose(scale.numpy()[:TOTAL], want[1], rtol=1e-5)
    assert scale[TOTAL:].isnan().all()


@pytest.mark.parametrize("limit", [0.0, 2.0])
@pytest.mark.parametrize("name", [FUSED, FUSED_ANY, FUSED_V2, FUSED_LIST])
def test_fused_swiglu_clamps_gate_from_above_and_up_on_both_sides(name, limit):
    case = Int8Case()
    nz = to_nz(case.weight, "test", fractal_bytes=32)
    weight: Any = nz
    scale: Any = case.scale
    if name == FUSED_V2:
        weight, scale = [nz], [case.scale]
    if name == FUSED_LIST:
        weight = [to_nz(each.contiguous(), "test", fractal_bytes=32) for each in case.weight]
        scale = list(case.scale)
    given = {"x": case.x, "weight": weight, "weight_scale": scale, "x_scale": case.per_token}
    ends = int64([3, 3, 8, 9])
    codes, scales, *_offset = called(A3, name, **given, group_list=ends, swiglu_limit=limit)
    assert_quantised(codes, scales, swiglu(case.product, limit))


def test_torch_npus_fused_swiglu_has_no_clamp():
    case = Int8Case()
    given = {"x": case.x, "x_scale": case.per_token, "group_list": int64([3, 3, 8, 9])}
    nz = to_nz(case.weight, "test", fractal_bytes=32)
    codes, scales, _offset = called(A3, TORCH_FUSED, weight=nz, weight_scale=case.scale, **given)
    assert_quantised(codes, scales, swiglu(case.product, 0))
    second = called(A3, TORCH_FUSED_V2, weight=[nz], weight_scale=[case.scale], **given)
    assert torch.equal(second[0][:TOTAL], codes[:TOTAL])


@pytest.mark.parametrize("name", [FUSED_ANY, FUSED_V2])
def test_fused_swiglu_of_int4_weights_takes_their_bias_by_its_own_name(name):
    case = Int4Case()
    listed = name == FUSED_V2
    given = {"x": case.x, "x_scale": case.per_token, "group_list": int64([3, 3, 8, 9])}
    bias = {"weight_assist_matrix": [case.bias]} if listed else {"bias": case.bias}
    two_axes = words(case.scale[:, 0])
    weights = {"weight": case.nz, "weight_scale": two_axes}
    weights = {key: [value] for key, value in weights.items()} if listed else weights
    codes, scales, *_ = called(A3, name, **given, **weights, **bias, swiglu_limit=1.5)
    assert_quantised(codes, scales, swiglu(case.product, 1.5))
    refuses(A3, name, "need bias", **given, **weights)
    plain = {**given, **weights, **bias, "weight": [case.packed] if listed else case.packed}
    if listed:
        refuses(A3, name, "FRACTAL_NZ", **plain, swiglu_limit=1.5)
    else:
        assert torch.equal(call(A3, name, **plain, swiglu_limit=1.5)[0][:TOTAL], codes[:TOTAL])


@pytest.mark.parametrize(
    ("problem", "changed"),
    [
        ("FRACTAL_NZ", {"weight": int8(EXPERTS, INNER, WIDTH)}),
        ("negative size", {"group_list": int64(COUNTS)}),
        ("covers 12 rows", {"group_list": int64([3, 3, 8, 12])}),
        ("swiglu_limit", {"swiglu_limit": -1.0}),
        ("x_scale must be float32", {"x_scale": torch.ones(ROWS).bfloat16()}),
        ("offset is not supported", {"offset": torch.ones(1)}),
    ],
)
def test_fused_swiglu_refuses(problem, changed):
    case = Int8Case()
    given = {"x": case.x, "weight": to_nz(case.weight, "test", fractal_bytes=32), "weight_scale": case.scale}
    given |= {"x_scale": case.per_token, "group_list": int64([3, 3, 8, 9])}
    refuses(A3, FUSED, problem, **{**given, **changed})


def test_fused_swiglu_of_mx_weights_quantises_to_mx():
    case = MxCase(width=128)
    given = {"x": case.x, "weight": [case.stored.transpose(1, 2)], "x_scale": case.per_token}
    given |= {"weight_scale": [case.scale.transpose(1, 2)], "group_list": int64([3, 3, 8, 9])}
    given |= {"dequant_mode": 2, "quant_mode": 2, "quant_dtype": 24}
    codes, pairs = called(A950, TORCH_FUSED_V2, **given, weight_scale_dtype=E8M0, x_scale_dtype=E8M0)
    gate, up = case.product.chunk(2, -1)
    want = gate * torch.sigmoid(gate) * up
    got = elements.mx_values(codes[:TOTAL], pairs[:TOTAL]).double()
    blocks = want.abs().view(TOTAL, -1, 32).amax(-1).repeat_interleave(32, -1)
    assert ((got - want).abs() <= blocks / 8).all()
    refuses(A950, TORCH_FUSED_V2, "E8M0 scales need", **given)

"""Simulated matrix products against sums of Python numbers, and the layouts that they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Arithmetic
from ascend_v4.operators.simulator import elements
from ascend_v4.operators.simulator.formats import MX_FP4_FRACTAL_BYTES, to_nz
from ascend_v4.operators.simulator.matmul import integer_matmul
from tests.npu.meta_agreement import called
from tests.npu.vendor_calls import call, refuses, simulated

A3, A950 = simulated(Chip.A3), simulated(Chip.A950)
QUANT = "npu::npu_quant_matmul"
FUSED = "npu::npu_fused_matmul"
BATCH = "npu::npu_transpose_batchmatmul"
MX_BATCH = "npu::npu_transpose_quant_batchmatmul"
VLLM_BATCH = "_C_ascend::batch_matmul_transpose"
E4M3 = torch.float8_e4m3fn
BF16, FP16, INT32 = 15, 5, 3
E8M0 = 293


def int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def close(got, want, steps=1.0):
    """Whether values agree within so many steps of bfloat16."""
    want = torch.as_tensor(want).double()
    assert (got.double() - want).abs().max() <= steps * 2**-8 * want.abs().max()


def test_integer_products_are_exact_at_their_largest():
    left = torch.full((2, 5000), -128, dtype=torch.int8)
    right = torch.full((5000, 3), -128, dtype=torch.int8)
    assert integer_matmul(left, right).tolist() == [[5000 * 128 * 128] * 3] * 2


class Int8Case:
    """x1, a weight [K, N] and scales, with K != N."""

    def __init__(self, rows=5, inner=64, width=96):
        self.x1, self.x2 = int8(rows, inner), int8(inner, width)
        self.scale = torch.rand(width) * 0.01
        self.per_token = torch.rand(rows)
        self.raw = self.x1.numpy().astype(np.int64) @ self.x2.numpy().astype(np.int64)
        self.product = self.raw * self.scale.double().numpy() * self.per_token.double().numpy()[:, None]

    def given(self, **changed):
        found: dict[str, Any] = {"x1": self.x1, "x2": self.x2, "scale": self.scale}
        found["pertoken_scale"] = self.per_token
        return {**found, "output_dtype": BF16, **changed}


def test_quant_matmul_scales_channels_and_tokens():
    case = Int8Case()
    close(called(A3, QUANT, **case.given()), case.product)
    close(called(A3, QUANT, **case.given(output_dtype=FP16)), case.product)
    close(called(A3, QUANT, **case.given(x2=case.x2.T.contiguous().T)), case.product)


def test_quant_matmul_reads_fractal_nz_in_order():
    case = Int8Case()
    nz = to_nz(case.x2, "test", fractal_bytes=32)
    assert not torch.equal(nz, case.x2)
    close(called(A3, QUANT, **case.given(x2=nz)), case.product)


def test_quant_matmul_returns_raw_sums_without_pertoken_scale():
    case = Int8Case()
    raw = called(A3, QUANT, **case.given(output_dtype=INT32, pertoken_scale=None))
    assert torch.equal(raw, torch.from_numpy(case.raw).int())


def test_quant_matmul_adds_integer_bias_before_the_scale_and_float_bias_after():
    case = Int8Case()
    bias = torch.randint(-1000, 1000, (96,), dtype=torch.int32)
    want = (case.raw + bias.numpy()) * case.scale.double().numpy() * case.per_token.double().numpy()[:, None]
    close(call(A3, QUANT, **case.given(bias=bias)), want)
    close(call(A3, QUANT, **case.given(bias=bias.float())), case.product + bias.double().numpy())


def test_quant_matmul_means_int8_when_no_output_type_is_given():
    case = Int8Case()
    offset = torch.full((96,), 3.0)
    given = case.given(output_dtype=None, pertoken_scale=None, offset=offset)
    want = np.clip(np.rint(case.raw * case.scale.numpy() + np.float32(3)), -128, 127)
    got = called(A3, QUANT, **given)
    assert got.dtype is torch.int8
    assert (got.numpy() - want).max() <= 1
    words = call(A3, "npu::npu_trans_quant_param", scale=case.scale, offset=offset)
    chip = simulated(Chip.A3, Arithmetic.CHIP)
    by_words = call(chip, QUANT, **case.given(output_dtype=None, pertoken_scale=None, scale=words))
    assert torch.equal(by_words, call(chip, QUANT, **given))


def test_quant_matmul_of_a_square_untransposed_weight_is_wrong_and_not_refused():
    case = Int8Case(inner=64, width=64)
    wrong = call(A3, QUANT, **case.given(x2=case.x2.T.contiguous()))
    assert np.abs(wrong.double().numpy() - case.product).max() > 0.1 * np.abs(case.product).max()


@pytest.mark.parametrize(
    ("problem", "changed"),
    [
        ("None as output_dtype means int8", {"output_dtype": None}),
        ("pertoken_scale cannot be given", {"output_dtype": INT32}),
        ("transpose the weight", {"x2": int8(96, 64)}),
        ("pertoken_scale is \\(4,\\)", {"pertoken_scale": torch.ones(4)}),
        ("scale is \\(64,\\)", {"scale": torch.ones(64)}),
        ("scale is torch.float16", {"scale": torch.ones(96, dtype=torch.float16)}),
        ("scale is torch.bfloat16", {"scale": torch.ones(96).bfloat16(), "output_dtype": FP16}),
        ("offset is float32 and for int8", {"offset": torch.ones(96)}),
        ("empty", {"x1": int8(0, 64), "pertoken_scale": torch.ones(0)}),
        ("int8 operands are simulated", {"x2": torch.zeros(64, 12, dtype=torch.int32)}),
        ("scale_dtype", {"scale_dtype": E8M0}),
        ("torch's own", {"output_dtype": 44}),
    ],
)
def test_quant_matmul_refuses(problem, changed):
    refuses(A3, QUANT, problem, **Int8Case().given(**changed))


def test_quant_matmul_takes_65535_columns_on_a3_and_not_one_more():
    x1 = torch.ones(1, 32, dtype=torch.int8)
    for width, allowed in ((65535, True), (65536, False)):
        weight = torch.ones(32, width, dtype=torch.int8)
        given: dict[str, Any] = {"x1": x1, "x2": weight, "scale": torch.ones(width)}
        given |= {"pertoken_scale": torch.ones(1), "output_dtype": BF16}
        if allowed:
            assert call(A3, QUANT, **given).shape == (1, width)
        else:
            refuses(A3, QUANT, "65535", **given)


class MxCase:
    """x1 FP8 [M, K] and a weight [K, N] as a transposed view, with scale pairs of both."""

    def __init__(self, rows=3, inner=96, width=32, packed=False):
        pairs = -(-inner // 64)
        self.x1 = torch.randn(rows, inner).to(E4M3)
        self.per_token = torch.randint(120, 130, (rows, pairs, 2), dtype=torch.uint8)
        self.scale_rows = torch.randint(120, 130, (width, pairs, 2), dtype=torch.uint8)
        if packed:
            self.stored = torch.randint(0, 256, (width, inner // 2), dtype=torch.uint8)
            values = elements.decode_fp4(self.stored)
        else:
            self.stored = torch.randn(width, inner).to(E4M3)
            values = self.stored.float()
        factors = 2.0 ** (self.scale_rows.double().flatten(-2) - 127)
        weight = values.double() * factors.repeat_interleave(32, -1)[:, :inner]
        tokens = 2.0 ** (self.per_token.double().flatten(-2) - 127)
        self.product = (self.x1.double() * tokens.repeat_interleave(32, -1)[:, :inner]) @ weight.T

    def given(self, **changed):
        found: dict[str, Any] = {"x1": self.x1, "x2": self.stored.T, "scale": self.scale_rows.transpose(0, 1)}
        found |= {"pertoken_scale": self.per_token, "scale_dtype": E8M0, "pertoken_scale_dtype": E8M0}
        return {**found, "group_sizes": [1, 1, 32], "output_dtype": BF16, **changed}


def test_mx_products_scale_blocks_of_both_operands():
    case = MxCase()
    close(called(A950, QUANT, **case.given()), case.product)


def test_mx_products_take_packed_fp4_weights_plain_or_nz():
    case = MxCase(inner=128, packed=True)
    close(called(A950, QUANT, **case.given(x2_dtype=296, group_sizes=[0, 0, 32])), case.product)
    nz = to_nz(case.stored, "test", fractal_bytes=MX_FP4_FRACTAL_BYTES)
    close(called(A950, QUANT, **case.given(x2=nz.T, x2_dtype=296)), case.product)
    wrong = to_nz(case.stored, "test", fractal_bytes=32)
    refuses(A950, QUANT, "fractals", **case.given(x2=wrong.T, x2_dtype=296))


@pytest.mark.parametrize(
    ("problem", "changed"),
    [
        ("scale_dtype is 44", {"scale_dtype": 44}),
        ("pertoken_scale_dtype is None", {"pertoken_scale_dtype": None}),
        ("group_sizes", {"group_sizes": None}),
        ("group_sizes", {"group_sizes": [1, 1, 128]}),
        ("output_dtype is torch.int8", {"output_dtype": None}),
        ("scale is \\(32, 2, 2\\)", {"scale": MxCase().scale_rows}),
        ("do not make the view contiguous", {"x2": MxCase().stored.T.contiguous()}),
        ("one byte", {"scale": torch.ones(2, 32, 2)}),
    ],
)
def test_mx_products_refuse(problem, changed):
    refuses(A950, QUANT, problem, **MxCase().given(**changed))


def test_a3_has_no_fp8_units():
    refuses(A3, QUANT, "no FP8", **MxCase().given())


def test_fused_matmul_returns_float32_sums_with_16cast32_only():
    x, w = torch.randn(3, 40).bfloat16(), torch.randn(40, 7).bfloat16()
    want = x.double() @ w.double()
    got = called(A950, FUSED, x1=x, x2=w, fused_op_type="16cast32")
    assert got.dtype is torch.float32
    assert (got.double() - want).abs().max() < 1e-4
    assert called(A950, FUSED, x1=x, x2=w).dtype is torch.bfloat16
    refuses(A950, FUSED, "HF32", x1=x.float(), x2=w.float(), fused_op_type="16cast32")
    refuses(A950, FUSED, "x2 is \\[K, N\\]", x1=x, x2=w.T, fused_op_type="16cast32")


def test_transpose_batchmatmul_puts_the_batch_between_rows_and_columns():
    x, w = torch.randn(5, 3, 32).bfloat16(), torch.randn(3, 32, 48).bfloat16()
    given = {"input": x, "weight": w, "perm_x1": [1, 0, 2], "perm_x2": [0, 1, 2], "perm_y": [1, 0, 2]}
    got = called(A3, BATCH, **given)
    assert got.shape == (5, 3, 48)
    for token in range(5):
        for batch in range(3):
            close(got[token, batch], x[token, batch].double() @ w[batch].double(), 2)
    refuses(A3, BATCH, "do not fit", **{**given, "perm_x1": None})
    refuses(A3, BATCH, "multiples of 16", **{**given, "input": x[..., :24], "weight": w[:, :24]})
    refuses(A3, BATCH, "perm_y", **{**given, "perm_y": [0, 1, 2]})


def test_vllm_batch_matmul_writes_into_its_third_operand():
    a, b = torch.randn(5, 3, 32).bfloat16(), torch.randn(3, 32, 48).bfloat16()
    c = torch.full((5, 3 * 48), float("nan")).bfloat16()
    assert call(A3, VLLM_BATCH, tensor_a=a, tensor_b=b, tensor_c=c) is None
    want = torch.einsum("tbk,bkn->tbn", a.double(), b.double()).reshape(5, -1)
    close(c, want, 2)


@pytest.mark.parametrize("as_rows", [False, True])
def test_mx_batch_products_agree_with_products_of_each_batch(as_rows):
    rows, batch, inner, width = 4, 2, 128, 32
    x = torch.randn(rows, batch, inner).to(E4M3)
    w = torch.randn(batch, width, inner).to(E4M3)
    x_scale = torch.randint(122, 130, (rows, batch, 2, 2), dtype=torch.uint8)
    w_scale = torch.randint(122, 130, (batch, width, 2, 2), dtype=torch.uint8)
    e8m0 = torch.float8_e8m0fnu
    given = {
        "x1": x,
        "x2": w if as_rows else w.transpose(1, 2),
        "dtype": BF16,
        "x1_scale": x_scale.view(e8m0),
        "x2_scale": (w_scale if as_rows else w_scale.transpose(1, 2)).contiguous().view(e8m0),
        "group_sizes": [0, 0, 32],
        "perm_x1": [1, 0, 2],
        "perm_x2": [0, 2, 1] if as_rows else [0, 1, 2],
        "perm_y": [1, 0, 2],
    }
    got = called(A950, MX_BATCH, **given)
    for each in range(batch):
        case = MxCase(rows, inner, width)
        case.x1, case.stored = x[:, each], w[each]
        alone = case.given(scale=w_scale[each].transpose(0, 1), pertoken_scale=x_scale[:, each])
        assert torch.equal(got[:, each], call(A950, QUANT, **alone))
    refuses(A950, MX_BATCH, "view them as", **{**given, "x1_scale": x_scale})
    refuses(A950, MX_BATCH, "group_sizes", **{**given, "group_sizes": None})

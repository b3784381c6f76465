"""Hyper-connections against loops in float64, HF32 products, and the sizes that the kernels insist on."""

from __future__ import annotations

import math

import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Arithmetic
from ascend_v4.errors import SimulatorError
from ascend_v4.operators import simulator

HIDDEN = frozenset({"hidden"})
BF16 = torch.bfloat16
npu, custom, vllm = torch.ops.npu, torch.ops.custom, torch.ops._C_ascend


@pytest.fixture(autouse=True)
def a3():
    simulator.install(Chip.A3, waived=HIDDEN, arithmetic=Arithmetic.IDEAL)
    yield
    simulator.uninstall()


def inputs(tokens=3, width=16):
    """x, hc_fn, hc_scale, hc_base of a small width."""
    return (
        torch.randn(tokens, 4, width).to(BF16),
        torch.randn(24, 4 * width) / width,
        torch.rand(3) + 0.5,
        torch.randn(24),
    )


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def one_token(streams, fn, scale, base, *, norm_eps, hc_eps, iterations=20):
    """y, post and comb of one token in Python floats."""
    flat = [value for stream in streams for value in stream]
    inverse = 1 / math.sqrt(sum(value * value for value in flat) / len(flat) + norm_eps)
    mixes = [sum(a * b for a, b in zip(flat, row, strict=True)) * inverse for row in fn]
    pre = [sigmoid(mixes[i] * scale[0] + base[i]) + hc_eps for i in range(4)]
    post = [2 * sigmoid(mixes[4 + i] * scale[1] + base[4 + i]) for i in range(4)]
    comb = []
    for row in range(4):
        raw = [math.exp(mixes[8 + 4 * row + i] * scale[2] + base[8 + 4 * row + i]) for i in range(4)]
        comb.append([value / sum(raw) + hc_eps for value in raw])

    def by_columns(matrix):
        sums = [sum(matrix[row][i] for row in range(4)) + hc_eps for i in range(4)]
        return [[matrix[row][i] / sums[i] for i in range(4)] for row in range(4)]

    comb = by_columns(comb)
    for _ in range(iterations - 1):
        comb = by_columns([[value / (sum(row) + hc_eps) for value in row] for row in comb])
    y = [sum(pre[k] * streams[k][d] for k in range(4)) for d in range(len(streams[0]))]
    return y, post, comb


@pytest.mark.parametrize(
    ("package", "name"),
    [("_C_ascend", "npu_hc_pre_v2"), ("_C_ascend", "npu_hc_pre"), ("custom", "npu_hc_pre")],
)
def test_streams_mix_as_documented(package, name):
    x, fn, scale, base = inputs()
    operator = getattr(getattr(torch.ops, package), name)
    y, post, comb = operator(x, fn, scale, base, hc_mult=4, hc_sinkhorn_iters=20, norm_eps=1e-3, hc_eps=1e-2)
    assert (y.dtype, post.dtype, comb.dtype) == (BF16, torch.float32, torch.float32)
    for token in range(3):
        want = one_token(
            x[token].tolist(), fn.tolist(), scale.tolist(), base.tolist(), norm_eps=1e-3, hc_eps=1e-2
        )
        torch.testing.assert_close(y[token], torch.tensor(want[0]).to(BF16))
        torch.testing.assert_close(post[token], torch.tensor(want[1]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(comb[token], torch.tensor(want[2]), rtol=1e-4, atol=1e-5)


def test_a_batch_axis_changes_shapes_only():
    x, fn, scale, base = inputs(tokens=6)
    flat = vllm.npu_hc_pre_v2(x, fn, scale, base, 4, 20, 1e-6, 1e-6)
    batched = vllm.npu_hc_pre_v2(x.view(2, 3, 4, 16), fn, scale, base, 4, 20, 1e-6, 1e-6)
    for one, two in zip(flat, batched, strict=True):
        assert two.shape == (2, 3, *one.shape[1:])
        assert torch.equal(one, two.flatten(0, 1))


def test_the_two_epsilons_are_not_exchanged():
    x, fn, scale, base = inputs()
    one = vllm.npu_hc_pre_v2(x, fn, scale, base, 4, 20, 0.5, 1e-6)
    other = vllm.npu_hc_pre_v2(x, fn, scale, base, 4, 20, 1e-6, 0.5)
    assert not torch.allclose(one[1], other[1])
    assert not torch.allclose(one[2], other[2])


def test_the_fused_product_is_hf32():
    x, fn, scale, base = inputs()
    ideal = vllm.npu_hc_pre_v2(x, fn, scale, base, 4, 20, 1e-6, 1e-6)[1]
    simulator.install(Chip.A3, waived=HIDDEN)
    real = vllm.npu_hc_pre_v2(x, fn, scale, base, 4, 20, 1e-6, 1e-6)[1]
    cut = (fn.view(torch.int32) & ~0x1FFF).view(torch.float32)
    assert not torch.equal(real, ideal)
    assert torch.equal(real, vllm.npu_hc_pre_v2(x, cut, scale, base, 4, 20, 1e-6, 1e-6)[1])
    torch.testing.assert_close(real, ideal, rtol=2e-2, atol=2e-2)


def test_recipes_compose_large_calls_on_950_in_float32():
    simulator.install(Chip.A950, waived=HIDDEN)
    x, fn, scale, base = inputs(tokens=513)
    composed = custom.npu_hc_pre(x, fn, scale, base)[1]
    fused = custom.npu_hc_pre(x[:512], fn, scale, base)[1]
    simulator.install(Chip.A950, waived=HIDDEN, arithmetic=Arithmetic.IDEAL)
    ideal = custom.npu_hc_pre(x, fn, scale, base)[1]
    torch.testing.assert_close(composed, ideal, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(fused, ideal[:512], rtol=1e-5, atol=1e-6)


def test_hidden_sizes_are_those_of_the_released_models_unless_waived():
    x, fn, scale, base = inputs()
    simulator.install(Chip.A3)
    with pytest.raises(SimulatorError, match="hidden is 16; the kernel takes 4096 or 7168"):
        vllm.npu_hc_pre_v2(x, fn, scale, base, 4, 20, 1e-6, 1e-6)
    with pytest.raises(SimulatorError, match="hidden is 16"):
        custom.npu_hc_post(x[:, 0], x, torch.ones(3, 4), torch.ones(3, 4, 4))
    wide = torch.zeros(1, 4, 4096, dtype=BF16)
    y, _, _ = vllm.npu_hc_pre_v2(wide, torch.zeros(24, 16384), scale, base, 4, 20, 1e-6, 1e-6)
    assert y.shape == (1, 4096)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"x": torch.zeros(0, 4, 16, dtype=BF16)}, "empty"),
        ({"x": torch.zeros(3, 4, 16)}, "bfloat16"),
        ({"x": torch.zeros(3, 2, 16, dtype=BF16)}, "4 streams"),
        ({"x": torch.zeros(4, 16, dtype=BF16)}, r"\[T, 4, d\]"),
        ({"hc_fn": torch.zeros(24, 63)}, "hc_fn must be"),
        ({"hc_fn": torch.zeros(24, 64, dtype=BF16)}, "hc_fn must be float32"),
        ({"hc_scale": torch.zeros(4)}, "3 values"),
        ({"hc_base": torch.zeros(4)}, "24 values"),
        ({"hc_mult": 2}, "hc_mult"),
        ({"hc_sinkhorn_iters": 19}, "must be 20"),
    ],
)
def test_pre_refuses(change, problem):
    x, fn, scale, base = inputs()
    call = {"x": x, "hc_fn": fn, "hc_scale": scale, "hc_base": base, **change}
    with pytest.raises(SimulatorError, match=problem):
        custom.npu_hc_pre(**call)


def test_the_two_halves_of_pre_make_the_whole():
    x, fn, scale, base = inputs()
    inverse = vllm.npu_hc_pre_inv_rms(x, 1e-6)
    assert inverse.shape == (3, 1)
    mixes = x.float().flatten(1) @ fn.T
    parts = custom.npu_hc_pre_sinkhorn(mixes, inverse, scale, base, x, 4, 20, 1e-6)
    whole = vllm.npu_hc_pre_v2(x, fn, scale, base, 4, 20, 1e-6, 1e-6)
    for part, one in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, one)
    for wrong, problem in ((mixes[:, :23], "mixes must be"), (mixes.to(BF16), "float32")):
        with pytest.raises(SimulatorError, match=problem):
            vllm.npu_hc_pre_sinkhorn(wrong, inverse, scale, base, x, 4, 20, 1e-6)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_post_adds_the_residual_through_the_transposed_matrix(dtype):
    x, residual = torch.randn(1, 3, 16).to(dtype), torch.randn(1, 3, 4, 16).to(dtype)
    post, comb = torch.randn(1, 3, 4), torch.randn(1, 3, 4, 4)
    out = vllm.npu_hc_post(x, residual, post, comb)
    assert out.dtype is dtype
    for token in range(3):
        for i in range(4):
            want = post[0, token, i] * x[0, token].float()
            for j in range(4):
                want = want + comb[0, token, j, i] * residual[0, token, j].float()
            torch.testing.assert_close(out[0, token, i].float(), want, rtol=1e-2, atol=2e-2)
    flat = custom.npu_hc_post(x[0], residual[0], post[0], comb[0])
    assert torch.equal(flat, out[0])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"x": torch.zeros(3, 16)}, r"\[b, s, d\]"),
        ({"x": torch.zeros(1, 0, 16)}, "empty axis"),
        ({"residual": torch.zeros(1, 3, 16)}, "residual must be"),
        ({"residual": torch.zeros(1, 3, 4, 16, dtype=BF16)}, "like x"),
        ({"post": torch.zeros(1, 3, 3)}, "post must be"),
        ({"comb": torch.zeros(1, 3, 4, 4, dtype=BF16)}, "like post"),
    ],
)
def test_post_refuses(change, problem):
    call = {
        "x": torch.zeros(1, 3, 16),
        "residual": torch.zeros(1, 3, 4, 16),
        "post": torch.zeros(1, 3, 4),
        "comb": torch.zeros(1, 3, 4, 4),
        **change,
    }
    with pytest.raises(SimulatorError, match=problem):
        vllm.npu_hc_post(**call)


def test_meta_kernels_tell_the_shapes():
    x, fn, scale, base = (tensor.to("meta") for tensor in inputs())
    y, post, comb = vllm.npu_hc_pre_v2(x, fn, scale, base, 4, 20, 1e-6, 1e-6)
    assert (y.shape, post.shape, comb.shape) == ((3, 16), (3, 4), (3, 4, 4))
    assert (y.dtype, post.dtype) == (BF16, torch.float32)
    assert custom.npu_hc_post(y, x, post, comb).shape == x.shape
    assert custom.npu_hc_pre_inv_rms(x).shape == (3, 1)


def test_torch_npus_own_pre_agrees_before_sinkhorn():
    x, fn, scale, base = inputs(width=128)
    h_in, h_post, h_res, inverse, h_mix, h_pre = npu.npu_mhc_pre(x, fn, scale, base, out_flag=1)
    y, post, _ = vllm.npu_hc_pre_v2(x, fn, scale, base, 4, 20, 1e-6, 1e-6)
    torch.testing.assert_close(h_in, y)
    torch.testing.assert_close(h_post, post)
    torch.testing.assert_close(h_mix, x.float().flatten(1) @ fn.T, rtol=1e-4, atol=1e-4)
    want = (h_mix * inverse.unsqueeze(-1))[:, 8:] * scale[2] + base[8:]
    torch.testing.assert_close(h_res.flatten(1), want)
    assert h_pre.shape == (3, 4)
    weighted = npu.npu_mhc_pre(x, fn, scale, base, gamma=torch.full((4, 128), 2.0), out_flag=1)[4]
    torch.testing.assert_close(weighted, 2 * h_mix)
    assert npu.npu_mhc_pre(x, fn, scale, base)[3:] == (None, None, None)
    with pytest.raises(SimulatorError, match="multiple of 128"):
        npu.npu_mhc_pre(*inputs(width=64))
    with pytest.raises(SimulatorError, match="950 only"):
        npu.npu_mhc_pre(x, fn, scale, base, inner_precise=1)


def test_torch_npus_own_post_is_the_same_sum():
    residual, out = torch.randn(3, 4, 128).to(BF16), torch.randn(3, 128).to(BF16)
    post, comb = torch.rand(3, 4), torch.rand(3, 4, 4)
    assert torch.equal(
        npu.npu_mhc_post(residual, comb, out, post),
        vllm.npu_hc_post(out[None], residual[None], post[None], comb[None])[0],
    )
    with pytest.raises(SimulatorError, match="required on A2 and A3"):
        npu.npu_mhc_post(residual, None, out, post)
    simulator.install(Chip.A950)
    plain = npu.npu_mhc_post(residual, None, out, post)
    torch.testing.assert_close(plain, (residual + post.unsqueeze(-1) * out.unsqueeze(1)).to(BF16))

"""Norms, rotary embedding, SwiGLU and sampling filters against loops in float64, and every refusal."""

from __future__ import annotations

import math

import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Arithmetic
from ascend_v4.errors import SimulatorError
from ascend_v4.operators import simulator

BF16 = torch.bfloat16
npu, custom, vllm = torch.ops.npu, torch.ops.custom, torch.ops._C_ascend


@pytest.fixture(autouse=True)
def a3():
    simulator.install(Chip.A3)
    yield
    simulator.uninstall()


def normed(row, gamma, epsilon):
    """One row's RMS norm in Python floats."""
    root = math.sqrt(sum(value * value for value in row) / len(row) + epsilon)
    return [value / root * weight for value, weight in zip(row, gamma, strict=True)]


def same_on_meta(operator, *args, **kwargs):
    """Asserts that the Meta kernel tells the shapes and dtypes of the real result, which it returns."""

    def to_meta(value):
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    meta = operator(*map(to_meta, args), **{name: to_meta(value) for name, value in kwargs.items()})
    real = operator(*args, **kwargs)
    pairs = zip(meta, real, strict=True) if isinstance(real, tuple) else [(meta, real)]
    for on_meta, result in pairs:
        assert on_meta.is_meta
        assert (on_meta.shape, on_meta.dtype) == (result.shape, result.dtype)
    return real


@pytest.mark.parametrize(
    ("x_dtype", "gamma_dtype"),
    [(BF16, BF16), (BF16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32)],
)
def test_rms_norm_rounds_once(x_dtype, gamma_dtype):
    x, gamma = torch.randn(2, 3, 8).to(x_dtype), torch.randn(8).to(gamma_dtype)
    y, rstd = same_on_meta(npu.npu_rms_norm, x, gamma, 1e-6)
    want = torch.tensor([[normed(row, gamma.tolist(), 1e-6) for row in part] for part in x.tolist()])
    assert torch.equal(y, want.to(x_dtype)) or (y.float() - want).abs().max() < 1e-6
    assert rstd.shape == (2, 3, 1)
    torch.testing.assert_close(rstd, x.float().square().mean(-1, keepdim=True).add(1e-6).rsqrt())


def test_rms_norm_over_two_axes_and_of_nothing():
    x = torch.randn(2, 3, 4)
    y, rstd = npu.npu_rms_norm(x, torch.ones(3, 4), 0.0)
    assert rstd.shape == (2, 1, 1)
    torch.testing.assert_close(y, x / x.square().mean((1, 2), keepdim=True).sqrt())
    assert npu.npu_rms_norm(torch.zeros(0, 4), torch.ones(4))[0].shape == (0, 4)


@pytest.mark.parametrize(
    ("x", "gamma", "problem"),
    [
        (torch.zeros(2, 4), torch.ones(4, dtype=BF16), "gamma must be"),
        (torch.zeros(2, 4, dtype=torch.int8), torch.ones(4), "x must be"),
        (torch.zeros(2, 4), torch.ones(3), "last axes"),
        (torch.zeros(2, 0), torch.ones(0), "gamma is empty"),
    ],
)
def test_rms_norm_refuses(x, gamma, problem):
    with pytest.raises(SimulatorError, match=problem):
        npu.npu_rms_norm(x, gamma)


def test_gemma_norm_adds_one_to_gamma():
    x, gamma = torch.randn(3, 8), torch.randn(8)
    torch.testing.assert_close(
        npu.npu_gemma_rms_norm(x, gamma)[0], npu.npu_rms_norm(x, gamma + 1)[0], rtol=1e-6, atol=1e-6
    )


def test_add_norm_is_of_the_stored_sum():
    x1, x2, gamma = torch.randn(3, 8).to(BF16), torch.randn(3, 8).to(BF16), torch.randn(8).to(BF16)
    y, rstd, total = same_on_meta(npu.npu_add_rms_norm, x1, x2, gamma)
    assert torch.equal(total, x1 + x2)
    assert torch.equal(y, npu.npu_rms_norm(total, gamma)[0])
    assert rstd.shape == (3, 1)
    with pytest.raises(SimulatorError, match="differ"):
        npu.npu_add_rms_norm(x1, x2[:2], gamma)


@pytest.mark.parametrize("package", [vllm, custom], ids=["vllm", "recipes"])
@pytest.mark.parametrize("arithmetic", list(Arithmetic))
def test_norm_and_quantisation_in_one(package, arithmetic):
    simulator.install(Chip.A2, arithmetic=arithmetic)
    x, gamma = torch.randn(5, 16).to(BF16), torch.rand(16).to(BF16)
    smooth, beta = torch.rand(16).to(BF16), torch.randn(16).to(BF16)
    codes, scale = same_on_meta(
        package.npu_rms_norm_dynamic_quant, x, gamma, smooth_scale=smooth, beta=beta, epsilon=1e-6
    )
    assert codes.dtype is torch.int8
    for row in range(5):
        values = normed(x[row].tolist(), gamma.tolist(), 1e-6)
        values = [(value + b) * s for value, b, s in zip(values, beta.tolist(), smooth.tolist(), strict=True)]
        top = max(map(abs, values))
        assert scale[row].item() == pytest.approx(top / 127, rel=1e-5)
        for code, value in zip(codes[row].tolist(), values, strict=True):
            assert abs(code - value * 127 / top) <= 0.5 + 1e-4


def test_the_quantised_norm_is_not_rounded_in_between():
    x, gamma = torch.randn(64, 128).to(BF16), torch.rand(128).to(BF16)
    codes, _ = vllm.npu_rms_norm_dynamic_quant(x, gamma)
    wide = x.float() * x.float().square().mean(-1, keepdim=True).add(1e-6).rsqrt() * gamma.float()
    want = (wide * (127.0 / wide.abs().amax(-1, keepdim=True))).round()
    rounded = wide.to(BF16).float()
    other = (rounded * (127.0 / rounded.abs().amax(-1, keepdim=True))).round()
    assert (codes - want).abs().sum() <= 2
    assert (codes - other).abs().sum() > 20


def test_a_row_of_zeros_has_scale_zero():
    codes, scale = vllm.npu_rms_norm_dynamic_quant(torch.zeros(1, 8, dtype=BF16), torch.ones(8, dtype=BF16))
    assert not codes.any()
    assert scale.item() == 0


@pytest.mark.parametrize(
    ("x", "options", "problem"),
    [
        (torch.ones(0, 4, dtype=BF16), {}, "x is empty"),
        (torch.ones(2, 4), {}, "float16 or bfloat16"),
        (torch.ones(2, 5, dtype=BF16), {}, "gamma"),
        (torch.ones(2, 4, dtype=BF16), {"smooth_scale": torch.ones(4)}, "smooth_scale must be"),
        (torch.ones(2, 4, dtype=BF16), {"beta": torch.ones(3, dtype=BF16)}, "shape of gamma"),
        (torch.ones(2, 4, dtype=BF16), {"epsilon": 0.0}, "greater than 0"),
    ],
)
def test_quantised_norm_refuses(x, options, problem):
    with pytest.raises(SimulatorError, match=problem):
        vllm.npu_rms_norm_dynamic_quant(x, torch.ones(4, dtype=BF16), **options)


def test_add_norm_and_quantisation():
    x1, x2, gamma = (torch.randn(4, 16).to(BF16) for _ in range(3))
    gamma, smooth = gamma[0].contiguous(), torch.rand(16).to(BF16)
    codes, second, total, scale, second_scale = npu.npu_add_rms_norm_dynamic_quant(
        x1, x2, gamma, smooth_scale1=smooth, smooth_scale2=smooth
    )
    alone = vllm.npu_rms_norm_dynamic_quant(x1 + x2, gamma, smooth_scale=smooth)
    assert torch.equal(total, x1 + x2)
    assert torch.equal(codes, alone[0])
    assert torch.equal(second, codes)
    assert torch.equal(scale, alone[1])
    assert torch.equal(second_scale, scale)
    with pytest.raises(SimulatorError, match="needs smooth_scale1"):
        npu.npu_add_rms_norm_dynamic_quant(x1, x2, gamma, smooth_scale2=smooth)


def rotated_pairs(row, cos, sin):
    """One row with neighbours turned, in Python floats."""
    out = []
    for pair in range(0, len(row), 2):
        a, b = row[pair], row[pair + 1]
        out += [a * cos[pair] - b * sin[pair], b * cos[pair + 1] + a * sin[pair + 1]]
    return out


@pytest.mark.parametrize("package", [vllm, custom], ids=["vllm", "recipes"])
@pytest.mark.parametrize(("dtype", "table"), [(BF16, torch.float32), (BF16, BF16), (torch.float32,) * 2])
def test_a_slice_is_rotated_in_place(package, dtype, table):
    x, cos, sin = torch.randn(3, 1, 2, 12).to(dtype), *(torch.randn(3, 1, 1, 4).to(table) for _ in range(2))
    before = x.clone()
    assert (
        package.inplace_partial_rotary_mul(x, cos, sin, rotary_mode="interleave", partial_slice=[8, 12])
        is None
    )
    assert torch.equal(x[..., :8], before[..., :8])
    for token in range(3):
        for head in range(2):
            row = before[token, 0, head, 8:].tolist()
            want = torch.tensor(rotated_pairs(row, cos[token, 0, 0].tolist(), sin[token, 0, 0].tolist()))
            assert (x[token, 0, head, 8:].float() - want).abs().max() <= torch.finfo(dtype).eps * 8


def test_a_view_of_a_larger_tensor_is_rotated():
    base = torch.randn(3, 2, 8)
    before = base.clone()
    cos, sin = torch.zeros(3, 1, 1, 4), torch.ones(3, 1, 1, 4)
    vllm.inplace_partial_rotary_mul(base[:, :1].unsqueeze(1), cos, sin, "interleave", [4, 8])
    assert torch.equal(base[:, 1], before[:, 1])
    assert torch.equal(base[:, 0, 4::2], -before[:, 0, 5::2])
    assert torch.equal(base[:, 0, 5::2], before[:, 0, 4::2])


@pytest.mark.parametrize("package", [vllm, custom], ids=["vllm", "recipes"])
def test_an_unknown_mode_does_nothing_and_says_nothing(package):
    x = torch.randn(1, 1, 1, 8)
    before = x.clone()
    table = torch.ones(1, 1, 1, 8)
    package.inplace_partial_rotary_mul(x, table, table, rotary_mode="Interleave", partial_slice=[0, 8])
    package.inplace_partial_rotary_mul(x[0], table, table, rotary_mode="interleaved", partial_slice=[0, 8])
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("shape", "options", "problem"),
    [
        ((1, 2, 8), {}, "four axes"),
        ((1, 1, 2, 8), {"rotary_mode": "half"}, "only the mode interleave"),
        ((1, 1, 2, 8), {"partial_slice": [2, 10]}, "even range"),
        ((1, 1, 2, 8), {"partial_slice": [3, 6]}, "even range"),
        ((1, 1, 2, 8), {"partial_slice": [0, 4]}, "8 wide|4 wide"),
        ((1, 1, 2, 1026), {"partial_slice": [0, 8]}, "at most 1024"),
        ((2, 1, 2, 8), {"rows": 3}, "broadcast"),
    ],
)
def test_slice_rotation_refuses(shape, options, problem):
    table = torch.ones(options.pop("rows", 1), 1, 1, 8)
    call = {"rotary_mode": "interleave", "partial_slice": [0, 8], **options}
    with pytest.raises(SimulatorError, match=problem):
        vllm.inplace_partial_rotary_mul(torch.zeros(shape), table, table, **call)


def test_slice_rotation_refuses_tables_of_another_dtype():
    x, table = torch.zeros(1, 1, 1, 8), torch.ones(1, 1, 1, 8)
    for wrong in (table.to(BF16), table.double()):
        with pytest.raises(SimulatorError, match="not supported"):
            vllm.inplace_partial_rotary_mul(x, wrong, wrong, "interleave", [0, 8])
    with pytest.raises(SimulatorError, match="one shape"):
        vllm.inplace_partial_rotary_mul(x, table, table[..., :4], "interleave", [0, 8])


@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_rotary_mul_turns_whole_rows(mode):
    x, cos, sin = torch.randn(1, 5, 3, 8), torch.randn(1, 5, 1, 8), torch.randn(1, 5, 1, 8)
    y = same_on_meta(npu.npu_rotary_mul, x, cos, sin, rotary_mode=mode)
    order = [0, 4, 1, 5, 2, 6, 3, 7] if mode == "half" else list(range(8))
    for token in range(5):
        row = x[0, token, 1, order].tolist()
        want = rotated_pairs(row, cos[0, token, 0, order].tolist(), sin[0, token, 0, order].tolist())
        torch.testing.assert_close(y[0, token, 1, order], torch.tensor(want))


@pytest.mark.parametrize(
    ("shape", "rows", "mode", "problem"),
    [
        ((1, 4, 2, 896), (1, 4, 1), "interleave", "below 896"),
        ((4, 1, 1000, 8), (4, 1, 1), "interleave", "below 1000"),
        ((2, 4, 2, 8), (2, 4, 1), "interleave", "sequence axis"),
        ((1, 4, 2, 8), (1, 4, 1), "quarter", "not supported"),
        ((4, 2, 8), (1, 4, 1), "half", "four axes"),
    ],
)
def test_rotary_mul_refuses(shape, rows, mode, problem):
    table = torch.ones(*rows, shape[-1])
    with pytest.raises(SimulatorError, match=problem):
        npu.npu_rotary_mul(torch.zeros(shape), table, table, rotary_mode=mode)


def test_rotary_mul_takes_batches_of_tables_in_half_mode_only():
    table = torch.ones(2, 4, 1, 8)
    assert npu.npu_rotary_mul(torch.zeros(2, 4, 2, 8), table, table).shape == (2, 4, 2, 8)
    with pytest.raises(SimulatorError, match="one of float16"):
        npu.npu_rotary_mul(torch.zeros(2, 4, 2, 8, dtype=BF16), table, table)


def test_interleave_rope_leaves_halves():
    x = torch.randn(2, 3, 1, 64).to(BF16)
    cos, sin = torch.ones(2, 1, 1, 64, dtype=BF16), torch.zeros(2, 1, 1, 64, dtype=BF16)
    y = same_on_meta(npu.npu_interleave_rope, x, cos, sin)
    assert torch.equal(y, torch.cat((x[..., ::2], x[..., 1::2]), -1))
    turned = npu.npu_interleave_rope(x, sin, cos)
    assert torch.equal(turned, torch.cat((-x[..., 1::2], x[..., ::2]), -1))
    for wrong in (x[..., :32].contiguous(), x.float(), x.transpose(0, 1)):
        with pytest.raises(SimulatorError, match="npu_interleave_rope"):
            npu.npu_interleave_rope(wrong, cos, sin)


def swiglu(gate, up, alpha=1.0, limit=math.inf, bias=0.0):
    gate, up = min(gate, limit), max(-limit, min(up, limit))
    return gate / (1 + math.exp(-alpha * gate)) * (up + bias)


def test_swiglu_takes_the_gate_first():
    x = torch.randn(3, 8)
    y = same_on_meta(npu.npu_swiglu, x)
    want = [[swiglu(x[row, i].item(), x[row, i + 4].item()) for i in range(4)] for row in range(3)]
    torch.testing.assert_close(y, torch.tensor(want))


@pytest.mark.parametrize("interleaved", [True, False])
def test_clipped_swiglu_clamps_both_sides(interleaved):
    x = torch.randn(3, 8) * 4
    y = same_on_meta(npu.npu_clipped_swiglu, x, alpha=1.3, limit=2.0, bias=0.5, interleaved=interleaved)
    places = [(2 * i, 2 * i + 1) if interleaved else (i, i + 4) for i in range(4)]
    want = [
        [swiglu(x[row, gate].item(), x[row, up].item(), 1.3, 2.0, 0.5) for gate, up in places]
        for row in range(3)
    ]
    torch.testing.assert_close(y, torch.tensor(want))


def test_clipped_swiglu_leaves_rows_behind_its_groups_undefined():
    x = torch.randn(5, 8)
    y = npu.npu_clipped_swiglu(x, group_index=torch.tensor([1, 2]))
    assert y[:3].isfinite().all()
    assert y[3:].isnan().all()
    for wrong, problem in ((torch.tensor([3, 3]), "sums to 6"), (torch.tensor([1.0]), "int64")):
        with pytest.raises(SimulatorError, match=problem):
            npu.npu_clipped_swiglu(x, group_index=wrong)


@pytest.mark.parametrize(
    ("x", "problem"),
    [
        (torch.zeros(0, 8), "empty"),
        (torch.zeros(2, 7), "even"),
        (torch.zeros(8, 2).T, "contiguous"),
        (torch.zeros(2, 8, dtype=torch.int8), "float16"),
    ],
)
def test_swiglu_refuses(x, problem):
    for operator in (npu.npu_swiglu, npu.npu_clipped_swiglu):
        with pytest.raises(SimulatorError, match=problem):
            operator(x)


def test_clipped_swiglu_is_not_built_for_950():
    simulator.install(Chip.A950)
    with pytest.raises(SimulatorError, match="this is 950"):
        npu.npu_clipped_swiglu(torch.zeros(2, 8))


def test_top_k_and_top_p_keep_what_the_definition_keeps():
    logits = torch.randn(6, 20) * 3
    k = torch.tensor([1, 2, 3, 20, 7, 20], dtype=torch.int32)
    p = torch.tensor([1.0, 0.5, 0.9, 0.3, 0.01, 1.0])
    out = same_on_meta(npu.npu_top_k_top_p, logits, p, k)
    for row in range(6):
        order = logits[row].argsort(descending=True)[: k[row]].tolist()
        weights = [math.exp(logits[row, i].item()) for i in order]
        kept: list[int] = []
        total = 0.0
        for index, weight in zip(order, weights, strict=True):
            if not kept or total / sum(weights) < p[row].item():
                kept.append(index)
            total += weight
        assert out[row].isfinite().nonzero().flatten().tolist() == sorted(kept)
        assert torch.equal(out[row, kept], logits[row, kept])


@pytest.mark.parametrize(
    ("p", "k", "problem"),
    [
        (None, None, "both be missing"),
        (None, torch.tensor([1, 2]), "int32"),
        (None, torch.tensor([0, 2], dtype=torch.int32), "between 1 and 5"),
        (torch.tensor([0.5, 0.5], dtype=BF16), None, "like the logits"),
    ],
)
def test_top_k_and_top_p_refuse(p, k, problem):
    with pytest.raises(SimulatorError, match=problem):
        npu.npu_top_k_top_p(torch.zeros(2, 5), p, k)


def test_prefetch_does_nothing_but_look_at_its_sizes():
    w = torch.zeros(4)
    assert npu.npu_prefetch(w, None, 16) is None
    with pytest.raises(SimulatorError, match="max_size"):
        npu.npu_prefetch(w, None, 0)

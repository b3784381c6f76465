"""Dense adapters against the contract on simulated chips, with numbers that tell every argument apart.

The epsilons differ and are large, no matrix is symmetric, rows and scales differ in size by powers of two: an
argument in another's place, or a transposed weight, then shows in the result.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Arithmetic
from ascend_v4.operators import simulator
from ascend_v4.operators.contract import WAIVABLE
from ascend_v4.operators.contracts.activation import clamped_swiglu
from ascend_v4.operators.contracts.embedding import embed_tokens
from ascend_v4.operators.contracts.hyper_connections import (
    hyper_connection_head,
    hyper_connection_post,
    hyper_connection_pre,
)
from ascend_v4.operators.contracts.linear import float32_linear, grouped_linear, linear
from ascend_v4.operators.contracts.norm import head_rms_norm, rms_norm
from ascend_v4.operators.testing.close import require_close
from ascend_v4.operators.testing.draw import Draw
from ascend_v4.operators.testing.weights import activation_of, weight_of
from tests.npu.expert_blocks import CPU, candidate

TOKENS, STREAMS, HIDDEN = 5, 4, 128
NORM_EPS, MIX_EPS = 0.5, 0.03
ROW_SIZES = torch.tensor([1.0, 64.0, 2.0**-6, 3.0, 8.0])
FUSED = ("vllm-ascend", "cann-recipes", "aten")
LINEAR = [(Chip.A2, "int8"), (Chip.A3, "int8"), (Chip.A3, "int4"), (Chip.A3, "bf16")]
LINEAR += [(Chip.A950, format) for format in ("mxfp8", "fp8+mxfp8", "fp4+mxfp8", "bf16")]
GROUPED = [(Chip.A3, "bf16"), (Chip.A3, "int8"), (Chip.A3, "fp8")]
GROUPED += [(Chip.A950, format) for format in ("mxfp8", "fp8+mxfp8", "bf16")]


def described(pair: tuple[Chip, str]) -> str:
    return f"{pair[0].value}-{pair[1]}"


@pytest.fixture
def on_chip():
    """Simulates a chip, ideal and waived, until the test ends."""

    def put(chip: Chip) -> None:
        simulator.install(chip, waived=frozenset(WAIVABLE), arithmetic=Arithmetic.IDEAL)

    yield put
    simulator.uninstall()


@pytest.fixture
def draw(request):
    return Draw(request.node.name, dtype=torch.bfloat16, device=CPU)


def mixing_weights(draw: Draw, rows: int, scales: int):
    """fn, scale and base of a mixing; each output has a base and each kind a scale of its own."""
    return (
        draw.normal(rows, STREAMS * HIDDEN, scale=HIDDEN**-0.5, dtype=torch.float32),
        torch.tensor([0.5, 1.5, 1.0])[:scales],
        draw.normal(rows, dtype=torch.float32),
    )


@pytest.mark.parametrize("provider", FUSED)
def test_mixing_agrees_with_the_contract(on_chip, draw, provider):
    on_chip(Chip.A3)
    chosen = candidate(hyper_connection_pre, provider, Chip.A3)
    inputs = (draw.normal(TOKENS, STREAMS, HIDDEN), *mixing_weights(draw, 24, 3))
    settings: dict[str, Any] = {"sinkhorn_iterations": 20, "norm_eps": NORM_EPS, "mix_eps": MIX_EPS}
    want = hyper_connection_pre.reference(*inputs, **settings)
    swapped = hyper_connection_pre.reference(
        *inputs, sinkhorn_iterations=20, norm_eps=MIX_EPS, mix_eps=NORM_EPS
    )
    assert (want[1] - swapped[1]).abs().max() > 0.01
    for got, wanted in zip(chosen.call(*inputs, **settings), want, strict=True):
        require_close(got, wanted, hyper_connection_pre.tolerance, contract=hyper_connection_pre.tolerance)


@pytest.mark.parametrize("provider", FUSED)
def test_streams_are_mixed_from_rows_to_columns(on_chip, draw, provider):
    on_chip(Chip.A3)
    chosen = candidate(hyper_connection_post, provider, Chip.A3)
    inputs = (
        draw.normal(TOKENS, HIDDEN),
        draw.normal(TOKENS, STREAMS, HIDDEN),
        draw.normal(TOKENS, STREAMS, dtype=torch.float32),
        draw.normal(TOKENS, STREAMS, STREAMS, dtype=torch.float32),
    )
    hyper_connection_post.tolerance.require(chosen.call(*inputs), hyper_connection_post.reference(*inputs))


def test_streams_are_collapsed_with_the_heads_epsilons(draw):
    chosen = candidate(hyper_connection_head, "aten", Chip.A3)
    inputs = (draw.normal(TOKENS, STREAMS, HIDDEN), *mixing_weights(draw, STREAMS, 1))
    settings: dict[str, Any] = {"norm_eps": NORM_EPS, "mix_eps": MIX_EPS}
    want = hyper_connection_head.reference(*inputs, **settings)
    hyper_connection_head.tolerance.require(chosen.call(*inputs, **settings), want)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_norms_use_the_models_epsilon(on_chip, draw, eps):
    on_chip(Chip.A3)
    x_TD, weight_D = draw.normal(TOKENS, HIDDEN), draw.normal(HIDDEN, dtype=torch.float32)
    got = candidate(rms_norm, "torch_npu", Chip.A3).call(x_TD, weight_D, eps=eps)
    rms_norm.tolerance.require(got, rms_norm.reference(x_TD, weight_D, eps=eps))
    q_THD = draw.normal(TOKENS, 3, HIDDEN)
    by_head = candidate(head_rms_norm, "torch_npu", Chip.A3).call(q_THD, eps=eps, rounded_once=True)
    head_rms_norm.tolerance.require(by_head, head_rms_norm.reference(q_THD, eps=eps, rounded_once=True))


@pytest.mark.parametrize(("chip", "format"), LINEAR, ids=map(described, LINEAR))
def test_linear_layers_agree_with_the_contract(on_chip, draw, chip, format):
    on_chip(chip)
    chosen = candidate(linear, "torch_npu", chip)
    weight, activation = weight_of(draw, format, 96, 256), activation_of(format)
    x_TK = (draw.uneven(TOKENS, 256) * ROW_SIZES[:, None]).bfloat16()
    assert chosen.prepare is not None
    got = chosen.call(x_TK, chosen.prepare(weight, copy=True), activation=activation)
    want = linear.reference(x_TK, weight, activation=activation)
    for ours, theirs in zip(got, want, strict=True):
        require_close(ours, theirs, chosen.tolerance, contract=linear.tolerance)


def test_outputs_that_were_split_come_back_in_order(on_chip, draw):
    on_chip(Chip.A3)
    chosen = candidate(linear, "torch_npu", Chip.A3)
    weight, activation = weight_of(draw, "int8", 65568, 16), activation_of("int8")
    x_TK = draw.normal(2, 16)
    assert chosen.prepare is not None
    got = chosen.call(x_TK, chosen.prepare(weight, copy=True), activation=activation)
    chosen.tolerance.require(got, linear.reference(x_TK, weight, activation=activation))


@pytest.mark.parametrize(("chip", "format"), GROUPED, ids=map(described, GROUPED))
def test_grouped_projections_agree_with_the_contract(on_chip, draw, chip, format):
    on_chip(chip)
    chosen = candidate(grouped_linear, "torch_npu", chip)
    groups, inputs, outputs = 2, 128, 128
    weight = weight_of(draw, format, groups * outputs, inputs)
    activation = activation_of(format if chip is Chip.A950 else "bf16")
    x_TGK = draw.uneven(TOKENS, groups * inputs).view(TOKENS, groups, inputs)
    x_TGK = (x_TGK * ROW_SIZES[:, None, None]).bfloat16()
    assert chosen.prepare is not None
    got = chosen.call(x_TGK, chosen.prepare(weight, copy=True), activation=activation)
    want = grouped_linear.reference(x_TGK, weight, activation=activation)
    for ours, theirs in zip(got, want, strict=True):
        require_close(ours, theirs, chosen.tolerance, contract=grouped_linear.tolerance)


@pytest.mark.parametrize(("chip", "provider"), [(Chip.A3, "aten"), (Chip.A950, "torch_npu")])
def test_float32_products_are_not_rounded_to_the_inputs(on_chip, draw, chip, provider):
    on_chip(chip)
    chosen = candidate(float32_linear, provider, chip)
    x_TK, weight = draw.normal(TOKENS, 128), weight_of(draw, "bf16", 128, 128)
    assert chosen.prepare is not None
    got = chosen.call(x_TK, chosen.prepare(weight, copy=True))
    assert got.dtype is torch.float32
    chosen.tolerance.require(got, float32_linear.reference(x_TK, weight))


@pytest.mark.parametrize("chip", [Chip.A2, Chip.A950], ids=lambda chip: chip.value)
@pytest.mark.parametrize("weighted", [False, True])
def test_both_halves_are_clamped_and_rows_weighted_once(on_chip, draw, chip, weighted):
    on_chip(chip)
    chosen = candidate(clamped_swiglu, "torch_npu", chip)
    gate_up_TJ = draw.normal(TOKENS, 256, scale=3.0)
    weight_T = torch.tensor([0.5, 2.0, 3.0, 0.25, 1.0]) if weighted else None
    want = clamped_swiglu.reference(gate_up_TJ, weight_T, limit=1.5)
    unclamped = clamped_swiglu.reference(gate_up_TJ, weight_T, limit=100.0)
    assert (want.float() - unclamped.float()).abs().max() > 1.0
    # the kernel has rounded before rows are weighted
    got = chosen.call(gate_up_TJ, weight_T, limit=1.5)
    torch.testing.assert_close(got.float(), want.float(), rtol=2**-7, atol=2**-12)


def test_rows_of_the_embedding_are_looked_up_by_token(draw):
    table_VD = draw.normal(7, HIDDEN)
    got = candidate(embed_tokens, "aten", Chip.A3).call(
        torch.tensor([3, 0, 6, 3]), table_VD, dtype=torch.bfloat16
    )
    assert torch.equal(got, table_VD[[3, 0, 6, 3]])

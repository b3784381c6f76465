"""Norms and rotation: dtypes that kernels take, tables of angles, and views that are written in place."""

from __future__ import annotations

import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Arithmetic
from ascend_v4.operators import simulator
from ascend_v4.operators.contracts.norm import rms_norm
from ascend_v4.operators.contracts.rope import plan_rope as reference_plan
from ascend_v4.operators.contracts.rope import rope_frequencies, rotate
from ascend_v4.operators.npu.norm import prepare_norm, weighted_norm
from ascend_v4.operators.npu.rope import plan_rope, rope_rows
from tests.npu.expert_blocks import candidate

PROVIDERS = ("vllm-ascend", "cann-recipes", "torch_npu")
FREQUENCIES = rope_frequencies(64, theta=10000.0)


@pytest.fixture
def a3():
    simulator.install(Chip.A3, arithmetic=Arithmetic.IDEAL)
    yield
    simulator.uninstall()


def test_a_bfloat16_weight_stays_and_others_become_float32():
    assert prepare_norm(torch.ones(8, dtype=torch.bfloat16), copy=True).dtype is torch.bfloat16
    assert prepare_norm(torch.ones(8, dtype=torch.float16), copy=True).dtype is torch.float32


@pytest.mark.parametrize(
    ("inputs", "weight"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_the_norm_takes_every_pair_of_dtypes(a3, inputs, weight):
    x_TD = torch.randn(3, 128).to(inputs)
    weight_D = torch.randn(128).to(weight)
    got = weighted_norm(x_TD, weight_D, eps=1e-6)
    rms_norm.tolerance.require(got, rms_norm.reference(x_TD, weight_D, eps=1e-6))


def test_tables_hold_each_angle_twice_in_a_row():
    positions = torch.tensor([0, 3, 100_000])
    cos_TR, sin_TR = rope_rows(positions, FREQUENCIES)
    angles = torch.outer(positions.float(), FREQUENCIES.frequencies)
    assert cos_TR.dtype is sin_TR.dtype is torch.float32
    for first in (0, 1):
        assert torch.equal(cos_TR[:, first::2], angles.cos())
        assert torch.equal(sin_TR[:, first::2], angles.sin())


def test_the_way_back_has_negated_sines():
    plan = plan_rope(torch.arange(5), FREQUENCIES)
    assert plan.cos.shape == plan.sin.shape == (5, 1, 1, 64)
    assert torch.equal(plan.inverse_sin, -plan.sin)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_row_turned_there_and_back_is_where_it_was(a3, provider):
    turn = candidate(rotate, provider, Chip.A3).call
    plan = plan_rope(torch.arange(7, 12), FREQUENCIES)
    x_THD = torch.randn(5, 4, 128)
    turned = x_THD.clone()
    turn(turned, plan)
    assert not torch.allclose(turned, x_THD, atol=0.1)
    assert torch.equal(turned[..., :64], x_THD[..., :64])
    turn(turned, plan, inverse=True)
    assert torch.allclose(turned, x_THD, atol=1e-5)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("inverse", [False, True])
def test_views_are_turned_where_they_are(a3, provider, inverse):
    """Heads behind other channels, as a slice of a wider projection is."""
    turn = candidate(rotate, provider, Chip.A3).call
    positions = torch.arange(3)
    wide_THC = torch.randn(3, 2, 200).bfloat16()
    want_THC = wide_THC.clone()
    rotate.reference(want_THC[..., 40:168], reference_plan(positions, FREQUENCIES), inverse=inverse)
    turn(wide_THC[..., 40:168], plan_rope(positions, FREQUENCIES), inverse=inverse)
    rotate.tolerance.require(wide_THC, want_THC)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_one_shared_head_is_turned_through_its_view(a3, provider):
    turn = candidate(rotate, provider, Chip.A3).call
    kv_TD = torch.randn(3, 128).bfloat16()
    before = kv_TD.clone()
    turn(kv_TD.unsqueeze(1), plan_rope(torch.arange(1, 4), FREQUENCIES))
    assert not torch.equal(kv_TD[:, 64:], before[:, 64:])
    assert torch.equal(kv_TD[:, :64], before[:, :64])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_no_tokens_reach_no_kernel(provider):
    plan = plan_rope(torch.arange(0), FREQUENCIES)
    candidate(rotate, provider, Chip.A3).call(torch.zeros(0, 4, 128), plan)

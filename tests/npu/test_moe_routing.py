"""Gating adapters against the contract, on simulated chips."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Target
from ascend_v4.operators import simulator
from ascend_v4.operators.contracts.moe import route_tokens
from tests.npu.expert_blocks import candidate

PROVIDERS = ("vllm-ascend", "cann-recipes", "torch_npu", "aten")


@pytest.fixture(params=Chip, ids=lambda chip: chip.value)
def chip(request):
    simulator.install(request.param)
    yield request.param
    simulator.uninstall()


@pytest.fixture(params=PROVIDERS)
def route(request, chip):
    return candidate(route_tokens, request.param, chip).call


def require_same(got, want):
    assert torch.equal(got[1], want[1])
    assert got[1].dtype is torch.int32
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_learned_routing_agrees_with_the_contract(route, tokens):
    logits, bias = torch.randn(tokens, 16) * 2, torch.randn(16) * 0.5
    settings: dict[str, Any] = {"experts_per_token": 3, "scaling": 2.5}
    got = route(logits, bias, torch.arange(tokens), None, **settings)
    require_same(got, route_tokens.reference(logits, bias, None, None, **settings))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_hash_routing_looks_up_the_token_and_weighs_by_its_scores(route, tokens, dtype):
    logits = torch.randn(tokens, 16)
    table = torch.stack([torch.randperm(16)[:3] for _ in range(50)]).to(dtype)
    token_ids = torch.randint(0, 50, (tokens,))
    settings: dict[str, Any] = {"experts_per_token": 3, "scaling": 1.5}
    got = route(logits, None, token_ids, table, **settings)
    require_same(got, route_tokens.reference(logits, None, token_ids, table, **settings))


def test_the_bias_chooses_and_does_not_weigh(route):
    logits, bias = torch.zeros(2, 8), torch.zeros(8)
    bias[[5, 2]] = torch.tensor([9.0, 3.0])
    weights, ids = route(logits, bias, None, None, experts_per_token=2, scaling=3.0)
    assert ids.tolist() == [[5, 2], [5, 2]]
    torch.testing.assert_close(weights, torch.full((2, 2), 1.5))


def test_logits_need_not_be_contiguous(route):
    logits = torch.randn(8, 5).t()
    settings: dict[str, Any] = {"experts_per_token": 2, "scaling": 1.0}
    require_same(
        route(logits, None, None, None, **settings),
        route_tokens.reference(logits, None, None, None, **settings),
    )


@pytest.mark.parametrize(
    ("provider", "sizes", "message"),
    [
        ("torch_npu", {"experts": 2049}, "experts is 2049, it takes experts 3 to 2048"),
        ("vllm-ascend", {"experts": 2}, "experts is 2, it takes experts 3 to 2048"),
        ("cann-recipes", {"experts_per_token": 65}, "experts_per_token is 65"),
    ],
)
def test_sizes_just_outside_the_vendor_s_are_refused(chip, provider, sizes, message):
    target = Target(device="sim", chip=chip, packages=simulator.packages(chip))
    refusal = candidate(route_tokens, provider, chip).refusal(target, sizes)
    assert refusal is not None
    assert message in refusal

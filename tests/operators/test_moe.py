"""Routing and experts against loops over tokens: ties, biases that only choose, weights before the down
projection.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from ascend_v4.operators.contracts.activation import clamped_swiglu
from ascend_v4.operators.contracts.moe import ExpertWeights, prepare_experts, route_tokens, routed_experts
from ascend_v4.operators.contracts.quantize import ActivationFormat, StoredWeight, WeightFormat
from ascend_v4.operators.cpu.moe import FEW_TOKENS
from ascend_v4.operators.select import select
from tests.operators.number_formats import ROUNDINGS, fake_fp8, numpy_of


def score(logit: float) -> float:
    return math.sqrt(math.log1p(math.exp(-abs(logit))) + max(logit, 0.0))


def route(
    logits: list[list[float]], bias: list[float] | None, *, per_token: int, scaling: float
) -> tuple[np.ndarray, np.ndarray]:
    """The best by score + bias, the lowest id first among equals; weights without bias, normalised."""
    weights, ids = [], []
    for row in logits:
        scores = [score(logit) for logit in row]
        ranked = [value + (bias[index] if bias else 0.0) for index, value in enumerate(scores)]
        best = sorted(range(len(row)), key=lambda index: (-ranked[index], index))[:per_token]
        total = sum(scores[index] for index in best)
        ids.append(best)
        weights.append([scores[index] / total * scaling for index in best])
    return np.array(weights), np.array(ids)


@pytest.fixture(params=["reference", "selected"])
def routed(request):
    """Learned routing by the reference and by what the CPU selects."""
    call = route_tokens.reference if request.param == "reference" else select("cpu")[route_tokens]

    def run(logits, bias, *, per_token, scaling=1.5):
        return call(logits, bias, None, None, experts_per_token=per_token, scaling=scaling)

    return run


@pytest.mark.parametrize("tokens", [1, FEW_TOKENS, 50])
@pytest.mark.parametrize("with_bias", [True, False])
def test_routing_takes_the_best_scores(with_bias, tokens, routed):
    logits = torch.randn(tokens, 24) * 3
    bias = torch.randn(24) if with_bias else None
    weights, ids = routed(logits, bias, per_token=6)
    want_weights, want_ids = route(
        logits.tolist(), None if bias is None else bias.tolist(), per_token=6, scaling=1.5
    )
    np.testing.assert_array_equal(ids.numpy(), want_ids)
    np.testing.assert_allclose(numpy_of(weights), want_weights, rtol=1e-6)
    np.testing.assert_allclose(weights.sum(-1).numpy(), 1.5, rtol=1e-6)


@pytest.mark.parametrize("tokens", [FEW_TOKENS, 40])
@pytest.mark.parametrize("experts", [8, 16, 17, 64, 384])
def test_equal_scores_take_the_lowest_expert_first(experts, tokens, routed):
    logits = torch.randint(0, 2, (tokens, experts)).float()
    _, ids = routed(logits, None, per_token=6)
    _, want = route(logits.tolist(), None, per_token=6, scaling=1.0)
    np.testing.assert_array_equal(ids.numpy(), want)


@pytest.mark.parametrize("tokens", [1, 3])
def test_all_experts_equal_gives_the_first_ones(tokens, routed):
    _, ids = routed(torch.zeros(tokens, 256), torch.zeros(256), per_token=6)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5]] * tokens


def test_a_bias_chooses_but_does_not_weigh(routed):
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    weights, ids = routed(logits, torch.tensor([0.0, 0.0, 100.0]), per_token=2, scaling=1.0)
    assert ids.tolist() == [[2, 0]]
    want = np.array([score(0.0), score(2.0)])
    np.testing.assert_allclose(numpy_of(weights)[0], want / want.sum(), rtol=1e-6)


def test_extreme_logits_keep_their_scores(routed):
    logits = torch.tensor([[-60.0, 0.0, 25.0, 3e4]])
    weights, ids = routed(logits, None, per_token=4, scaling=1.0)
    want_weights, want_ids = route(logits.tolist(), None, per_token=4, scaling=1.0)
    np.testing.assert_array_equal(ids.numpy(), want_ids)
    np.testing.assert_allclose(numpy_of(weights), want_weights, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_hash_routing_takes_the_tables_experts_in_the_tables_order(dtype):
    logits = torch.randn(4, 8)
    table = torch.tensor([[7, 0, 3], [1, 2, 6], [5, 4, 0]], dtype=dtype)
    tokens = torch.tensor([2, 0, 0, 1])
    weights, ids = route_tokens(logits, None, tokens, table, experts_per_token=3, scaling=2.5)
    assert ids.dtype is torch.int32
    for token, chosen in enumerate(table[tokens].tolist()):
        scores = np.array([score(logits[token, expert].item()) for expert in chosen])
        assert ids[token].tolist() == chosen
        np.testing.assert_allclose(numpy_of(weights)[token], scores / scores.sum() * 2.5, rtol=1e-6)


def swiglu(gate: np.ndarray, up: np.ndarray, limit: float) -> np.ndarray:
    """Gate clamped from above only, up from both sides."""
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return gate / (1 + np.exp(-gate)) * up


@pytest.mark.parametrize("which", ["reference", "selected"])
def test_swiglu_clamps_the_gate_from_above_and_up_from_both_sides(which):
    call = clamped_swiglu.reference if which == "reference" else select("cpu")[clamped_swiglu]
    gate = torch.tensor([[-30.0, -3.0, 0.0, 3.0, 30.0]]).repeat_interleave(5, 1)
    up = torch.tensor([[-30.0, -3.0, 0.0, 3.0, 30.0]]).repeat(1, 5)
    got = call(torch.cat((gate, up), 1), torch.tensor([0.5]), limit=10.0)
    want = 0.5 * swiglu(numpy_of(gate), numpy_of(up), 10.0)
    np.testing.assert_allclose(numpy_of(got), want, rtol=1e-5, atol=1e-12)


def experts_by_loop(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    experts: ExpertWeights,
    *,
    limit: float,
    activation: ActivationFormat,
) -> np.ndarray:
    """Token by token, expert by expert, with the release's roundings."""
    rounding = ROUNDINGS[x.dtype]

    def quantised(row: np.ndarray) -> np.ndarray:
        return fake_fp8(row[None], group=128)[0] if activation is ActivationFormat.FP8_GROUP else row

    out = np.zeros(x.shape)
    for token, row in enumerate(numpy_of(x)):
        for weight, expert in zip(weights[token].tolist(), ids[token].tolist(), strict=True):
            gate_weight, up_weight = (numpy_of(part.to_float32()) for part in experts.gate_up[expert])
            entered = quantised(row)
            gate, up = rounding(gate_weight @ entered), rounding(up_weight @ entered)
            hidden = rounding(swiglu(gate, up, limit) * weight)
            out[token] += rounding(numpy_of(experts.down[expert].to_float32()) @ quantised(hidden))
    return out


def plain(outputs: int, inputs: int) -> StoredWeight:
    return StoredWeight((torch.randn(outputs, inputs) * inputs**-0.5), None, WeightFormat.PLAIN)


@pytest.fixture
def experts():
    pairs = tuple((plain(40, 136), plain(40, 136)) for _ in range(5))
    return ExpertWeights(gate_up=pairs, down=tuple(plain(136, 40) for _ in range(5)))


NUMERICS = {
    "exact": (torch.float32, ActivationFormat.NONE, 1e-6),
    # sums near a rounding of bfloat16 or FP8 may fall to the other side
    "fp8": (torch.float32, ActivationFormat.FP8_GROUP, 2e-3),
    "native": (torch.bfloat16, ActivationFormat.FP8_GROUP, 4e-3),
}


@pytest.mark.parametrize("tokens", [1, FEW_TOKENS, FEW_TOKENS + 1, 19])
@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("implementation", ["reference", "selected"])
def test_experts_equal_a_loop_over_tokens(experts, tokens, numerics, implementation):
    dtype, activation, bound = NUMERICS[numerics]
    x = torch.randn(tokens, 136).to(dtype)
    weights = torch.rand(tokens, 3)
    ids = torch.stack([torch.randperm(5)[:3] for _ in range(tokens)]).to(torch.int32)
    call = routed_experts.reference if implementation == "reference" else select("cpu")[routed_experts]
    got = call(x, weights, ids, experts, swiglu_limit=1.0, activation=activation)
    want = experts_by_loop(x, weights, ids, experts, limit=1.0, activation=activation)
    assert got.dtype is torch.float32
    error = np.sqrt(np.mean((numpy_of(got) - want) ** 2) / np.mean(want**2))
    assert error < bound


def test_the_routing_weight_stands_inside_the_activation_quantisation(experts):
    x, ids = torch.randn(4, 136), torch.zeros(4, 1, dtype=torch.int32)
    weights = torch.full((4, 1), 0.7)
    settings: dict[str, Any] = {"swiglu_limit": 9.0, "activation": ActivationFormat.FP8_GROUP}
    inside = routed_experts(x, weights, ids, experts, **settings)
    after = 0.7 * routed_experts(x, torch.ones(4, 1), ids, experts, **settings)
    assert (inside - after).abs().max() > 1e-3 * after.abs().max()


def test_prepared_experts_are_float32_copies_with_gate_before_up(experts):
    prepared = prepare_experts(experts, copy=True)
    for (gate, up), (joined,) in zip(experts.gate_up, prepared.gate_up, strict=True):
        assert torch.equal(joined.codes, torch.cat((gate.codes, up.codes)))
    assert prepare_experts(experts, copy=False) is experts

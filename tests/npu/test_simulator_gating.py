"""Simulated expert selection against sorting in Python, and the calls that it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from ascend_v4.device.soc import Chip
from tests.npu.meta_agreement import called
from tests.npu.vendor_calls import call, refuses, simulated

A2, A3, A950 = (simulated(chip) for chip in Chip)
TORCH = "npu::npu_moe_gating_top_k"
RECIPES = "custom::npu_moe_gating_top_k"
HASH = "_C_ascend::moe_gating_top_k_hash"
VLLM = "_C_ascend::moe_gating_top_k"
SOFTMAX = "npu::npu_moe_gating_top_k_softmax_v2"
ALL = (TORCH, RECIPES, HASH)
TOKENS, EXPERTS, CHOSEN = 5, 16, 6


def score(logit, norm_type):
    if norm_type == 1:
        return 1 / (1 + math.exp(-logit))
    return math.sqrt(math.log1p(math.exp(logit)))


def by_hand(logits, bias, norm_type, scale, eps):
    """Ids in the order of biased scores, weights of the plain ones."""
    if norm_type == 0:
        total = sum(map(math.exp, logits))
        scores = [math.exp(each) / total for each in logits]
    else:
        scores = [score(each, norm_type) for each in logits]
    order = sorted(range(len(scores)), key=lambda each: -(scores[each] + bias[each]))[:CHOSEN]
    chosen = [scores[each] for each in order]
    divisor = sum(chosen) + eps if norm_type else 1.0
    return order, [scale * each / divisor for each in chosen]


def logits_and_bias():
    return torch.randn(TOKENS, EXPERTS), torch.randn(EXPERTS) * 0.1


def vllm_given(x, bias, norm_type, **changed):
    found = {"x": x, "k": CHOSEN, "k_group": 1, "group_count": 1, "group_select_mode": 1, "renorm": 0}
    found |= {"norm_type": norm_type, "out_flag": False, "routed_scaling_factor": 1.5, "eps": 1e-20}
    return {**found, "bias_opt": bias, **changed}


@pytest.mark.parametrize("norm_type", [0, 1, 2])
@pytest.mark.parametrize("name", [*ALL, VLLM])
def test_experts_are_chosen_by_biased_scores_and_weighted_by_plain_ones(name, norm_type):
    x, bias = logits_and_bias()
    if name == VLLM:
        given = vllm_given(x, bias, norm_type)
    else:
        given = {"x": x, "k": CHOSEN, "bias": bias, "norm_type": norm_type, "routed_scaling_factor": 1.5}
    weights, ids, out = called(A3, name, **given)
    assert ids.dtype is torch.int32
    assert out.isnan().all()
    for token in range(TOKENS):
        order, want = by_hand(x[token].tolist(), bias.tolist(), norm_type, 1.5, 1e-20)
        assert ids[token].tolist() == order
        assert weights[token].tolist() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_the_scores_come_out_when_asked_for(name):
    x, _bias = logits_and_bias()
    _weights, _ids, out = called(A3, name, x=x, k=CHOSEN, norm_type=2, out_flag=True)
    want = [[score(each, 2) for each in row] for row in x.tolist()]
    assert torch.allclose(out, torch.tensor(want))


@pytest.mark.parametrize("name", ALL)
def test_a_hash_layer_takes_the_experts_of_the_token_and_weighs_them_by_score(name):
    x, _bias = logits_and_bias()
    table = torch.stack([torch.randperm(EXPERTS)[:CHOSEN] for _ in range(9)]).to(torch.int32)
    tokens = torch.tensor([8, 0, 3, 3, 7])
    given = {"x": x, "k": CHOSEN, "input_ids": tokens, "tid2eid": table, "norm_type": 2}
    weights, ids, _out = called(A3, name, **given)
    assert torch.equal(ids, table[tokens])
    for token in range(TOKENS):
        scores = [score(x[token, each].item(), 2) for each in ids[token].tolist()]
        assert weights[token].tolist() == pytest.approx([each / sum(scores) for each in scores], rel=1e-5)


def test_ties_go_to_the_lower_expert():
    _weights, ids, _out = call(A3, HASH, x=torch.zeros(2, EXPERTS), k=CHOSEN, norm_type=2)
    assert ids.tolist() == [list(range(CHOSEN))] * 2


@pytest.mark.parametrize(("mode", "winner"), [(0, 1), (1, 0)])
def test_groups_are_ranked_by_their_best_expert_or_by_their_best_two(mode, winner):
    x = torch.tensor([[1.0, 1.0, -9.0, -9.0, 1.5, -9.0, -9.0, -9.0]])
    given = {"x": x, "k": 2, "norm_type": 1, "group_count": 2, "k_group": 1, "group_select_mode": mode}
    _weights, ids, _out = call(A3, TORCH, **given)
    assert {each // 4 for each in ids[0].tolist()} == {winner}


@pytest.mark.parametrize(
    ("problem", "changed"),
    [
        ("alike", {"bias": torch.zeros(EXPERTS).bfloat16()}),
        ("bias is \\(5,\\)", {"bias": torch.zeros(5)}),
        ("renorm", {"renorm": 1}),
        ("norm_type", {"norm_type": 3}),
        ("k is 17", {"k": 17}),
        ("empty", {"x": torch.zeros(0, EXPERTS)}),
        ("at most 2048", {"x": torch.zeros(1, 2049)}),
        ("go together", {"input_ids": torch.zeros(TOKENS, dtype=torch.int64)}),
        (
            "input_ids go from 0 to 9",
            {"input_ids": torch.tensor([0, 1, 9, 0, 0]), "tid2eid": torch.zeros(9, 6, dtype=torch.int32)},
        ),
        (
            "input_ids go from -1",
            {"input_ids": torch.tensor([0, 1, -1, 0, 0]), "tid2eid": torch.zeros(9, 6, dtype=torch.int32)},
        ),
        (
            "outside the 16",
            {"input_ids": torch.zeros(5).long(), "tid2eid": torch.full((9, 6), 16, dtype=torch.int32)},
        ),
        (
            "tid2eid is \\(9, 5\\)",
            {"input_ids": torch.zeros(5).long(), "tid2eid": torch.zeros(9, 5, dtype=torch.int32)},
        ),
        ("4 input_ids", {"input_ids": torch.zeros(4).long(), "tid2eid": torch.zeros(9, 6).int()}),
    ],
)
@pytest.mark.parametrize("name", ALL)
def test_gating_refuses(name, problem, changed):
    given = {"x": torch.zeros(TOKENS, EXPERTS), "k": CHOSEN, "norm_type": 2}
    refuses(A3, name, problem, **{**given, **changed})


def test_the_recipes_take_64_experts_per_token_and_int32_tables_only():
    x = torch.zeros(1, 128)
    assert call(A3, RECIPES, x=x, k=64, norm_type=2)[1].shape == (1, 64)
    refuses(A3, RECIPES, "at most 64", x=x, k=65, norm_type=2)
    wide = {"k": 65, "input_ids": torch.zeros(1).long(), "tid2eid": torch.zeros(3, 65).int()}
    refuses(A3, TORCH, "by token id at most 64", x=x, norm_type=2, **wide)
    given = {"x": x, "k": 2, "norm_type": 2, "input_ids": torch.zeros(1).long()}
    refuses(A3, RECIPES, "want int64 and int32", **given, tid2eid=torch.zeros(3, 2).long())
    assert call(A3, HASH, **given, tid2eid=torch.zeros(3, 2).long())[1].tolist() == [[0, 0]]


@pytest.mark.parametrize("renorm", [0, 1])
def test_softmax_comes_before_the_choice_or_after_it(renorm):
    x = torch.randn(TOKENS, EXPERTS)
    finished = torch.tensor([False, True, False, False, False])
    given = {"x": x, "k": 3, "renorm": renorm, "output_softmax": True}
    weights, ids, out = called(A3, SOFTMAX, **given, finished=finished)
    order = x.argsort(-1, descending=True)[:, :3]
    want = x.gather(1, order).softmax(-1) if renorm else x.softmax(-1).gather(1, order)
    assert torch.allclose(weights, want)
    assert torch.equal(ids[0], order[0].int())
    assert ids[1].tolist() == [EXPERTS] * 3
    assert out.shape == ((0,) if renorm else (TOKENS, EXPERTS))

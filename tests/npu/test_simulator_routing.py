"""Simulated routing against lists in Python, and the calls that it refuses."""

from __future__ import annotations

import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.operators.simulator import elements
from tests.npu.meta_agreement import called
from tests.npu.vendor_calls import call, refuses, simulated

A3, A950 = simulated(Chip.A3), simulated(Chip.A950)
INIT = "npu::npu_moe_init_routing_v2"
CUSTOM = "_C_ascend::npu_moe_init_routing_custom"
PERMUTE = "npu::npu_moe_token_permute"
UNPERMUTE = "npu::npu_moe_token_unpermute"
FINALIZE = "npu::npu_moe_finalize_routing"
RE_ROUTING = "npu::npu_moe_re_routing"
QUANT = "npu::npu_dynamic_quant"
TOKENS, CHOSEN, EXPERTS, WIDTH = 5, 3, 8, 64


def choices():
    return torch.stack([torch.randperm(EXPERTS)[:CHOSEN] for _ in range(TOKENS)]).to(torch.int32)


def by_expert(expert_idx, first=0, last=EXPERTS):
    """(expert, token, place) of the active choices, in the order of a stable sort."""
    found = [
        (expert, token, place)
        for token, row in enumerate(expert_idx.tolist())
        for place, expert in enumerate(row)
        if first <= expert < last
    ]
    return sorted(found, key=lambda each: each[0])


def given(x, expert_idx, **changed):
    found = {"x": x, "expert_idx": expert_idx, "active_num": expert_idx.numel(), "expert_num": EXPERTS}
    found |= {"expert_tokens_num_type": 1, "expert_tokens_num_flag": True, "quant_mode": -1}
    return {**found, "active_expert_range": [0, EXPERTS], **changed}


@pytest.mark.parametrize("name", [INIT, CUSTOM])
def test_rows_are_sorted_by_expert_and_tokens_stay_in_order(name):
    x, idx = torch.randn(TOKENS, WIDTH).bfloat16(), choices()
    rows, index, counts, scale = called(A3, name, **given(x, idx))
    for row, (expert, token, place) in enumerate(by_expert(idx)):
        assert torch.equal(rows[row], x[token])
        assert index[token * CHOSEN + place] == row
        assert idx[token, place] == expert
    assert counts.tolist() == torch.bincount(idx.flatten(), minlength=EXPERTS).tolist()
    assert scale.isnan().all()


def test_row_index_type_1_names_the_source_and_leaves_its_tail():
    x, idx = torch.randn(TOKENS, WIDTH).bfloat16(), choices()
    _rows, index, _counts, _scale = called(
        A3, INIT, **given(x, idx, row_idx_type=1, active_expert_range=[2, 5])
    )
    active = by_expert(idx, 2, 5)
    assert index[: len(active)].tolist() == [token * CHOSEN + place for _, token, place in active]
    assert (index[len(active) :] < -(2**29)).all()


def test_experts_of_other_ranks_get_minus_one_and_no_rows():
    x, idx = torch.randn(TOKENS, WIDTH).bfloat16(), choices()
    rows, index, counts, _scale = called(A3, INIT, **given(x, idx, active_expert_range=[2, 5]))
    active = by_expert(idx, 2, 5)
    kept = {token * CHOSEN + place: row for row, (_, token, place) in enumerate(active)}
    assert index.tolist() == [kept.get(each, -1) for each in range(idx.numel())]
    assert counts.tolist() == [int((idx == expert).sum()) for expert in (2, 3, 4)]
    assert rows[len(active) :].isnan().all()


def test_tokens_per_expert_may_be_ends_or_pairs_or_left_out():
    x, idx = torch.randn(TOKENS, WIDTH).bfloat16(), choices()
    per_expert = torch.bincount(idx.flatten(), minlength=EXPERTS)
    ends = called(A3, INIT, **given(x, idx, expert_tokens_num_type=0))[2]
    assert torch.equal(ends, per_expert.cumsum(0))
    pairs = called(A3, INIT, **given(x, idx, expert_tokens_num_type=2))[2].tolist()
    used = [[expert, int(count)] for expert, count in enumerate(per_expert) if count]
    assert pairs[: len(used)] == used
    assert called(A3, INIT, **given(x, idx, expert_tokens_num_flag=False))[2].shape == ()


def test_dynamic_quantisation_is_that_of_each_source_row():
    x, idx = torch.randn(TOKENS, WIDTH).bfloat16(), choices()
    codes, scales = call(A3, QUANT, input=x)
    rows, _index, _counts, scale = called(A3, INIT, **given(x, idx, quant_mode=1))
    for row, (_expert, token, _place) in enumerate(by_expert(idx)):
        assert torch.equal(rows[row], codes[token])
        assert scale[row] == scales[token]


def test_smooth_scales_are_those_of_the_expert():
    x, idx = torch.randn(TOKENS, WIDTH), choices()
    smooth = torch.rand(3, WIDTH) + 0.5
    rows, _index, _counts, scale = called(
        A3, INIT, **given(x, idx, quant_mode=1, scale=smooth, active_expert_range=[2, 5])
    )
    for row, (expert, token, _place) in enumerate(by_expert(idx, 2, 5)):
        values = x[token] * smooth[expert - 2]
        assert scale[row] == values.abs().max() / 127
        assert torch.equal(rows[row], (values / scale[row]).round().to(torch.int8))


def test_scales_of_quantised_rows_travel_with_them():
    x = torch.randint(-128, 128, (TOKENS, WIDTH), dtype=torch.int8)
    idx, scales = choices(), torch.rand(TOKENS)
    rows, _index, _counts, scale = called(A3, INIT, **given(x, idx, scale=scales))
    for row, (_expert, token, _place) in enumerate(by_expert(idx)):
        assert torch.equal(rows[row], x[token])
        assert scale[row] == scales[token]


def test_950_quantises_rows_to_mx():
    x, idx = torch.randn(TOKENS, WIDTH).bfloat16(), choices()
    codes, pairs = call(A950, "npu::npu_dynamic_mx_quant", input=x, dst_type=24)
    rows, _index, _counts, scale = called(A950, INIT, **given(x, idx, quant_mode=3))
    assert scale.dtype is torch.float8_e8m0fnu
    for row, (_expert, token, _place) in enumerate(by_expert(idx)):
        assert torch.equal(rows[row].view(torch.uint8), codes[token].view(torch.uint8))
        assert torch.equal(elements.as_bytes(scale[row]), pairs[token].flatten())
    refuses(A3, INIT, "quant_mode is 3", **given(x, idx, quant_mode=3))


X = torch.zeros(TOKENS, WIDTH).bfloat16()
IDX = torch.zeros(TOKENS, CHOSEN, dtype=torch.int32)


@pytest.mark.parametrize(
    ("problem", "changed"),
    [
        ("must be int32", {"expert_idx": IDX.long()}),
        ("expert_idx goes from 8 to 8", {"expert_idx": IDX + 8}),
        ("expert_idx goes from -1", {"expert_idx": IDX - 1}),
        ("outside the 8", {"active_expert_range": [4, 9]}),
        ("empty", {"x": X[:0], "expert_idx": IDX[:0]}),
        ("two axes", {"x": X.view(-1)}),
        ("expert_idx 4", {"expert_idx": IDX[:4]}),
        ("quantised again", {"x": X.to(torch.int8), "quant_mode": 1}),
        ("drop_pad_mode", {"drop_pad_mode": 1}),
        ("row_idx_type", {"row_idx_type": 2}),
        ("scale is \\(8,\\)", {"quant_mode": 1, "scale": torch.ones(8)}),
        ("needs scale and offset", {"quant_mode": 0}),
        ("expert_num is -1", {"expert_num": -1}),
    ],
)
def test_init_routing_refuses(problem, changed):
    refuses(A3, INIT, problem, **{**given(X, IDX), **changed})


def test_permute_and_unpermute_are_inverse():
    x, idx = torch.randn(TOKENS, WIDTH).bfloat16(), choices()
    rows, index = called(A3, PERMUTE, tokens=x, indices=idx)
    for row, (_expert, token, place) in enumerate(by_expert(idx)):
        assert torch.equal(rows[row], x[token])
        assert index[token * CHOSEN + place] == row
    probs = torch.rand(TOKENS, CHOSEN)
    back = called(A3, UNPERMUTE, permuted_tokens=rows.float(), sorted_indices=index, probs=probs)
    assert torch.allclose(back, x.float() * probs.sum(1, keepdim=True), atol=1e-5)


def test_unpermute_weighs_each_choice_of_a_token():
    rows = torch.randn(TOKENS * CHOSEN, WIDTH)
    index = torch.randperm(TOKENS * CHOSEN).to(torch.int32)
    probs = torch.rand(TOKENS, CHOSEN)
    got = called(A3, UNPERMUTE, permuted_tokens=rows, sorted_indices=index, probs=probs)
    for token in range(TOKENS):
        want = torch.zeros(WIDTH).double()
        for place in range(CHOSEN):
            want += probs[token, place].double() * rows[index[token * CHOSEN + place]].double()
        assert torch.allclose(got[token].double(), want, atol=1e-5)


def test_unpermute_takes_minus_one_only_where_the_probability_is_zero():
    rows, probs = torch.full((4, 8), float("nan")), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    rows[0] = 1.0
    index = torch.tensor([0, -1, 0, -1], dtype=torch.int32)
    given_ = {"permuted_tokens": rows, "sorted_indices": index}
    assert torch.equal(call(A3, UNPERMUTE, **given_, probs=probs), torch.ones(2, 8))
    refuses(A3, UNPERMUTE, "from -1 to 0", **given_, probs=torch.ones(2, 2))
    refuses(A3, UNPERMUTE, "there are 4 rows", **{**given_, "sorted_indices": index + 4}, probs=probs)
    refuses(A3, UNPERMUTE, "must be int32", **{**given_, "sorted_indices": index.long()}, probs=probs)
    refuses(A950, UNPERMUTE, "wants one type", **given_, probs=probs.bfloat16())


@pytest.mark.parametrize("mode", [0, 2])
def test_finalize_reads_its_index_expert_major_or_token_major(mode):
    rows, scales = torch.randn(TOKENS * CHOSEN, WIDTH), torch.rand(TOKENS, CHOSEN)
    skip = torch.randn(TOKENS, WIDTH)
    index = torch.randperm(TOKENS * CHOSEN).to(torch.int32)
    fixed = {"skip2": None, "bias": None, "export_for_source_row": None}
    got = called(
        A3,
        FINALIZE,
        expanded_permuted_rows=rows,
        skip1=skip,
        scales=scales,
        expanded_src_to_dst_row=index,
        drop_pad_mode=mode,
        **fixed,
    )
    for token in range(TOKENS):
        want = skip[token].double()
        for place in range(CHOSEN):
            at = place * TOKENS + token if mode == 0 else token * CHOSEN + place
            want = want + scales[token, place].double() * rows[index[at]].double()
        assert torch.allclose(got[token].double(), want, atol=1e-5)


def test_finalize_refuses_other_modes_types_and_indices():
    rows, index = torch.zeros(6, 8), torch.zeros(6, dtype=torch.int32)
    fixed = dict.fromkeys(("skip1", "skip2", "bias", "export_for_source_row"))
    found = {"expanded_permuted_rows": rows, "expanded_src_to_dst_row": index, **fixed}
    found |= {"scales": torch.ones(3, 2)}
    refuses(A3, FINALIZE, "drop_pad_mode is 1", **found, drop_pad_mode=1)
    refuses(A3, FINALIZE, "must have the rows' type", **{**found, "scales": torch.ones(3, 2).bfloat16()})
    refuses(A3, FINALIZE, "from -1", **{**found, "expanded_src_to_dst_row": index - 1})
    refuses(A3, FINALIZE, "skip2 needs skip1", **{**found, "skip2": torch.zeros(3, 8)})


def test_re_routing_puts_rows_of_ranks_expert_after_expert():
    counts = torch.tensor([[2, 1, 0], [1, 0, 3]], dtype=torch.int64)
    tokens, scales = torch.randn(7, 8).bfloat16(), torch.rand(7)
    rows, moved, index, per_expert = called(
        A3, RE_ROUTING, tokens=tokens, expert_token_num_per_rank=counts, per_token_scales=scales
    )
    order = [0, 1, 3, 2, 4, 5, 6]
    assert index.tolist() == order
    assert torch.equal(rows, tokens[order])
    assert torch.equal(moved, scales[order])
    assert per_expert.tolist() == [3, 1, 3]
    refuses(A3, RE_ROUTING, "sum to 7", tokens=tokens[:6], expert_token_num_per_rank=counts)

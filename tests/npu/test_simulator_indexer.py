"""Simulated indexers against a loop over queries, entries and heads, and every call that they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Arithmetic
from tests.npu.vendor_calls import call, call_meta, refuses, simulated

VLLM = "_C_ascend::npu_vllm_quant_lightning_indexer"
RECIPES = "custom::npu_quant_lightning_indexer"
TORCH_NPU = "npu::npu_quant_lightning_indexer"
PLAIN = "npu::npu_lightning_indexer"
HEADS, DIM, PAGE = 4, 128, 16
A3 = simulated(Chip.A3)
A950 = simulated(Chip.A950)
CHIP_A3 = simulated(Chip.A3, Arithmetic.CHIP)
CHIP_950 = simulated(Chip.A950, Arithmetic.CHIP)


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


class Scene:
    """A batch whose keys lie in shuffled pages, and the arguments of a call on it."""

    def __init__(self, lengths, counts, *, ratio=4, topk=6, mode=3, sim=A3):
        self.lengths, self.counts, self.ratio, self.topk, self.mode, self.sim = (
            lengths, counts, ratio, topk, mode, sim,
        )  # fmt: skip
        tokens = sum(counts)
        self.ends = [sum(counts[: index + 1]) for index in range(len(counts))]
        columns = -(-max(max(lengths) // ratio, 1) // PAGE)
        pages = columns * len(counts)
        self.table = torch.randperm(pages).view(len(counts), columns).int()
        query, key = torch.randn(tokens, HEADS, DIM), torch.randn(pages, PAGE, 1, DIM)
        wide = torch.float32 if sim.is_950 else torch.float16
        if sim.is_950:
            self.query, self.key = query.to(torch.float8_e4m3fn), key.to(torch.float8_e4m3fn)
        else:
            self.query, self.key = ((rows * 40).clamp(-127, 127).to(torch.int8) for rows in (query, key))
        self.query_scale = (torch.rand(tokens, HEADS) * 0.02 + 0.01).to(wide)
        self.key_scale = (torch.rand(pages, PAGE, 1) * 0.02 + 0.01).to(wide)
        self.weights = torch.randn(tokens, HEADS).to(wide)

    def metadata(self, operator=VLLM, **changes: Any):
        arguments = {
            "num_heads_q": HEADS, "num_heads_k": 1, "head_dim": DIM, "query_quant_mode": 0,
            "key_quant_mode": 0, "actual_seq_lengths_query": int32(self.ends),
            "actual_seq_lengths_key": int32(self.lengths), "batch_size": len(self.counts),
            "max_seqlen_q": max(self.counts), "max_seqlen_k": max(self.lengths),
            "layout_query": "TND", "layout_key": "PA_BSND", "sparse_count": self.topk,
            "sparse_mode": self.mode, "cmp_ratio": self.ratio,
        }  # fmt: skip
        return call(self.sim, f"{operator}_metadata", **(arguments | changes))

    def arguments(self, **changes: Any):
        arguments = {
            "query": self.query, "key": self.key, "weights": self.weights,
            "query_dequant_scale": self.query_scale, "key_dequant_scale": self.key_scale,
            "query_quant_mode": 0, "key_quant_mode": 0, "actual_seq_lengths_query": int32(self.ends),
            "actual_seq_lengths_key": int32(self.lengths),
            "block_table": self.table, "layout_query": "TND", "layout_key": "PA_BSND",
            "sparse_count": self.topk, "sparse_mode": self.mode, "cmp_ratio": self.ratio,
        }  # fmt: skip
        if "metadata" not in changes:
            arguments["metadata"] = self.metadata()
        return arguments | changes

    def run(self, **changes: Any):
        indices, values = call(self.sim, VLLM, **self.arguments(**changes))
        assert values.numel() == 0
        return indices[:, 0]

    def refuses(self, problem, **changes: Any):
        refuses(self.sim, VLLM, problem, **self.arguments(**changes))

    def visible(self, request, offset):
        length, count = self.lengths[request], self.counts[request]
        if self.mode == 0:
            return length // self.ratio
        return max(0, length - count + offset + 1) // self.ratio

    def rows(self):
        """(request, token, visible entries) of each query."""
        for request, count in enumerate(self.counts):
            for offset in range(count):
                yield request, self.ends[request] - count + offset, self.visible(request, offset)

    def score(self, request, token, entry):
        """Score of one entry in float64, with the sum over heads as the formula has it."""
        page = int(self.table[request, entry // PAGE])
        key = self.key[page, entry % PAGE, 0].double()
        total = 0.0
        for head in range(HEADS):
            dot = max(0.0, float(self.query[token, head].double() @ key))
            total += float(self.weights[token, head]) * float(self.query_scale[token, head]) * dot
        return total * float(self.key_scale[page, entry % PAGE, 0])

    def int8_score(self, request, token, entry):
        """Score as A2 and A3 round it: float16 products before a float32 sum."""
        page = int(self.table[request, entry // PAGE])
        key = self.key[page, entry % PAGE, 0].long()
        total = np.float32(0)
        for head in range(HEADS):
            dot = max(0, int(self.query[token, head].long() @ key))
            factor = np.float16(float(self.weights[token, head])) * np.float16(
                float(self.query_scale[token, head])
            )
            total += np.float32(factor) * np.float32(np.float16(dot / 1024))
        return float(total * np.float32(float(self.key_scale[page, entry % PAGE, 0])))

    def expected(self, score):
        rows = torch.full((sum(self.counts), self.topk), -1, dtype=torch.int32)
        for request, token, visible in self.rows():
            scores = [score(request, token, entry) for entry in range(visible)]
            best = sorted(range(visible), key=lambda entry: -scores[entry])[: self.topk]
            rows[token, : len(best)] = int32(best)
        return rows


BATCHES = {
    "one token": ((1,), (1,)),
    "block edges": ((3, 4, 5, 64, 65), (1, 1, 1, 1, 2)),
    "chunks": ((40, 9), (40, 3)),
    "an empty request": ((20, 90), (0, 5)),
    "more queries than keys": ((2,), (5,)),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("mode", [0, 3])
@pytest.mark.parametrize("sim", [A3, A950], ids=["a3", "950"])
def test_rows_are_the_best_visible_entries_then_minus_one(batch, mode, sim):
    scene = Scene(*BATCHES[batch], sim=sim, mode=mode)
    assert scene.run().tolist() == scene.expected(scene.score).tolist()


def test_the_chips_float16_arithmetic_is_the_documented_one():
    scene = Scene((260,), (4,), sim=CHIP_A3, topk=64)
    scene.weights = scene.weights * 2.0**-9
    assert scene.run().tolist() == scene.expected(scene.int8_score).tolist()


def test_subnormal_factors_lose_their_order_on_the_chip_only():
    scene = Scene((8,), (1,), topk=2)
    scene.query.zero_()
    scene.query[0, 0, 0], scene.query[0, 1, 1] = 127, 127
    scene.key[int(scene.table[0, 0]), 0, 0] = torch.tensor([100] + [0] * 127, dtype=torch.int8)
    scene.key[int(scene.table[0, 0]), 1, 0] = torch.tensor([0, 100] + [0] * 126, dtype=torch.int8)
    scene.key_scale.fill_(1)
    scene.query_scale.fill_(2.0**-12)
    scene.weights = torch.tensor([[1.0, 1.25, 0, 0]]).half() * 2.0**-12
    assert scene.run().tolist() == [[1, 0]]
    scene.sim = CHIP_A3
    assert scene.run().tolist() == [[0, 1]]


def test_near_ties_fall_together_on_a_950_in_chip_arithmetic():
    scene = Scene((8,), (1,), topk=2, sim=A950)
    page = int(scene.table[0, 0])
    scene.key[page, 1, 0] = scene.key[page, 0, 0]
    scene.query = scene.query.float().abs().to(torch.float8_e4m3fn)
    scene.key = scene.key.float().abs().to(torch.float8_e4m3fn)
    scene.weights = scene.weights.abs()
    scene.key_scale[page, 0, 0], scene.key_scale[page, 1, 0] = 1.0, 1.0 + 2.0**-16
    assert scene.run().tolist() == [[1, 0]]
    scene.sim = CHIP_950
    assert scene.run().tolist() == [[0, 1]]


def test_query_lengths_may_have_a_leading_zero():
    scene = Scene((40, 9), (7, 3))
    ends = int32([0, *scene.ends])
    metadata = scene.metadata(actual_seq_lengths_query=ends)
    assert torch.equal(scene.run(actual_seq_lengths_query=ends, metadata=metadata), scene.run())


def test_rectangular_batches_have_their_own_lengths():
    scene = Scene((40, 30), (3, 3))
    shape = {"layout_query": "BSND", "actual_seq_lengths_query": int32([3, 2])}
    square = {
        "query": scene.query.view(2, 3, HEADS, DIM), "weights": scene.weights.view(2, 3, HEADS),
        "query_dequant_scale": scene.query_scale.view(2, 3, HEADS),
    }  # fmt: skip
    found, _ = call(A3, VLLM, **scene.arguments(**shape, **square, metadata=scene.metadata(**shape)))
    assert found.shape == (2, 3, 1, scene.topk)
    assert torch.equal(found[0, :, 0], scene.run()[:3])
    assert bool((found[1, 2] < -1).all())


def test_pages_may_lie_apart():
    scene = Scene((100,), (2,))
    wide = torch.zeros(scene.key.shape[0], PAGE + 4, 1, DIM, dtype=torch.int8)
    wide[:, :PAGE] = scene.key
    assert torch.equal(scene.run(key=wide[:, :PAGE]), scene.run())
    scene.refuses("only the distance of pages", key=scene.key.repeat(1, 1, 1, 2)[..., :DIM])


def test_rows_of_no_request_are_undefined():
    scene = Scene((40,), (3,))
    scene.ends = [2]
    scene.counts = [2]
    assert bool((scene.run()[2] < -1).all())


@pytest.mark.parametrize(
    ("fact", "changes"),
    [
        ("number of index heads", {"num_heads_q": 8}),
        ("sparse_count", {"sparse_count": 7}),
        ("sparse_mode", {"sparse_mode": 0}),
        ("cmp_ratio", {"cmp_ratio": 1}),
        ("actual_seq_lengths_query", {"actual_seq_lengths_query": int32([6, 10])}),
        ("actual_seq_lengths_key", {"actual_seq_lengths_key": int32([41, 9])}),
    ],
)
@pytest.mark.parametrize("sim", [A3, A950], ids=["a3", "950"])
def test_a_plan_for_another_step_is_refused(fact, changes, sim):
    scene = Scene((40, 9), (7, 3), sim=sim)
    scene.refuses(f"metadata was made for another {fact}", metadata=scene.metadata(**changes))


@pytest.mark.parametrize(
    ("problem", "changes"),
    [
        ("metadata is missing", {"metadata": None}),
        ("was not made by", {"metadata": torch.zeros(1024, dtype=torch.int32)}),
        ("actual_seq_lengths_key is missing", {"actual_seq_lengths_key": None}),
        ("actual_seq_lengths_query is missing", {"actual_seq_lengths_query": None}),
        ("4 entries for 2 requests", {"actual_seq_lengths_query": int32([0, 3, 7, 10])}),
        ("int32 of rank 1", {"actual_seq_lengths_key": torch.tensor([40, 9])}),
        ("block_table is missing", {"block_table": None}),
        ("block_table has 1 rows", {"block_table": int32([[0, 1]])}),
        ("names page \\[9\\]", {"block_table": int32([[9, 1], [0, 0]])}),
        ("quant modes", {"query_quant_mode": 1}),
        ("layouts are", {"layout_key": "BSND"}),
        ("layouts are", {"layout_query": "BNSD"}),
        ("sparse_mode is 1", {"sparse_mode": 1}),
        ("pre_tokens", {"pre_tokens": 2**31 - 1}),
        ("return_value", {"return_value": True}),
        ("sparse_count is 0", {"sparse_count": 0}),
        ("cmp_ratio is 3", {"cmp_ratio": 3}),
        ("query or key is empty", {"key": torch.zeros(0, PAGE, 1, DIM, dtype=torch.int8)}),
        ("only 128", {"query": torch.zeros(10, HEADS, 64, dtype=torch.int8)}),
        ("key is torch.int32", {"key": torch.zeros(2, PAGE, 1, DIM, dtype=torch.int32)}),
        ("all are torch.float16", {"weights": torch.zeros(10, HEADS)}),
        ("all are torch.float16", {"key_dequant_scale": torch.zeros(2, PAGE, 1)}),
        ("key_dequant_scale is not", {"key_dequant_scale": torch.zeros(2, PAGE).half()}),
        ("weights is not contiguous", {"weights": torch.zeros(HEADS, 10).half().T}),
        ("24 rows per page", {"key": torch.zeros(2, 24, 1, DIM, dtype=torch.int8)}),
        ("2\\*\\*n", {"key": torch.zeros(2, 48, 1, DIM, dtype=torch.int8)}),
    ],
)
def test_what_no_size_excuses_is_refused(problem, changes):
    scene = Scene((40, 9), (7, 3))
    scene.refuses(problem, **({"metadata": scene.metadata()} | changes))


def test_a_score_that_is_not_a_number_is_refused():
    scene = Scene((40,), (1,), sim=CHIP_A3)
    scene.query_scale.fill_(3e4)
    scene.weights.fill_(3e4)
    scene.refuses("not a number")


@pytest.mark.parametrize("chip", list(Chip))
@pytest.mark.parametrize("size", ["index_heads", "topk"])
def test_kernel_sizes_are_refused_just_outside_and_waived_by_name(chip, size):
    scene = Scene((40,), (1,), sim=simulated(chip))
    topk = {Chip.A950: 513}.get(chip, 2049) if size == "topk" else 512
    heads = HEADS if size == "index_heads" else 64
    scene.topk = topk
    arguments = scene.arguments(metadata=None) | {
        name: value[:, :1].repeat(1, heads, *[1] * (value.dim() - 2))
        for name, value in (
            ("query", scene.query), ("weights", scene.weights), ("query_dequant_scale", scene.query_scale),
        )
    }  # fmt: skip
    refuses(simulated(chip, waived=frozenset()), VLLM, f"{size} is", **arguments)
    arguments["metadata"] = scene.metadata(num_heads_q=heads)
    waived = simulated(chip, waived=frozenset({size}))
    assert call(waived, VLLM, **arguments)[0].shape == (1, 1, topk)
    scene.sim = simulated(chip, waived=frozenset())
    with pytest.raises(Exception, match=f"{size} is"):
        scene.metadata(num_heads_q=heads)


def test_both_packages_compute_the_same():
    scene = Scene((40, 9), (7, 3))
    found, _ = call(A3, RECIPES, **scene.arguments(metadata=scene.metadata(RECIPES)))
    assert torch.equal(found[:, 0], scene.run())


def test_torch_npus_indexer_stands_in_with_one_row_per_token():
    """Key lengths in entries, no mask, one rectangular row per query token."""
    scene = Scene((40, 9), (7, 3))
    rows = list(scene.rows())
    arguments = scene.arguments(metadata=None)
    for name in ("metadata", "cmp_ratio"):
        del arguments[name]
    found = call(
        A3, TORCH_NPU, **arguments | {
            "query": scene.query[:, None], "weights": scene.weights[:, None],
            "query_dequant_scale": scene.query_scale[:, None], "layout_query": "BSND", "sparse_mode": 0,
            "actual_seq_lengths_query": None, "actual_seq_lengths_key": int32([row[2] for row in rows]),
            "block_table": scene.table[[row[0] for row in rows]].contiguous(),
        },
    )  # fmt: skip
    assert torch.equal(found[:, 0, 0], scene.run())
    refuses(
        A3, TORCH_NPU, "3 entries for 2 requests",
        **arguments | {"actual_seq_lengths_query": int32([0, *scene.ends])},
    )  # fmt: skip


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)])
def test_torch_npus_950_dtypes(dtypes):
    scene = Scene((40, 9), (7, 3), sim=A950, ratio=1)
    arguments = scene.arguments(metadata=None)
    for name in ("metadata", "cmp_ratio"):
        del arguments[name]
    refuses(A950, TORCH_NPU, "weights, query and key scales", **arguments)
    arguments["weights"] = scene.weights = scene.weights.to(dtypes[0])
    arguments["query_dequant_scale"] = scene.query_scale = scene.query_scale.to(dtypes[1])
    arguments["key_dequant_scale"] = scene.key_scale = scene.key_scale.to(dtypes[1])
    assert call(A950, TORCH_NPU, **arguments)[:, 0].tolist() == scene.expected(scene.score).tolist()


def test_the_unquantised_indexer_has_no_scales():
    scene = Scene((40, 9), (7, 3), ratio=1)
    scene.query, scene.key = torch.randn(scene.query.shape).half(), torch.randn(scene.key.shape).half()
    scene.query_scale.fill_(1)
    scene.key_scale.fill_(1)
    arguments = scene.arguments(metadata=None)
    for name in ("metadata", "cmp_ratio", "query_dequant_scale", "key_dequant_scale"):
        del arguments[name]
    for name in ("query_quant_mode", "key_quant_mode"):
        del arguments[name]
    found, _ = call(A3, PLAIN, **arguments)
    assert found[:, 0].tolist() == scene.expected(scene.score).tolist()


def test_meta_forms_have_the_results_shapes():
    scene = Scene((40, 9), (7, 3))
    indices, values = call_meta(A3, VLLM, **scene.arguments())
    assert (indices.shape, indices.dtype, values.shape) == ((10, 1, scene.topk), torch.int32, (0,))

"""Simulated sparse attention against a loop over tokens and heads, and every call that it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Arithmetic
from ascend_v4.operators.simulator.rows950 import pack_rows, row_bytes, unpack_rows
from tests.npu.vendor_calls import call, call_meta, refuses, simulated

SPARSE = "_C_ascend::npu_sparse_attn_sharedkv"
RECIPES = "custom::npu_sparse_attn_sharedkv"
QUANT = "_C_ascend::npu_kv_quant_sparse_attn_sharedkv"
HEADS, DIM, PAGE, LEFT, TOPK = 4, 128, 16, 31, 12
A3 = simulated(Chip.A3)
A950 = simulated(Chip.A950)
QUANTISED = {"kv_quant_mode": 1, "tile_size": 64, "rope_head_dim": 64}
BATCHES = {
    "one token": ((1,), (1,)),
    "decode": ((40, 4, 131), (1, 1, 1)),
    "chunks": ((70, 9), (70, 3)),
    "empty request": ((20, 30), (0, 5)),
    "more queries than keys": ((2,), (4,)),
}


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


class Scene:
    """A batch over shuffled pages, the arguments of a call on it, and what each token sees."""

    def __init__(self, kv_lens, counts, *, ratio=0, topk=0, sim=A3, dtype=torch.bfloat16):
        self.sim, self.kv_lens, self.counts, self.ratio = sim, kv_lens, counts, ratio
        self.quant = sim.is_950
        self.ends = [sum(counts[:index]) for index in range(len(counts) + 1)]
        self.q = torch.randn(max(self.ends[-1], 1), HEADS, DIM).to(dtype)
        self.sinks = torch.randn(HEADS)
        self.ori, self.ori_rows, self.ori_table = self._pages([max(kv_lens)] * len(counts), dtype)
        self.indices: Any = None
        self.slots: dict[int, list[int]] | None = None
        """Physical places of the window rows of each token, where they are chosen."""
        if ratio:
            entries = [max(max(kv_lens) // ratio, 1)] * len(counts)
            self.cmp, self.cmp_rows, self.cmp_table = self._pages(entries, dtype)
        if topk:
            self.indices = torch.full((self.q.shape[0], 1, topk), -1, dtype=torch.int32)
            for _, token, position in self.tokens():
                visible = max(0, (position + 1) // ratio)
                best = torch.randperm(visible)[:topk]
                self.indices[token, 0, : best.numel()] = best.int()

    def _pages(self, lengths, dtype):
        columns = -(-max(lengths) // PAGE)
        order = torch.randperm(columns * len(lengths)) + 1
        table = order.view(len(lengths), columns)
        rows = torch.randn(order.numel() + 2, PAGE, 1, DIM).to(dtype)
        if not self.quant:
            return rows, rows.double(), table.int()
        flat = pack_rows(rows.view(-1, DIM), 64)
        packed = torch.nn.functional.pad(flat, (0, row_bytes(DIM, 64) - flat.shape[1]))
        values = unpack_rows(packed, DIM, 64).double().view(rows.shape)
        return packed.view(torch.float8_e4m3fn).view(*rows.shape[:3], -1), values, table.int()

    def tokens(self):
        for request, count in enumerate(self.counts):
            for offset in range(count):
                yield request, self.ends[request] + offset, self.kv_lens[request] - count + offset

    def metadata(self, **changes: Any):
        arguments = {
            "num_heads_q": HEADS, "num_heads_kv": 1, "head_dim": DIM, "cu_seqlens_q": int32(self.ends),
            "seqused_kv": int32(self.kv_lens), "batch_size": len(self.counts),
            "max_seqlen_q": max(self.counts), "max_seqlen_kv": max(self.kv_lens),
            "cmp_topk": 0 if self.indices is None else self.indices.shape[2],
            "cmp_ratio": self.ratio or 1, "ori_win_left": LEFT, "ori_win_right": 0, "layout_q": "TND",
            "has_cmp_kv": bool(self.ratio),
        }  # fmt: skip
        if self.quant:
            arguments |= QUANTISED
        return call(self.sim, f"{self.operator}_metadata", **(arguments | changes))

    @property
    def operator(self):
        return QUANT if self.quant else SPARSE

    def arguments(self, **changes: Any):
        arguments = {
            "q": self.q, "ori_kv": self.ori, "ori_block_table": self.ori_table,
            "cu_seqlens_q": int32(self.ends), "seqused_kv": int32(self.kv_lens), "sinks": self.sinks,
            "softmax_scale": DIM**-0.5,
            "cmp_ratio": self.ratio or 1, "ori_win_left": LEFT, "layout_q": "TND",
        }  # fmt: skip
        if "metadata" not in changes:
            arguments["metadata"] = self.metadata()
        if self.ratio:
            arguments |= {"cmp_kv": self.cmp, "cmp_block_table": self.cmp_table}
            arguments["cmp_sparse_indices"] = self.indices
        if self.quant:
            arguments |= QUANTISED
        return arguments | changes

    def run(self, **changes: Any):
        out, lse = call(self.sim, self.operator, **self.arguments(**changes))
        assert lse.numel() == 0
        return out

    def refuses(self, problem, sim=None, **changes: Any):
        refuses(sim or self.sim, self.operator, problem, **self.arguments(**changes))

    def seen(self, request, token, position, left=LEFT, right=0):
        """Rows that a token sees, float64."""
        if self.slots is not None:
            return [self.ori_rows.view(-1, DIM)[slot] for slot in self.slots[token]]
        window = range(max(0, position - left), min(position + right, self.kv_lens[request] - 1) + 1)
        rows = [self._row(self.ori_rows, self.ori_table, request, place) for place in window]
        if self.ratio:
            visible = (position + 1) // self.ratio
            entries = list(range(visible))
            if self.indices is not None:
                entries = self.indices[token, 0, : min(visible, self.indices.shape[2])].tolist()
            rows += [self._row(self.cmp_rows, self.cmp_table, request, entry) for entry in entries]
        return rows

    @staticmethod
    def _row(rows, table, request, place):
        return rows[int(table[request, place // PAGE]), place % PAGE, 0]

    def expected(self, **window):
        out = torch.zeros(self.q.shape, dtype=torch.float64)
        for request, token, position in self.tokens():
            if position < 0:
                continue
            rows = self.seen(request, token, position, **window)
            for head in range(HEADS):
                q = self.q[token, head].double()
                weights = [math.exp(float(q @ row) * DIM**-0.5) for row in rows]
                total = sum(weights) + math.exp(float(self.sinks[head]))
                for weight, row in zip(weights, rows, strict=True):
                    out[token, head] += weight / total * row
        return out


def close(found, expected):
    step = 2.0**-7 if found.dtype is torch.bfloat16 else 2.0**-10
    bound = step * max(1.0, float(expected.abs().max()))
    assert float((found.double() - expected).abs().max()) <= bound


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", ["window", "all entries", "chosen entries"])
@pytest.mark.parametrize("sim", [A3, A950], ids=["a3", "950"])
def test_attention_is_the_loop_over_tokens_and_heads(batch, kind, sim):
    kv_lens, counts = BATCHES[batch]
    ratio = 0 if kind == "window" else 4
    scene = Scene(kv_lens, counts, ratio=ratio, topk=TOPK if kind == "chosen entries" else 0, sim=sim)
    close(scene.run(), scene.expected())


def test_ratio_128_shows_an_entry_at_its_last_token():
    scene = Scene((130,), (4,), ratio=128)
    close(scene.run(), scene.expected())
    assert [(position + 1) // 128 for _, _, position in scene.tokens()] == [0, 1, 1, 1]


def test_float16_caches_work_on_a2():
    scene = Scene((40, 4), (3, 1), sim=simulated(Chip.A2), dtype=torch.float16)
    close(scene.run(), scene.expected())


def test_a_window_to_the_right_stops_at_the_last_key():
    scene = Scene((40,), (9,))
    metadata = scene.metadata(ori_win_left=5, ori_win_right=3)
    found = scene.run(metadata=metadata, ori_win_left=5, ori_win_right=3)
    close(found, scene.expected(left=5, right=3))


def test_ori_win_left_127_shows_128_rows():
    scene = Scene((200,), (1,))
    found = scene.run(metadata=scene.metadata(ori_win_left=127), ori_win_left=127)
    assert len(scene.seen(0, 0, 199, left=127)) == 128
    close(found, scene.expected(left=127))


def halfway_logit():
    """A positive float32 x with exp(-x) halfway between two bfloat16 numbers, the lower one even."""
    start = torch.tensor(-math.log(0.5 * (1 + 2**-8))).view(torch.int32)
    candidates = (start + torch.arange(-32, 33, dtype=torch.int32)).view(torch.float32)
    halves = (-candidates).exp().view(torch.int32) & 0x1FFFF == 0x8000
    return float(candidates[halves][0])


@pytest.mark.parametrize(
    ("chip", "arithmetic", "share"),
    [
        (Chip.A3, Arithmetic.CHIP, 0.5 * (1 + 2**-7)),
        (Chip.A3, Arithmetic.IDEAL, 0.5),
        (Chip.A950, Arithmetic.CHIP, 0.5),
    ],
)
def test_halves_of_the_exponential_go_up_on_a3_and_to_even_elsewhere(chip, arithmetic, share):
    scene = Scene((1,), (1,), sim=simulated(chip, arithmetic))
    row = torch.zeros(DIM, dtype=torch.bfloat16)
    row[64:] = torch.arange(64) + 1
    row[-1] = -1.0
    scene.q = torch.zeros(1, HEADS, DIM, dtype=torch.bfloat16)
    scene.q[..., -1] = 1.0
    stored = scene.ori.view(torch.uint8)[int(scene.ori_table[0, 0]), 0, 0]
    packed = pack_rows(row[None], 64)[0] if scene.quant else row.view(torch.uint8)
    stored[: packed.numel()] = packed
    scene.sinks = torch.zeros(HEADS)
    logit = halfway_logit()
    total = 1.0 + torch.tensor(-logit).exp()
    found = scene.run(softmax_scale=logit)[0, 0, 64:]
    assert torch.equal(found, (share * row[64:].float() / total).bfloat16())


def test_the_last_places_of_an_index_row_are_ignored():
    scene = Scene((20,), (3,), ratio=4, topk=TOPK)
    expected = scene.run()
    for _, token, position in scene.tokens():
        scene.indices[token, 0, (position + 1) // 4 :] = 10**6
    assert torch.equal(scene.run(), expected)


def test_a_repeated_index_counts_twice_and_the_order_does_not_matter():
    scene = Scene((40,), (1,), ratio=4, topk=TOPK)
    scene.indices[0, 0, :10] = int32([3, 3, 0, 1, 2, 4, 5, 6, 7, 9])
    close(scene.run(), scene.expected())
    found = scene.run()
    scene.indices[0, 0, :10] = int32([9, 7, 6, 3, 5, 4, 2, 1, 0, 3])
    close(found, scene.expected())


@pytest.mark.parametrize(("place", "value"), [(0, -1), (4, -1), (2, 5), (1, 2**31 - 1)])
def test_an_invalid_index_among_the_places_that_are_read_is_refused(place, value):
    scene = Scene((20,), (1,), ratio=4, topk=TOPK)
    scene.indices[0, 0, place] = value
    scene.refuses(f"token 0 has index {value} at place {place}")


def test_window_indices_are_physical_slots_that_bypass_the_table():
    scene = Scene((5,), (2,))
    slots = torch.full((2, 1, 128), -1, dtype=torch.int32)
    places = {0: [7, 40, 3, 9], 1: [7, 8, 9, 10, 11]}
    for token, names in places.items():
        slots[token, 0, : len(names)] = int32(names)
    scene.slots = places
    found = scene.run(ori_sparse_indices=slots, ori_block_table=torch.full_like(scene.ori_table, 999))
    close(found, scene.expected())
    slots[1, 0, 2] = -1
    scene.refuses("token 1 has index -1", ori_sparse_indices=slots)


def test_entries_left_of_the_window_are_never_read():
    scene = Scene((100,), (2,))
    expected = scene.run()
    first_column = (98 - LEFT) // PAGE
    scene.ori_table[0, :first_column] = -5
    assert torch.equal(scene.run(), expected)
    scene.ori_table[0, first_column] = -5
    scene.refuses("reads page -5")


def test_a_page_past_the_cache_and_a_short_table_are_refused():
    scene = Scene((40,), (1,))
    scene.refuses("reads page 99", ori_block_table=torch.full_like(scene.ori_table, 99))
    scene.refuses("its table has 1", ori_block_table=scene.ori_table[:, :1].contiguous())


def test_rows_past_the_last_request_are_undefined():
    scene = Scene((9,), (2,))
    scene.q = torch.randn(3, HEADS, DIM).bfloat16()
    assert bool(scene.run()[2].isnan().all())


def test_pages_may_lie_apart_and_nothing_else_may():
    scene = Scene((40,), (3,))
    wide = torch.randn(scene.ori.shape[0], PAGE + 3, 1, DIM).bfloat16()
    wide[:, :PAGE] = scene.ori
    assert torch.equal(scene.run(ori_kv=wide[:, :PAGE]), scene.run())
    scene.refuses("only the distance of pages", ori_kv=scene.ori.repeat(1, 1, 1, 2)[..., :DIM])


def test_a_rectangular_batch_takes_no_cumulative_lengths():
    scene = Scene((40, 37), (3, 3))
    shape = {"layout_q": "BSND", "cu_seqlens_q": None}
    metadata = scene.metadata(**shape)
    found = scene.run(**shape, q=scene.q.view(2, 3, HEADS, DIM), metadata=metadata)
    close(found.flatten(0, 1), scene.expected())
    scene.refuses("BSND refuses it", q=scene.q.view(2, 3, HEADS, DIM), layout_q="BSND")


@pytest.mark.parametrize(
    ("fact", "changes"),
    [
        ("number of query heads", {"num_heads_q": 8}),
        ("cmp_topk", {"cmp_topk": 0}),
        ("cmp_ratio", {"cmp_ratio": 128}),
        ("window", {"ori_win_left": LEFT + 1}),
        ("cu_seqlens_q", {"cu_seqlens_q": int32([0, 2, 4])}),
        ("seqused_kv", {"seqused_kv": int32([41, 9])}),
    ],
)
@pytest.mark.parametrize("sim", [A3, A950], ids=["a3", "950"])
def test_a_plan_for_another_step_is_refused(fact, changes, sim):
    scene = Scene((40, 9), (3, 1), ratio=4, topk=TOPK, sim=sim)
    scene.refuses(f"metadata was made for another {fact}", metadata=scene.metadata(**changes))


@pytest.mark.parametrize(
    ("problem", "changes"),
    [
        ("metadata is missing", {"metadata": None}),
        ("was not made by", {"metadata": torch.zeros(1024, dtype=torch.int32)}),
        ("int32 \\[1024\\]", {"metadata": torch.zeros(1023, dtype=torch.int32)}),
        ("sinks is missing", {"sinks": None}),
        ("sinks is", {"sinks": torch.zeros(HEADS, dtype=torch.bfloat16)}),
        ("sinks is", {"sinks": torch.zeros(HEADS + 1)}),
        ("softmax_scale is 0", {"softmax_scale": 0.0}),
        ("seqused_kv is missing", {"seqused_kv": None}),
        ("cu_seqlens_q is missing", {"cu_seqlens_q": None}),
        ("leading 0", {"cu_seqlens_q": int32([3, 4, 4])}),
        ("falls", {"cu_seqlens_q": int32([0, 4, 3])}),
        ("past the 4 rows of the query", {"cu_seqlens_q": int32([0, 3, 5])}),
        ("seqused_kv of 2", {"cu_seqlens_q": int32([0, 4])}),
        ("seqused_q is given", {"seqused_q": int32([3, 1])}),
        ("no effect with PA_ND", {"cu_seqlens_ori_kv": int32([0, 3, 4])}),
        ("q .* is empty", {"q": torch.zeros(0, HEADS, DIM).bfloat16()}),
        ("q is not contiguous", {"q": torch.zeros(4, DIM, HEADS).bfloat16().transpose(1, 2)}),
        ("q is torch.float32", {"q": torch.zeros(4, HEADS, DIM)}),
        ("rank 4", {"q": torch.zeros(4, 1, HEADS, DIM).bfloat16()}),
        ("ori_mask_mode", {"ori_mask_mode": 3}),
        ("cmp_mask_mode", {"cmp_mask_mode": 0}),
        ("not negative", {"ori_win_left": -1}),
        ("layout_kv", {"layout_kv": "BSND"}),
        ("return_softmax_lse", {"return_softmax_lse": True}),
        ("cmp_ratio is 8", {"cmp_ratio": 8}),
        ("cmp_block_table is missing", {"cmp_block_table": None}),
        ("without cmp_kv", {"cmp_kv": None}),
        ("ori_kv is missing", {"ori_kv": None}),
        ("int32 of rank 2", {"ori_block_table": torch.zeros(2, 3, dtype=torch.int64)}),
        ("int32 of rank 3", {"cmp_sparse_indices": torch.zeros(4, 1, 0, dtype=torch.int32)}),
        ("\\[\\[4\\], 1, K\\]", {"cmp_sparse_indices": torch.zeros(3, 1, 12, dtype=torch.int32)}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("sim", [A3, A950], ids=["a3", "950"])
def test_what_no_size_excuses_is_refused(problem, changes, sim):
    scene = Scene((40, 9), (3, 1), ratio=4, topk=TOPK, sim=sim)
    if "metadata" not in changes:
        changes = {"metadata": scene.metadata(), **changes}
    scene.refuses(problem, **changes)


def test_page_rows_are_multiples_of_sixteen():
    scene = Scene((40,), (1,))
    cache = torch.zeros(9, 24, 1, DIM).bfloat16()
    scene.refuses("24 rows per page", ori_kv=cache)


def test_a_950_window_without_entries_has_cmp_ratio_1():
    Scene((40,), (1,), sim=A950).refuses("without cmp_kv it is 1", cmp_ratio=0)


@pytest.mark.parametrize(
    ("problem", "changes"),
    [
        ("kv_quant_mode", {"kv_quant_mode": 0}),
        ("tile_size", {"tile_size": 128}),
        ("rope_head_dim", {"rope_head_dim": 0}),
        ("256 bytes", {"ori_kv": torch.zeros(4, 16, 1, 640, dtype=torch.uint8).view(torch.float8_e4m3fn)}),
        ("float8_e4m3fn", {"ori_kv": torch.zeros(4, 16, 1, 256, dtype=torch.uint8)}),
    ],
)  # fmt: skip
def test_a_950_row_format_is_fixed(problem, changes):
    Scene((40,), (1,), sim=A950).refuses(problem, **changes)


SIZES = [
    (Chip.A3, "heads", {"heads": 6}), (Chip.A3, "head_dim", {"dim": 256}),
    (Chip.A3, "topk", {"topk": 511}), (Chip.A950, "heads", {"heads": 32}),
    (Chip.A950, "head_dim", {"dim": 256}), (Chip.A950, "topk", {"topk": 256}),
]  # fmt: skip


@pytest.mark.parametrize(("chip", "size", "outside"), SIZES, ids=str)
def test_kernel_sizes_are_refused_just_outside_and_waived_by_name(chip, size, outside):
    shape = {"heads": 64, "dim": 512, "topk": 512} | outside
    quant = chip is Chip.A950
    width = row_bytes(shape["dim"], 64) if quant else shape["dim"]
    dtype = torch.uint8 if quant else torch.bfloat16
    cache = torch.zeros(3, 16, 1, width, dtype=dtype)
    arguments: dict[str, Any] = {
        "q": torch.zeros(1, shape["heads"], shape["dim"]).bfloat16(),
        "ori_kv": cache.view(torch.float8_e4m3fn) if quant else cache,
        "cmp_kv": cache.view(torch.float8_e4m3fn) if quant else cache,
        "ori_block_table": int32([[1]]), "cmp_block_table": int32([[2]]), "cu_seqlens_q": int32([0, 1]),
        "seqused_kv": int32([4]), "sinks": torch.zeros(shape["heads"]), "softmax_scale": 0.1, "cmp_ratio": 4,
        "ori_win_left": 127, "layout_q": "TND",
        "cmp_sparse_indices": torch.zeros(1, 1, shape["topk"], dtype=torch.int32),
    }  # fmt: skip
    plan: dict[str, Any] = {
        "num_heads_q": shape["heads"], "num_heads_kv": 1, "head_dim": shape["dim"],
        "cu_seqlens_q": int32([0, 1]), "seqused_kv": int32([4]), "cmp_topk": shape["topk"], "cmp_ratio": 4,
        "ori_win_left": 127, "layout_q": "TND",
    }  # fmt: skip
    operator = QUANT if quant else SPARSE
    if quant:
        arguments |= QUANTISED
        plan |= QUANTISED
    kernel_sizes = simulated(chip, waived=frozenset())
    problem = "row_width is" if quant and size == "head_dim" else f"{size} is"
    refuses(kernel_sizes, operator, problem, **arguments)
    refuses(kernel_sizes, f"{operator}_metadata", f"{size} is", **plan)
    names = frozenset({size, "row_width"})
    waived = simulated(chip, waived=names)
    metadata = call(waived, f"{operator}_metadata", **plan)
    assert call(waived, operator, metadata=metadata, **arguments)[0].shape == arguments["q"].shape


def test_both_packages_compute_the_same():
    scene = Scene((40, 9), (3, 1), ratio=4, topk=TOPK)
    metadata = scene.metadata()
    found, _ = call(A3, RECIPES, **scene.arguments(metadata=metadata))
    assert torch.equal(found, scene.run(metadata=metadata))


@pytest.mark.parametrize(
    ("problem", "changes"),
    [
        ("batch_size is 3", {"batch_size": 3}),
        ("num_heads_kv is 2", {"num_heads_kv": 2}),
        ("seqused_kv is missing", {"seqused_kv": None}),
        ("cu_seqlens_q is missing", {"cu_seqlens_q": None}),
        ("one more than requests", {"seqused_kv": int32([1, 2, 3])}),
        ("cmp_ratio is 1", {"cmp_ratio": 1}),
        ("has_ori_kv", {"has_ori_kv": False}),
    ],
)
def test_plans_refuse(problem, changes):
    scene = Scene((40, 9), (3, 1), ratio=4, topk=TOPK)
    with pytest.raises(Exception, match=problem):
        scene.metadata(**changes)


def test_meta_forms_have_the_results_shapes():
    scene = Scene((40, 9), (3, 1))
    out, lse = call_meta(A3, SPARSE, **scene.arguments())
    assert (out.shape, out.dtype, out.device.type) == (scene.q.shape, torch.bfloat16, "meta")
    assert lse.shape == (0,)
    plan = call_meta(A3, f"{SPARSE}_metadata", num_heads_q=64, num_heads_kv=1, head_dim=512, device="meta")
    assert (plan.shape, plan.dtype) == ((1024,), torch.int32)

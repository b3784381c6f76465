"""The simulated compressor against a loop over positions and channels, and every call that it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ascend_v4.device.soc import Chip
from tests.npu.vendor_calls import call, call_meta, refuses, simulated

VLLM = "_C_ascend::compressor"
RECIPES = "custom::compressor"
METADATA = "_C_ascend::compressor_metadata"
HIDDEN, DIM, EPSILON = 32, 128, 1e-6
A3 = simulated(Chip.A3)
A950 = simulated(Chip.A950)
KINDS = {"csa": (4, 2, 4), "hca": (128, 1, 32)}
"""Ratio, coff, rows of a state page."""


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


class Scene:
    """Requests whose tokens arrive in steps; what the compressor is given, and what it should return."""

    def __init__(self, kind, lengths, *, sim=A3, page_rows=None):
        self.ratio, self.coff, rows = KINDS[kind]
        self.page_rows, self.sim, self.lengths = page_rows or rows, sim, lengths
        width = self.coff * DIM
        self.x = [torch.randn(length, HIDDEN).bfloat16() for length in lengths]
        self.wkv = (torch.randn(width, HIDDEN) * 0.1).bfloat16()
        self.wgate = (torch.randn(width, HIDDEN) * 0.1).bfloat16()
        self.ape = torch.randn(self.ratio, width) * 0.5
        self.norm = torch.rand(DIM) + 0.5
        columns = -(-max(lengths) // self.page_rows)
        pages = columns * len(lengths)
        self.table = (torch.randperm(pages) + 1).view(len(lengths), columns).int()
        self.state = torch.full((pages + 1, self.page_rows, 2 * width), torch.nan)
        entries = max(lengths) // self.ratio + 1
        self.cos, self.sin = torch.randn(2, entries, 64)

    def arguments(self, starts, counts, **changes: Any):
        ends = [sum(counts[:index]) for index in range(len(counts) + 1)]
        rows = min(ends[-1], ends[-1] // self.ratio + len(counts))
        names = self.completed(starts, counts)
        sin, cos = torch.full((2, rows, 64), torch.nan)
        for row, (_, entry) in enumerate(names):
            sin[row], cos[row] = self.sin[entry], self.cos[entry]
        new = [x[start : start + count] for x, start, count in zip(self.x, starts, counts, strict=True)]
        norm = self.norm if self.sim.is_950 else self.norm.bfloat16()
        return {
            "x": torch.cat(new), "wkv": self.wkv, "wgate": self.wgate, "state_cache": self.state,
            "ape": self.ape, "norm_weight": norm, "rope_sin": sin, "rope_cos": cos,
            "state_block_table": self.table, "cu_seqlens": int32(ends), "seqused": None,
            "start_pos": int32(starts), "rope_head_dim": 64, "cmp_ratio": self.ratio,
            "coff": self.coff, "norm_eps": EPSILON, "rotary_mode": 2, "cache_mode": 1,
        } | changes  # fmt: skip

    def completed(self, starts, counts):
        """(request, entry) of each group that the step completes, in order."""
        return [
            (request, entry)
            for request, (start, count) in enumerate(zip(starts, counts, strict=True))
            for entry in range(start // self.ratio, (start + count) // self.ratio)
        ]

    def run(self, starts, counts, **changes: Any):
        return call(self.sim, VLLM, **self.arguments(starts, counts, **changes))

    def refuses(self, problem, starts, counts, **changes: Any):
        refuses(self.sim, VLLM, problem, **self.arguments(starts, counts, **changes))

    def projected(self, request, position):
        """Key-value and score of a position, the score with its position's bias: float64."""
        x = self.x[request][position].double()
        return self.wkv.double() @ x, self.wgate.double() @ x + self.ape[position % self.ratio].double()

    def expected(self, request, entry):
        out = torch.zeros(DIM, dtype=torch.float64)
        places = []
        for part in range(self.coff):
            block = entry - (self.coff - 1) + part
            if block >= 0:
                places += [(block * self.ratio + offset, part) for offset in range(self.ratio)]
        kv_rows, score_rows = [], []
        for position, part in places:
            kv, score = self.projected(request, position)
            kv_rows.append(kv[part * DIM : (part + 1) * DIM].tolist())
            score_rows.append(score[part * DIM : (part + 1) * DIM].tolist())
        for channel in range(DIM):
            scores = [score[channel] for score in score_rows]
            values = [kv[channel] for kv in kv_rows]
            weights = [math.exp(score - max(scores)) for score in scores]
            out[channel] = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        norm = self.norm if self.sim.is_950 else self.norm.bfloat16()
        out = out * (out.square().mean() + EPSILON).rsqrt() * norm.double()
        cos, sin = self.cos[entry].double(), self.sin[entry].double()
        turned = out[64:].clone()
        for pair in range(32):
            even, odd = out[64 + 2 * pair], out[65 + 2 * pair]
            turned[2 * pair] = even * cos[2 * pair] - odd * sin[2 * pair]
            turned[2 * pair + 1] = odd * cos[2 * pair + 1] + even * sin[2 * pair + 1]
        return torch.cat([out[:64], turned])

    def check(self, found, starts, counts):
        names = self.completed(starts, counts)
        assert bool(found[len(names) :].isnan().all())
        for row, (request, entry) in zip(found, names, strict=False):
            expected = self.expected(request, entry)
            bound = 2.0**-8 * float(expected.abs().max()) + 1e-6
            assert float((row.double() - expected).abs().max()) <= bound, (request, entry)


@pytest.mark.parametrize("sim", [A3, A950], ids=["a3", "950"])
@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("csa", [((0, 0), (4, 3)), ((4, 3), (1, 1)), ((5, 4), (9, 5))]),
        ("csa", [((0, 0), (14, 9))]),
        ("csa", [((0, 0), (1, 1)), ((1, 1), (1, 0)), ((2, 1), (6, 8))]),
        ("hca", [((0, 0), (127, 130)), ((127, 130), (1, 1))]),
        ("hca", [((0, 0), (100, 20)), ((100, 20), (40, 120))]),
    ],
)
def test_entries_are_the_same_however_the_tokens_arrive(kind, steps, sim):
    lengths = [start + count for start, count in zip(*steps[-1], strict=True)]
    scene = Scene(kind, lengths, sim=sim)
    for starts, counts in steps:
        scene.check(scene.run(starts, counts), starts, counts)


def test_stored_scores_hold_their_positions_bias_and_padded_pages_stay():
    scene = Scene("csa", [7])
    backing = torch.full((scene.state.shape[0], scene.page_rows + 2, scene.state.shape[2]), -17.0)
    scene.state = backing[:, : scene.page_rows]
    scene.run((0,), (7,))
    for position in range(7):
        page = int(scene.table[0, position // scene.page_rows])
        row = scene.state[page, position % scene.page_rows].double()
        assert torch.allclose(row, torch.cat(scene.projected(0, position)), atol=1e-4)
    assert bool((backing[:, scene.page_rows :] == -17).all())


def test_pages_of_entry_0_are_not_written_and_new_tokens_do_not_need_them():
    scene = Scene("csa", [12])
    kept = scene.table.clone()
    scene.table[0, 0] = 0
    scene.check(scene.run((0,), (8,)), (0,), (8,))
    assert bool(scene.state[0].isnan().all())
    assert bool(scene.state[int(kept[0, 0])].isnan().all())
    scene.check(scene.run((8,), (4,)), (8,), (4,))


def test_an_old_position_whose_page_is_0_is_refused():
    scene = Scene("csa", [12])
    scene.run((0,), (8,))
    scene.table[0, 1] = 0
    scene.refuses("needs the state of position \\[4\\]", (8,), (4,))


def test_pages_older_than_the_overlap_may_be_gone():
    scene = Scene("csa", [16])
    scene.run((0,), (12,))
    scene.table[0, :2] = 0
    scene.check(scene.run((12,), (4,)), (12,), (4,))


def test_a_page_that_two_touched_entries_share_is_refused():
    scene = Scene("csa", [8, 8])
    scene.table[1, 0] = scene.table[0, 1]
    scene.refuses("share page", (0, 0), (8, 4))
    scene.run((0, 4), (4, 4), start_pos=int32([0, 4]), seqused=int32([4, 0]))


def test_a_ring_of_pages_is_refused_while_the_rows_it_takes_are_needed():
    scene = Scene("csa", [12], page_rows=2)
    scene.run((0,), (6,))
    kept = int(scene.table[0, 3])
    scene.table[0, 3] = scene.table[0, 0]
    scene.refuses("share page", (6,), (2,))
    scene.table[0, 3] = kept
    scene.run((6,), (2,))
    scene.table[0, 4] = scene.table[0, 0]
    scene.run((8,), (1,))


def test_seqused_leaves_tokens_out():
    scene = Scene("csa", [9, 9])
    arguments = scene.arguments((0, 0), (9, 9), seqused=int32([5, 8]))
    arguments["rope_cos"][:3], arguments["rope_sin"][:3] = scene.cos[[0, 0, 1]], scene.sin[[0, 0, 1]]
    found = call(A3, VLLM, **arguments)
    for row, name in zip(found, [(0, 0), (1, 0), (1, 1)], strict=False):
        assert float((row.double() - scene.expected(*name)).abs().max()) < 0.05
    assert bool(found[3:].isnan().all())
    page = int(scene.table[0, 1])
    assert bool(scene.state[page, 1:].isnan().all())


def test_a_rectangular_batch_has_its_rows_per_request():
    scene = Scene("csa", [7, 10])
    scene.run((0, 0), (2, 3))
    x = torch.stack([scene.x[0][2:7], scene.x[1][3:8]])
    sin, cos = torch.zeros(2, 2, 2, 64)
    cos[0, 0], sin[0, 0] = scene.cos[0], scene.sin[0]
    cos[1], sin[1] = scene.cos[:2], scene.sin[:2]
    found = scene.run((2, 3), (5, 5), x=x, rope_sin=sin, rope_cos=cos, cu_seqlens=None)
    assert found.shape == (2, 2, DIM)
    for place, name in (((0, 0), (0, 0)), ((1, 0), (1, 0)), ((1, 1), (1, 1))):
        assert float((found[place].double() - scene.expected(*name)).abs().max()) < 0.05
    assert bool(found[0, 1].isnan().all())


def test_no_tokens_are_allowed():
    scene = Scene("csa", [5])
    found = scene.run((0,), (0,))
    assert found.shape == (0, DIM)
    assert bool(scene.state.isnan().all())


def test_the_recipes_build_takes_a_float32_norm_and_vllms_one_of_x():
    scene = Scene("csa", [8])
    arguments = scene.arguments((0,), (8,))
    refuses(A3, RECIPES, "norm_weight", **arguments)
    found = call(A3, RECIPES, **(arguments | {"norm_weight": scene.norm.bfloat16().float()}))
    assert torch.equal(found[:2], call(A3, VLLM, **arguments)[:2])
    scene.refuses("norm_weight", (0,), (8,), norm_weight=scene.norm)
    refuses(A950, VLLM, "norm_weight", **arguments)


def test_a_950_takes_float32_rope_only():
    scene = Scene("csa", [8], sim=A950)
    halves = {"rope_sin": torch.zeros(3, 64).bfloat16(), "rope_cos": torch.zeros(3, 64).bfloat16()}
    scene.refuses("rope_sin is torch.bfloat16", (0,), (8,), **halves)
    Scene("csa", [8]).run((0,), (8,), **halves)


@pytest.mark.parametrize(
    ("problem", "changes"),
    [
        ("coff, cmp_ratio", {"coff": 1}),
        ("rotary_mode", {"rotary_mode": 1}),
        ("rotary_mode, cache_mode", {"cache_mode": 2}),
        ("rope_head_dim", {"rope_head_dim": 32}),
        ("state_block_table is missing", {"state_block_table": None}),
        ("int32 of rank 2", {"state_block_table": torch.zeros(1, 2, dtype=torch.int64)}),
        ("cu_seqlens is missing", {"cu_seqlens": None}),
        ("leading 0", {"cu_seqlens": int32([8])}),
        ("past the 8 rows", {"cu_seqlens": int32([0, 9])}),
        ("start_pos\\[0\\] is -1", {"start_pos": int32([-1])}),
        ("seqused\\[0\\] is 9", {"seqused": int32([9])}),
        ("state page \\[99\\]", {"state_block_table": int32([[99, 2, 3, 4]])}),
        ("state page \\[-1\\]", {"state_block_table": int32([[-1, 2, 3, 4]])}),
        ("its table has 1", {"state_block_table": int32([[1]])}),
        ("rope_sin is", {"rope_sin": torch.zeros(2, 64)}),
        ("rope_cos is", {"rope_cos": torch.zeros(3, 32)}),
        ("rope_sin is .*rope_cos", {"rope_cos": torch.zeros(3, 64).bfloat16()}),
        ("ape is", {"ape": torch.zeros(4, 2 * DIM).bfloat16()}),
        ("wkv is", {"wkv": torch.zeros(HIDDEN, 2 * DIM).bfloat16()}),
        ("wgate is", {"wgate": torch.zeros(2 * DIM, HIDDEN)}),
        ("state_cache is", {"state_cache": torch.zeros(5, 4, 2 * DIM)}),
        ("only the distance of pages", {"state_cache": torch.zeros(5, 4, 8 * DIM)[..., : 4 * DIM]}),
        ("x is torch.float32", {"x": torch.zeros(8, HIDDEN)}),
    ],
)
def test_what_no_size_excuses_is_refused(problem, changes):
    Scene("csa", [16]).refuses(problem, (0,), (8,), **changes)


@pytest.mark.parametrize("chip", list(Chip))
@pytest.mark.parametrize(("dim", "hidden", "size"), [(256, 4096, "head_dim"), (512, 4352, "hidden")])
def test_kernel_sizes_are_refused_just_outside_and_waived_by_name(chip, dim, hidden, size):
    dtype = torch.float32 if chip is Chip.A950 else torch.bfloat16
    arguments = {
        "x": torch.zeros(1, hidden).bfloat16(), "wkv": torch.zeros(dim, hidden).bfloat16(),
        "wgate": torch.zeros(dim, hidden).bfloat16(), "state_cache": torch.zeros(2, 8, 2 * dim),
        "ape": torch.zeros(128, dim), "norm_weight": torch.ones(dim, dtype=dtype),
        "rope_sin": torch.zeros(1, 64), "rope_cos": torch.zeros(1, 64), "state_block_table": int32([[1]]),
        "cu_seqlens": int32([0, 1]), "seqused": None, "start_pos": int32([0]), "rope_head_dim": 64,
        "cmp_ratio": 128, "coff": 1, "norm_eps": EPSILON, "rotary_mode": 2, "cache_mode": 1,
    }  # fmt: skip
    refuses(simulated(chip, waived=frozenset()), VLLM, f"{size} is", **arguments)
    assert call(simulated(chip, waived=frozenset({size})), VLLM, **arguments).shape == (1, dim)


def test_metadata_gives_rope_rows_and_slots_of_completed_entries():
    cos = torch.arange(64.0)[:, None].repeat(1, 64)
    table = int32([[5, 0], [7, -1], [3, 3]])
    call_ = {
        "rope_cos": cos, "rope_sin": -cos, "cu_seqlens": int32([0, 9, 15, 16]),
        "start_pos": int32([3, 30, 7]),
        "kv_block_table": table, "kv_block_size": 8, "compress_ratio": 4, "num_compressed_tokens": 7,
        "num_reqs_actual": 3,
    }  # fmt: skip
    entries = [(0, 0), (0, 1), (0, 2), (1, 7), (1, 8), (2, 1), (2, 2)]
    expected = [[5, 0], [5, 1], [5, 2], [7, 7], [-1, 7], [3, 1], [-1, 7]]
    found_cos, found_sin, slots = call(A3, METADATA, **call_, slot_mapping_format=2)
    assert slots.tolist() == expected
    for row, name in enumerate(entries):
        valid = expected[row][0] >= 0
        assert float(found_cos[row, 0, 0, 3]) == (4.0 * name[1] if valid else 1.0)
        assert float(found_sin[row, 0, 0, 3]) == (-4.0 * name[1] if valid else 0.0)
    _, _, flat = call(A3, METADATA, **call_, slot_mapping_format=1)
    assert flat.tolist() == [40, 41, 42, 63, -1, 25, -1]


def test_metadata_leaves_padding_requests_and_positions_past_the_tables_out():
    cos = torch.zeros(16, 64)
    sizes = {"kv_block_size": 8, "compress_ratio": 4, "slot_mapping_format": 1}
    found = call(
        A3, METADATA, cu_seqlens=int32([0, 8, 16, 16]), start_pos=int32([12, 0, 0]),
        kv_block_table=int32([[2], [4], [4]]), num_compressed_tokens=4, num_reqs_actual=1,
        rope_cos=cos, rope_sin=cos, **sizes,
    )  # fmt: skip
    assert found[2].tolist() == [19, -1, -1, -1]


def test_metadata_out_fills_given_buffers():
    scene = {
        "rope_cos": torch.randn(16, 64), "rope_sin": torch.randn(16, 64), "cu_seqlens": int32([0, 8]),
        "start_pos": int32([0]), "kv_block_table": int32([[2]]), "kv_block_size": 8,
        "slot_mapping_format": 2, "compress_ratio": 4, "num_reqs_actual": 1,
    }  # fmt: skip
    buffers = (torch.empty(3, 1, 1, 64), torch.empty(3, 1, 1, 64), torch.zeros(3, 2, dtype=torch.int32))
    names = ("compress_cos", "compress_sin", "slot_mapping")
    call(A3, f"{METADATA}_out", **scene, **dict(zip(names, buffers, strict=True)))
    wanted = call(A3, METADATA, **scene, num_compressed_tokens=3)
    assert all(torch.equal(buffer, value) for buffer, value in zip(buffers, wanted, strict=True))
    bad = dict(zip(names, buffers, strict=True)) | {"slot_mapping": torch.zeros(3, dtype=torch.int32)}
    refuses(A3, f"{METADATA}_out", "slot_mapping", **scene, **bad)


@pytest.mark.parametrize(
    ("problem", "changes"),
    [
        ("num_compressed_tokens is 0", {"num_compressed_tokens": 0}),
        ("slot_mapping_format is 0", {"slot_mapping_format": 0}),
        ("kv_block_size is 0", {"kv_block_size": 0}),
        ("compress_ratio is 0", {"compress_ratio": 0}),
        ("num_reqs_actual is 2", {"num_reqs_actual": 2}),
        ("two tables alike", {"rope_sin": torch.zeros(16, 32)}),
        ("int32", {"start_pos": torch.tensor([0])}),
    ],
)
def test_metadata_refuses(problem, changes):
    arguments = {
        "rope_cos": torch.zeros(16, 64), "rope_sin": torch.zeros(16, 64), "cu_seqlens": int32([0, 8]),
        "start_pos": int32([0]), "kv_block_table": int32([[2]]), "kv_block_size": 8,
        "slot_mapping_format": 2, "compress_ratio": 4, "num_compressed_tokens": 3, "num_reqs_actual": 1,
    }  # fmt: skip
    refuses(A3, METADATA, problem, **(arguments | changes))


def test_meta_forms_have_the_results_shapes():
    scene = Scene("csa", [9, 4])
    found = call_meta(A3, VLLM, **scene.arguments((0, 0), (9, 4)))
    assert (found.shape, found.dtype) == ((5, DIM), torch.bfloat16)
    cos, _, slots = call_meta(
        A3, METADATA, rope_cos=scene.cos, rope_sin=scene.sin, cu_seqlens=int32([0, 9]), start_pos=int32([0]),
        kv_block_table=int32([[1]]), kv_block_size=32, slot_mapping_format=2, compress_ratio=4,
        num_compressed_tokens=3, num_reqs_actual=1,
    )  # fmt: skip
    assert (cos.shape, slots.shape, slots.dtype) == ((3, 1, 1, 64), (3, 2), torch.int32)

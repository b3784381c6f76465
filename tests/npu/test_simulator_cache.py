"""Simulated cache writes against what their rows must hold, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.operators.simulator.rows950 import pack_rows, round_half_away, row_bytes, unpack_rows
from tests.npu.vendor_calls import call, call_meta, refuses, simulated

A3 = simulated(Chip.A3)
A950 = simulated(Chip.A950)
V2 = "_C_ascend::npu_scatter_nd_update_v2"
ASC = "custom::scatter_nd_update_asc"
TORCH_NPU = "npu::npu_scatter_nd_update_"
KV_VLLM = "_C_ascend::kv_compress_epilog"
KV_RECIPES = "custom::kv_compress_epilog"
INDEX_VLLM = "_C_ascend::indexer_compress_epilog_v2"
INDEX_RECIPES = "custom::indexer_compress_epilog"
E4M3 = torch.float8_e4m3fn
VLLM_ROW = {"quant_group_size": 64, "quant_mode": 2, "round_scale_flag": True, "layout": 1}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_rows_of_448_and_64_values_take_640_bytes():
    assert row_bytes(512, 64) == 640
    assert row_bytes(128, 64) == 256


def test_a_row_is_rotated_part_then_codes_then_exponents():
    x = torch.zeros(1, 128, dtype=torch.bfloat16)
    x[0, 0] = 448.0
    x[0, 64:] = torch.arange(64)
    row = pack_rows(x, 64)[0]
    assert row.numel() == 2 * 64 + 64 + 1
    assert torch.equal(row[:128].view(torch.bfloat16), x[0, 64:])
    assert row[128:192].view(E4M3)[0] == 448.0
    assert row[192] == 127


@pytest.mark.parametrize("largest", [1e-6, 3e-3, 1.0, 448.0, 449.0, 3e4])
def test_exponents_are_those_of_the_smallest_power_of_two_that_holds_the_group(largest):
    x = torch.zeros(1, 128, dtype=torch.bfloat16)
    x[0, 5] = largest
    held = max(float(x[0, 5]), 1e-4)
    exponent = math.ceil(math.log2(held / 448.0))
    assert int(pack_rows(x, 64)[0, -1]) == 127 + exponent


def test_unpacked_rows_are_within_a_sixteenth_and_keep_the_rotated_part():
    x = torch.randn(5, 512).bfloat16()
    packed = torch.nn.functional.pad(pack_rows(x, 64), (0, 57))
    values = unpack_rows(packed, 512, 64)
    assert torch.equal(values[:, 448:], x[:, 448:].float())
    groups = x[:, :448].float().unflatten(1, (-1, 64))
    error = (values[:, :448].unflatten(1, (-1, 64)) - groups).abs()
    assert bool((error <= groups.abs() / 16 + groups.abs().amax(-1, keepdim=True) / 2**14).all())


def test_halves_round_away_from_zero_in_both_formats():
    values = torch.tensor([1 + 2**-8, -(1 + 2**-8), 1 + 3 * 2**-8, 1 + 2**-9])
    assert round_half_away(values, torch.bfloat16).tolist() == [1 + 2**-7, -(1 + 2**-7), 1 + 2**-6, 1.0]
    values = torch.tensor([1 + 2**-11, 2.0**-25, 0.5 * 2.0**-25, 3 * 2.0**-25])
    assert round_half_away(values, torch.float16).tolist() == [1 + 2**-10, 2.0**-24, 0.0, 2 * 2.0**-24]


def paged(dtype=torch.bfloat16, pages=3, rows=16, width=8, gap=0):
    """A cache whose pages lie `gap` rows apart."""
    return torch.zeros(pages, rows + gap, 1, width, dtype=dtype)[:, :rows]


@pytest.mark.parametrize("gap", [0, 2])
def test_scatter_v2_writes_pages_that_lie_apart_and_skips_the_padded_row(gap):
    cache = paged(gap=gap)
    update = torch.randn(3, 8).bfloat16()
    call(A3, V2, var=cache, indices=torch.tensor([[2, 3], [-1, 15], [1, 0]]), update=update)
    assert torch.equal(cache[2, 3, 0], update[0])
    assert torch.equal(cache[1, 0, 0], update[2])
    assert int(cache.count_nonzero()) == 16


def test_scatter_v2_takes_flat_slots_of_a_scale_view():
    scales = torch.zeros(2, 16, 1, dtype=torch.float16)
    call(A3, V2, var=scales, indices=int32([1, 4]), update=torch.ones(1, 1, dtype=torch.float16))
    assert scales[1, 4, 0] == 1


@pytest.mark.parametrize("row", [[1, -1], [0, 16]])
def test_scatter_v2_refuses_an_index_that_falls_on_another_row(row):
    update = torch.ones(1, 8, dtype=torch.bfloat16)
    refuses(A3, V2, "falls on another row", var=paged(), indices=torch.tensor([row]), update=update)


def test_scatter_v2_skips_an_offset_past_the_end():
    cache = paged()
    call(A3, V2, var=cache, indices=int32([9, 0]), update=torch.ones(1, 8, dtype=torch.bfloat16))
    assert not cache.any()


def test_scatter_v2_refuses_a_cache_that_int32_offsets_do_not_reach():
    cache = torch.empty(2**24, 128, dtype=torch.int8)
    update = torch.zeros(1, 128, dtype=torch.int8)
    refuses(A3, V2, "offsets are int32", var=cache, indices=int32([0]), update=update)
    call(A3, V2, var=cache[:-1], indices=int32([0]), update=update)


@pytest.mark.parametrize("operator", [V2, ASC])
def test_scatters_refuse_two_different_rows_for_one_place_and_no_rows(operator):
    cache = torch.zeros(8, 128, dtype=torch.bfloat16)
    update = torch.full((2, 128), torch.nan, dtype=torch.bfloat16)
    call(A3, operator, var=cache, indices=int32([3], [3]), update=update)
    update[1, 5] = 1
    refuses(A3, operator, "one place", var=cache, indices=int32([3], [3]), update=update)
    empty = torch.zeros(0, 1, dtype=torch.int32)
    refuses(A3, operator, "no row to write", var=cache, indices=empty, update=update[:0])


def test_scatter_asc_skips_every_negative_row_and_refuses_one_past_the_end():
    cache = torch.zeros(4, 128, dtype=torch.int8)
    update = torch.arange(3, dtype=torch.int8)[:, None].repeat(1, 128) + 1
    call(A3, ASC, var=cache, indices=torch.tensor([[-7], [2], [-1]]), update=update)
    assert cache[2].tolist() == [2] * 128
    assert int(cache.count_nonzero()) == 128
    refuses(A3, ASC, "past the 4 rows", var=cache, indices=int32([4]), update=update[:1])


def test_scatter_asc_takes_dense_rows_of_its_widths_only():
    kernel_sizes = simulated(Chip.A3, waived=frozenset())
    cache = torch.zeros(4, 256, dtype=torch.bfloat16)
    refuses(kernel_sizes, ASC, "head_dim is 256", var=cache, indices=int32([1]), update=cache[:1])
    refuses(A3, ASC, "not \\[rows, width\\]", var=cache[:, :128], indices=int32([1]), update=cache[:1, :128])
    floats = torch.zeros(4, 128)
    refuses(A3, ASC, "float32", var=floats, indices=int32([1]), update=floats[:1])


def test_torch_npus_scatter_writes_a_view_in_place_and_wants_indices_in_range():
    base = torch.zeros(3, 20, 8)
    view = base[:, :16]
    result = call(A3, TORCH_NPU, input=view, indices=torch.tensor([[1, 2]]), updates=torch.ones(1, 8))
    assert result is view
    assert base[1, 2].tolist() == [1.0] * 8
    refuses(
        A3, TORCH_NPU, "is outside", input=view, indices=torch.tensor([[-1, 15]]), updates=torch.ones(1, 8)
    )
    bytes_ = torch.zeros(3, 8, dtype=torch.uint8)
    refuses(A3, TORCH_NPU, "uint8", input=bytes_, indices=torch.tensor([[1]]), updates=bytes_[:1])


def test_the_functional_scatter_leaves_its_input():
    cache = torch.zeros(3, 8)
    result = call(
        A3, "npu::npu_scatter_nd_update", input=cache, indices=torch.tensor([[1]]), updates=torch.ones(1, 8)
    )
    assert not cache.any()
    assert int(result.count_nonzero()) == 8


def test_blocks_are_runs_of_slots_within_a_page():
    groups = [torch.full((8,), 99, dtype=torch.int32) for _ in range(3)]
    names = ("group_len", "group_key_idx", "group_key_cache_idx")
    slots = int32(14, 15, 16, -1, 17, 18, 5)
    call(
        A3,
        "_C_ascend::store_kv_block_metadata",
        slot_mapping_npu=slots,
        **dict(zip(names, groups, strict=True)),
        block_size=16,
    )
    runs = torch.stack(groups, dim=1).tolist()
    assert runs[:4] == [[2, 0, 14], [1, 2, 16], [2, 4, 17], [1, 6, 5]]
    assert runs[4:] == [[0, 0, 0]] * 4
    keys = torch.arange(7.0)[:, None].repeat(1, 8)
    cache = torch.full((2, 16, 8), -1.0)
    call(
        A3,
        "_C_ascend::store_kv_block",
        key_in=keys,
        key_cache_in=cache,
        **dict(zip(names, groups, strict=True)),
        block_size=16,
    )
    flat = cache.view(32, 8)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert flat[slot].tolist() == [float(row)] * 8
    assert int((flat != -1).sum()) == 6 * 8


@pytest.mark.parametrize("operator", [KV_VLLM, KV_RECIPES])
def test_epilogs_write_packed_rows_and_skip_minus_one(operator):
    cache = torch.zeros(32, 640, dtype=torch.uint8).view(E4M3)
    x = torch.randn(3, 512).bfloat16()
    x[1] = torch.nan
    layout = VLLM_ROW if operator is KV_VLLM else {}
    view = cache.view(-1, 1, 640) if operator is KV_VLLM else cache
    call(A950, operator, kv_compress_cache=view, x=x, slot_mapping=int32(7, -1, 30), **layout)
    stored = cache.view(torch.uint8)
    assert torch.equal(stored[[7, 30], :583], pack_rows(x[[0, 2]], 64))
    stored[[7, 30]] = 0
    assert not stored.any()


def test_epilogs_write_nothing_where_every_slot_is_minus_one():
    slots = int32(-1, -1)
    pages = torch.zeros(2, 16, 1, 132, dtype=torch.uint8)
    call(A950, INDEX_VLLM, indexer_compress_cache=pages, x=torch.ones(2, 128).half(), slot_mapping=slots)
    rows = torch.zeros(8, 640, dtype=torch.uint8).view(E4M3)
    x = torch.ones(2, 512).bfloat16()
    call(A950, KV_RECIPES, kv_compress_cache=rows, x=x, slot_mapping=slots)
    assert not pages.any()
    assert not rows.view(torch.uint8).any()


def test_vllms_epilog_takes_the_first_stride_for_the_distance_of_rows():
    cache = torch.zeros(2, 16, 1, 640, dtype=torch.uint8).view(E4M3)
    x = torch.zeros(1, 512).bfloat16()
    refuses(
        A950,
        KV_VLLM,
        "stride\\(0\\) separates rows",
        kv_compress_cache=cache,
        x=x,
        slot_mapping=int32(3),
        **VLLM_ROW,
    )


@pytest.mark.parametrize(
    ("problem", "change"),
    [
        ("only -1 is skipped", {"slot_mapping": int32(-2, 1)}),
        ("outside the 32", {"slot_mapping": int32(32, 1)}),
        ("one slot", {"slot_mapping": int32(4, 4)}),
        ("not empty", {"x": torch.zeros(0, 512).bfloat16(), "slot_mapping": int32()}),
        ("bfloat16", {"x": torch.zeros(2, 512)}),
        ("dense", {"x": torch.zeros(512, 2).bfloat16().T}),
        ("640 bytes", {"kv_compress_cache": torch.zeros(32, 576, dtype=torch.uint8).view(E4M3)}),
        ("float8_e4m3fn", {"kv_compress_cache": torch.zeros(32, 640, dtype=torch.uint8)}),
        ("group, mode, round", {"quant_mode": 1}),
        ("group, mode, round", {"quant_group_size": 128}),
        ("group, mode, round", {"round_scale_flag": False}),
    ],
)
def test_epilogs_refuse(problem, change):
    arguments = {
        "kv_compress_cache": torch.zeros(32, 640, dtype=torch.uint8).view(E4M3),
        "x": torch.zeros(2, 512).bfloat16(),
        "slot_mapping": int32(0, 1),
    }
    refuses(A950, KV_RECIPES, problem, **(arguments | change))
    refuses(A950, KV_VLLM, problem, **(arguments | VLLM_ROW | change))


def test_epilogs_take_heads_of_512_unless_waived():
    kernel_sizes = simulated(Chip.A950, waived=frozenset())
    cache = torch.zeros(32, 256, dtype=torch.uint8).view(E4M3)
    x = torch.zeros(1, 128).bfloat16()
    call(A950, KV_RECIPES, kv_compress_cache=cache, x=x, slot_mapping=int32(0))
    refuses(kernel_sizes, KV_RECIPES, "head_dim is 128", kv_compress_cache=cache, x=x, slot_mapping=int32(0))


@pytest.mark.parametrize("gap", [0, 5])
def test_index_pages_hold_all_codes_then_all_scales(gap):
    cache = torch.zeros(3, 16 * 132 + gap * 132, dtype=torch.uint8)
    view = cache.view(3, 16 + gap, 1, 132)[:, :16]
    x = torch.randn(3, 128).bfloat16()
    x[2] = 0
    call(A950, INDEX_VLLM, indexer_compress_cache=view, x=x, slot_mapping=int32(18, -1, 47))
    scale = x[0].float().abs().max() / 448
    assert cache[1, 2048 + 8 : 2048 + 12].view(torch.float32) == pytest.approx(float(scale), rel=1e-6)
    codes = cache[1, 2 * 128 : 3 * 128].view(E4M3).float()
    assert torch.allclose(codes * scale, x[0].float(), rtol=1 / 15, atol=float(scale) / 512)
    cache[1, 256:384] = 0
    cache[1, 2056:2060] = 0
    assert not cache.any()


def test_index_epilog_of_the_recipes_writes_two_dense_tensors():
    codes = torch.zeros(32, 128, dtype=torch.uint8).view(E4M3)
    scales = torch.zeros(32, 1)
    x = torch.randn(2, 128).bfloat16()
    call(
        A950,
        INDEX_RECIPES,
        indexer_compress_cache=codes,
        indexer_compress_scale=scales,
        x=x,
        slot_mapping=int32(31, 4),
    )
    values = codes.float()[[31, 4]] * scales[[31, 4]]
    assert torch.allclose(values, x.float(), rtol=1 / 15, atol=1e-4)
    assert int(scales.count_nonzero()) == 2


@pytest.mark.parametrize(
    ("problem", "change"),
    [
        ("layout is 1", {"layout": 1}),
        ("uint8", {"indexer_compress_cache": torch.zeros(2, 16, 1, 132, dtype=torch.int8)}),
        ("bytes apart", {"indexer_compress_cache": torch.zeros(2, 16, 1, 131, dtype=torch.uint8)}),
        ("int32", {"slot_mapping": torch.tensor([0])}),
        ("outside the 32", {"slot_mapping": int32(32)}),
        ("a scale is for 128", {"x": torch.zeros(1, 64).bfloat16()}),
    ],
)
def test_index_epilog_refuses(problem, change):
    arguments = {
        "indexer_compress_cache": torch.zeros(2, 16, 1, 132, dtype=torch.uint8),
        "x": torch.zeros(1, 128).bfloat16(),
        "slot_mapping": int32(0),
    }
    refuses(A950, INDEX_VLLM, problem, **(arguments | change))


def test_meta_forms_return_what_the_schemas_say():
    cache = torch.zeros(3, 8)
    indices = torch.tensor([[1]])
    assert call_meta(A3, TORCH_NPU, input=cache, indices=indices, updates=cache[:1]).shape == (3, 8)
    assert call_meta(A3, V2, var=cache, indices=indices, update=cache[:1]) is None

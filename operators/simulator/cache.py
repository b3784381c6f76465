"""Writes into paged caches: scatters of both packages and of torch_npu, block copies, and the 950's epilogs.

A negative slot means different things to different kernels. The epilogs skip -1 only; scatter_nd_update_asc
skips every negative row; npu_scatter_nd_update_v2 skips a row whose linear offset is negative or past the
end, and writes to whatever place any other offset names. Two different rows for one place are refused: their
order is open.

Sources: bindings, tiling and kernels of vLLM-Ascend (HEAD 182b75ea) and of the CANN recipes (HEAD fbc225d),
and torch_npu's documentation of npu_scatter_nd_update_.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ascend_v4.operators.simulator.kernels import A2_A3, ONLY_950, kernel
from ascend_v4.operators.simulator.rows950 import pack_rows, quantise_index_keys, row_bytes
from ascend_v4.operators.simulator.state import SimulatedChip, require, require_size

# T rows to write, I index columns, C cache pages, S rows per page, D values of a row

ROPE_HEAD_DIM = 64
HEAD_DIM = 512
ROW_BYTES = 640
INDEX_HEAD_DIM = 128
SCALE_BYTES = 4
SKIPPED = -1
MAX_INT32 = 2**31 - 1
ASC_WIDTHS = (1, 128, 512)
ASC_DTYPES = (torch.bfloat16, torch.float16, torch.int8)
INDEX_DTYPES = (torch.int32, torch.int64)
TORCH_NPU_DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.bool,
    torch.int64,
    torch.int8,
)
V2_DTYPES = (*TORCH_NPU_DTYPES, torch.int32, torch.int16)
EPILOG_DTYPES = (torch.bfloat16, torch.float16)


def nothing(sim: SimulatedChip, **arguments: object) -> None:
    """What operators without a result return on meta."""


def first_argument(sim: SimulatedChip, *, input: Tensor, **arguments: object) -> Tensor:
    """The tensor that is written in place."""
    return input


def fresh_result(sim: SimulatedChip, *, input: Tensor, **arguments: object) -> Tensor:
    """A tensor of the first one's shape."""
    return torch.empty_like(input)


@kernel("_C_ascend::npu_scatter_nd_update_v2", meta=nothing, chips=A2_A3)
def scatter_nd_update_v2(sim: SimulatedChip, *, var: Tensor, indices: Tensor, update: Tensor) -> None:
    """Rows of a cache whose pages may lie apart; indices [T, I] name the first I axes."""
    operator = "npu_scatter_nd_update_v2"
    require(var.dtype in V2_DTYPES, operator, f"var is {var.dtype}; it takes {V2_DTYPES}")
    columns = _require_scatter(operator, var, indices, update)
    strides = torch.tensor(var.stride()[:columns])
    offsets = (indices.long() * strides).sum(dim=1)
    reach = sum((size - 1) * stride for size, stride in zip(var.shape[:columns], var.stride(), strict=False))
    right = reach + math.prod(var.shape[columns:]) <= MAX_INT32
    require(
        right, operator, f"var reaches over {reach} elements; offsets are int32, and wrapped ones are skipped"
    )
    written = (offsets >= 0) & (offsets <= reach)
    rows = indices.long()[written]
    outside = ((rows < 0) | (rows >= torch.tensor(var.shape[:columns]))).any(dim=1)
    message = f"index {rows[outside][:1].tolist()} of var {tuple(var.shape)} falls on another row"
    require(not outside.any(), operator, message)
    _write(operator, var, rows, update.reshape(indices.shape[0], *var.shape[columns:])[written])


@kernel("custom::scatter_nd_update_asc", meta=nothing, chips=A2_A3)
def scatter_nd_update_asc(sim: SimulatedChip, *, var: Tensor, indices: Tensor, update: Tensor) -> None:
    """Rows of a dense [rows, width] cache."""
    operator = "scatter_nd_update_asc"
    require(var.dtype in ASC_DTYPES, operator, f"var is {var.dtype}; it takes {ASC_DTYPES}")
    require(var.dim() == 2 and var.is_contiguous(), operator, f"var {tuple(var.shape)} is not [rows, width]")
    width = var.shape[1]
    require_size(sim, operator, "head_dim", width, width in ASC_WIDTHS, f"rows of {ASC_WIDTHS} values")
    columns = _require_scatter(operator, var, indices, update)
    require(columns == 1, operator, f"indices have {columns} columns; one")
    require(update.shape == (indices.shape[0], width), operator, f"update is {tuple(update.shape)}")
    rows = indices.long()
    message = f"index {int(rows.max())} is past the {var.shape[0]} rows"
    require(int(rows.max()) < var.shape[0], operator, message)
    written = rows[:, 0] >= 0
    _write(operator, var, rows[written], update[written])


@kernel("npu::npu_scatter_nd_update_", meta=first_argument)
def scatter_nd_update_(sim: SimulatedChip, *, input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """torch_npu's scatter, in place; every index lies in range."""
    operator = "npu_scatter_nd_update_"
    require(input.dtype in TORCH_NPU_DTYPES, operator, f"input is {input.dtype}; {TORCH_NPU_DTYPES}")
    right = indices.dim() >= 2 and indices.dtype in INDEX_DTYPES
    require(right, operator, f"indices is {indices.dtype} of rank {indices.dim()}; int32 or int64, rank >= 2")
    columns = indices.shape[-1]
    shape = (*indices.shape[:-1], *input.shape[columns:])
    right = updates.dtype is input.dtype and tuple(updates.shape) == shape
    found = f"{updates.dtype} {tuple(updates.shape)}"
    require(right, operator, f"updates is {found}; it is {input.dtype} {shape}")
    rows = indices.reshape(-1, columns).long()
    outside = ((rows < 0) | (rows >= torch.tensor(input.shape[:columns]))).any(dim=1)
    message = f"index {rows[outside][:1].tolist()} is outside {tuple(input.shape[:columns])}"
    require(not outside.any(), operator, message)
    _write(operator, input, rows, updates.reshape(rows.shape[0], *input.shape[columns:]))
    return input


@kernel("npu::npu_scatter_nd_update", meta=fresh_result)
def scatter_nd_update(sim: SimulatedChip, *, input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """`scatter_nd_update_` into a copy."""
    return scatter_nd_update_(sim, input=input.clone(), indices=indices, updates=updates)


@kernel("_C_ascend::store_kv_block_metadata", meta=nothing)
def store_kv_block_metadata(
    sim: SimulatedChip,
    *,
    slot_mapping_npu: Tensor,
    group_len: Tensor,
    group_key_idx: Tensor,
    group_key_cache_idx: Tensor,
    block_size: int,
) -> None:
    """Runs of slots that follow each other within a page: length, first row, first slot; then zeros."""
    operator = "store_kv_block_metadata"
    require(block_size > 0, operator, f"block_size is {block_size}")
    groups = (group_len, group_key_idx, group_key_cache_idx)
    for tensor in (slot_mapping_npu, *groups):
        right = tensor.dtype is torch.int32 and tensor.dim() == 1 and tensor.is_contiguous()
        require(right, operator, f"an argument is {tensor.dtype} {tuple(tensor.shape)}; int32 of rank 1")
    slots: list[int] = slot_mapping_npu.tolist()
    capacity = min(tensor.shape[0] for tensor in groups)
    require(
        capacity >= len(slots), operator, f"the groups hold {capacity} runs, there are {len(slots)} slots"
    )
    runs: list[list[int]] = []
    for row, slot in enumerate(slots):
        if slot < 0:
            continue
        follows = bool(runs) and row > 0 and slots[row - 1] >= 0 and slot == slots[row - 1] + 1
        if follows and slot // block_size == slots[row - 1] // block_size:
            runs[-1][0] += 1
        else:
            runs.append([1, row, slot])
    for column, tensor in enumerate(groups):
        tensor.zero_()
        tensor[: len(runs)] = torch.tensor([run[column] for run in runs], dtype=torch.int32)


@kernel("_C_ascend::store_kv_block", meta=nothing)
def store_kv_block(
    sim: SimulatedChip,
    *,
    key_in: Tensor,
    key_cache_in: Tensor,
    group_len: Tensor,
    group_key_idx: Tensor,
    group_key_cache_idx: Tensor,
    block_size: int,
) -> None:
    """Copies the runs of `store_kv_block_metadata` into a dense cache [C, S, ...]."""
    operator = "store_kv_block"
    require(
        key_in.is_contiguous() and key_cache_in.is_contiguous(), operator, "key or cache is not contiguous"
    )
    require(
        key_in.dtype is key_cache_in.dtype, operator, f"key is {key_in.dtype}, cache {key_cache_in.dtype}"
    )
    groups = (group_len, group_key_idx, group_key_cache_idx)
    sizes = {(tensor.dim(), tensor.numel(), tensor.dtype) for tensor in groups}
    right = len(sizes) == 1 and group_len.dim() == 1 and group_len.dtype is torch.int32
    require(right, operator, "the group buffers are not int32 of rank 1 and one length")
    row_values = math.prod(key_cache_in.shape[2:])
    require(math.prod(key_in.shape[1:]) == row_values, operator, "key and cache rows differ in length")
    rows, cache = key_in.view(-1, row_values), key_cache_in.view(-1, row_values)
    for length, row, slot in torch.stack(groups, dim=1).tolist():
        inside = min(length, row, slot) >= 0 and row + length <= len(rows) and slot + length <= len(cache)
        require(
            inside, operator, f"run of {length} from row {row} to slot {slot} leaves the key or the cache"
        )
        cache[slot : slot + length] = rows[row : row + length]


@kernel("_C_ascend::kv_compress_epilog", meta=nothing, chips=ONLY_950)
def kv_compress_epilog_vllm(
    sim: SimulatedChip,
    *,
    kv_compress_cache: Tensor,
    x: Tensor,
    slot_mapping: Tensor,
    quant_group_size: int,
    quant_mode: int,
    round_scale_flag: bool,
    layout: int,
) -> None:
    """FP8 rows of layout 1. The kernel takes the stride of the first axis as the distance between rows."""
    operator = "kv_compress_epilog"
    require(layout == 1, operator, f"layout is {layout}; attention reads layout 1")
    cache = kv_compress_cache
    if cache.dim() == 4:
        require(cache.shape[2] == 1, operator, f"kv_compress_cache {tuple(cache.shape)} has several heads")
        cache = cache.squeeze(2)
    one_row = cache.dim() in (2, 3) and math.prod(cache.shape[1:-1]) == 1 and cache.stride(-1) == 1
    message = (
        f"kv_compress_cache is {tuple(kv_compress_cache.shape)}; stride(0) separates rows: view (-1, 1, row)"
    )
    require(one_row, operator, message)
    _write_rows950(
        sim,
        operator,
        cache.view(cache.shape[0], -1),
        x,
        slot_mapping,
        modes=(quant_group_size, quant_mode, round_scale_flag),
    )


@kernel("custom::kv_compress_epilog", meta=nothing, chips=ONLY_950)
def kv_compress_epilog_recipes(
    sim: SimulatedChip,
    *,
    kv_compress_cache: Tensor,
    x: Tensor,
    slot_mapping: Tensor,
    quant_group_size: int,
    quant_mode: int,
    round_scale_flag: bool,
    scale: float,
) -> None:
    """FP8 rows of a dense cache."""
    operator = "kv_compress_epilog"
    require(kv_compress_cache.is_contiguous(), operator, "kv_compress_cache is not contiguous")
    _write_rows950(
        sim,
        operator,
        kv_compress_cache.view(-1, kv_compress_cache.shape[-1]),
        x,
        slot_mapping,
        modes=(quant_group_size, quant_mode, round_scale_flag),
    )


@kernel("_C_ascend::indexer_compress_epilog_v2", meta=nothing, chips=ONLY_950)
def indexer_compress_epilog_v2(
    sim: SimulatedChip, *, indexer_compress_cache: Tensor, x: Tensor, slot_mapping: Tensor, layout: int
) -> None:
    """FP8 index keys and float32 scales in pages of bytes: all codes of a page, then all its scales."""
    operator = "indexer_compress_epilog_v2"
    cache = indexer_compress_cache
    require(layout == 2, operator, f"layout is {layout}; only 2")
    right = cache.dtype is torch.uint8 and cache.dim() == 4 and cache.shape[2] == 1
    require(right, operator, f"cache is {cache.dtype} {tuple(cache.shape)}; uint8 [pages, rows, 1, bytes]")
    _require_epilog(operator, x, slot_mapping, (torch.int32,))
    num_pages, page_rows = cache.shape[:2]
    page_bytes = page_rows * (INDEX_HEAD_DIM + SCALE_BYTES)
    dense = cache.stride(-1) == 1 and cache.stride(0) >= max(page_bytes, page_rows * cache.shape[3])
    require(dense, operator, f"pages are {cache.stride(0)} bytes apart; codes and scales take {page_bytes}")
    pages = cache.as_strided((num_pages, page_bytes), (cache.stride(0), 1), cache.storage_offset())
    written, slots = _written_slots(operator, slot_mapping, num_pages * page_rows)
    if slots.numel() == 0:
        return
    codes, scales = quantise_index_keys(x[written])
    page, row = slots // page_rows, slots % page_rows
    code_places = (row * INDEX_HEAD_DIM)[:, None] + torch.arange(INDEX_HEAD_DIM)
    scale_places = (page_rows * INDEX_HEAD_DIM + row * SCALE_BYTES)[:, None] + torch.arange(SCALE_BYTES)
    pages[page[:, None], code_places] = codes.view(torch.uint8)
    pages[page[:, None], scale_places] = scales.view(torch.uint8)


@kernel("custom::indexer_compress_epilog", meta=nothing, chips=ONLY_950)
def indexer_compress_epilog(
    sim: SimulatedChip,
    *,
    indexer_compress_cache: Tensor,
    indexer_compress_scale: Tensor,
    x: Tensor,
    slot_mapping: Tensor,
    quant_mode: int,
    round_scale: bool,
    scale: float,
) -> None:
    """FP8 index keys and float32 scales in two dense tensors."""
    operator = "indexer_compress_epilog"
    require(
        quant_mode == 1, operator, f"quant_mode is {quant_mode}; the indexer reads float32 scales, mode 1"
    )
    _require_epilog(operator, x, slot_mapping, (torch.int32,))
    caches = (
        ("indexer_compress_cache", indexer_compress_cache, torch.float8_e4m3fn, x.shape[-1]),
        ("indexer_compress_scale", indexer_compress_scale, torch.float32, x.shape[-1] // INDEX_HEAD_DIM),
    )
    for name, cache, dtype, width in caches:
        right = cache.dtype is dtype and cache.is_contiguous() and cache.shape[-1] == width
        found = f"{cache.dtype} {tuple(cache.shape)}"
        require(right, operator, f"{name} is {found}; it is {dtype} with rows of {width}, contiguous")
    rows, scales = (cache.view(-1, cache.shape[-1]) for _, cache, _, _ in caches)
    require(len(rows) == len(scales), operator, f"{len(rows)} rows of codes, {len(scales)} of scales")
    written, slots = _written_slots(operator, slot_mapping, len(rows))
    codes, values = quantise_index_keys(x[written])
    rows.view(torch.uint8)[slots] = codes.view(torch.uint8)
    scales[slots] = values


def _require_scatter(operator: str, var: Tensor, indices: Tensor, update: Tensor) -> int:
    """Index columns of a scatter whose arguments fit."""
    right = indices.dim() == 2 and indices.dtype in INDEX_DTYPES and indices.is_contiguous()
    require(right, operator, f"indices is {indices.dtype} {tuple(indices.shape)}; int32 or int64 [T, I]")
    num_rows, columns = indices.shape
    require(num_rows > 0, operator, "there is no row to write; leave the call out")
    require(0 < columns <= var.dim(), operator, f"indices have {columns} columns, var has rank {var.dim()}")
    row_values = math.prod(var.shape[columns:])
    right = update.dtype is var.dtype and update.numel() == num_rows * row_values
    right = right and update.shape[0] == num_rows and update.is_contiguous()
    found = f"{update.dtype} {tuple(update.shape)}"
    require(right, operator, f"update is {found}; it is {var.dtype}, {num_rows} rows of {row_values}")
    dense = var[(0,) * columns].is_contiguous() if var.numel() else False
    require(dense, operator, f"rows of var {tuple(var.shape)} are not dense")
    return columns


def _write(operator: str, var: Tensor, rows_TI: Tensor, values: Tensor) -> None:
    places = tuple(rows_TI.unbind(dim=1))
    var[places] = values
    same = torch.equal(_bits(var[places]), _bits(values))
    require(same, operator, "two different rows go to one place; which one stays is not defined")


def _bits(values: Tensor) -> Tensor:
    """Bytes of each number, so that a NaN equals itself."""
    return values.reshape(-1).view(torch.uint8)


def _require_epilog(
    operator: str, x: Tensor, slot_mapping: Tensor, slot_dtypes: tuple[torch.dtype, ...]
) -> None:
    right = x.dim() == 2 and x.numel() > 0 and x.dtype in EPILOG_DTYPES and x.is_contiguous()
    require(right, operator, f"x is {x.dtype} {tuple(x.shape)}; bfloat16 or float16 [T, D], dense, not empty")
    right = slot_mapping.dtype in slot_dtypes and tuple(slot_mapping.shape) == (x.shape[0],)
    found = f"{slot_mapping.dtype} {tuple(slot_mapping.shape)}"
    require(right, operator, f"slot_mapping is {found}; {slot_dtypes} [{x.shape[0]}]")
    if slot_dtypes == (torch.int32,):
        right = x.shape[1] % INDEX_HEAD_DIM == 0
        require(right, operator, f"x has {x.shape[1]} channels; a scale is for {INDEX_HEAD_DIM}")


def _written_slots(operator: str, slot_mapping: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Which rows are written, and their slots. Refuses slots outside and slots named twice."""
    slots = slot_mapping.long()
    written = slots != SKIPPED
    slots = slots[written]
    bad = slots[(slots < 0) | (slots >= num_slots)].tolist()
    require(not bad, operator, f"slot {bad[:1]} is outside the {num_slots} of the cache; only -1 is skipped")
    distinct = torch.unique(slots).numel() == slots.numel()
    require(distinct, operator, "two rows go to one slot; which one stays is not defined")
    return written, slots


def _write_rows950(
    sim: SimulatedChip,
    operator: str,
    rows: Tensor,
    x: Tensor,
    slot_mapping: Tensor,
    *,
    modes: tuple[int, int, bool],
) -> None:
    """Rows of `rows950` at their slots; the padding behind them stays as it is."""
    require(modes == (64, 2, True), operator, f"(group, mode, round) is {modes}; it takes (64, 2, True)")
    require(x.dtype is torch.bfloat16, operator, f"x is {x.dtype}; it takes bfloat16")
    _require_epilog(operator, x, slot_mapping, INDEX_DTYPES)
    head_dim = x.shape[1]
    require_size(sim, operator, "head_dim", head_dim, head_dim == HEAD_DIM, f"{HEAD_DIM}")
    width = row_bytes(head_dim, ROPE_HEAD_DIM)
    right = rows.dtype is torch.float8_e4m3fn and rows.shape[1] == width
    found = f"{rows.dtype} with rows of {rows.shape[1]}"
    require(right, operator, f"kv_compress_cache is {found}; it is float8_e4m3fn with {width} bytes")
    written, slots = _written_slots(operator, slot_mapping, rows.shape[0])
    if slots.numel() == 0:
        return
    packed = pack_rows(x[written], ROPE_HEAD_DIM)
    rows.view(torch.uint8)[slots, : packed.shape[1]] = packed

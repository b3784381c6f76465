"""The compressor of both packages, and compressor_metadata, which prepares its rope rows and cache slots.

Projections of new tokens are kept as a state row [keys-values | scores], the score with its position's bias
in it, until a group of cmp_ratio positions is complete. A complete group is pooled by a softmax per channel
(with coff 2 together with the group before it, each with its own half of the channels), normalised, rotated
in its last 64 channels, and rounded once. New rows are written before old ones are read.

Sources: kernel, binding, README and tests of the compressor and compressor_metadata of vLLM-Ascend (HEAD
182b75ea).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_v4.device.soc import Chip
from ascend_v4.operators.simulator.attention_metadata import (
    OPS_TRANSFORMER,
    cumulative_counts,
    given,
    int32_values,
)
from ascend_v4.operators.simulator.kernels import kernel
from ascend_v4.operators.simulator.state import SimulatedChip, require, require_size, undefined

# T tokens, B requests, H hidden size, D head size, E = coff * D, S rows per state page, P table columns
# N complete groups, R rope values

OPERATOR = "compressor"
METADATA = "compressor_metadata"
A3_950 = (Chip.A3, Chip.A950)
HEAD_DIMS = {(2, 4): (128, 512), (1, 128): (512,)}
"""Head sizes by (coff, cmp_ratio)."""
ROPE_HEAD_DIM = 64
INTERLEAVED = 2
CONTIGUOUS = 1
HIDDEN_STEP = 512
HIDDEN_RANGE = (1024, 10240)
UNTOUCHED = 0
"""Entry of the state table of a page that is not written."""
FLAT = 1
PAGE_AND_ROW = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressorCall:
    """Arguments of the compressor."""

    x: Tensor
    wkv: Tensor
    wgate: Tensor
    state_cache: Tensor
    ape: Tensor
    norm_weight: Tensor
    rope_sin: Tensor
    rope_cos: Tensor
    state_block_table: Tensor | None
    cu_seqlens: Tensor | None
    seqused: Tensor | None
    start_pos: Tensor | None
    rope_head_dim: int
    cmp_ratio: int
    coff: int
    norm_eps: float
    rotary_mode: int
    cache_mode: int

    @property
    def head_dim(self) -> int:
        """Channels of an entry."""
        return self.norm_weight.shape[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """The new tokens of one request."""

    index: int
    first: int
    """Its first row among all tokens."""
    used: int
    start: int
    """Position of its first new token."""
    first_output: int
    """Its first output row."""


def compressor_meta(
    sim: SimulatedChip,
    *,
    x: Tensor,
    norm_weight: Tensor,
    rope_sin: Tensor,
    cmp_ratio: int,
    **arguments: object,
) -> Tensor:
    """One row per rope row, or per group of each request of a rectangular batch."""
    if x.dim() == 3:
        return x.new_empty(x.shape[0], -(-x.shape[1] // cmp_ratio), norm_weight.shape[0])
    return x.new_empty(rope_sin.shape[0], norm_weight.shape[0])


@kernel("_C_ascend::compressor", meta=compressor_meta)
def compressor_vllm(sim: SimulatedChip, **arguments: object) -> Tensor:
    """vLLM-Ascend's build: the norm's weight is of x's dtype on A2 and A3, float32 on the 950."""
    call = CompressorCall(**arguments)  # type: ignore[arg-type]
    return _compress(sim, call, torch.float32 if sim.is_950 else call.x.dtype)


@kernel(
    "custom::compressor",
    meta=compressor_meta,
    chips=A3_950,
    symbol="aclnnCompressor",
    symbol_package=OPS_TRANSFORMER,
)
def compressor_recipes(sim: SimulatedChip, **arguments: object) -> Tensor:
    """The build that the CANN recipes call: the norm's weight is float32."""
    return _compress(sim, CompressorCall(**arguments), torch.float32)  # type: ignore[arg-type]


def _compress(sim: SimulatedChip, call: CompressorCall, norm_dtype: torch.dtype) -> Tensor:
    _require_weights(sim, call, norm_dtype)
    table_BP = given(OPERATOR, "state_block_table", call.state_block_table, "the kernel reads it")
    int32_values(OPERATOR, "state_block_table", table_BP, rank=2)
    requests, num_rows = _requests(call, table_BP.shape[0])
    _require_rope(sim, call, num_rows, table_BP.shape[0])
    x_TH = call.x.flatten(0, -2).float()
    kv_TE = x_TH @ call.wkv.float().T
    score_TE = x_TH @ call.wgate.float().T
    for request in requests:
        positions = torch.arange(request.start, request.start + request.used)
        tokens = slice(request.first, request.first + request.used)
        score_TE[tokens] += call.ape[positions % call.cmp_ratio]
    state_TW = torch.cat([kv_TE, score_TE], dim=-1)
    _write_state(call, table_BP.long(), requests, state_TW)
    outputs = undefined(num_rows, call.head_dim, dtype=call.x.dtype)
    sin_NR, cos_NR = (rope.flatten(0, -2).float() for rope in (call.rope_sin, call.rope_cos))
    for request in requests:
        pooled_ND = _pool(call, table_BP.long(), request, state_TW)
        rows = slice(request.first_output, request.first_output + pooled_ND.shape[0])
        normed_ND = _rms_norm(pooled_ND, call.norm_weight.float(), call.norm_eps)
        outputs[rows] = _rotate(normed_ND, sin_NR[rows], cos_NR[rows]).to(call.x.dtype)
    if call.x.dim() == 3:
        return outputs.view(call.x.shape[0], -1, call.head_dim)
    return outputs


def _require_weights(sim: SimulatedChip, call: CompressorCall, norm_dtype: torch.dtype) -> None:
    """Refuses modes, sizes, dtypes and layouts that the kernel does not have."""
    pair = (call.coff, call.cmp_ratio)
    require(pair in HEAD_DIMS, OPERATOR, f"(coff, cmp_ratio) is {pair}; it takes {sorted(HEAD_DIMS)}")
    modes = (call.rotary_mode, call.cache_mode, call.rope_head_dim)
    right = modes == (INTERLEAVED, CONTIGUOUS, ROPE_HEAD_DIM)
    require(right, OPERATOR, f"(rotary_mode, cache_mode, rope_head_dim) is {modes}; it takes (2, 1, 64)")
    head_dim, hidden, width = call.head_dim, call.x.shape[-1], call.coff * call.head_dim
    allowed = HEAD_DIMS[pair]
    require_size(sim, OPERATOR, "head_dim", head_dim, head_dim in allowed, f"{allowed} for {pair}")
    right = hidden % HIDDEN_STEP == 0 and HIDDEN_RANGE[0] <= hidden <= HIDDEN_RANGE[1]
    require_size(sim, OPERATOR, "hidden", hidden, right, "1024 to 10240, multiples of 512")
    right = call.x.dtype in (torch.bfloat16, torch.float16) and call.x.dim() in (2, 3)
    require(right, OPERATOR, f"x is {call.x.dtype} of rank {call.x.dim()}; bfloat16 or float16, rank 2 or 3")
    expected = {
        "wkv": (call.wkv, call.x.dtype, (width, hidden)),
        "wgate": (call.wgate, call.x.dtype, (width, hidden)),
        "ape": (call.ape, torch.float32, (call.cmp_ratio, width)),
        "norm_weight": (call.norm_weight, norm_dtype, (head_dim,)),
    }
    for name, (tensor, dtype, shape) in expected.items():
        right = tensor.dtype is dtype and tuple(tensor.shape) == shape and tensor.is_contiguous()
        found = f"{tensor.dtype} {tuple(tensor.shape)}"
        require(right, OPERATOR, f"{name} is {found}; it is {dtype} {shape}, contiguous")
    state = call.state_cache
    right = state.dtype is torch.float32 and state.dim() == 3 and state.shape[-1] == 2 * width
    found = f"{state.dtype} {tuple(state.shape)}"
    require(right, OPERATOR, f"state_cache is {found}; it is float32 [pages, rows, {2 * width}]")
    require(state.numel() > 0, OPERATOR, f"state_cache {tuple(state.shape)} is empty")
    dense = state.stride(2) == 1 and state.stride(1) == 2 * width
    dense = dense and state.stride(0) >= state.shape[1] * 2 * width
    message = f"state_cache has strides {state.stride()}; only the distance of pages may differ from dense"
    require(dense, OPERATOR, message)


def _requests(call: CompressorCall, num_tables: int) -> tuple[list[Request], int]:
    """The requests and how many output rows there are."""
    if call.x.dim() == 2:
        cu_seqlens = given(OPERATOR, "cu_seqlens", call.cu_seqlens, "packed tokens need it")
        ends = int32_values(OPERATOR, "cu_seqlens", cu_seqlens).tolist()
        counts = cumulative_counts(OPERATOR, "cu_seqlens", ends, call.x.shape[0])
        num_rows = min(call.x.shape[0], call.x.shape[0] // call.cmp_ratio + len(counts))
        groups = 0
    else:
        require(call.cu_seqlens is None, OPERATOR, "cu_seqlens is given with a rectangular batch")
        counts = [call.x.shape[1]] * call.x.shape[0]
        groups = -(-call.x.shape[1] // call.cmp_ratio)
        num_rows = call.x.shape[0] * groups
    message = f"{len(counts)} requests, state_block_table has {num_tables} rows"
    require(len(counts) == num_tables, OPERATOR, message)
    used = _per_request("seqused", call.seqused, counts)
    starts = _per_request("start_pos", call.start_pos, [0] * len(counts))
    requests: list[Request] = []
    first = output = 0
    for index, (count, taken, start) in enumerate(zip(counts, used, starts, strict=True)):
        require(0 <= taken <= count, OPERATOR, f"seqused[{index}] is {taken} of {count} tokens")
        require(start >= 0, OPERATOR, f"start_pos[{index}] is {start}")
        output = index * groups if groups else output
        requests.append(Request(index=index, first=first, used=taken, start=start, first_output=output))
        first += count
        output += (start + taken) // call.cmp_ratio - start // call.cmp_ratio
    return requests, num_rows


def _per_request(name: str, values: Tensor | None, default: list[int]) -> list[int]:
    if values is None:
        return default
    found: list[int] = int32_values(OPERATOR, name, values).tolist()
    require(len(found) == len(default), OPERATOR, f"{name} has {len(found)} entries of {len(default)}")
    return found


def _require_rope(sim: SimulatedChip, call: CompressorCall, num_rows: int, num_requests: int) -> None:
    shape: tuple[int, ...] = (num_rows, ROPE_HEAD_DIM)
    if call.x.dim() == 3:
        shape = (num_requests, num_rows // num_requests, ROPE_HEAD_DIM)
    dtypes = (torch.float32,) if sim.is_950 else (call.x.dtype, torch.float32)
    for name, table in (("rope_sin", call.rope_sin), ("rope_cos", call.rope_cos)):
        right = table.dtype in dtypes and tuple(table.shape) == shape and table.is_contiguous()
        found = f"{table.dtype} {tuple(table.shape)}"
        require(right, OPERATOR, f"{name} is {found}; it is {shape} of {dtypes}, contiguous")
    same = call.rope_sin.dtype is call.rope_cos.dtype
    require(same, OPERATOR, f"rope_sin is {call.rope_sin.dtype}, rope_cos {call.rope_cos.dtype}")


def _write_state(call: CompressorCall, table_BP: Tensor, requests: list[Request], state_TW: Tensor) -> None:
    """Stores the new rows, where the table has a page for them. Refuses pages that two entries share."""
    page_rows = call.state_cache.shape[1]
    owners: dict[int, tuple[int, int]] = {}
    for request in requests:
        positions = torch.arange(_first_read(call, request), request.start + request.used)
        pages = _state_pages(call, table_BP, request, positions)
        for column in torch.unique(positions // page_rows).tolist():
            page = int(table_BP[request.index, column])
            owner = owners.setdefault(page, (request.index, column))
            same = page == UNTOUCHED or owner == (request.index, column)
            message = f"entries {owner} and {(request.index, column)} of the state table share page {page}"
            require(same, OPERATOR, message)
        new = positions >= request.start
        written = pages[new] != UNTOUCHED
        rows = positions[new] % page_rows
        values = state_TW[request.first : request.first + request.used]
        call.state_cache[pages[new][written], rows[written]] = values[written]


def _first_read(call: CompressorCall, request: Request) -> int:
    """First old position that the call needs; the first new one if no group is completed."""
    group = request.start // call.cmp_ratio
    if (request.start + request.used) // call.cmp_ratio == group:
        return request.start
    return max(0, group - call.coff + 1) * call.cmp_ratio


def _state_pages(call: CompressorCall, table_BP: Tensor, request: Request, positions: Tensor) -> Tensor:
    columns = positions // call.state_cache.shape[1]
    needed = int(columns.max()) + 1 if columns.numel() else 0
    message = f"request {request.index} needs {needed} state pages, its table has {table_BP.shape[1]}"
    require(needed <= table_BP.shape[1], OPERATOR, message)
    pages = table_BP[request.index][columns]
    bad = pages[(pages < 0) | (pages >= call.state_cache.shape[0])]
    message = f"request {request.index} has state page {bad.tolist()[:1]} of {call.state_cache.shape[0]}"
    require(bad.numel() == 0, OPERATOR, message)
    return pages


def _pool(call: CompressorCall, table_BP: Tensor, request: Request, state_TW: Tensor) -> Tensor:
    """The pooled groups that this call completes: float32 [N, D]."""
    ratio, coff, head_dim = call.cmp_ratio, call.coff, call.head_dim
    group, end = request.start // ratio, (request.start + request.used) // ratio
    if end == group:
        return torch.zeros(0, head_dim)
    first = _first_read(call, request)
    old = torch.arange(first, request.start)
    pages = _state_pages(call, table_BP, request, old)
    missing = old[pages == UNTOUCHED].tolist()
    message = f"request {request.index} needs the state of position {missing[:1]}, its table has page 0 there"
    require(not missing, OPERATOR, message)
    rows_W = torch.cat(
        [
            call.state_cache[pages, old % call.state_cache.shape[1]],
            state_TW[request.first : request.first + end * ratio - request.start],
        ]
    )
    kv, score = rows_W.view(-1, ratio, 2, coff, head_dim).unbind(2)
    if coff == 2:
        kv, score = _overlapped(kv, score, has_previous=first < group * ratio)
    else:
        kv, score = kv[:, :, 0], score[:, :, 0]
    return (kv * score.softmax(dim=1)).sum(dim=1)


def _overlapped(kv: Tensor, score: Tensor, *, has_previous: bool) -> tuple[Tensor, Tensor]:
    """Each group's own half after the other half of the group before: [N, 2 * ratio, D].

    Before the first group of a sequence there are zeros with score -inf.
    """
    if not has_previous:
        kv = torch.cat([torch.zeros_like(kv[:1]), kv])
        score = torch.cat([torch.full_like(score[:1], -torch.inf), score])
    return (
        torch.cat([kv[:-1, :, 0], kv[1:, :, 1]], dim=1),
        torch.cat([score[:-1, :, 0], score[1:, :, 1]], dim=1),
    )


def _rms_norm(x_ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    return x_ND * (x_ND.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt() * weight_D


def _rotate(x_ND: Tensor, sin_NR: Tensor, cos_NR: Tensor) -> Tensor:
    """The last channels rotated in neighbouring pairs."""
    fixed, turned_NR = x_ND[:, :-ROPE_HEAD_DIM], x_ND[:, -ROPE_HEAD_DIM:]
    even, odd = turned_NR[:, 0::2], turned_NR[:, 1::2]
    crossed_NR = torch.stack([-odd, even], dim=-1).flatten(-2)
    return torch.cat([fixed, turned_NR * cos_NR + crossed_NR * sin_NR], dim=-1)


def metadata_meta(
    sim: SimulatedChip,
    *,
    rope_cos: Tensor,
    slot_mapping_format: int,
    num_compressed_tokens: int,
    **arguments: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rope rows [n, 1, 1, R] of the tables' dtype, and slots int32 [n] or [n, 2]."""
    rows = rope_cos.new_empty(num_compressed_tokens, 1, 1, rope_cos.shape[1])
    slots = (num_compressed_tokens, 2) if slot_mapping_format == PAGE_AND_ROW else (num_compressed_tokens,)
    return rows, torch.empty_like(rows), rope_cos.new_empty(slots, dtype=torch.int32)


def metadata_out_meta(
    sim: SimulatedChip,
    *,
    compress_cos: Tensor,
    compress_sin: Tensor,
    slot_mapping: Tensor,
    **arguments: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """The given buffers."""
    return compress_cos, compress_sin, slot_mapping


@dataclass(frozen=True, kw_only=True, slots=True)
class MetadataCall:
    """Arguments of both forms that say what to compute."""

    rope_cos: Tensor
    rope_sin: Tensor
    cu_seqlens: Tensor
    start_pos: Tensor
    kv_block_table: Tensor
    kv_block_size: int
    slot_mapping_format: int
    compress_ratio: int
    num_reqs_actual: int


@kernel("_C_ascend::compressor_metadata", meta=metadata_meta)
def compressor_metadata(
    sim: SimulatedChip, *, num_compressed_tokens: int, **arguments: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine rows, sine rows and cache slots of the entries that a step completes; unused rows at the end."""
    call = MetadataCall(**arguments)  # type: ignore[arg-type]
    require(num_compressed_tokens > 0, METADATA, f"num_compressed_tokens is {num_compressed_tokens}")
    return _entry_rows(call, num_compressed_tokens)


@kernel("_C_ascend::compressor_metadata_out", meta=metadata_out_meta)
def compressor_metadata_out(
    sim: SimulatedChip,
    *,
    compress_cos: Tensor,
    compress_sin: Tensor,
    slot_mapping: Tensor,
    **arguments: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """`compressor_metadata` into given buffers, as many rows as they have."""
    call = MetadataCall(**arguments)  # type: ignore[arg-type]
    operator = f"{METADATA}_out"
    num_rows, width = compress_cos.shape[0], call.rope_cos.shape[-1]
    require(num_rows > 0, operator, "compress_cos is empty")
    right = compress_cos.shape == compress_sin.shape and compress_cos.dim() >= 2
    right = right and compress_cos.shape[-1] == width and compress_cos.numel() == num_rows * width
    require(right, operator, "compress_cos and compress_sin are not [n, 1, 1, rope values] alike")
    right = compress_cos.dtype is call.rope_cos.dtype and compress_sin.dtype is call.rope_cos.dtype
    require(right, operator, "compress_cos and compress_sin are not of the rope tables' dtype")
    shape = (num_rows, 2) if call.slot_mapping_format == PAGE_AND_ROW else (num_rows,)
    right = slot_mapping.dtype is torch.int32 and tuple(slot_mapping.shape) == shape
    require(
        right, operator, f"slot_mapping is {slot_mapping.dtype} {tuple(slot_mapping.shape)}; int32 {shape}"
    )
    for buffer, values in zip(
        (compress_cos, compress_sin, slot_mapping), _entry_rows(call, num_rows), strict=True
    ):
        buffer.copy_(values.view(buffer.shape))
    return compress_cos, compress_sin, slot_mapping


def _entry_rows(call: MetadataCall, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    _require_metadata(call)
    rope_rows, width = call.rope_cos.shape
    cos = torch.ones(num_rows, 1, 1, width, dtype=call.rope_cos.dtype)
    sin = torch.zeros_like(cos)
    slots = torch.tensor([-1, call.kv_block_size - 1], dtype=torch.int32).repeat(num_rows, 1)
    requests, entries = _completed(call)
    requests, entries = requests[:num_rows], entries[:num_rows]
    columns = entries // call.kv_block_size
    positions = entries * call.compress_ratio
    inside = (columns < call.kv_block_table.shape[1]) & (positions < rope_rows)
    pages = call.kv_block_table[requests, columns.clamp_max(call.kv_block_table.shape[1] - 1)]
    rows = (inside & (pages >= 0)).nonzero().flatten()
    cos[rows, 0, 0] = call.rope_cos[positions[rows]]
    sin[rows, 0, 0] = call.rope_sin[positions[rows]]
    offsets = entries[rows] % call.kv_block_size
    slots[rows] = torch.stack([pages[rows].long(), offsets], dim=1).to(torch.int32)
    if call.slot_mapping_format == PAGE_AND_ROW:
        return cos, sin, slots
    flat = slots[:, 0] * call.kv_block_size + slots[:, 1]
    return cos, sin, torch.where(slots[:, 0] < 0, -1, flat)


def _completed(call: MetadataCall) -> tuple[Tensor, Tensor]:
    """Request and number of each completed entry, request after request."""
    ends = call.cu_seqlens[: call.num_reqs_actual + 1].tolist()
    starts = call.start_pos[: call.num_reqs_actual].tolist()
    requests, entries = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, dtype=torch.long)]
    for index, start in enumerate(starts):
        count = ends[index + 1] - ends[index]
        if start < 0 or count <= 0:
            continue
        first, end = start // call.compress_ratio, (start + count) // call.compress_ratio
        requests.append(torch.full((end - first,), index))
        entries.append(torch.arange(first, end))
    return torch.cat(requests), torch.cat(entries)


def _require_metadata(call: MetadataCall) -> None:
    require(call.compress_ratio > 0, METADATA, f"compress_ratio is {call.compress_ratio}")
    require(call.kv_block_size > 0, METADATA, f"kv_block_size is {call.kv_block_size}")
    right = call.slot_mapping_format in (FLAT, PAGE_AND_ROW)
    require(right, METADATA, f"slot_mapping_format is {call.slot_mapping_format}; 1 flat, 2 (page, row)")
    right = call.rope_cos.dim() == 2 and call.rope_cos.shape == call.rope_sin.shape
    right = right and call.rope_cos.dtype is call.rope_sin.dtype and call.rope_cos.numel() > 0
    require(right, METADATA, "rope_cos and rope_sin are not two tables alike")
    int32_values(METADATA, "cu_seqlens", call.cu_seqlens)
    int32_values(METADATA, "start_pos", call.start_pos)
    int32_values(METADATA, "kv_block_table", call.kv_block_table, rank=2)
    actual = call.num_reqs_actual
    right = actual > 0 and call.cu_seqlens.shape[0] > actual
    right = right and min(call.start_pos.shape[0], call.kv_block_table.shape[0]) >= actual
    require(
        right, METADATA, f"num_reqs_actual is {actual}; cu_seqlens, start_pos or kv_block_table is shorter"
    )

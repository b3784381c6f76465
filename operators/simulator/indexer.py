"""Lightning indexers: which compressed entries each query attends to.

The score of an entry is its key scale times the sum over heads of weight * query scale * relu(q . k). Query s
of request b stands at p = length[b] - count[b] + s, lengths counted in raw tokens; it sees
(p + 1) // cmp_ratio entries in sparse_mode 3 and length[b] // cmp_ratio in mode 0. Its row holds the best of
them in falling order, then -1. Equal scores, whose order the chips leave open, go to the lower entry.

A2 and A3 keep relu(q . k) / 1024 and weight * query scale in float16. The 950 rounds the score to bfloat16
before it sorts. Ideal arithmetic is float32 throughout.

Sources: kernels, tiling checks and golden code of quant_lightning_indexer and lightning_indexer in
ops-transformer, binding and README of vllm_quant_lightning_indexer in vLLM-Ascend (HEAD 182b75ea).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_v4.device.soc import Chip
from ascend_v4.operators.simulator.attention_metadata import (
    OPS_TRANSFORMER,
    Fact,
    cumulative_counts,
    given,
    int32_values,
    metadata_meta,
    require_sealed,
    seal,
)
from ascend_v4.operators.simulator.kernels import A2_A3, kernel
from ascend_v4.operators.simulator.rows950 import round_half_away
from ascend_v4.operators.simulator.state import SimulatedChip, require, require_size, undefined

# B requests, T tokens, Q queries of one request, H index heads, D head size, N entries, K places of a row
# C cache pages, S rows per page, P table columns

A3_950 = (Chip.A3, Chip.A950)
VLLM = "npu_vllm_quant_lightning_indexer"
QUANT = "npu_quant_lightning_indexer"
PLAIN = "npu_lightning_indexer"
HEAD_DIM = 128
MAX_PAGE_ROWS = 1024
MAX_TOPK = 2048
TOPK_950 = (512, 1024)
LONG_TOPK = (3072, 4096, 5120, 6144, 7168, 8192)
UNLIMITED = 2**63 - 1
CAUSAL = 3
UNMASKED = 0
SCORE_SCALE = 2.0**-10
TORCH_NPU_HEADS = (16, 24, 32, 64)
QUANT_DTYPES_950 = (
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.float16, torch.float16),
)
"""Weights, query scales, key scales that torch_npu's operator takes beside FP8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexCall:
    """Arguments of all indexers; those of only some have the value that the others imply."""

    query: Tensor
    key: Tensor
    weights: Tensor
    actual_seq_lengths_query: Tensor | None
    actual_seq_lengths_key: Tensor | None
    block_table: Tensor | None
    layout_query: str
    layout_key: str
    sparse_count: int
    sparse_mode: int
    pre_tokens: int
    next_tokens: int
    query_dequant_scale: Tensor | None = None
    key_dequant_scale: Tensor | None = None
    query_quant_mode: int = 0
    key_quant_mode: int = 0
    metadata: Tensor | None = None
    cmp_ratio: int = 1
    return_value: bool = False
    query_dtype: int | None = None
    key_dtype: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Host lengths of a call."""

    counts: list[int]
    """Query tokens of each request."""
    strides: list[int]
    """Query rows from each request to the next: its count, or the padded count of a rectangular batch."""
    keys: list[int]
    """Raw tokens of each request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexPlanCall:
    """Arguments of the indexers' metadata operators."""

    num_heads_q: int
    num_heads_k: int
    head_dim: int
    query_quant_mode: int
    key_quant_mode: int
    actual_seq_lengths_query: Tensor | None
    actual_seq_lengths_key: Tensor | None
    batch_size: int
    max_seqlen_q: int
    max_seqlen_k: int
    layout_query: str
    layout_key: str
    sparse_count: int
    sparse_mode: int
    pre_tokens: int
    next_tokens: int
    cmp_ratio: int
    device: str


def index_meta(
    sim: SimulatedChip, *, query: Tensor, sparse_count: int, **arguments: object
) -> tuple[Tensor, Tensor]:
    """Indices int32 [..., 1, K], and no values."""
    indices = query.new_empty((*query.shape[:-2], 1, sparse_count), dtype=torch.int32)
    return indices, query.new_empty(0, dtype=torch.float32)


def single_index_meta(sim: SimulatedChip, *, query: Tensor, sparse_count: int, **arguments: object) -> Tensor:
    """Indices int32 [..., 1, K]."""
    return query.new_empty((*query.shape[:-2], 1, sparse_count), dtype=torch.int32)


@kernel(f"_C_ascend::{VLLM}_metadata", meta=metadata_meta)
def vllm_index_metadata(sim: SimulatedChip, **arguments: object) -> Tensor:
    """A plan for vLLM-Ascend's indexer."""
    return _plan(sim, f"{VLLM}_metadata", IndexPlanCall(**arguments))  # type: ignore[arg-type]


@kernel(
    f"custom::{QUANT}_metadata",
    meta=metadata_meta,
    chips=A3_950,
    symbol="aclnnQuantLightningIndexerMetadata",
    symbol_package=OPS_TRANSFORMER,
)
def recipes_index_metadata(sim: SimulatedChip, **arguments: object) -> Tensor:
    """A plan for the indexer that the CANN recipes bind."""
    return _plan(sim, f"{QUANT}_metadata", IndexPlanCall(**arguments))  # type: ignore[arg-type]


@kernel(f"_C_ascend::{VLLM}", meta=index_meta)
def vllm_indexer(sim: SimulatedChip, **arguments: object) -> tuple[Tensor, Tensor]:
    """vLLM-Ascend's indexer over compressed keys."""
    return _planned(sim, VLLM, IndexCall(**arguments))  # type: ignore[arg-type]


@kernel(
    f"custom::{QUANT}",
    meta=index_meta,
    chips=A3_950,
    symbol="aclnnQuantLightningIndexer",
    symbol_package=OPS_TRANSFORMER,
)
def recipes_indexer(sim: SimulatedChip, **arguments: object) -> tuple[Tensor, Tensor]:
    """The indexer over compressed keys that the CANN recipes bind."""
    return _planned(sim, QUANT, IndexCall(**arguments))  # type: ignore[arg-type]


@kernel(f"npu::{QUANT}", meta=single_index_meta)
def torch_npu_quant_indexer(sim: SimulatedChip, **arguments: object) -> Tensor:
    """torch_npu's own: keys are not compressed, no plan, query lengths without a leading 0."""
    call = IndexCall(**arguments)  # type: ignore[arg-type]
    found = (call.weights.dtype, _scale(QUANT, call, "query").dtype, _scale(QUANT, call, "key").dtype)
    right = found in QUANT_DTYPES_950 if sim.is_950 else found == (torch.float16,) * 3
    require(right, QUANT, f"weights, query and key scales are {found}; see aclnnQuantLightningIndexer")
    heads = call.query.shape[-2]
    require_size(sim, QUANT, "index_heads", heads, heads in TORCH_NPU_HEADS, f"{TORCH_NPU_HEADS}")
    require_topk(sim, QUANT, call.sparse_count, 1 <= call.sparse_count <= MAX_TOPK, "1 to 2048")
    return _select(sim, QUANT, call, _lengths(QUANT, call, leading_zero=False))


@kernel(f"npu::{PLAIN}", meta=index_meta, chips=A2_A3)
def torch_npu_indexer(sim: SimulatedChip, **arguments: object) -> tuple[Tensor, Tensor]:
    """torch_npu's unquantised indexer."""
    call = IndexCall(**arguments)  # type: ignore[arg-type]
    dtype = call.query.dtype
    right = dtype in (torch.bfloat16, torch.float16) and call.weights.dtype in (dtype, torch.float32)
    require(right, PLAIN, f"query is {dtype} and weights {call.weights.dtype}; bfloat16 or float16 alike")
    heads = call.query.shape[-2]
    require_size(sim, PLAIN, "index_heads", heads, heads <= 64, "64 at most")
    right = 1 <= call.sparse_count <= MAX_TOPK or call.sparse_count in LONG_TOPK
    require_topk(sim, PLAIN, call.sparse_count, right, "1 to 2048, or multiples of 1024 up to 8192")
    indices = _select(sim, PLAIN, call, _lengths(PLAIN, call, leading_zero=False))
    return indices, torch.empty(0, dtype=torch.float32)


def require_topk(sim: SimulatedChip, operator: str, topk: int, allowed: bool, rule: str) -> None:
    """Refuses a sparse_count that is not positive, and one outside the kernel's, which a run may waive."""
    require(topk > 0, operator, f"sparse_count is {topk}")
    require_size(sim, operator, "topk", topk, allowed, rule)


def _planned(sim: SimulatedChip, operator: str, call: IndexCall) -> tuple[Tensor, Tensor]:
    dtype = torch.float32 if sim.is_950 else torch.float16
    found = (call.weights.dtype, _scale(operator, call, "query").dtype, _scale(operator, call, "key").dtype)
    right = found == (dtype,) * 3
    require(right, operator, f"weights, query and key scales are {found}; all are {dtype}")
    heads = call.query.shape[-2]
    require_size(sim, operator, "index_heads", heads, heads == 64, "64")
    _require_plan_sizes(sim, operator, call.sparse_count, call.cmp_ratio)
    lengths = _lengths(operator, call, leading_zero=True)
    facts = _facts(heads, call.sparse_count, call.sparse_mode, call.cmp_ratio, lengths)
    require_sealed(operator, call.metadata, f"{operator}_metadata", facts)
    return _select(sim, operator, call, lengths), torch.empty(0, dtype=torch.float32)


def _plan(sim: SimulatedChip, operator: str, call: IndexPlanCall) -> Tensor:
    require_size(sim, operator, "index_heads", call.num_heads_q, call.num_heads_q == 64, "64")
    require(call.num_heads_k == 1, operator, f"num_heads_k is {call.num_heads_k}; keys have one head")
    require(call.head_dim == HEAD_DIM, operator, f"head_dim is {call.head_dim}; only {HEAD_DIM}")
    _require_plan_sizes(sim, operator, call.sparse_count, call.cmp_ratio)
    _require_modes(operator, call)
    keys = given(operator, "actual_seq_lengths_key", call.actual_seq_lengths_key, "PA_BSND needs it")
    lengths = _host_lengths(
        operator,
        call.actual_seq_lengths_query,
        int32_values(operator, "actual_seq_lengths_key", keys).tolist(),
        layout=call.layout_query,
        shape=(call.batch_size, call.max_seqlen_q),
        leading_zero=True,
    )
    allowed = (0, len(lengths.keys)) if call.layout_query == "TND" else (len(lengths.keys),)
    message = f"batch_size is {call.batch_size} for {len(lengths.keys)} requests"
    require(call.batch_size in allowed, operator, message)
    facts = _facts(call.num_heads_q, call.sparse_count, call.sparse_mode, call.cmp_ratio, lengths)
    return seal(operator, facts)


def _facts(heads: int, topk: int, mode: int, ratio: int, lengths: Lengths) -> dict[str, Fact]:
    return {
        "number of index heads": heads,
        "sparse_count": topk,
        "sparse_mode": mode,
        "cmp_ratio": ratio,
        "actual_seq_lengths_query": tuple(lengths.counts),
        "actual_seq_lengths_key": tuple(lengths.keys),
    }


def _require_plan_sizes(sim: SimulatedChip, operator: str, topk: int, ratio: int) -> None:
    if sim.is_950:
        require_topk(sim, operator, topk, topk in TOPK_950, "512 or 1024")
        require(ratio in (1, 4, 128), operator, f"cmp_ratio is {ratio}; it takes 1, 4 or 128")
    else:
        require_topk(sim, operator, topk, topk <= MAX_TOPK, "1 to 2048")
        right = 1 <= ratio <= 128 and ratio & (ratio - 1) == 0
        require(right, operator, f"cmp_ratio is {ratio}; powers of two up to 128")


def _require_modes(operator: str, call: IndexCall | IndexPlanCall) -> None:
    modes = (call.query_quant_mode, call.key_quant_mode)
    require(modes == (0, 0), operator, f"quant modes are {modes}; only 0, a scale per token and head")
    right = call.layout_query in ("TND", "BSND") and call.layout_key == "PA_BSND"
    found = (call.layout_query, call.layout_key)
    require(right, operator, f"layouts are {found}; the query's is TND or BSND, the key's PA_BSND")
    right = call.sparse_mode in (UNMASKED, CAUSAL)
    require(right, operator, f"sparse_mode is {call.sparse_mode}; it takes 0 or 3")
    right = (call.pre_tokens, call.next_tokens) == (UNLIMITED, UNLIMITED)
    require(right, operator, "pre_tokens and next_tokens take 2**63 - 1 only")


def _lengths(operator: str, call: IndexCall, *, leading_zero: bool) -> Lengths:
    """Lengths of a call whose shapes and modes are right; refuses others."""
    _require_modes(operator, call)
    rank = 3 if call.layout_query == "TND" else 4
    require(call.query.dim() == rank, operator, f"query has rank {call.query.dim()}; {call.layout_query}")
    keys = given(operator, "actual_seq_lengths_key", call.actual_seq_lengths_key, "PA_BSND needs it")
    return _host_lengths(
        operator,
        call.actual_seq_lengths_query,
        int32_values(operator, "actual_seq_lengths_key", keys).tolist(),
        layout=call.layout_query,
        shape=(call.query.shape[0], call.query.shape[1]),
        leading_zero=leading_zero,
    )


def _host_lengths(
    operator: str,
    query_lengths: Tensor | None,
    keys: list[int],
    *,
    layout: str,
    shape: tuple[int, int],
    leading_zero: bool,
) -> Lengths:
    """shape is (requests, tokens of each) of a rectangular batch; leading_zero: B + 1 ends may be given."""
    name = "actual_seq_lengths_query"
    require(min(keys) >= 0, operator, f"actual_seq_lengths_key {keys} has a negative length")
    if layout == "TND":
        values = given(operator, name, query_lengths, "TND needs it")
        ends: list[int] = int32_values(operator, name, values).tolist()
        if len(ends) == len(keys):
            ends = [0, *ends]
        else:
            message = f"{name} has {len(ends)} entries for {len(keys)} requests"
            require(leading_zero and len(ends) == len(keys) + 1, operator, message)
        counts = cumulative_counts(operator, name, ends, ends[-1])
        return Lengths(counts=counts, strides=counts, keys=keys)
    require(shape[0] == len(keys), operator, f"{shape[0]} requests, {len(keys)} key lengths")
    counts = [shape[1]] * shape[0]
    if query_lengths is not None:
        counts = int32_values(operator, name, query_lengths).tolist()
    right = len(counts) == shape[0] and min(counts) >= 0 and max(counts) <= shape[1]
    require(right, operator, f"{name} {counts} does not fit {shape[0]} requests of {shape[1]} tokens")
    return Lengths(counts=counts, strides=[shape[1]] * shape[0], keys=keys)


def _scale(operator: str, call: IndexCall, name: str) -> Tensor:
    value = call.query_dequant_scale if name == "query" else call.key_dequant_scale
    return given(operator, f"{name}_dequant_scale", value, "the operator quantises")


def _require_tensors(sim: SimulatedChip, operator: str, call: IndexCall, lengths: Lengths) -> Tensor:
    """Refuses shapes, dtypes and strides; the block table otherwise."""
    query, key = call.query, call.key
    require(query.numel() > 0 and key.numel() > 0, operator, "query or key is empty")
    require(query.is_contiguous(), operator, "query is not contiguous")
    require(query.shape[-1] == HEAD_DIM, operator, f"query has {query.shape[-1]} channels; only {HEAD_DIM}")
    if operator != PLAIN:
        dtype = torch.float8_e4m3fn if sim.is_950 else torch.int8
        require(query.dtype is dtype, operator, f"query is {query.dtype}; it is {dtype}")
    require(key.dtype is query.dtype, operator, f"key is {key.dtype}, query {query.dtype}")
    require(not call.return_value, operator, "return_value is True; values are not returned")
    require(sum(lengths.strides) <= query.shape[:-2].numel(), operator, "query lengths pass the query's rows")
    for name, rows in (("weights", call.weights), ("query_dequant_scale", call.query_dequant_scale)):
        right = rows is None or (rows.shape == query.shape[:-1] and rows.is_contiguous())
        require(right, operator, f"{name} is not contiguous {list(query.shape[:-1])}")
    shape = (call.key.shape[0], call.key.shape[1], 1)
    require(key.dim() == 4 and key.shape[2] == 1, operator, f"key {tuple(key.shape)} is not [C, S, 1, 128]")
    page_rows = key.shape[1]
    right = page_rows % 16 == 0 and page_rows <= MAX_PAGE_ROWS
    require(right, operator, f"key has {page_rows} rows per page; multiples of 16 up to {MAX_PAGE_ROWS}")
    right = sim.is_950 or page_rows & (page_rows - 1) == 0
    require(
        right, operator, f"key has {page_rows} rows per page; the key tile is a multiple of it only for 2**n"
    )
    dense = key.stride(3) == 1 and key.stride(1) == HEAD_DIM and key.shape[3] == HEAD_DIM
    require(dense, operator, f"key has strides {key.stride()}; only the distance of pages may vary")
    scale = call.key_dequant_scale
    right = scale is None or (tuple(scale.shape) == shape and scale.stride(1) == 1)
    require(right, operator, f"key_dequant_scale is not {shape}, dense but for the distance of pages")
    table = given(operator, "block_table", call.block_table, "PA_BSND needs it")
    int32_values(operator, "block_table", table, rank=2)
    message = f"block_table has {table.shape[0]} rows for {len(lengths.keys)} requests"
    require(table.shape[0] == len(lengths.keys), operator, message)
    return table


def _select(sim: SimulatedChip, operator: str, call: IndexCall, lengths: Lengths) -> Tensor:
    """Index rows, int32 [..., 1, K]; undefined for rows that belong to no request."""
    table_BP = _require_tensors(sim, operator, call, lengths).long()
    query_THD = call.query.flatten(0, -3)
    rows_TK = undefined(query_THD.shape[0], call.sparse_count, dtype=torch.int32)
    first = 0
    for index, (count, stride) in enumerate(zip(lengths.counts, lengths.strides, strict=True)):
        tokens = slice(first, first + count)
        first += stride
        if count == 0:
            continue
        length = lengths.keys[index]
        visible_Q = torch.full((count,), length // call.cmp_ratio)
        if call.sparse_mode == CAUSAL:
            visible_Q = (torch.arange(count) + length - count + 1).clamp_min(0) // call.cmp_ratio
        key_ND, scale_N = _keys(operator, call, table_BP[index], int(visible_Q.max()))
        scores_QN = _scores(sim, call, query_THD[tokens], key_ND, tokens)
        if scale_N is not None:
            scores_QN = scores_QN * scale_N
        message = "a score is not a number: weights * query scale leaves float16, or a key was never written"
        require(not scores_QN.isnan().any(), operator, message)
        if sim.is_950 and not sim.is_ideal:
            scores_QN = round_half_away(scores_QN, torch.bfloat16)
        rows_TK[tokens] = _best(scores_QN, visible_Q, call.sparse_count)
    return rows_TK.view(*call.query.shape[:-2], 1, call.sparse_count)


def _keys(operator: str, call: IndexCall, table_P: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """The first keys of a request and their scales, float32."""
    entries = torch.arange(count)
    page_rows, num_pages = call.key.shape[1], call.key.shape[0]
    needed = -(-count // page_rows)
    message = f"a request has {needed} pages of keys, block_table has {table_P.shape[0]} columns"
    require(needed <= table_P.shape[0], operator, message)
    pages = table_P[entries // page_rows]
    bad = pages[(pages < 0) | (pages >= num_pages)].tolist()
    require(not bad, operator, f"block_table names page {bad[:1]} of {num_pages}")
    key_ND = call.key[pages, entries % page_rows, 0].float()
    if call.key_dequant_scale is None:
        return key_ND, None
    return key_ND, call.key_dequant_scale[pages, entries % page_rows, 0].float()


def _scores(sim: SimulatedChip, call: IndexCall, query_QHD: Tensor, key_ND: Tensor, tokens: slice) -> Tensor:
    """Scores before the key scales, float32 [Q, N]."""
    dots_QHN = (query_QHD.float() @ key_ND.T).relu()
    weights_QH = call.weights.flatten(0, -2)[tokens]
    if call.query_dequant_scale is None:
        return torch.einsum("qh,qhn->qn", weights_QH.float(), dots_QHN)
    scale_QH = call.query_dequant_scale.flatten(0, -2)[tokens]
    if sim.is_950 or sim.is_ideal:
        factors_QH = weights_QH.float() * scale_QH.float()
    else:
        factors_QH = (weights_QH * scale_QH).float()
        dots_QHN = (dots_QHN * SCORE_SCALE).half().float()
    return torch.einsum("qh,qhn->qn", factors_QH, dots_QHN)


def _best(scores_QN: Tensor, visible_Q: Tensor, topk: int) -> Tensor:
    """The highest visible entries of each row in falling order, then -1: int32 [Q, K]."""
    num_queries, num_entries = scores_QN.shape
    rows_QK = torch.full((num_queries, topk), -1, dtype=torch.int32)
    if num_entries == 0:
        return rows_QK
    hidden_QN = torch.arange(num_entries) >= visible_Q[:, None]
    order_QN = scores_QN.masked_fill(hidden_QN, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    taken = min(topk, num_entries)
    unused = torch.arange(taken) >= visible_Q[:, None]
    rows_QK[:, :taken] = order_QN[:, :taken].masked_fill(unused, -1).to(torch.int32)
    return rows_QK

"""Sparse attention over shared keys and values: `npu_sparse_attn_sharedkv` and its FP8 form of the 950.

Query s of request b stands at p = seqused_kv[b] - count[b] + s. It sees cache rows max(0, p - ori_win_left)
to min(p + ori_win_right, seqused_kv[b] - 1), and of the n = (p + 1) // cmp_ratio visible compressed entries
all, or those that the first min(K, n) places of its index row name. A sink per head joins the denominator.

Exponentials are rounded to the query's dtype before they meet the values and stay float32 in the
denominator: halves away from zero on A2 and A3, to even on the 950 and in ideal arithmetic. The chip takes
the maximum tile by tile; that difference, of the order of this rounding, is not modelled.

Sources: READMEs, bindings and tiling checks of both operators in vLLM-Ascend (HEAD 182b75ea), and the golden
code of ops-transformer's tests.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_v4.operators.simulator.attention_metadata import (
    CMP_RATIOS,
    KV_QUANT_MODE,
    ONLY_A3,
    OPS_TRANSFORMER,
    QUANT_PLAN,
    ROPE_HEAD_DIM,
    SPARSE_PLAN,
    TILE,
    attention_facts,
    cumulative_counts,
    given,
    int32_values,
    require_modes,
    require_quantisation,
    require_sealed,
)
from ascend_v4.operators.simulator.kernels import A2_A3, ONLY_950, kernel
from ascend_v4.operators.simulator.rows950 import round_half_away, row_bytes, unpack_rows
from ascend_v4.operators.simulator.state import SimulatedChip, require, require_size, undefined

# T tokens, B requests, H query heads, D head size, K index places, C cache pages, S rows per page
# Q queries handled at once, M rows they see, N compressed entries

SPARSE = "npu_sparse_attn_sharedkv"
QUANT = "npu_kv_quant_sparse_attn_sharedkv"
QUERY_TILE = 64
MAX_PAGE_ROWS = 1024
HEAD_DIM = 512
ROW_BYTES = 640
TOPK_CHOICES = (512, 1024)
MAX_WINDOW_INDICES = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionCall:
    """Arguments of both operators; the last three belong to the FP8 form."""

    q: Tensor
    ori_kv: Tensor | None
    cmp_kv: Tensor | None
    ori_sparse_indices: Tensor | None
    cmp_sparse_indices: Tensor | None
    ori_block_table: Tensor | None
    cmp_block_table: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_ori_kv: Tensor | None
    cu_seqlens_cmp_kv: Tensor | None
    seqused_q: Tensor | None
    seqused_kv: Tensor | None
    sinks: Tensor | None
    metadata: Tensor | None
    softmax_scale: float
    cmp_ratio: int
    ori_mask_mode: int
    cmp_mask_mode: int
    ori_win_left: int
    ori_win_right: int
    layout_q: str
    layout_kv: str
    return_softmax_lse: bool
    kv_quant_mode: int = KV_QUANT_MODE
    tile_size: int = TILE
    rope_head_dim: int = ROPE_HEAD_DIM


@dataclass(frozen=True, kw_only=True, slots=True)
class Pages:
    """One paged cache with its block table."""

    name: str
    operator: str
    cache: Tensor
    """[C, S, 1, row]."""
    table_BP: Tensor
    head_dim: int
    rope_head_dim: int

    def rows(self, request: int, positions: Tensor) -> Tensor:
        """Float32 rows of these positions of a request. Refuses positions past its table."""
        page_rows = self.cache.shape[1]
        columns = positions // page_rows
        width = self.table_BP.shape[1]
        message = (
            f"{self.name}: request {request} needs {int(columns.max()) + 1} pages, its table has {width}"
        )
        require(int(columns.max()) < width, self.operator, message)
        return self.at(request, self.table_BP[request].long()[columns], positions % page_rows)

    def at(self, request: int, pages: Tensor, rows: Tensor) -> Tensor:
        """Float32 rows at physical places."""
        bad = pages[(pages < 0) | (pages >= self.cache.shape[0])]
        if bad.numel():
            message = f"{self.name}: request {request} reads page {int(bad[0])} of {self.cache.shape[0]}"
            require(False, self.operator, message)
        if self.cache.dtype is torch.float8_e4m3fn:
            stored = self.cache.view(torch.uint8)[pages, rows, 0]
            return unpack_rows(stored, self.head_dim, self.rope_head_dim)
        return self.cache[pages, rows, 0].float()


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """The queries of one request and what its caches hold."""

    index: int
    first: int
    """First row among all queries."""
    count: int
    kv_len: int


def attention_meta(sim: SimulatedChip, *, q: Tensor, **arguments: object) -> tuple[Tensor, Tensor]:
    """The query's shape, and no log sums."""
    return torch.empty_like(q), torch.empty(0, dtype=torch.float32, device="meta")


@kernel(f"_C_ascend::{SPARSE}", meta=attention_meta, chips=A2_A3)
@kernel(
    f"custom::{SPARSE}",
    meta=attention_meta,
    chips=ONLY_A3,
    symbol="aclnnSparseAttnSharedkv",
    symbol_package=OPS_TRANSFORMER,
)
def sparse_attention(sim: SimulatedChip, **arguments: object) -> tuple[Tensor, Tensor]:
    """Attention over caches of the query's dtype."""
    call = AttentionCall(**arguments)  # type: ignore[arg-type]
    q = call.q
    message = f"q is {q.dtype}; it takes bfloat16 or float16"
    require(q.dtype in (torch.bfloat16, torch.float16), SPARSE, message)
    heads, head_dim = q.shape[-2:]
    require_size(sim, SPARSE, "heads", heads, heads % 4 == 0, "multiples of 4")
    for name, cache in (("ori_kv", call.ori_kv), ("cmp_kv", call.cmp_kv)):
        right = cache is None or (cache.dtype is q.dtype and cache.shape[-1] == head_dim)
        require(right, SPARSE, f"{name} does not have the query's dtype and head size")
    return _attend(sim, SPARSE, SPARSE_PLAN, call)


@kernel(f"_C_ascend::{QUANT}", meta=attention_meta, chips=ONLY_950)
@kernel(
    f"custom::{QUANT}",
    meta=attention_meta,
    chips=ONLY_950,
    symbol="aclnnKvQuantSparseAttnSharedkv",
    symbol_package=OPS_TRANSFORMER,
)
def quant_attention(sim: SimulatedChip, **arguments: object) -> tuple[Tensor, Tensor]:
    """Attention over the FP8 rows of `rows950`."""
    call = AttentionCall(**arguments)  # type: ignore[arg-type]
    q = call.q
    require(q.dtype is torch.bfloat16, QUANT, f"q is {q.dtype}; it takes bfloat16")
    require_quantisation(QUANT, call.kv_quant_mode, call.tile_size, call.rope_head_dim)
    heads, head_dim = q.shape[-2:]
    require_size(sim, QUANT, "heads", heads, heads in (64, 128), "64 or 128")
    width = row_bytes(head_dim, call.rope_head_dim)
    require_size(sim, QUANT, "row_width", width, width == ROW_BYTES, f"{ROW_BYTES} bytes")
    for name, cache in (("ori_kv", call.ori_kv), ("cmp_kv", call.cmp_kv)):
        right = cache is None or (cache.dtype is torch.float8_e4m3fn and cache.shape[-1] == width)
        require(right, QUANT, f"{name} is not float8_e4m3fn with rows of {width} bytes")
    if call.cmp_kv is None:
        require(call.cmp_ratio == 1, QUANT, f"cmp_ratio is {call.cmp_ratio}; without cmp_kv it is 1")
    return _attend(sim, QUANT, QUANT_PLAN, call)


def _attend(sim: SimulatedChip, operator: str, plan: str, call: AttentionCall) -> tuple[Tensor, Tensor]:
    _require_call(sim, operator, call)
    seqused_kv = given(operator, "seqused_kv", call.seqused_kv, "PA_ND needs it")
    kv_lens = int32_values(operator, "seqused_kv", seqused_kv).tolist()
    requests, starts = _requests(operator, call, kv_lens)
    topk = 0 if call.cmp_sparse_indices is None else call.cmp_sparse_indices.shape[-1]
    facts = attention_facts(
        heads=call.q.shape[-2],
        topk=topk,
        ratio=1 if call.cmp_kv is None else call.cmp_ratio,
        window=(call.ori_win_left, call.ori_win_right),
        cu_seqlens_q=starts,
        shape_q=(call.q.shape[0], call.q.shape[1]),
        seqused_kv=kv_lens,
    )
    require_sealed(operator, call.metadata, plan, facts)
    attention = _Attention(
        sim=sim,
        operator=operator,
        call=call,
        window=_pages(operator, call, "ori", len(kv_lens)),
        compressed=None if call.cmp_kv is None else _pages(operator, call, "cmp", len(kv_lens)),
    )
    q_THD = call.q.flatten(0, -3)
    out_THD = undefined(*q_THD.shape, dtype=call.q.dtype)
    for request in requests:
        for first in range(0, request.count, QUERY_TILE):
            queries_Q = torch.arange(first, min(first + QUERY_TILE, request.count))
            values_MD, counts_QM = attention.visible(request, queries_Q)
            tokens_Q = queries_Q + request.first
            out_THD[tokens_Q] = attention.weighted_sum(q_THD[tokens_Q], values_MD, counts_QM)
    return out_THD.view(call.q.shape), torch.empty(0, dtype=torch.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Attention:
    sim: SimulatedChip
    operator: str
    call: AttentionCall
    window: Pages
    compressed: Pages | None

    def visible(self, request: Request, queries_Q: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that some query sees, and how often each query counts each of them."""
        positions_Q = queries_Q + (request.kv_len - request.count)
        parts = [self._window_part(request, queries_Q, positions_Q)]
        if self.compressed is not None:
            counts_QN = self._entry_counts(queries_Q + request.first, positions_Q)
            entries_N = counts_QN.sum(dim=0).nonzero().flatten()
            if entries_N.numel():
                parts.append((self.compressed.rows(request.index, entries_N), counts_QN[:, entries_N]))
        return torch.cat([rows for rows, _ in parts]), torch.cat([counts for _, counts in parts], dim=1)

    def _window_part(self, request: Request, queries_Q: Tensor, positions_Q: Tensor) -> tuple[Tensor, Tensor]:
        call, window = self.call, self.window
        first_Q = (positions_Q - call.ori_win_left).clamp_min(0)
        last_Q = (positions_Q + call.ori_win_right).clamp_max(request.kv_len - 1)
        size_Q = torch.where(positions_Q >= 0, last_Q - first_Q + 1, 0).clamp_min(0)
        if int(size_Q.max()) == 0:
            return torch.zeros(0, call.q.shape[-1]), torch.zeros(queries_Q.numel(), 0)
        if call.ori_sparse_indices is not None and call.cmp_sparse_indices is None:
            tokens_Q = queries_Q + request.first
            slots_QK = call.ori_sparse_indices[tokens_Q, 0].long()
            num_pages, page_rows = window.cache.shape[:2]
            bound_Q = torch.full_like(size_Q, num_pages * page_rows)
            counts = self._index_counts(slots_QK, tokens_Q, size_Q.clamp_max(slots_QK.shape[1]), bound_Q)
            slots = counts.sum(dim=0).nonzero().flatten()
            return window.at(request.index, slots // page_rows, slots % page_rows), counts[:, slots]
        seen = torch.arange(int(first_Q[size_Q > 0].min()), int(last_Q.max()) + 1)
        inside = (seen >= first_Q[:, None]) & (seen <= last_Q[:, None]) & (size_Q[:, None] > 0)
        return window.rows(request.index, seen), inside.float()

    def _entry_counts(self, tokens_Q: Tensor, positions_Q: Tensor) -> Tensor:
        """How often each query counts each compressed entry: float32 [Q, N]."""
        call = self.call
        visible_Q = torch.where(positions_Q >= 0, (positions_Q + 1) // call.cmp_ratio, 0)
        if call.cmp_sparse_indices is None:
            return (torch.arange(int(visible_Q.max())) < visible_Q[:, None]).float()
        indices_QK = call.cmp_sparse_indices.flatten(0, -3)[tokens_Q, 0].long()
        used_Q = visible_Q.clamp_max(indices_QK.shape[1])
        return self._index_counts(indices_QK, tokens_Q, used_Q, visible_Q)

    def _index_counts(self, indices_QK: Tensor, tokens_Q: Tensor, used_Q: Tensor, bound_Q: Tensor) -> Tensor:
        """How often the used places of each index row name each entry: float32 [Q, N].

        The kernel walks those places without a look at what they hold: an entry outside its bound leaves an
        older row in the work buffer, so it is refused. Later places are ignored.
        """
        used_QK = torch.arange(indices_QK.shape[1]) < used_Q[:, None]
        bad_QK = used_QK & ((indices_QK < 0) | (indices_QK >= bound_Q[:, None]))
        if bool(bad_QK.any()):
            query, place = bad_QK.nonzero()[0].tolist()
            problem = (
                f"token {int(tokens_Q[query])} has index {int(indices_QK[query, place])} at place {place}; "
                f"the first {int(used_Q[query])} places are read and must lie in [0, {int(bound_Q[query])})"
            )
            require(False, self.operator, problem)
        counts_QN = torch.zeros(indices_QK.shape[0], int(bound_Q.max()) + 1)
        counts_QN.scatter_add_(1, torch.where(used_QK, indices_QK, counts_QN.shape[1] - 1), used_QK.float())
        return counts_QN[:, :-1]

    def weighted_sum(self, q_QHD: Tensor, values_MD: Tensor, counts_QM: Tensor) -> Tensor:
        """The sum of the visible rows by their share, in the query's dtype; zero where none is visible."""
        times_Q1M = counts_QM[:, None, :]
        logits_QHM = q_QHD.float() @ values_MD.T * self.call.softmax_scale
        logits_QHM = logits_QHM.masked_fill(times_Q1M == 0, -torch.inf)
        sinks = given(self.operator, "sinks", self.call.sinks, "the running maximum starts there")
        sinks_QH1 = sinks[None, :, None].expand(q_QHD.shape[0], -1, 1)
        largest_QH1 = torch.cat([logits_QHM, sinks_QH1], dim=-1).amax(dim=-1, keepdim=True)
        exponentials_QHM = (logits_QHM - largest_QH1).exp()
        total_QH1 = (exponentials_QHM * times_Q1M).sum(dim=-1, keepdim=True)
        total_QH1 = total_QH1 + (sinks_QH1 - largest_QH1).exp()
        if self.sim.is_ideal or self.sim.is_950:
            rounded_QHM = exponentials_QHM.to(q_QHD.dtype).float()
        else:
            rounded_QHM = round_half_away(exponentials_QHM, q_QHD.dtype)
        return ((rounded_QHM * times_Q1M) @ values_MD / total_QH1).to(q_QHD.dtype)


def _require_call(sim: SimulatedChip, operator: str, call: AttentionCall) -> None:
    """Refuses what no length can excuse."""
    q = call.q
    require(q.numel() > 0, operator, f"q {tuple(q.shape)} is empty")
    require(q.is_contiguous(), operator, "q is not contiguous")
    require_modes(
        operator,
        masks=(call.ori_mask_mode, call.cmp_mask_mode),
        window=(call.ori_win_left, call.ori_win_right),
        layouts=(call.layout_q, call.layout_kv),
    )
    rank = 3 if call.layout_q == "TND" else 4
    require(q.dim() == rank, operator, f"q has rank {q.dim()}; {call.layout_q} has {rank}")
    head_dim = q.shape[-1]
    require_size(sim, operator, "head_dim", head_dim, head_dim == HEAD_DIM, f"{HEAD_DIM}")
    require(call.softmax_scale > 0, operator, f"softmax_scale is {call.softmax_scale}; pass it")
    require(not call.return_softmax_lse, operator, "return_softmax_lse is True; its values are not valid")
    require(call.seqused_q is None, operator, "seqused_q is given; the kernel does not honour it")
    for name, lengths in (("ori", call.cu_seqlens_ori_kv), ("cmp", call.cu_seqlens_cmp_kv)):
        require(lengths is None, operator, f"cu_seqlens_{name}_kv is given; it has no effect with PA_ND")
    if call.cmp_kv is None:
        require(call.cmp_sparse_indices is None, operator, "cmp_sparse_indices without cmp_kv")
        require(call.cmp_ratio in (0, 1), operator, f"cmp_ratio is {call.cmp_ratio} without cmp_kv")
    else:
        require(call.cmp_ratio in CMP_RATIOS, operator, f"cmp_ratio is {call.cmp_ratio}; it takes 4 or 128")
    _require_indices(sim, operator, call)
    sinks = given(operator, "sinks", call.sinks, "the running maximum starts there")
    right = sinks.dtype is torch.float32 and tuple(sinks.shape) == (q.shape[-2],)
    require(right, operator, f"sinks is {sinks.dtype} {tuple(sinks.shape)}; float32 [{q.shape[-2]}]")


def _require_indices(sim: SimulatedChip, operator: str, call: AttentionCall) -> None:
    leading = call.q.shape[:-2]
    for name, indices in (("cmp", call.cmp_sparse_indices), ("ori", call.ori_sparse_indices)):
        if indices is None:
            continue
        full = f"{name}_sparse_indices"
        int32_values(operator, full, indices, rank=len(leading) + 2)
        right = indices.shape[:-2] == leading and indices.shape[-2] == 1 and indices.is_contiguous()
        require(right, operator, f"{full} {tuple(indices.shape)} is not contiguous [{list(leading)}, 1, K]")
        places = indices.shape[-1]
        if name == "cmp":
            require_size(sim, operator, "topk", places, places in TOPK_CHOICES, "512 or 1024")
        else:
            right = places % 128 == 0 and places <= MAX_WINDOW_INDICES and call.layout_q == "TND"
            require(right, operator, f"{full} has {places} places; TND only, a multiple of 128 up to 2048")


def _requests(
    operator: str, call: AttentionCall, kv_lens: list[int]
) -> tuple[list[Request], list[int] | None]:
    """The requests, and the cumulative starts where there are any."""
    starts = None
    if call.layout_q == "TND":
        cu_seqlens_q = given(operator, "cu_seqlens_q", call.cu_seqlens_q, "TND needs it")
        starts = int32_values(operator, "cu_seqlens_q", cu_seqlens_q).tolist()
        counts = cumulative_counts(operator, "cu_seqlens_q", starts, call.q.shape[0])
    else:
        require(call.cu_seqlens_q is None, operator, "cu_seqlens_q is given; BSND refuses it")
        counts = [call.q.shape[1]] * call.q.shape[0]
    message = f"queries of {len(counts)} requests, seqused_kv of {len(kv_lens)}"
    require(len(counts) == len(kv_lens), operator, message)
    require(min(kv_lens) >= 0, operator, f"seqused_kv {kv_lens} has a negative length")
    firsts = itertools.accumulate(counts, initial=0)
    requests = [
        Request(index=index, first=first, count=count, kv_len=kv_len)
        for index, (count, kv_len, first) in enumerate(zip(counts, kv_lens, firsts, strict=False))
    ]
    return requests, starts


def _pages(operator: str, call: AttentionCall, name: str, num_requests: int) -> Pages:
    cache = call.ori_kv if name == "ori" else call.cmp_kv
    cache = given(operator, f"{name}_kv", cache, "every mode has a window")
    require(cache.dim() == 4, operator, f"{name}_kv has rank {cache.dim()}; PA_ND is [pages, rows, 1, row]")
    page_rows, heads, width = cache.shape[1:]
    require(cache.numel() > 0, operator, f"{name}_kv {tuple(cache.shape)} is empty")
    require(heads == 1, operator, f"{name}_kv has {heads} heads; it has one")
    right = page_rows % 16 == 0 and page_rows <= MAX_PAGE_ROWS
    require(right, operator, f"{name}_kv has {page_rows} rows per page; multiples of 16 up to 1024")
    dense = cache.stride(3) == 1 and cache.stride(1) == width and cache.stride(0) >= page_rows * width
    message = f"{name}_kv has strides {cache.stride()}; only the distance of pages may differ from dense"
    require(dense, operator, message)
    table = call.ori_block_table if name == "ori" else call.cmp_block_table
    table = given(operator, f"{name}_block_table", table, "PA_ND needs it")
    int32_values(operator, f"{name}_block_table", table, rank=2)
    message = f"{name}_block_table has {table.shape[0]} rows for {num_requests} requests"
    require(table.shape[0] == num_requests, operator, message)
    return Pages(
        name=f"{name}_kv",
        operator=operator,
        cache=cache,
        table_BP=table,
        head_dim=call.q.shape[-1],
        rope_head_dim=call.rope_head_dim,
    )

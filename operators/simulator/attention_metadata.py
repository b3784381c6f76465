"""Plans of work for the attention kernels: simulated as a fingerprint of what they were made for.

On the chip, `*_metadata` divides the work over cores from heads, lengths and masks into 1024 ints, and the
attention kernel trusts it: a plan made for other lengths skips or repeats work without an error. Here the
ints carry a checksum of each of those facts, and a kernel refuses a plan that differs. Source: kernels and
checks of sparse_attn_sharedkv(_metadata) and kv_quant_sparse_attn_sharedkv(_metadata) in vLLM-Ascend.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_v4.device.soc import Chip
from ascend_v4.errors import SimulatorError
from ascend_v4.operators.simulator.kernels import A2_A3, ONLY_950, kernel
from ascend_v4.operators.simulator.state import SimulatedChip, require, require_size, undefined

METADATA_INTS = 1024
MAGIC = 0x0CA2_95ED
ONLY_A3 = (Chip.A3,)
OPS_TRANSFORMER = "ops_transformer"
"""CANN package whose op_api library holds the kernels behind several bindings of custom_ops."""
TOPK_CHOICES = (0, 512, 1024)
CMP_RATIOS = (4, 128)
WINDOW_MASK = 4
CAUSAL_MASK = 3
KV_QUANT_MODE = 1
TILE = 64
ROPE_HEAD_DIM = 64

Fact = int | str | tuple[int, ...]


def seal(kind: str, facts: Mapping[str, Fact]) -> Tensor:
    """The 1024 ints of a plan made for these facts; undefined past the checksums."""
    metadata = undefined(METADATA_INTS, dtype=torch.int32)
    checks = [MAGIC, _check(kind), *(_check(facts[name]) for name in sorted(facts))]
    metadata[: len(checks)] = torch.tensor(checks, dtype=torch.int32)
    return metadata


def require_sealed(operator: str, metadata: Tensor | None, kind: str, facts: Mapping[str, Fact]) -> None:
    """Refuses a plan that is missing, is not of this kind, or was made for other facts."""
    metadata = given(operator, "metadata", metadata, "the kernel divides its work by it")
    right = metadata.dtype is torch.int32 and tuple(metadata.shape) == (METADATA_INTS,)
    require(
        right, operator, f"metadata is {metadata.dtype} {tuple(metadata.shape)}, not int32 [{METADATA_INTS}]"
    )
    values = metadata.tolist()
    made = values[0] == MAGIC and values[1] == _check(kind)
    require(made, operator, f"metadata was not made by {kind}; unplanned work is skipped or done twice")
    for place, name in enumerate(sorted(facts), start=2):
        message = f"metadata was made for another {name} (this call has {facts[name]}); make it for this step"
        require(values[place] == _check(facts[name]), operator, message)


def given(operator: str, name: str, value: Tensor | None, why: str) -> Tensor:
    """The tensor, refused if it is None."""
    if value is None:
        raise SimulatorError(f"{operator}: {name} is missing; {why}")
    return value


def int32_values(operator: str, name: str, values: Tensor, rank: int = 1) -> Tensor:
    """The int32 tensor of that rank, refused otherwise or if it is empty."""
    right = values.dtype is torch.int32 and values.dim() == rank and values.numel() > 0
    right = right and values.is_contiguous()
    message = (
        f"{name} is {values.dtype} {tuple(values.shape)}; the kernel reads int32 of rank {rank}, not empty"
    )
    require(right, operator, message)
    return values


def cumulative_counts(operator: str, name: str, ends: list[int], num_rows: int) -> list[int]:
    """Tokens of each request from ends that start with 0. Refuses ends that fall, or lie past num_rows."""
    require(ends[0] == 0, operator, f"{name} starts with {ends[0]}; it needs a leading 0")
    counts = [end - start for start, end in itertools.pairwise(ends)]
    require(min(counts, default=0) >= 0, operator, f"{name} {ends} falls; it is cumulative")
    require(
        ends[-1] <= num_rows, operator, f"{name} ends at {ends[-1]}, past the {num_rows} rows of the query"
    )
    return counts


def attention_facts(
    *,
    heads: int,
    topk: int,
    ratio: int,
    window: tuple[int, int],
    cu_seqlens_q: list[int] | None,
    shape_q: tuple[int, int],
    seqused_kv: list[int],
) -> dict[str, Fact]:
    """What an attention plan depends on. shape_q is (requests, tokens of each) where cu_seqlens_q is None."""
    queries = tuple(cu_seqlens_q) if cu_seqlens_q is not None else shape_q
    return {
        "number of query heads": heads,
        "cmp_topk": topk,
        "cmp_ratio": ratio,
        "window": window,
        "cu_seqlens_q": queries,
        "seqused_kv": tuple(seqused_kv),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanCall:
    """Arguments of both attention metadata operators."""

    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    cu_seqlens_q: Tensor | None
    cu_seqlens_ori_kv: Tensor | None
    cu_seqlens_cmp_kv: Tensor | None
    seqused_q: Tensor | None
    seqused_kv: Tensor | None
    batch_size: int
    max_seqlen_q: int
    max_seqlen_kv: int
    ori_topk: int
    cmp_topk: int
    cmp_ratio: int
    ori_mask_mode: int
    cmp_mask_mode: int
    ori_win_left: int
    ori_win_right: int
    layout_q: str
    layout_kv: str
    has_ori_kv: bool
    has_cmp_kv: bool
    device: str
    kv_quant_mode: int = KV_QUANT_MODE
    tile_size: int = TILE
    rope_head_dim: int = ROPE_HEAD_DIM


def require_modes(
    operator: str, *, masks: tuple[int, int], window: tuple[int, int], layouts: tuple[str, str]
) -> None:
    """Refuses masks, windows and layouts that the attention kernels do not have."""
    require(masks[0] == WINDOW_MASK, operator, f"ori_mask_mode is {masks[0]}; only {WINDOW_MASK} (band)")
    require(masks[1] == CAUSAL_MASK, operator, f"cmp_mask_mode is {masks[1]}; only {CAUSAL_MASK} (causal)")
    require(min(window) >= 0, operator, f"ori_win_left, ori_win_right are {window}; they are not negative")
    require(layouts[0] in ("TND", "BSND"), operator, f"layout_q is {layouts[0]}; it takes TND or BSND")
    require(layouts[1] == "PA_ND", operator, f"layout_kv is {layouts[1]}; only PA_ND")


def _plan(sim: SimulatedChip, operator: str, call: PlanCall) -> Tensor:
    window = (call.ori_win_left, call.ori_win_right)
    masks = (call.ori_mask_mode, call.cmp_mask_mode)
    require_modes(operator, masks=masks, window=window, layouts=(call.layout_q, call.layout_kv))
    require(call.num_heads_kv == 1, operator, f"num_heads_kv is {call.num_heads_kv}; keys have one head")
    require(call.has_ori_kv, operator, "has_ori_kv is False; every mode has a window")
    require_size(sim, operator, "topk", call.cmp_topk, call.cmp_topk in TOPK_CHOICES, "0, 512 or 1024")
    if call.has_cmp_kv:
        right = call.cmp_ratio in CMP_RATIOS
        require(right, operator, f"cmp_ratio is {call.cmp_ratio}; with compressed keys it is 4 or 128")
    seqused_kv = given(operator, "seqused_kv", call.seqused_kv, "PA_ND needs it")
    kv = int32_values(operator, "seqused_kv", seqused_kv).tolist()
    starts = None
    if call.layout_q == "TND":
        cu_seqlens_q = given(operator, "cu_seqlens_q", call.cu_seqlens_q, "TND needs it")
        starts = int32_values(operator, "cu_seqlens_q", cu_seqlens_q).tolist()
        cumulative_counts(operator, "cu_seqlens_q", starts, starts[-1])
        message = f"cu_seqlens_q has {len(starts)} entries for {len(kv)} requests; one more than requests"
        require(len(starts) == len(kv) + 1, operator, message)
    allowed = (0, len(kv)) if starts is not None else (len(kv),)
    require(call.batch_size in allowed, operator, f"batch_size is {call.batch_size} for {len(kv)} requests")
    facts = attention_facts(
        heads=call.num_heads_q,
        topk=call.cmp_topk,
        ratio=call.cmp_ratio if call.has_cmp_kv else 1,
        window=window,
        cu_seqlens_q=starts,
        shape_q=(len(kv), call.max_seqlen_q),
        seqused_kv=kv,
    )
    return seal(operator, facts)


def metadata_meta(sim: SimulatedChip, **arguments: object) -> Tensor:
    """int32 [1024] on meta."""
    return torch.empty(METADATA_INTS, dtype=torch.int32, device="meta")


SPARSE_PLAN = "npu_sparse_attn_sharedkv_metadata"
QUANT_PLAN = "npu_kv_quant_sparse_attn_sharedkv_metadata"


@kernel(f"_C_ascend::{SPARSE_PLAN}", meta=metadata_meta, chips=A2_A3)
@kernel(
    f"custom::{SPARSE_PLAN}",
    meta=metadata_meta,
    chips=ONLY_A3,
    symbol="aclnnSparseAttnSharedkvMetadata",
    symbol_package=OPS_TRANSFORMER,
)
def sparse_attention_metadata(sim: SimulatedChip, **arguments: object) -> Tensor:
    """A plan for attention over bfloat16 or float16 caches."""
    call = PlanCall(**arguments)  # type: ignore[arg-type]
    require_size(sim, SPARSE_PLAN, "head_dim", call.head_dim, call.head_dim == 512, "512")
    require_size(sim, SPARSE_PLAN, "heads", call.num_heads_q, call.num_heads_q % 4 == 0, "multiples of 4")
    return _plan(sim, SPARSE_PLAN, call)


@kernel(f"_C_ascend::{QUANT_PLAN}", meta=metadata_meta, chips=ONLY_950)
@kernel(
    f"custom::{QUANT_PLAN}",
    meta=metadata_meta,
    chips=ONLY_950,
    symbol="aclnnKvQuantSparseAttnSharedkvMetadata",
    symbol_package=OPS_TRANSFORMER,
)
def quant_attention_metadata(sim: SimulatedChip, **arguments: object) -> Tensor:
    """A plan for attention over FP8 rows. head_dim is the query's, or the bytes of a row."""
    call = PlanCall(**arguments)  # type: ignore[arg-type]
    require_size(sim, QUANT_PLAN, "head_dim", call.head_dim, call.head_dim in (512, 640), "512, or 640 bytes")
    require_size(sim, QUANT_PLAN, "heads", call.num_heads_q, call.num_heads_q in (64, 128), "64 or 128")
    require_quantisation(QUANT_PLAN, call.kv_quant_mode, call.tile_size, call.rope_head_dim)
    return _plan(sim, QUANT_PLAN, call)


def require_quantisation(operator: str, kv_quant_mode: int, tile_size: int, rope_head_dim: int) -> None:
    """Refuses another row format than the one that the kernels read."""
    require(
        kv_quant_mode == KV_QUANT_MODE, operator, f"kv_quant_mode is {kv_quant_mode}; only {KV_QUANT_MODE}"
    )
    require(tile_size == TILE, operator, f"tile_size is {tile_size}; only {TILE}")
    right = rope_head_dim == ROPE_HEAD_DIM
    require(right, operator, f"rope_head_dim is {rope_head_dim}; only {ROPE_HEAD_DIM}")


def _check(fact: Fact) -> int:
    return zlib.crc32(repr(fact).encode()) & 0x7FFF_FFFF

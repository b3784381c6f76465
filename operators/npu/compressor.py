"""The compressor by the vendors' kernel: projections, state, pooling, norm and rotation in one call.

Legend: T new tokens, K hidden, D entry width, N entries completed by this step, B sequences, R rope channels,
C pages, S rows per page, W state row width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ascend_v4.device.soc import Chip
from ascend_v4.operators.contract import Limit, Needs, implements
from ascend_v4.operators.contracts.batch import Plan, TokenBatch, rows_of
from ascend_v4.operators.contracts.compressor import CompressorWeights, compress
from ascend_v4.operators.contracts.quantize import StoredWeight, WeightFormat
from ascend_v4.operators.contracts.rope import RopeFrequencies
from ascend_v4.operators.npu.constants import (
    A2_A3,
    CANN_RECIPES,
    ONLY_950,
    RECIPES_MODULE,
    VLLM_ASCEND,
    VLLM_MODULE,
)
from ascend_v4.operators.npu.pages import table32
from ascend_v4.operators.npu.rope import rope_rows

INTERLEAVED = 2
"""rotary_mode; 1 would rotate halves."""
PAGED_STATE = 1
"""cache_mode; 2 would be a ring."""

DOC = "compressor: supported (D, coff, ratio) are (512, 2, 4), (128, 2, 4) and (512, 1, 128)"
LIMITS = (
    Limit(size="hidden", low=1024, high=10240, multiple=512, source="compressor: hidden 1K to 10K by 512"),
    Limit(size="head_dim", choices=(512,), source=DOC),
    Limit(size="index_head_dim", choices=(128,), source=DOC),
    Limit(size="rope_dim", choices=(64,), source="compressor: rope_head_dim"),
)


@dataclass(frozen=True, slots=True)
class VendorCompressor:
    """value and gate: [W/2, K] bfloat16, as the file has them. ape: float32 [ratio, W/2]. norm: [D]."""

    value: Tensor
    gate: Tensor
    ape: Tensor
    norm: Tensor


@dataclass(frozen=True)
class VendorCompressionPlan(Plan):
    """What a step's calls of one kind of layer share."""

    kernel: Callable[..., Tensor]
    ratio: int
    entry_slots: Tensor
    """Physical rows of the N entries in the compressed cache, int64; -1 for rows that are none."""
    rope_cos: Tensor
    rope_sin: Tensor
    """Rotations at each entry's first position, float32 [min(T, T // ratio + B), R]: the kernel's output has
    as many rows, of which the first N are entries.
    """
    state_table: Tensor
    """int32 [B, P]; 0 where a page is neither read nor written."""
    query_starts: Tensor
    starts: Tensor
    """Tokens of each sequence before the new ones, int32 [B]."""


def prepare_vendor(weights: CompressorWeights, *, copy: bool, norm_dtype: torch.dtype) -> VendorCompressor:
    """Projections in bfloat16, apart, neither transposed nor tiled: the kernel reads them as the file has
    them.
    """
    parts = [_bfloat16(projection) for projection in weights.projections]
    value, gate = parts if len(parts) == 2 else parts[0].chunk(2)
    return VendorCompressor(
        value.contiguous(), gate.contiguous(), weights.ape.float().contiguous(), weights.norm.to(norm_dtype)
    )


def _bfloat16(weight: StoredWeight) -> Tensor:
    plain = weight.codes if weight.format is WeightFormat.PLAIN else weight.to_float32()
    return plain.to(torch.bfloat16)


def new_entries(batch: TokenBatch, ratio: int) -> tuple[Tensor, Tensor]:
    """Number and sequence of each entry that the new tokens complete, int64 [N], on the CPU."""
    pairs = [
        (entry, index)
        for index, (_, count, start) in enumerate(batch.spans)
        for entry in range(start // ratio, (start + count) // ratio)
    ]
    entries, sequences = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
    return entries, sequences


def plan_vendor(
    batch: TokenBatch,
    *,
    ratio: int,
    overlap: bool,
    state_table: Tensor,
    state_page_tokens: int,
    entry_table: Tensor,
    entries_per_page: int,
    frequencies: RopeFrequencies,
    static_rows: int | None = None,
    namespace: str,
) -> VendorCompressionPlan:
    """Rotations are computed for this step's entries alone.

    The vendors' own callers look them up in tables over all positions, which for a million positions take
    512 MB per kind of layer. A row that belongs to no entry gets position 0: cosine 1, sine 0.
    static_rows asks for that many entry slots whatever the lengths, -1 after the completed ones, as steps
    that are captured into a graph need.
    """
    entries, sequences = new_entries(batch, ratio)
    num_rows = min(batch.num_tokens, batch.num_tokens // ratio + len(batch.counts))
    positions = torch.zeros(num_rows, dtype=torch.int64)
    positions[: len(entries)] = entries * ratio
    cos, sin = rope_rows(positions.to(batch.device), frequencies)
    entries, sequences = entries.to(batch.device), sequences.to(batch.device)
    entry_slots = rows_of(entry_table, sequences, entries, per_page=entries_per_page)
    if static_rows is not None:
        assert static_rows == num_rows, f"{static_rows} rows asked for, the kernel gives {num_rows}"
        entry_slots = functional.pad(entry_slots, (0, num_rows - len(entry_slots)), value=-1)
    return VendorCompressionPlan(
        kernel=getattr(torch.ops, namespace).compressor,
        ratio=ratio,
        entry_slots=entry_slots,
        rope_cos=cos,
        rope_sin=sin,
        state_table=table32(state_table),
        query_starts=batch.query_starts,
        starts=torch.tensor(batch.starts, dtype=torch.int32, device=batch.device),
    )


def compress_fused(
    x_TK: Tensor,
    weights: CompressorWeights | VendorCompressor,
    state_cache_CSW: Tensor,
    plan: Plan,
    *,
    overlap: bool,
    eps: float,
    rounded_once: bool,
) -> Tensor:
    """State rows are [values | scores], the positional bias within the scores, as in the contract.

    What is pooled stays float32 through norm and rotation. Sine comes before cosine here.
    """
    assert rounded_once, "the vendors' compressor rounds once"
    assert isinstance(plan, VendorCompressionPlan), type(plan)
    assert isinstance(weights, VendorCompressor), type(weights)
    if x_TK.shape[0] == 0:
        return x_TK.new_empty(0, weights.norm.shape[0])
    entries_RD = plan.kernel(
        x_TK.contiguous(),
        weights.value,
        weights.gate,
        state_cache_CSW,
        weights.ape,
        weights.norm,
        rope_sin=plan.rope_sin,
        rope_cos=plan.rope_cos,
        state_block_table=plan.state_table,
        cu_seqlens=plan.query_starts,
        seqused=None,
        start_pos=plan.starts,
        rope_head_dim=plan.rope_sin.shape[1],
        cmp_ratio=plan.ratio,
        coff=2 if overlap else 1,
        norm_eps=eps,
        rotary_mode=INTERLEAVED,
        cache_mode=PAGED_STATE,
    )
    return entries_RD[: plan.entry_slots.shape[0]]


def _register(provider: str, namespace: str, needs: Needs, norm_dtype: torch.dtype) -> None:
    implements(
        compress,
        backend="npu",
        provider=provider,
        needs=needs,
        limits=LIMITS,
        plan=partial(plan_vendor, namespace=namespace),
        prepare=partial(prepare_vendor, norm_dtype=norm_dtype),
        capturable=True,
    )(compress_fused)


def _vllm_needs(chips: tuple[Chip, ...]) -> Needs:
    return Needs(module=VLLM_MODULE, torch_operators=("_C_ascend::compressor",), chips=chips)


# the builds differ in the dtype they read the norm's weight in, and do not look at what they are given
_register(VLLM_ASCEND, "_C_ascend", _vllm_needs(A2_A3), torch.bfloat16)
_register(VLLM_ASCEND, "_C_ascend", _vllm_needs(ONLY_950), torch.float32)
# the recipes only bind this kernel, CANN's ops-transformer brings it
_register(
    CANN_RECIPES,
    "custom",
    Needs(
        module=RECIPES_MODULE,
        torch_operators=("custom::compressor",),
        symbols=("aclnnCompressor",),
        chips=(Chip.A3, Chip.A950),
    ),
    torch.float32,
)

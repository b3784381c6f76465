"""The 950's cache rows, and the roundings that several attention kernels share.

A key-value row is bytes: rotated part as bfloat16, the rest as float8_e4m3fn, one e8m0 exponent per 64 values
of the rest, padding up to a multiple of 128 bytes. Source: kv_compress_epilog and
kv_quant_sparse_attn_sharedkv of vLLM-Ascend, and the golden code of the CANN recipes' operator tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

# T tokens, D values of a row, N values that are not rotated, G groups of them, W bytes of a stored row

GROUP = 64
"""Values of the part that is not rotated under one exponent."""
ROW_ALIGNMENT_BYTES = 128
SMALLEST_AMAX = 1e-4
"""Groups of smaller values are scaled as if this were their largest."""
E4M3_MAX = 448.0
E4M3_STEP = 1.0 / E4M3_MAX
FLOAT16_STEPS_BELOW_NORMAL = 2.0**24
FLOAT16_SMALLEST_NORMAL = 2.0**-14


def row_bytes(head_dim: int, rope_head_dim: int) -> int:
    """Bytes of a stored row: 640 for 448 + 64 values."""
    nope = head_dim - rope_head_dim
    used = 2 * rope_head_dim + nope + nope // GROUP
    return -(-used // ROW_ALIGNMENT_BYTES) * ROW_ALIGNMENT_BYTES


def pack_rows(x_TD: Tensor, rope_head_dim: int) -> Tensor:
    """Bytes that kv_compress_epilog stores for bfloat16 rows, without the padding: uint8 [T, used bytes]."""
    num_rows, head_dim = x_TD.shape
    nope = head_dim - rope_head_dim
    groups_TGE = x_TD[:, :nope].float().reshape(num_rows, nope // GROUP, GROUP)
    amax_TG = groups_TGE.abs().amax(dim=-1).clamp_min(SMALLEST_AMAX)
    bits_TG = (amax_TG * torch.tensor(E4M3_STEP)).view(torch.int32)
    exponent_TG = (bits_TG >> 23) + (bits_TG & 0x7FFFFF).ne(0)
    scale_TG = (exponent_TG << 23).view(torch.float32)
    codes_TGE = (groups_TGE / scale_TG[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    rope_TR = x_TD[:, nope:].contiguous().view(torch.uint8)
    codes_TN = codes_TGE.view(torch.uint8).reshape(num_rows, nope)
    return torch.cat([rope_TR, codes_TN, exponent_TG.to(torch.uint8)], dim=-1)


def unpack_rows(rows_TW: Tensor, head_dim: int, rope_head_dim: int) -> Tensor:
    """Values of stored rows (uint8), in the order of the query: not rotated, then rotated. Float32 [T, D]."""
    nope = head_dim - rope_head_dim
    sizes = [2 * rope_head_dim, nope, nope // GROUP]
    rope, codes, exponents = torch.split(rows_TW[:, : sum(sizes)], sizes, dim=-1)
    rope_TR = rope.contiguous().view(torch.bfloat16).float()
    codes_TN = codes.contiguous().view(torch.float8_e4m3fn).float()
    scale_TG = exponents.contiguous().view(torch.float8_e8m0fnu).float()
    return torch.cat([codes_TN * scale_TG.repeat_interleave(GROUP, dim=-1), rope_TR], dim=-1)


def quantise_index_keys(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """What the indexer epilogs store: codes as float8_e4m3fn [T, D], float32 scales [T, D/128].

    The scale is the largest finite magnitude of 128 values times 1/448; an all-zero group gets zeros and
    scale 0, and a value that is not finite is stored as it is. Source: vLLM-Ascend's
    indexer_compress_epilog_v2.
    """
    groups = x_TD.float().reshape(x_TD.shape[0], -1, 128)
    amax = torch.where(groups.isfinite(), groups.abs(), 0.0).amax(dim=-1)
    scale = amax * torch.tensor(E4M3_STEP)
    scaled = groups / scale[..., None]
    codes = torch.where(scaled.isfinite(), scaled, groups)
    return codes.flatten(-2).to(torch.float8_e4m3fn), scale


def round_half_away(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 values rounded to bfloat16 or float16 numbers, halves away from zero; float32 again.

    Values beyond float16's range are not meant.
    """
    bits = values.contiguous().view(torch.int32)
    if dtype is torch.bfloat16:
        return ((bits + 0x8000) & ~0xFFFF).view(torch.float32)
    normal = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    steps = (values.abs() * FLOAT16_STEPS_BELOW_NORMAL + 0.5).floor() / FLOAT16_STEPS_BELOW_NORMAL
    return torch.where(values.abs() < FLOAT16_SMALLEST_NORMAL, steps.copysign(values), normal)

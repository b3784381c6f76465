"""Key-value rows as Ascend 950 stores them: rope first, then FP8 codes, then their scales, padded.

    bytes 0 .. 2R            R rope channels, bfloat16
    then nope channels       one E4M3 code each
    then nope / 64           one E8M0 scale per 64 codes
    then zeros               up to a multiple of 128 bytes

which is 640 bytes for 448 + 64 channels. Never reinterpret such a row as bfloat16 channels: rope comes last
in the model and first here.
Legend: T rows, D channels, R of them rope, W bytes of a stored row, C pages, S rows per page.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ascend_v4.operators.contract import Limit
from ascend_v4.operators.contracts.cache import CacheStorage
from ascend_v4.operators.contracts.quantize import (
    FP8_AMAX_FLOOR,
    FP8_MAX,
    KV_GROUP,
    KvFormat,
    power_of_two_at_least,
    scale_to_float32,
)

ROPE_CHANNELS = 64
"""The only rope width that the kernels over such rows take."""
ROW_ALIGNMENT_BYTES = 128
FLOAT32_MANTISSA_BITS = 23

ROW_SOURCE = "kv_compress_epilog and kv_quant_sparse_attn_sharedkv: 64 rope channels, tiles of 64"
ROW_LIMITS = (
    Limit(size="rope_dim", choices=(ROPE_CHANNELS,), source=ROW_SOURCE),
    Limit(size="nope_dim", multiple=KV_GROUP, low=KV_GROUP, source=ROW_SOURCE),
)


def row_bytes(width: int, nope_dim: int) -> int:
    """Bytes of a stored row of `width` channels."""
    used = 2 * (width - nope_dim) + nope_dim + nope_dim // KV_GROUP
    return -(-used // ROW_ALIGNMENT_BYTES) * ROW_ALIGNMENT_BYTES


def pack_rows(kv_TD: Tensor, *, nope_dim: int) -> Tensor:
    """Stored rows, uint8 [T, W], of bfloat16 rows. The scale is the release's: a power of two, rounded up."""
    groups = nope_dim // KV_GROUP
    nope = kv_TD[:, :nope_dim].float().view(-1, groups, KV_GROUP)
    amax = nope.abs().amax(-1, keepdim=True).clamp_min(FP8_AMAX_FLOOR)
    scale = power_of_two_at_least(amax / FP8_MAX)
    codes = (nope / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    parts = (
        kv_TD[:, nope_dim:].to(torch.bfloat16).contiguous().view(torch.uint8),
        codes.view(torch.uint8).view(-1, nope_dim),
        (scale.view(torch.int32) >> FLOAT32_MANTISSA_BITS).to(torch.uint8).view(-1, groups),
    )
    rows_TW = torch.cat(parts, dim=1)
    return functional.pad(rows_TW, (0, row_bytes(kv_TD.shape[1], nope_dim) - rows_TW.shape[1]))


def unpack_rows(rows_TW: Tensor, *, nope_dim: int, rope_dim: int) -> Tensor:
    """Channels [..., D], float32, of stored rows (uint8 [..., W])."""
    first, last = 2 * rope_dim, 2 * rope_dim + nope_dim
    groups = nope_dim // KV_GROUP
    rope = rows_TW[..., :first].contiguous().view(torch.bfloat16).float()
    codes = rows_TW[..., first:last].contiguous().view(torch.float8_e4m3fn).float()
    scale = scale_to_float32(rows_TW[..., last : last + groups].contiguous())
    nope = codes.view(*codes.shape[:-1], groups, KV_GROUP) * scale.unsqueeze(-1)
    return torch.cat((nope.flatten(-2), rope), dim=-1)


@dataclass(frozen=True, slots=True)
class Fp8RowStorage(CacheStorage):
    """Rows of `nope_dim` + `rope_dim` channels in `width` bytes."""

    nope_dim: int
    rope_dim: int

    def pack(self, pages_CSD: Tensor) -> Tensor:
        """Stored pages, float8_e4m3fn [C, S, W], which is how the kernels want the bytes to be called."""
        rows_TW = pack_rows(pages_CSD.flatten(0, 1).to(torch.bfloat16), nope_dim=self.nope_dim)
        return rows_TW.view(*pages_CSD.shape[:2], self.width).view(self.dtype)

    def unpack(self, stored_CSW: Tensor) -> Tensor:
        """The channels [C, S, D], float32."""
        bytes_CSW = stored_CSW.view(torch.uint8)
        return unpack_rows(bytes_CSW, nope_dim=self.nope_dim, rope_dim=self.rope_dim)


def kv_storage(*, width: int, nope_dim: int, format: KvFormat, dtype: torch.dtype) -> CacheStorage:
    """Plain rows on A2 and A3; FP8 rows on 950."""
    if format is KvFormat.PLAIN:
        return CacheStorage(dtype, width)
    return Fp8RowStorage(
        torch.float8_e4m3fn, row_bytes(width, nope_dim), nope_dim=nope_dim, rope_dim=width - nope_dim
    )

"""The indexer's quantised numbers: rotation, codes and scales, and how keys lie in their cache.

A2 and A3: int8 codes of all pages, then float16 scales of all pages. 950: each page has its own E4M3 codes,
then its float32 scales. Either way a cache is one uint8 tensor [C, S, code bytes + scale bytes].
Legend: T rows, D channels, C pages, S rows per page, W bytes per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ascend_v4.operators.contract import Tolerance
from ascend_v4.operators.contracts.cache import CacheStorage
from ascend_v4.operators.contracts.quantize import (
    FP8_MAX,
    INT8_MAX,
    LARGEST_FLOAT16,
    IndexFormat,
    hadamard_matrix,
)
from ascend_v4.operators.npu.constants import FLOAT8_E4M3FN

INT8_SCALE_BYTES, FP8_SCALE_BYTES = 2, 4

NEXT_CODE = "the rotation sums, and the kernel divides, in its own way: a code may be the next one"
INT8_TOLERANCE = Tolerance(2.0**17, NEXT_CODE)
"""One code of 127, in float32 steps of the largest key."""
FP8_TOLERANCE = Tolerance(2.0**20, NEXT_CODE)
"""One E4M3 step at the top of its range, in float32 steps of the largest key."""


@cache
def _rotation(width: int, device: torch.device) -> Tensor:
    """One constant per device, kept so that captured graphs find it where it was."""
    return hadamard_matrix(width).to(torch.bfloat16).to(device)


def rotate_index(x_TD: Tensor) -> Tensor:
    """Walsh-Hadamard rotation of the last axis, bfloat16, no gaps; no vendor has an operator for it."""
    return torch.matmul(x_TD.to(torch.bfloat16), _rotation(x_TD.shape[-1], x_TD.device))


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 codes of x [..., D] and float16 scales [...].

    What the vendor gives for a row of zeros is not documented: its scale is made 0 here, whatever it is.
    """
    codes, scale = torch.ops.npu.npu_dynamic_quant(x.contiguous())
    scale = torch.where(scale > 0, scale, 0.0).clamp_max(LARGEST_FLOAT16)
    return codes, scale.to(torch.float16)


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes of x [..., D] and float32 scales [...]; codes and scale of a row of zeros are made 0."""
    codes, scale = torch.ops.npu.npu_dynamic_quant(x.contiguous(), dst_type=FLOAT8_E4M3FN)
    has_any = scale > 0
    # codes of such a row may be NaN, which no scale of 0 mends
    codes = torch.where(has_any.unsqueeze(-1), codes.view(torch.uint8), 0).view(torch.float8_e4m3fn)
    return codes, torch.where(has_any, scale, 0.0)


def int8_pages(cache_CSW: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [C, S, D] and float16 scales [C, S] as views of an A2 or A3 cache."""
    pages, rows, width = cache_CSW.shape
    channels = width - INT8_SCALE_BYTES
    flat = cache_CSW.view(-1)
    codes = flat[: pages * rows * channels].view(torch.int8).view(pages, rows, channels)
    return codes, flat[pages * rows * channels :].view(torch.float16).view(pages, rows)


def fp8_pages(cache_CSW: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [C, S, D] and float32 scales [C, S] as views of a 950 cache; pages are apart by both."""
    pages, rows, width = cache_CSW.shape
    channels = width - FP8_SCALE_BYTES
    by_page = cache_CSW.view(pages, rows * width)
    codes = by_page[:, : rows * channels].view(torch.float8_e4m3fn).view(pages, rows, channels)
    return codes, by_page[:, rows * channels :].view(torch.float32)


@dataclass(frozen=True, slots=True)
class Int8KeyStorage(CacheStorage):
    """Keys of A2 and A3."""

    def pack(self, pages_CSD: Tensor) -> Tensor:
        """Quantises keys that are rotated already."""
        pages, rows, _ = pages_CSD.shape
        stored_CSW = pages_CSD.new_empty((pages, rows, self.width), dtype=self.dtype)
        scale = pages_CSD.float().abs().amax(-1, keepdim=True) / INT8_MAX
        codes, scales = int8_pages(stored_CSW)
        codes.copy_(torch.where(scale > 0, pages_CSD.float() / scale, 0.0).round())
        scales.copy_(scale.squeeze(-1).clamp_max(LARGEST_FLOAT16))
        return stored_CSW

    def unpack(self, stored_CSW: Tensor) -> Tensor:
        """Codes times scales, float32."""
        codes, scales = int8_pages(stored_CSW)
        return codes.float() * scales.float().unsqueeze(-1)


@dataclass(frozen=True, slots=True)
class Fp8KeyStorage(CacheStorage):
    """Keys of 950."""

    def pack(self, pages_CSD: Tensor) -> Tensor:
        """Quantises keys that are rotated already."""
        pages, rows, _ = pages_CSD.shape
        stored_CSW = pages_CSD.new_empty((pages, rows, self.width), dtype=self.dtype)
        scale = pages_CSD.float().abs().amax(-1, keepdim=True) / FP8_MAX
        codes, scales = fp8_pages(stored_CSW)
        numbers = torch.where(scale > 0, pages_CSD.float() / scale, 0.0).clamp(-FP8_MAX, FP8_MAX)
        codes.copy_(numbers.to(torch.float8_e4m3fn))
        scales.copy_(scale.squeeze(-1))
        return stored_CSW

    def unpack(self, stored_CSW: Tensor) -> Tensor:
        """Codes times scales, float32."""
        codes, scales = fp8_pages(stored_CSW)
        return codes.float() * scales.unsqueeze(-1)


def key_storage(*, width: int, format: IndexFormat, dtype: torch.dtype) -> CacheStorage:
    """One uint8 tensor for codes and scales, laid out as the format's chip wants it."""
    if format is IndexFormat.INT8:
        return Int8KeyStorage(torch.uint8, width + INT8_SCALE_BYTES)
    assert format is IndexFormat.FP8, f"no Ascend indexer reads keys as {format}"
    return Fp8KeyStorage(torch.uint8, width + FP8_SCALE_BYTES)

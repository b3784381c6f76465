"""Inputs drawn from a name: the same values for every device, memory layout and filling of unused memory.

An implementation gets awkward layouts and poison wherever the contract says it must not read; the reference
gets the same values packed, with zeros there. A read past the bounds then shows as a difference.
"""

from __future__ import annotations

import hashlib
import math
import mmap
from enum import Enum

import torch
from torch import Tensor

from ascend_v4.operators.contracts.quantize import (
    FP4_GROUP,
    MX_GROUP,
    WEIGHT_BLOCK,
    StoredWeight,
    WeightFormat,
)
from ascend_v4.operators.testing.poison import poison

LEFT_PAD, RIGHT_PAD = 1, 2
"""Elements around each row of a sliced tensor; odd, so that pairs and vectors lose their alignment."""
STEP_CHANNELS = 32
"""Channels of one size in uneven rows: no group of any format is smaller."""


class Layout(Enum):
    """How the tensors of a case lie in memory."""

    PACKED = "packed"
    SLICED = "sliced: rows inside wider rows"
    STRIDED = "strided: every second element of the last axis"


class Draw:
    """Seeded values in one layout. Tensors are drawn on the CPU and laid out on `device`."""

    def __init__(
        self,
        name: str,
        *,
        dtype: torch.dtype,
        device: torch.device,
        layout: Layout = Layout.PACKED,
        poisoned: bool = True,
    ) -> None:
        digest = hashlib.sha256(name.encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "little"))
        self.dtype, self.device = dtype, device
        self._layout, self._poisoned = layout, poisoned

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers in the case's dtype, or another."""
        return self.lay_out(self._normal(*shape, scale=scale).to(dtype or self.dtype))

    def uneven(self, rows: int, width: int, *, scale: float = 1.0) -> Tensor:
        """Normal numbers whose size changes by up to 2^-12 every few channels.

        Neighbouring groups of a quantiser then need different scales: a group of the wrong width shows, which
        it does not among numbers of one size, since FP8 codes float.
        """
        steps = torch.randint(-12, 1, (-(-width // STEP_CHANNELS),), generator=self._generator)
        sizes = torch.exp2(steps.float()).repeat_interleave(STEP_CHANNELS)[:width]
        return self.lay_out((self._normal(rows, width, scale=scale) * sizes).to(self.dtype))

    def whole(self, *shape: int, largest: int, dtype: torch.dtype | None = None) -> Tensor:
        """Small whole numbers: sums of their products are exact in float32, whatever the order."""
        values = torch.randint(-largest, largest + 1, shape, generator=self._generator)
        return self.lay_out(values.to(dtype or self.dtype))

    def indices(self, *shape: int, below: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Whole numbers from 0."""
        return self.lay_out(torch.randint(0, below, shape, generator=self._generator).to(dtype))

    def subsets(self, num_rows: int, *, below: int, width: int) -> Tensor:
        """Rows of `width` distinct numbers from 0, int64, on the CPU."""
        return torch.rand(num_rows, below, generator=self._generator).argsort(-1)[:, :width]

    def permutation(self, count: int) -> list[int]:
        """Numbers from 0 in random order."""
        order: list[int] = torch.randperm(count, generator=self._generator).tolist()
        return order

    def lay_out(self, values: Tensor) -> Tensor:
        """A copy of given values on the case's device in the case's layout."""
        if self._layout is Layout.PACKED or values.dim() == 0:
            return values.to(self.device)
        width = values.shape[-1]
        if self._layout is Layout.SLICED:
            base = self._unused(*values.shape[:-1], LEFT_PAD + width + RIGHT_PAD, dtype=values.dtype)
            view = base[..., LEFT_PAD : LEFT_PAD + width]
        else:
            view = self._unused(*values.shape[:-1], 2 * width, dtype=values.dtype)[..., ::2]
        view.copy_(values)
        return view

    def cache(
        self,
        shape: tuple[int, int, int],
        rows: Tensor,
        *,
        whole: bool = False,
        state: bool = False,
        far: bool = False,
    ) -> Tensor:
        """A paged cache, always packed, in which only the given physical rows hold values.

        `whole` draws small whole numbers instead of normal ones; `state` is float32 whatever the case's
        dtype; `far` leaves the rest untouched, so that only written pages take memory.
        """
        dtype = torch.float32 if state else self.dtype
        if far:
            cache = _untouched(*shape, dtype=dtype, device=self.device)
        else:
            cache = self._unused(*shape, dtype=dtype)
        count = (len(rows), shape[2])
        values = (
            torch.randint(-3, 4, count, generator=self._generator).float() if whole else self._normal(*count)
        )
        cache.view(-1, shape[2])[rows.to(self.device)] = values.to(dtype).to(self.device)
        return cache

    def plain_weight(
        self, num_outputs: int, num_inputs: int, dtype: torch.dtype = torch.bfloat16
    ) -> StoredWeight:
        """A weight without scales."""
        codes = self.normal(num_outputs, num_inputs, scale=num_inputs**-0.5, dtype=dtype)
        return StoredWeight(codes, None, WeightFormat.PLAIN)

    def fp8_weight(self, num_outputs: int, num_inputs: int) -> StoredWeight:
        """Any E4M3 codes but NaN, with a scale per started block."""
        codes = self._bytes(num_outputs, num_inputs)
        codes[(codes & 0x7F) == 0x7F] ^= 1
        blocks = (-(-num_outputs // WEIGHT_BLOCK), -(-num_inputs // WEIGHT_BLOCK))
        return StoredWeight(
            self.lay_out(codes.view(torch.float8_e4m3fn)),
            self.lay_out(self.scales(*blocks, middle=115)),
            WeightFormat.FP8_BLOCK,
        )

    def fp4_weight(self, num_outputs: int, num_inputs: int) -> StoredWeight:
        """Any E2M1 codes, with a scale per 32 inputs."""
        codes = self._bytes(num_outputs, num_inputs // 2).view(torch.int8)
        scales = self.scales(num_outputs, num_inputs // FP4_GROUP, middle=122)
        return StoredWeight(self.lay_out(codes), self.lay_out(scales), WeightFormat.FP4_GROUP)

    def mxfp8_weight(self, num_outputs: int, num_inputs: int) -> StoredWeight:
        """Any E4M3 codes but NaN, with a scale per 32 inputs."""
        codes = self.fp8_weight(num_outputs, num_inputs).codes
        scales = self.scales(num_outputs, num_inputs // MX_GROUP, middle=115)
        return StoredWeight(codes, self.lay_out(scales), WeightFormat.MXFP8)

    def integer_weight(self, num_outputs: int, num_inputs: int, *, bits: int) -> StoredWeight:
        """INT8 codes within +-127, or INT4 within +-7 in pairs of outputs, with a scale per output."""
        scale = self.lay_out(self._normal(num_outputs).abs() * num_inputs**-0.5 / 64)
        if bits == 8:
            codes = self.whole(num_outputs, num_inputs, largest=127, dtype=torch.int8)
            return StoredWeight(codes, scale, WeightFormat.INT8_CHANNEL)
        low, high = (
            torch.randint(-7, 8, (num_outputs // 2, num_inputs), generator=self._generator) for _ in range(2)
        )
        codes = (((high << 4) | (low & 15)) & 0xFF).to(torch.uint8).view(torch.int8)
        return StoredWeight(self.lay_out(codes), scale, WeightFormat.INT4_CHANNEL)

    def scales(self, *shape: int, middle: int) -> Tensor:
        """E8M0 scales around 2^(middle - 127)."""
        codes = torch.randint(middle - 2, middle + 3, shape, generator=self._generator)
        return codes.to(torch.uint8).view(torch.float8_e8m0fnu)

    def _normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self._generator).mul_(scale)

    def _bytes(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, generator=self._generator).to(torch.uint8)

    def _unused(self, *shape: int, dtype: torch.dtype) -> Tensor:
        if not self._poisoned:
            return torch.zeros(shape, dtype=dtype, device=self.device)
        return poison(torch.empty(shape, dtype=dtype, device=self.device))


def _untouched(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take memory only where they are written, on a CPU."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros writes every page of its memory
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape)

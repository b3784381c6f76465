"""What every simulated kernel can ask: the chip, its arithmetic, what is waived; how it refuses a call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Arithmetic
from ascend_v4.errors import SimulatorError
from ascend_v4.operators.contract import WAIVABLE
from ascend_v4.operators.testing.poison import poison

HF32_MASK = ~0x1FFF
"""Keeps sign, exponent and 10 mantissa bits of a float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedChip:
    """The chip that kernels of this process pretend to run on."""

    chip: Chip
    arithmetic: Arithmetic = Arithmetic.CHIP
    waived: frozenset[str] = frozenset()

    @property
    def is_ideal(self) -> bool:
        """Whether the chip's known roundings are switched off."""
        return self.arithmetic is Arithmetic.IDEAL

    @property
    def is_950(self) -> bool:
        """Whether it has FP8 and FP4 units."""
        return self.chip is Chip.A950

    def wide(self, values: Tensor) -> Tensor:
        """Numbers as kernels compute with them: float32; in ideal arithmetic float64, so that results round
        where they are stored and nowhere else.
        """
        return values.double() if self.is_ideal else values.float()

    def hf32(self, values: Tensor) -> Tensor:
        """Float32 operands as an HF32 cube unit sees them: cut to 10 mantissa bits, toward zero."""
        if self.is_ideal:
            return values.float()
        return (values.float().contiguous().view(torch.int32) & HF32_MASK).view(torch.float32)


def require(condition: object, operator: str, problem: str) -> None:
    """Refuses a call as the chip's checks would, or where the chip's result would be undefined.

    Raises SimulatorError.
    """
    if not condition:
        raise SimulatorError(f"{operator}: {problem}")


def require_size(  # noqa: PLR0917 -- a sentence: who, what, how much, whether, what else
    sim: SimulatedChip, operator: str, size: str, value: int, allowed: bool, rule: str
) -> None:
    """Refuses a model size outside the kernel's own, unless the run waives it by name.

    size is one of `WAIVABLE`; rule says what is allowed. Raises SimulatorError.
    """
    assert size in WAIVABLE, size
    if not allowed and size not in sim.waived:
        raise SimulatorError(f"{operator}: {size} is {value}; the kernel takes {rule}")


def undefined(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Memory the chip leaves undefined: NaN and absurd integers, which no right result survives."""
    return poison(torch.empty(shape, dtype=dtype, device=device))

"""The number formats once more, in numpy and Python loops, from their definitions and not from our code."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    """Values as float64."""
    return tensor.detach().double().numpy()


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Nearest bfloat16 of finite numbers, ties to even, kept as float64."""
    mantissa, exponent = np.frexp(np.asarray(values, dtype=np.float64))
    return np.ldexp(np.round(np.ldexp(mantissa, 8)), exponent - 8)


def e4m3_value(code: int) -> float:
    """Sign, four exponent bits with bias 7, three mantissa bits; no infinities, one NaN per sign."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def e2m1_value(code: int) -> float:
    """Sign bit, two exponent bits, one mantissa bit."""
    return (-1.0 if code & 8 else 1.0) * E2M1_MAGNITUDES[code & 7]


def e8m0_value(code: int) -> float:
    """A power of two; 255 is NaN."""
    return math.nan if code == 255 else 2.0 ** (code - 127)


E4M3_MAGNITUDES = tuple(e4m3_value(code) for code in range(127))


def nearest(value: float, magnitudes: tuple[float, ...]) -> float:
    """The nearest magnitude with value's sign; between two, the one with the even code."""
    size = abs(value)
    best = min(range(len(magnitudes)), key=lambda code: (abs(magnitudes[code] - size), code % 2))
    return math.copysign(magnitudes[best], value)


def scale_for(amax: float, *, largest: float, floor: float) -> float:
    """Smallest power of two that is not below max(amax, floor) / largest, the quotient taken in float32."""
    quotient = float(np.float32(max(np.float32(amax), np.float32(floor))) / np.float32(largest))
    mantissa, exponent = math.frexp(quotient)
    return 2.0 ** (exponent - 1 if mantissa == 0.5 else exponent)


def fake_quantized(
    rows: np.ndarray, *, group: int, magnitudes: tuple[float, ...], floor: float
) -> np.ndarray:
    """Rows there and back through a format, with a scale per group of channels."""
    largest = magnitudes[-1]
    out = np.empty_like(rows)
    for row, target in zip(rows, out, strict=True):
        for low in range(0, len(row), group):
            values = row[low : low + group]
            scale = scale_for(float(np.abs(values).max()), largest=largest, floor=floor)
            clipped = np.clip(values / scale, -largest, largest)
            target[low : low + group] = [nearest(value, magnitudes) * scale for value in clipped]
    return out


def fake_fp8(rows: np.ndarray, *, group: int) -> np.ndarray:
    """FP8 activations: E4M3, amax at least 1e-4."""
    return fake_quantized(rows, group=group, magnitudes=E4M3_MAGNITUDES, floor=1e-4)


def fake_fp4(rows: np.ndarray, *, group: int) -> np.ndarray:
    """FP4 indexer values: E2M1, amax at least 6 * 2^-126."""
    return fake_quantized(rows, group=group, magnitudes=E2M1_MAGNITUDES, floor=6 * 2.0**-126)


def unchanged(values: np.ndarray) -> np.ndarray:
    """Rounding to the dtype of `exact` numerics, as far as these tests can see."""
    return values


ROUNDINGS: dict[torch.dtype, Callable[[np.ndarray], np.ndarray]] = {
    torch.float32: unchanged,
    torch.bfloat16: to_bf16,
}

"""Random values of each tensor of a synthetic checkpoint, drawn directly in the format they are stored in.

A model of such weights computes numbers of ordinary magnitudes: linears keep the variance of their normed
inputs, routing and pooling choose without collapsing, logits have a standard deviation of about 3. FP4 and
FP8 codes are drawn as bytes, BF16 and float32 by looking 16 random bits up in the quantiles of a normal
distribution, so nothing is quantised and gigabytes take seconds.

Every tensor has its own random stream, seeded by the seed and its name: values do not depend on how the
tensors are cut into shards.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ascend_v4.checkpoint.index import DTYPE_BYTES, Role, Specs, TensorSpec

CHUNK_BYTES = 1 << 20
"""Values are made in pieces of this many bytes, which stay in the processor's cache."""

_SPREAD: dict[Role, tuple[float, float]] = {
    # mean and standard deviation
    Role.EMBEDDING: (0.0, 1.0),
    Role.NORM: (1.0, 0.2),
    Role.ROUTER_BIAS: (0.0, 0.1),
    Role.SINK: (0.0, 1.0),
    Role.POSITION_BIAS: (0.0, 0.5),
    Role.HYPER_BASE: (0.0, 0.5),
    Role.HYPER_SCALE: (1.0, 0.2),
}
_GAIN: dict[Role, float] = {
    # standard deviation of the product with inputs of variance one
    Role.LINEAR: 1.0,
    Role.EXPERT: 1.0,
    Role.POOL_VALUE: 1.0,
    Role.POOL_GATE: 2.0,
    Role.ROUTER: 2.0,
    Role.HYPER_MIX: 1.5,
    Role.HEAD: 3.0,
}
_FP4_RMS = math.sqrt(sum(value * value for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)) / 8)
"""Of codes that are all equally likely."""

_FP8_LARGER_SCALES = 192
"""Of 256 FP8 blocks, how many have the larger of two neighbouring scales."""

_FP8_SMALLEST_STD = 64.0
"""Codes have a standard deviation in [64, 128): the largest drawn, 2.9 of them, is within 448."""

_Bytes = NDArray[np.uint8]


class RandomValues:
    """Draws the tensors of one checkpoint."""

    def __init__(self, specs: Specs, *, seed: int, num_experts: int) -> None:
        self._specs = specs
        self._seed = seed
        self._num_experts = num_experts
        self._normal = _normal_quantiles(1 << 16)
        self._bf16_tables: dict[tuple[float, float], NDArray[np.uint16]] = {}

    def draw(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor, in pieces of at most about CHUNK_BYTES."""
        spec = self._specs[name]
        if spec.role is Role.TOKEN_EXPERTS:
            return self._draw_token_experts(name, spec)
        if spec.dtype == "I8":
            return (piece.data for piece in self._random_pieces(name, spec.num_bytes))
        if spec.dtype in ("F8_E8M0", "F8_E4M3"):
            table = self._scale_table(spec) if spec.dtype == "F8_E8M0" else self._code_table(spec)
            return self._draw_bytes(name, spec, table)
        return self._draw_normal(name, spec)

    def _random_pieces(self, name: str, num_bytes: int) -> Iterator[_Bytes]:
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))
        for start_bytes in range(0, num_bytes, CHUNK_BYTES):
            wanted_bytes = min(CHUNK_BYTES, num_bytes - start_bytes)
            words = generator.integers(0, 1 << 64, size=-(-wanted_bytes // 8), dtype=np.uint64)
            yield words.view(np.uint8)[:wanted_bytes]

    def _draw_bytes(self, name: str, spec: TensorSpec, table: bytes) -> Iterator[memoryview]:
        for piece in self._random_pieces(name, spec.num_bytes):
            yield memoryview(piece.tobytes().translate(table))

    def _draw_normal(self, name: str, spec: TensorSpec) -> Iterator[memoryview]:
        mean, std = _SPREAD[spec.role] if spec.role in _SPREAD else (0.0, self._linear_std(spec))
        num_values = spec.num_bytes // DTYPE_BYTES[spec.dtype]
        for piece in self._random_pieces(name, 2 * num_values):
            draws = piece.view(np.uint16)
            if spec.dtype == "BF16":
                yield _raw(self._bf16_table(mean, std)[draws])
            else:
                yield _raw(self._normal[draws] * np.float32(std) + np.float32(mean))

    def _draw_token_experts(self, name: str, spec: TensorSpec) -> Iterator[memoryview]:
        _, num_chosen = spec.shape
        left = np.empty(0, dtype=np.uint64)
        for piece in self._random_pieces(name, spec.num_bytes):
            # pieces need not end with a row
            words = np.concatenate([left, piece.view(np.uint64)])
            num_whole = len(words) // num_chosen * num_chosen
            left = words[num_whole:]
            yield _raw(_distinct(words[:num_whole].reshape(-1, num_chosen), self._num_experts))

    def _linear_std(self, spec: TensorSpec) -> float:
        return _GAIN[spec.role] / math.sqrt(spec.shape[1] * spec.packed_elements)

    def _scale_table(self, spec: TensorSpec) -> bytes:
        """Scale codes for each of 256 equally likely draws: two neighbouring powers of two."""
        assert spec.weight is not None, "a scale without its weight"
        weight = self._specs[spec.weight]
        std = self._linear_std(weight)
        if weight.dtype == "F8_E4M3":
            exponent, larger = _fp8_exponent(std), _FP8_LARGER_SCALES
        else:
            exponent, larger = _fp4_scales(std)
        return bytes([127 + exponent]) * larger + bytes([127 + exponent - 1]) * (256 - larger)

    def _code_table(self, spec: TensorSpec) -> bytes:
        """E4M3 codes of 256 equally likely values of a normal distribution; NaN is not among them."""
        std = self._linear_std(spec)
        code_std = std / (_fp8_scale_rms() * 2.0 ** _fp8_exponent(std))
        return _nearest_e4m3(_normal_quantiles(256) * np.float32(code_std)).tobytes()

    def _bf16_table(self, mean: float, std: float) -> NDArray[np.uint16]:
        key = (mean, std)
        if key not in self._bf16_tables:
            self._bf16_tables[key] = _bf16_bits(self._normal * np.float32(std) + np.float32(mean))
        return self._bf16_tables[key]


def _raw(values: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(values).data.cast("B")


def _normal_quantiles(count: int) -> NDArray[np.float32]:
    normal = NormalDist()
    return np.array([normal.inv_cdf((index + 0.5) / count) for index in range(count)], dtype=np.float32)


def _bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)


def _nearest_e4m3(values: NDArray[np.float32]) -> _Bytes:
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    magnitudes = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    nearest = np.abs(np.abs(values)[:, None] - magnitudes).argmin(axis=1)
    signed: _Bytes = (nearest + np.where(values < 0, 128, 0)).astype(np.uint8)
    return signed


def _fp8_scale_rms() -> float:
    """Root mean square of the scales, in units of the larger of the two."""
    share = _FP8_LARGER_SCALES / 256
    return math.sqrt(share + (1 - share) / 4)


def _fp8_exponent(std: float) -> int:
    """Larger scale exponent: with it, codes have a standard deviation in [64, 128)."""
    return math.floor(math.log2(std / (_fp8_scale_rms() * _FP8_SMALLEST_STD)))


def _fp4_scales(std: float) -> tuple[int, int]:
    """Larger scale exponent, and how many of 256 groups have it, so that weights have this deviation."""
    mean_square = (std / _FP4_RMS) ** 2
    exponent = math.ceil(math.log(mean_square, 4))
    smaller, larger = 4.0 ** (exponent - 1), 4.0**exponent
    return exponent, round(256 * (mean_square - smaller) / (larger - smaller))


def _distinct(draws: NDArray[np.uint64], num_experts: int) -> NDArray[np.int64]:
    """Distinct expert ids for each row of random words, every choice equally likely."""
    chosen = np.empty(draws.shape, dtype=np.int64)
    for column in range(draws.shape[1]):
        # the words are 64 bits, so the bias of the remainder is below 2^-47
        ids = (draws[:, column] % np.uint64(num_experts - column)).astype(np.int64)
        # the draw counts only experts that are still free: step over those taken, from the lowest on
        for taken in np.sort(chosen[:, :column], axis=1).T:
            ids += ids >= taken
        chosen[:, column] = ids
    return chosen

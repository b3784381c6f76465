"""Builders for repack tests: a run, what a directory holds, and a decoder written from the formats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ascend_v4.repack.config import RepackConfig
from ascend_v4.repack.pipeline import run_repack
from ascend_v4.repack.recipes import Target
from ascend_v4.repack.report import RepackReport

PART_BYTES = 200_000
"""Gives the small source some ten parts."""


def config_of(source: Path, output: Path, target: Target = Target.W8A8, **changes) -> RepackConfig:
    """A repack into small parts."""
    return RepackConfig(
        source=source, output=output, target=target, **{"max_part_bytes": PART_BYTES, "jobs": 2} | changes
    )


def repacked(source: Path, output: Path, target: Target = Target.W8A8, **changes) -> RepackReport:
    """Run one."""
    return run_repack(config_of(source, output, target, **changes))


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def stored_tensors(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> dtype, shape and bytes of every tensor in the safetensors files of one directory."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        header.pop("__metadata__")
        for name, entry in header.items():
            first, stop = entry["data_offsets"]
            found[name] = (entry["dtype"], tuple(entry["shape"]), raw[start + first : start + stop])
    return found


def array(entry: tuple[str, tuple[int, ...], bytes], dtype: type) -> np.ndarray:
    """A stored tensor's bytes under a numpy dtype."""
    return np.frombuffer(entry[2], dtype=dtype).reshape(entry[1])


def e8m0(entry: tuple[str, tuple[int, ...], bytes]) -> np.ndarray:
    """Powers of two."""
    return np.ldexp(1.0, array(entry, np.uint8).astype(int) - 127)


def fp4_numbers(weight: tuple, scale: tuple) -> np.ndarray:
    """FP4 codes, low nibble first, times a power of two per 32 inputs."""
    codes = array(weight, np.uint8)
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[nibbles & 7]
    return np.where(nibbles & 8, -magnitudes, magnitudes) * np.repeat(e8m0(scale), 32, axis=1)


def fp8_numbers(weight: tuple, scale: tuple) -> np.ndarray:
    """E4M3 codes times a power of two per 128x128 block."""
    codes = array(weight, np.uint8).astype(int)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    normal = np.ldexp(8.0 + mantissa, exponent - 10)
    magnitudes = np.where(exponent == 0, np.ldexp(mantissa.astype(float), -9), normal)
    blocks = np.repeat(np.repeat(e8m0(scale), 128, axis=0), 128, axis=1)
    return np.where(codes & 128, -magnitudes, magnitudes) * blocks[: codes.shape[0], : codes.shape[1]]


def bf16_numbers(weight: tuple) -> np.ndarray:
    """The upper half of a float32."""
    return (array(weight, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(float)


def int8_numbers(weight: tuple, scale: tuple) -> np.ndarray:
    """Codes times a scale per row."""
    return array(weight, np.int8).astype(float) * array(scale, np.float32).astype(float).reshape(-1, 1)


def int4_numbers(weight: tuple, scale: tuple) -> np.ndarray:
    """Pairs of rows, the even one in the low nibble, times a scale per row."""
    pairs = array(weight, np.uint8).astype(int)
    codes = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1, pairs.shape[1])
    return np.where(codes > 7, codes - 16, codes) * array(scale, np.float32).astype(float).reshape(-1, 1)

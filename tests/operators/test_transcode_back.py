"""The native way back to FP4 beside the reference: any bytes a file may hold, bit by bit, and refusals."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from ascend_v4.errors import CheckpointError
from ascend_v4.operators.contracts.transcode_exact import (
    bf16_to_fp4,
    bf16_to_fp8,
    derive_fp4_scale,
    int8_to_fp4,
)
from ascend_v4.operators.select import load_backend

DRAWS = 250
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
ODD_REALS = (float("nan"), float("inf"), -float("inf"), 2.0**-140, 1.0009765625, -0.0, 3e38, 5.0, 7.0, -24.0)
ODD_SCALES = (0.0, float("nan"), float("inf"), -1.0)


def integers(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high, shape)


def below(count: int) -> int:
    return int(torch.randint(0, count, ()))


@pytest.fixture
def compare():
    """Calls the native kernel and the reference on outputs of their own; returns the refusal, or None."""

    load_backend("cpu")

    def compared(operator, out: torch.Tensor, *arguments, **keywords) -> str | None:
        (native,) = (each for each in operator.implementations if each.provider == "native")
        if native.unusable() is not None:
            pytest.skip(native.unusable())
        found: list[tuple[torch.Tensor, torch.Tensor | None, str | None]] = []
        for call in (native.call, operator.reference):
            made = torch.full_like(out, 17)
            try:
                found.append((made, call(*arguments, made, **keywords), None))
            except CheckpointError as error:
                found.append((made, None, str(error)))
        (mine, stats, refused), (wanted, wanted_stats, wanted_refusal) = found
        assert refused == wanted_refusal
        if refused is None:
            assert torch.equal(mine, wanted)
            assert (stats is None) == (wanted_stats is None)
            assert stats is None or wanted_stats is None or torch.equal(stats, wanted_stats)
        return refused

    return compared


def drawn_scales(rows: int, kind: int) -> torch.Tensor:
    """Powers of two, whole multiples of them, and any numbers, near and far from 1."""
    if kind == 0:
        return torch.ldexp(torch.ones(rows), integers(-130, 120, rows)).float()
    if kind == 1:
        return torch.ldexp(integers(1, 128, rows) * 2.0 + 1, integers(-20, -10, rows)).float()
    return torch.rand(rows) * 10.0 ** (below(75) - 38) + 2.0**-149


def test_any_int8_row_goes_back_as_the_reference_says(compare):
    seen: Counter[str | None] = Counter()
    for draw in range(DRAWS):
        rows, groups = below(5) + 1, below(20) + 1
        codes = (integers(-128, 128, rows, 32 * groups) // (16 if draw % 3 else 1)).to(torch.int8)
        scale = drawn_scales(rows, draw % 3)
        if draw % 25 == 0:
            scale[below(rows)] = ODD_SCALES[draw // 25 % len(ODD_SCALES)]
        middle = 127 + torch.frexp(scale.nan_to_num(1.0, 1.0, 1.0))[1].clamp(-126, 120).view(rows, 1)
        near = middle + integers(-3, 9, rows, groups)
        release = near if draw % 4 else integers(0, 255 + (draw % 16 == 0), rows, groups)
        marked = (codes == 0) & (integers(0, 2, rows, 32 * groups) == 1)
        if draw % 30 == 1:
            marked[-1, -1] = True
        bits = 1 << torch.arange(8)
        bitmap = (marked.view(rows, 4 * groups, 8) * bits).sum(-1).to(torch.uint8) if draw % 2 else None
        out = torch.empty(rows, 16 * groups, dtype=torch.int8)
        said = compare(int8_to_fp4, out, codes, scale, release.clamp(0, 255).to(torch.uint8), bitmap)
        seen[said and said.split()[1]] += 1
    assert seen[None] > DRAWS // 2
    assert {"scale", "weight"} <= seen.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "float32"])
def test_any_real_row_is_coded_or_refused_as_the_reference_says(compare, dtype):
    seen: Counter[str | None] = Counter()
    for draw in range(DRAWS):
        rows, groups = below(5) + 1, below(6) + 1
        scale = integers(0, 253, rows, groups) if draw % 2 else integers(110, 130, rows, groups)
        codes = integers(0, 16, rows, 32 * groups)
        signed = torch.from_numpy(E2M1[codes & 7]) * torch.where(codes >= 8, -1.0, 1.0).double()
        real = torch.ldexp(signed, (scale - 127).repeat_interleave(32, 1)).to(dtype)
        if draw % 3 == 0:
            real[below(rows), below(32 * groups)] = ODD_REALS[draw // 3 % len(ODD_REALS)]
        if draw % 25 == 0:
            scale[0, 0] = 255
        out = torch.empty(rows, 16 * groups, dtype=torch.int8)
        said = compare(bf16_to_fp4, out, real, scale.to(torch.uint8))
        seen[said and said.split()[1]] += 1
        derived = compare(derive_fp4_scale, torch.empty(rows, groups, dtype=torch.uint8), real)
        seen["underivable"] += derived is not None
    assert seen[None] > DRAWS // 2
    assert seen["scale"] > 0
    assert seen["weight"] > 0
    assert seen["underivable"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "float32"])
def test_any_real_block_is_coded_or_refused_as_the_reference_says(compare, dtype):
    seen: Counter[str | None] = Counter()
    for draw in range(DRAWS):
        rows, width, first_row = below(5) + 1, below(300) + 1, below(130)
        blocks = (-(-(first_row + rows) // 128), -(-width // 128))
        scale = integers(0, 255, *blocks) if draw % 2 else integers(110, 130, *blocks)
        codes = integers(0, 256, rows, width).to(torch.uint8)
        codes[(codes & 0x7F) == 0x7F] ^= 1
        powers = scale[(torch.arange(rows) + first_row) // 128].repeat_interleave(128, 1)[:, :width] - 127
        real = torch.ldexp(codes.view(torch.float8_e4m3fn).double(), powers).to(dtype)
        if draw % 3 == 0:
            real[below(rows), below(width)] = ODD_REALS[draw // 3 % len(ODD_REALS)]
        if draw % 25 == 0:
            scale[0, 0] = 255
        out = torch.empty(rows, width, dtype=torch.uint8)
        said = compare(bf16_to_fp8, out, real, scale.to(torch.uint8), first_row=first_row)
        seen[said and said.split()[1]] += 1
    assert seen[None] > DRAWS // 4
    assert {"scale", "weight"} <= seen.keys()


def test_every_fp8_code_comes_back_under_every_scale(compare):
    codes = torch.arange(256).to(torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].repeat(1, 1)
    out = torch.empty_like(codes)
    for byte in range(20, 240):
        real = torch.ldexp(codes.view(torch.float8_e4m3fn).float(), torch.tensor(byte - 127))
        scale = torch.full((1, 2), byte, dtype=torch.uint8)
        assert compare(bf16_to_fp8, out, real, scale, first_row=0) is None

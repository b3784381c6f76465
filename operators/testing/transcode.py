"""Recipes of the conversions between weight formats.

Rows of zeros, groups of zeros, negative zeros and spans of scales on both sides of what INT8 holds exactly
stand in every FP4 case. The largest size is that of an expert of Pro.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ascend_v4.operators.contracts.quantize import FP4_GROUP, WEIGHT_BLOCK, StoredWeight
from ascend_v4.operators.contracts.transcode import Rounding, fp4_to_int8
from ascend_v4.operators.contracts.transcode_exact import fp4_to_bf16, fp8_to_bf16, negative_zeros
from ascend_v4.operators.testing.draw import Draw
from ascend_v4.operators.testing.recipe import FLOAT32_ONLY, Inputs, Recipe, sized

ROW_COUNTS = {"zero": 0, "one": 1, "few": 2, "odd": 5, "many": 37}
PAIRED_COUNTS = {"zero": 0, "one": 2, "few": 4, "odd": 6, "many": 38}
LARGEST = {"rows": 3072, "width": 7168}
GROUP_WIDTHS = (32, 64, 96, 128, 160, 288)
BLOCK_WIDTHS = (15, 16, 17, 127, 128, 129, 300)


def recipes() -> dict[str, list[Recipe]]:
    """Recipes by operator name."""
    return {**_to_integers(), **_to_bf16_and_mx(), **_back_to_fp4(), **_back_to_fp8()}


def _sizes(counts: dict[str, int], widths: tuple[int, ...], **fixed: object) -> dict[str, dict[str, object]]:
    rows = {name: {"rows": count, "width": widths[-1], **fixed} for name, count in counts.items()}
    edges = {f"edge-{width}": {"rows": counts["few"], "width": width, **fixed} for width in widths}
    return {**rows, **edges}


def fp4_inputs(draw: Draw, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Codes and scale bytes with empty groups, empty rows and, in every third row, a wide span of scales."""
    weight = draw.fp4_weight(rows, width)
    assert weight.scale is not None
    codes, scale = weight.codes, weight.scale.view(torch.uint8)
    half = FP4_GROUP // 2
    for row in range(rows):
        if row % 5 == 3:
            codes[row] = -0x78 if row % 2 else 0
        if row % 3 == 1:
            scale[row, 0] = 90 + 13 * (row % 7)
            codes[row, -half:] = 0
        elif row % 3 == 2:
            scale[row] = (draw.indices(1, below=4) + 120).to(scale)
            codes[row, :half] &= 0x33
    return codes, scale


def _output(draw: Draw, *shape: int, dtype: torch.dtype) -> Tensor:
    return draw.lay_out(torch.zeros(shape, dtype=dtype))


def _inputs(outputs: dict[str, Tensor], **arguments: object) -> Inputs:
    return Inputs(arguments={**arguments, **outputs}, written_rows=dict.fromkeys(outputs))


def _to_integers() -> dict[str, list[Recipe]]:
    def int8(draw: Draw, *, rows: int, width: int, rounding: Rounding) -> Inputs:
        codes, scale = fp4_inputs(draw, rows, width)
        outputs = {
            "out_NK": _output(draw, rows, width, dtype=torch.int8),
            "out_scale_N": _output(draw, rows, dtype=torch.float32),
        }
        return _inputs(outputs, codes_NJ=codes, scale_NG=scale, rounding=rounding)

    def int4(draw: Draw, *, rows: int, width: int, parts: int) -> Inputs:
        codes, scale = fp4_inputs(draw, rows, width)
        outputs = {
            "out_HK": _output(draw, rows // 2, width, dtype=torch.int8),
            "out_scale_N": _output(draw, rows, dtype=torch.float32),
            "out_bias_NS": _output(draw, rows, parts, dtype=torch.float32),
        }
        return _inputs(outputs, codes_NJ=codes, scale_NG=scale)

    def fp8(draw: Draw, *, rows: int, width: int, first_row: int) -> Inputs:
        weight = _fp8_slab(draw, rows, width, first_row)
        outputs = {
            "out_NK": _output(draw, rows, width, dtype=torch.int8),
            "out_scale_N": _output(draw, rows, dtype=torch.float32),
        }
        return _inputs(
            outputs,
            codes_NK=weight.codes[first_row:],
            scale_blocks=_scale_bytes(weight),
            first_row=first_row,
        )

    def bf16(draw: Draw, *, rows: int, width: int) -> Inputs:
        weight = draw.normal(rows, width, dtype=torch.bfloat16)
        weight[1::4] = 0
        outputs = {
            "out_NK": _output(draw, rows, width, dtype=torch.int8),
            "out_scale_N": _output(draw, rows, dtype=torch.float32),
        }
        return _inputs(outputs, weight_NK=weight)

    exact, absmax = {"rounding": Rounding.EXACT}, {"rounding": Rounding.ABSMAX}
    whole, split = {"parts": 1}, {"parts": 16}
    return {
        "fp4_to_int8": sized(
            int8,
            {
                **_sizes(ROW_COUNTS, GROUP_WIDTHS, **exact),
                "absmax": {"rows": 37, "width": 288, **absmax},
            },
            largest={**LARGEST, **exact},
            dtypes=FLOAT32_ONLY,
        ),
        "fp4_to_int4": sized(
            int4,
            {**_sizes(PAIRED_COUNTS, GROUP_WIDTHS, **whole), "split": {"rows": 8, "width": 96, **split}},
            largest={"rows": 7168, "width": 3072, **split},
            dtypes=FLOAT32_ONLY,
        ),
        "fp8_to_int8": sized(
            fp8,
            {
                **_sizes(ROW_COUNTS, BLOCK_WIDTHS, first_row=0),
                "edge-rows": {"rows": 130, "width": 160, "first_row": 127},
            },
            largest={"rows": 4096, "width": 8192, "first_row": 256},
            dtypes=FLOAT32_ONLY,
        ),
        "bf16_to_int8": sized(bf16, _sizes(ROW_COUNTS, BLOCK_WIDTHS), largest=LARGEST, dtypes=FLOAT32_ONLY),
    }


def _fp8_slab(draw: Draw, rows: int, width: int, first_row: int) -> StoredWeight:
    weight = draw.fp8_weight(first_row + rows, width)
    codes = weight.codes.view(torch.uint8)
    codes[2::7] &= 0x80
    codes[3::7] &= 0x87
    return weight


def _scale_bytes(weight: StoredWeight) -> Tensor:
    assert weight.scale is not None
    return weight.scale.view(torch.uint8)


def _to_bf16_and_mx() -> dict[str, list[Recipe]]:
    def fp4(draw: Draw, *, rows: int, width: int) -> Inputs:
        codes, scale = fp4_inputs(draw, rows, width)
        outputs = {"out_NK": _output(draw, rows, width, dtype=torch.bfloat16)}
        return _inputs(outputs, codes_NJ=codes, scale_NG=scale)

    def fp8(draw: Draw, *, rows: int, width: int, first_row: int) -> Inputs:
        weight = _fp8_slab(draw, rows, width, first_row)
        outputs = {"out_NK": _output(draw, rows, width, dtype=torch.bfloat16)}
        return _inputs(
            outputs,
            codes_NK=weight.codes[first_row:],
            scale_blocks=_scale_bytes(weight),
            first_row=first_row,
        )

    def scales(draw: Draw, *, rows: int, width: int, first_row: int) -> Inputs:
        blocks = _block_scales(draw, first_row + rows, width)
        outputs = {"out_NG": _output(draw, rows, width // FP4_GROUP, dtype=torch.uint8)}
        return _inputs(outputs, scale_blocks=blocks, first_row=first_row)

    slabs = {"edge-rows": {"rows": 130, "width": 160, "first_row": 127}}
    return {
        "fp4_to_bf16": sized(fp4, _sizes(ROW_COUNTS, GROUP_WIDTHS), largest=LARGEST, dtypes=FLOAT32_ONLY),
        "fp8_to_bf16": sized(
            fp8,
            {**_sizes(ROW_COUNTS, BLOCK_WIDTHS, first_row=0), **slabs},
            largest={**LARGEST, "first_row": 0},
            dtypes=FLOAT32_ONLY,
        ),
        "fp8_scale_to_mx": sized(
            scales,
            {**_sizes(ROW_COUNTS, GROUP_WIDTHS, first_row=0), **slabs},
            largest={**LARGEST, "first_row": 0},
            dtypes=FLOAT32_ONLY,
        ),
    }


def _block_scales(draw: Draw, rows: int, width: int) -> Tensor:
    blocks = (-(-rows // WEIGHT_BLOCK), -(-width // WEIGHT_BLOCK))
    return draw.lay_out(draw.scales(*blocks, middle=115).view(torch.uint8))


def _back_to_fp4() -> dict[str, list[Recipe]]:
    def bitmap(draw: Draw, *, rows: int, width: int) -> Inputs:
        codes, _ = fp4_inputs(draw, rows, width)
        outputs = {"out_NB": _output(draw, rows, width // 8, dtype=torch.uint8)}
        return _inputs(outputs, codes_NJ=codes)

    def from_int8(draw: Draw, *, rows: int, width: int, kept: bool) -> Inputs:
        codes, scale = fp4_inputs(draw, rows, width)
        int8 = _output(draw, rows, width, dtype=torch.int8)
        row_scale = _output(draw, rows, dtype=torch.float32)
        fp4_to_int8.reference(codes, scale, int8, row_scale, rounding=Rounding.EXACT)
        zeros = _output(draw, rows, width // 8, dtype=torch.uint8) if kept else None
        if zeros is not None:
            negative_zeros.reference(codes, zeros)
        outputs = {"out_NJ": _output(draw, rows, width // 2, dtype=torch.int8)}
        return _inputs(
            outputs, codes_NK=int8, scale_N=row_scale, release_scale_NG=scale, negative_zeros_NB=zeros
        )

    def reals(
        draw: Draw, rows: int, width: int, dtype: torch.dtype = torch.bfloat16
    ) -> tuple[Tensor, Tensor]:
        codes, scale = fp4_inputs(draw, rows, width)
        weight = _output(draw, rows, width, dtype=torch.bfloat16)
        fp4_to_bf16.reference(codes, scale, weight)
        return draw.lay_out(weight.to(dtype)) if dtype is torch.float32 else weight, scale

    def from_float32(draw: Draw, *, rows: int, width: int) -> Inputs:
        weight, scale = reals(draw, rows, width, torch.float32)
        outputs = {"out_NJ": _output(draw, rows, width // 2, dtype=torch.int8)}
        return _inputs(outputs, weight_NK=weight, scale_NG=scale)

    def from_bf16(draw: Draw, *, rows: int, width: int) -> Inputs:
        weight, scale = reals(draw, rows, width)
        outputs = {"out_NJ": _output(draw, rows, width // 2, dtype=torch.int8)}
        return _inputs(outputs, weight_NK=weight, scale_NG=scale)

    def derived(draw: Draw, *, rows: int, width: int) -> Inputs:
        weight, _ = reals(draw, rows, width)
        outputs = {"out_NG": _output(draw, rows, width // FP4_GROUP, dtype=torch.uint8)}
        return _inputs(outputs, weight_NK=weight)

    sizes = _sizes(ROW_COUNTS, GROUP_WIDTHS)
    exact = sized(
        from_int8,
        {
            **_sizes(ROW_COUNTS, GROUP_WIDTHS, kept=True),
            "no-bitmap": {"rows": 5, "width": 96, "kept": False},
        },
        largest={**LARGEST, "kept": True},
        dtypes=FLOAT32_ONLY,
    )
    inexact = [
        Recipe(
            name=f"off-{power}",
            build=partial(_any_int8, rows=7, width=1280, power=power),
            dtypes=FLOAT32_ONLY,
        )
        for power in (-100, 0, 90)
    ]
    wide = partial(from_float32, rows=7, width=96)
    wide_scale = partial(_any_float32, rows=7, width=96)
    return {
        "negative_zeros": sized(bitmap, sizes, largest=LARGEST, dtypes=FLOAT32_ONLY),
        "int8_to_fp4": exact + inexact,
        "bf16_to_fp4": [
            *sized(from_bf16, sizes, largest=LARGEST, dtypes=FLOAT32_ONLY),
            Recipe(name="float32", build=wide, dtypes=FLOAT32_ONLY),
        ],
        "derive_fp4_scale": [
            *sized(derived, sizes, largest=LARGEST, dtypes=FLOAT32_ONLY),
            Recipe(name="float32", build=wide_scale, dtypes=FLOAT32_ONLY),
        ],
    }


def _any_int8(draw: Draw, *, rows: int, width: int, power: int) -> Inputs:
    # any code under any scale: few FP4 numbers, and more scales in a row than kernels keep tables of
    codes = draw.lay_out((draw.indices(rows, width, below=256) - 128).to(torch.int8))
    row_scale = draw.lay_out(draw.normal(rows, dtype=torch.float32).abs() * 2.0**power + 2.0**-149)
    scale = draw.lay_out((draw.indices(rows, width // FP4_GROUP, below=40) + 107 + power).to(torch.uint8))
    outputs = {"out_NJ": _output(draw, rows, width // 2, dtype=torch.int8)}
    return _inputs(outputs, codes_NK=codes, scale_N=row_scale, release_scale_NG=scale, negative_zeros_NB=None)


def _any_float32(draw: Draw, *, rows: int, width: int) -> Inputs:
    weight = draw.normal(rows, width, dtype=torch.float32)
    weight[1::3] *= 2.0**-130
    weight[2::3, : width // 2] *= 2.0**120
    outputs = {"out_NG": _output(draw, rows, width // FP4_GROUP, dtype=torch.uint8)}
    return _inputs(outputs, weight_NK=weight)


def _back_to_fp8() -> dict[str, list[Recipe]]:
    def reals(draw: Draw, rows: int, width: int, first_row: int) -> tuple[Tensor, Tensor]:
        weight = _fp8_slab(draw, rows, width, first_row)
        scale = _scale_bytes(weight)
        real = _output(draw, rows, width, dtype=torch.bfloat16)
        fp8_to_bf16.reference(weight.codes[first_row:], scale, real, first_row=first_row)
        return real, scale

    def from_bf16(draw: Draw, *, rows: int, width: int, first_row: int) -> Inputs:
        weight, scale = reals(draw, rows, width, first_row)
        outputs = {"out_NK": _output(draw, rows, width, dtype=torch.uint8)}
        return _inputs(outputs, weight_NK=weight, scale_blocks=scale, first_row=first_row)

    def blocks_of(draw: Draw, rows: int, width: int) -> dict[str, Tensor]:
        shape = (-(-rows // WEIGHT_BLOCK), -(-width // WEIGHT_BLOCK))
        return {"out_blocks": _output(draw, *shape, dtype=torch.uint8)}

    def derived(draw: Draw, *, rows: int, width: int) -> Inputs:
        weight, _ = reals(draw, rows, width, 0)
        return _inputs(blocks_of(draw, rows, width), weight_NK=weight)

    def from_mx(draw: Draw, *, rows: int, width: int) -> Inputs:
        blocks = _block_scales(draw, rows, width)
        wide = blocks.repeat_interleave(WEIGHT_BLOCK, 0).repeat_interleave(WEIGHT_BLOCK // FP4_GROUP, 1)
        scale = draw.lay_out(wide[:rows, : width // FP4_GROUP])
        return _inputs(blocks_of(draw, rows, width), scale_NG=scale)

    return {
        "bf16_to_fp8": sized(
            from_bf16,
            {
                **_sizes(ROW_COUNTS, BLOCK_WIDTHS, first_row=0),
                "edge-rows": {"rows": 130, "width": 160, "first_row": 127},
            },
            largest={**LARGEST, "first_row": 0},
            dtypes=FLOAT32_ONLY,
        ),
        "derive_fp8_scale": sized(
            derived,
            {**_sizes(ROW_COUNTS, BLOCK_WIDTHS), "edge-rows": {"rows": 257, "width": 129}},
            largest=LARGEST,
            dtypes=FLOAT32_ONLY,
        ),
        "mx_scale_to_fp8": sized(
            from_mx,
            {**_sizes(ROW_COUNTS, GROUP_WIDTHS), "edge-rows": {"rows": 257, "width": 96}},
            largest=LARGEST,
            dtypes=FLOAT32_ONLY,
        ),
    }

"""Recipes of the simple operators without caches: number formats, linear layers, norms, rotation, embedding.

The largest sizes are those of the released models: T tokens of a prefill, the widths of Pro.
"""

from __future__ import annotations

import torch

from ascend_v4.operators.contracts.quantize import ActivationFormat, IndexFormat
from ascend_v4.operators.contracts.rope import rope_frequencies
from ascend_v4.operators.testing.draw import Draw
from ascend_v4.operators.testing.recipe import (
    FLOAT32_ONLY,
    ROW_COUNTS,
    Inputs,
    Planned,
    Recipe,
    rows_and,
    sized,
    vendor_sized,
)
from ascend_v4.operators.testing.weights import activation_of, weight_of

EPS = 1e-6
SMALL_BESIDE_EPS = {"scale": 1e-3, "eps": 1e-5}
"""Numbers whose mean square is below an eps that is no kernel's default."""
KEEP_OR_COPY = (True, False)
CHIP_FORMATS = {"int8": 128, "int4": 128, "mxfp8": 128, "fp8+mxfp8": 130, "fp4+mxfp8": 64, "bf16": 96}
"""Weights as packs have them for the chips (activation after the plus), and how many outputs each gets."""


def recipes() -> dict[str, list[Recipe]]:
    """Recipes by operator name."""
    return {
        **_number_formats(),
        **_linear_layers(),
        **_norms_and_rotation(),
        **_embedding(),
    }


def _number_formats() -> dict[str, list[Recipe]]:
    def values(draw: Draw, *, rows: int, width: int, group: int) -> Inputs:
        x = draw.uneven(rows, width, scale=30.0)
        return Inputs(arguments={"values": x, "group": group})

    def index_values(draw: Draw, *, rows: int, width: int, format: IndexFormat) -> Inputs:
        # Whole numbers, and a width whose square root is a power of two: the rotation is exact in any order.
        return Inputs(arguments={"values": draw.whole(rows, width, largest=8), "format": format})

    def rows_alone(draw: Draw, *, rows: int, width: int) -> Inputs:
        x = draw.normal(rows, width, scale=30.0)
        # a row of zeros has a scale of its own rule
        x[1::3] = 0
        return Inputs(arguments={"values": x})

    def fp8(draw: Draw, *, rows: int, width: int) -> Inputs:
        weight = draw.fp8_weight(rows, width)
        return Inputs(arguments={"codes": weight.codes, "scale": weight.scale})

    def fp4(draw: Draw, *, rows: int, width: int) -> Inputs:
        weight = draw.fp4_weight(rows, width)
        return Inputs(arguments={"codes": weight.codes, "scale": weight.scale})

    edges = {f"edge-{width}": {"rows": 3, "width": width} for width in (127, 128, 129)}
    blocks = {f"edge-{rows}": {"rows": rows, "width": 130} for rows in (127, 128, 129)}
    groups = {f"edge-{width}": {"rows": 3, "width": width} for width in (32, 64, 96)}
    largest = {"rows": 4096, "width": 16384}
    fp4_format, plain = {"format": IndexFormat.FP4_GROUP}, {"format": IndexFormat.PLAIN}
    return {
        "fake_quantize_fp8": sized(
            values,
            {
                **rows_and(width=200, group=128),
                **{name: {**size, "group": 64} for name, size in edges.items()},
            },
            largest={**largest, "group": 128},
        ),
        "fake_quantize_fp4": sized(
            values,
            {
                **rows_and(width=80, group=32),
                **{name: {**size, "group": 32} for name, size in edges.items()},
            },
            largest={**largest, "group": 32},
        ),
        "quantize_int8_token": sized(
            rows_alone, {**rows_and(width=200), **edges, "edge-1": {"rows": 3, "width": 1}}, largest=largest
        ),
        "fake_quantize_mxfp8": sized(rows_alone, {**rows_and(width=80), **edges}, largest=largest),
        "quantize_index": sized(
            index_values,
            {
                **rows_and(width=64, **fp4_format),
                "edge-plain": {"rows": 3, "width": 64, **plain},
                "edge-256": {"rows": 3, "width": 256, **fp4_format},
                "edge-int8": {"rows": 3, "width": 64, "format": IndexFormat.INT8},
                "edge-fp8": {"rows": 3, "width": 64, "format": IndexFormat.FP8},
            },
            largest={"rows": 64 * 4096, "width": 64, **fp4_format},
        ),
        "dequantize_fp8_block": sized(
            fp8, {**rows_and(width=200), **blocks}, largest=largest, dtypes=FLOAT32_ONLY
        ),
        "dequantize_fp4_group": sized(
            fp4, {**rows_and(width=64), **groups}, largest=largest, dtypes=FLOAT32_ONLY
        ),
    }


def _one_linear(draw: Draw, *, rows: int, inputs: int, outputs: int, format: str) -> Inputs:
    weight = weight_of(draw, format, outputs, inputs)
    arguments = {"x_TK": draw.uneven(rows, inputs), "weight": weight, "activation": activation_of(format)}
    return Inputs(arguments=arguments, prepared="weight", sizes={"hidden": inputs})


def _wide_linear(draw: Draw, *, rows: int, inputs: int, outputs: int, format: str) -> Inputs:
    weight = weight_of(draw, format, outputs, inputs)
    arguments = {"x_TK": draw.uneven(rows, inputs), "weight": weight}
    return Inputs(arguments=arguments, prepared="weight", sizes={"hidden": inputs})


def _grouped_linear(draw: Draw, *, rows: int, groups: int, inputs: int, outputs: int, format: str) -> Inputs:
    weight = weight_of(draw, format, groups * outputs, inputs)
    is_quantised = activation_of(format) is ActivationFormat.MXFP8
    activation = ActivationFormat.MXFP8 if is_quantised else ActivationFormat.NONE
    # sizes step along the inputs, so that a quantisation group of the wrong width shows
    x_TGK = draw.uneven(rows, groups * inputs).view(rows, groups, inputs)
    arguments = {"x_TGK": x_TGK, "weight": weight, "activation": activation}
    model_sizes = {"o_group_inputs": inputs, "o_lora": outputs, "o_groups": groups}
    return Inputs(arguments=arguments, prepared="weight", sizes=model_sizes)


def _linear_layers() -> dict[str, list[Recipe]]:
    sizes = {
        **rows_and(inputs=160, outputs=96, format="fp8"),
        "edge-fp8": {"rows": 3, "inputs": 129, "outputs": 257, "format": "fp8"},
        "edge-fp4": {"rows": 3, "inputs": 96, "outputs": 33, "format": "fp4"},
        "edge-mxfp8": {"rows": 3, "inputs": 96, "outputs": 130, "format": "mxfp8"},
        "edge-int8": {"rows": 3, "inputs": 1300, "outputs": 33, "format": "int8"},
        "edge-int4": {"rows": 2, "inputs": 129, "outputs": 130, "format": "int4"},
        "edge-bf16": {"rows": 3, "inputs": 127, "outputs": 1, "format": "bf16"},
        "edge-float32": {"rows": 1, "inputs": 128, "outputs": 129, "format": "float32"},
    }
    chips = {
        f"{format}-{name}": {**size, "inputs": 256, "outputs": outputs, "format": format}
        for format, outputs in CHIP_FORMATS.items()
        for name, size in ROW_COUNTS.items()
    }
    chips["int8-untiled"] = {"rows": 3, "inputs": 1000, "outputs": 33, "format": "int8"}
    chips["mxfp8-half-pair"] = {"rows": 3, "inputs": 96, "outputs": 33, "format": "mxfp8"}
    chips["int8-split"] = {"rows": 2, "inputs": 16, "outputs": 65568, "format": "int8"}
    chips["int8-longest"] = {"rows": 2, "inputs": 16, "outputs": 65535, "format": "int8"}
    plain = {name: {**size, "format": "bf16"} for name, size in rows_and(inputs=150, outputs=24).items()}
    plain["edge-float32"] = {"rows": 3, "inputs": 129, "outputs": 130, "format": "float32"}
    by_group = rows_and(groups=3, inputs=64, outputs=48, format="fp8")
    by_group["edge-128"] = {"rows": 3, "groups": 2, "inputs": 128, "outputs": 128, "format": "bf16"}
    by_group["edge-mxfp8"] = {"rows": 3, "groups": 3, "inputs": 96, "outputs": 130, "format": "mxfp8"}
    return {
        "linear": sized(
            _one_linear,
            sizes,
            largest={"rows": 512, "inputs": 16384, "outputs": 7168, "format": "fp8"},
            copies=KEEP_OR_COPY,
        )
        + vendor_sized(
            _one_linear,
            chips,
            copies=KEEP_OR_COPY,
            largest={
                f"largest-{format}": {"rows": 16, "inputs": 1536, "outputs": 65536, "format": format}
                for format in ("int8", "fp8+mxfp8")
            },
        ),
        "float32_linear": sized(
            _wide_linear,
            plain,
            largest={"rows": 64, "inputs": 7168, "outputs": 129280, "format": "bf16"},
            copies=KEEP_OR_COPY,
        )
        + vendor_sized(_wide_linear, rows_and(inputs=512, outputs=16, format="bf16")),
        "grouped_linear": sized(
            _grouped_linear,
            by_group,
            largest={"rows": 512, "groups": 16, "inputs": 4096, "outputs": 1024, "format": "fp8"},
            copies=KEEP_OR_COPY,
        )
        + vendor_sized(
            _grouped_linear,
            {
                f"{format}-{name}": {**size, "groups": 2, "inputs": 256, "outputs": 128, "format": format}
                for format in ("bf16", "mxfp8", "fp8+mxfp8")
                for name, size in ROW_COUNTS.items()
            },
            largest={
                f"largest-{format}": {
                    "rows": 16,
                    "groups": 16,
                    "inputs": 4096,
                    "outputs": 1024,
                    "format": format,
                }
                for format in ("bf16", "fp8+mxfp8")
            },
        ),
    }


def _weighted_norm(
    draw: Draw,
    *,
    rows: int,
    width: int,
    weight: torch.dtype = torch.float32,
    scale: float = 1.0,
    eps: float = EPS,
) -> Inputs:
    arguments = {
        "x_TD": draw.normal(rows, width, scale=scale),
        "weight_D": draw.normal(width, dtype=weight),
        "eps": eps,
    }
    return Inputs(arguments=arguments, prepared="weight_D", sizes={"hidden": width})


def _head_norm(
    draw: Draw,
    *,
    rows: int,
    heads: int,
    width: int,
    rounded_once: bool = True,
    scale: float = 1.0,
    eps: float = EPS,
) -> Inputs:
    q_THD = draw.normal(rows, heads, width, scale=scale)
    arguments = {"q_THD": q_THD, "eps": eps, "rounded_once": rounded_once}
    return Inputs(arguments=arguments, sizes={"heads": heads, "head_dim": width})


def _rotation(
    draw: Draw, *, rows: int, heads: int, width: int, inverse: bool = False, first: int = 0
) -> Inputs:
    frequencies = rope_frequencies(
        width // 2, theta=160000.0, factor=16.0, original_positions=4096, beta_fast=32.0, beta_slow=1.0
    )
    positions = torch.arange(first, first + rows, device=draw.device)
    return Inputs(
        arguments={"x_THD": draw.normal(rows, heads, width), "inverse": inverse},
        planned=Planned(parameter="rows", arguments={"positions_T": positions, "frequencies": frequencies}),
        written_rows={"x_THD": None},
        sizes={"heads": heads, "head_dim": width, "rope_dim": width // 2},
    )


def _norms_and_rotation() -> dict[str, list[Recipe]]:
    bf16_weight = {"rows": 3, "width": 129, "weight": torch.bfloat16}
    return {
        "rms_norm": sized(
            _weighted_norm,
            {**rows_and(width=96), "edge-127": {"rows": 3, "width": 127}, "edge-bf16-weight": bf16_weight},
            largest={"rows": 4096, "width": 7168},
        )
        + vendor_sized(
            _weighted_norm,
            {
                **rows_and(width=512, weight=torch.bfloat16),
                "small": {"rows": 5, "width": 512, **SMALL_BESIDE_EPS},
            },
        ),
        "head_rms_norm": sized(
            _head_norm,
            {
                **rows_and(heads=3, width=96),
                "edge-1": {"rows": 127, "heads": 1, "width": 129},
                "edge-release": {"rows": 5, "heads": 3, "width": 128, "rounded_once": False},
            },
            largest={"rows": 512, "heads": 128, "width": 512},
        )
        + vendor_sized(
            _head_norm,
            {
                **rows_and(heads=4, width=128),
                "small": {"rows": 5, "heads": 4, "width": 128, **SMALL_BESIDE_EPS},
            },
        ),
        "rotate": sized(
            _rotation,
            {
                **rows_and(heads=3, width=24),
                "edge-inverse": {"rows": 129, "heads": 1, "width": 16, "inverse": True},
                "edge-far": {"rows": 3, "heads": 2, "width": 32, "first": 1048573},
            },
            largest={"rows": 1024, "heads": 128, "width": 128},
        )
        + vendor_sized(
            _rotation,
            {
                **rows_and(heads=4, width=128),
                "inverse": {"rows": 5, "heads": 4, "width": 128, "inverse": True},
                "far": {"rows": 3, "heads": 1, "width": 128, "first": 1048573},
            },
        ),
    }


def _embedding() -> dict[str, list[Recipe]]:
    def looked_up(
        draw: Draw, *, rows: int, vocabulary: int, width: int, table: torch.dtype = torch.bfloat16
    ) -> Inputs:
        arguments = {
            "token_ids_T": draw.indices(rows, below=vocabulary),
            "table_VD": draw.normal(vocabulary, width, dtype=table),
            "dtype": draw.dtype,
        }
        return Inputs(arguments=arguments)

    return {
        "embed_tokens": sized(
            looked_up,
            {
                **rows_and(vocabulary=50, width=96),
                "edge-one-id": {"rows": 3, "vocabulary": 1, "width": 129},
                "edge-float32-table": {"rows": 3, "vocabulary": 7, "width": 128, "table": torch.float32},
            },
            largest={"rows": 8192, "vocabulary": 129280, "width": 7168},
        )
    }

"""Recipes of the operators without caches: number formats, linear layers, norms, rotation, experts,
hyper-connections.

The largest sizes are those of the released models: T tokens of a prefill, the widths of Pro.
"""

from __future__ import annotations

from typing import Any

import torch

from ascend_v4.operators.contracts.moe import ExpertWeights
from ascend_v4.operators.contracts.quantize import (
    ActivationFormat,
    IndexFormat,
    StoredWeight,
)
from ascend_v4.operators.contracts.rope import rope_frequencies
from ascend_v4.operators.testing.draw import Draw
from ascend_v4.operators.testing.recipe import FLOAT32_ONLY, Inputs, Planned, Recipe, sized

EPS = 1e-6
KEEP_OR_COPY = (True, False)
ROW_COUNTS = {
    "zero": {"rows": 0},
    "one": {"rows": 1},
    "few": {"rows": 2},
    "odd": {"rows": 5},
    "many": {"rows": 37},
}


def recipes() -> dict[str, list[Recipe]]:
    """Recipes by operator name."""
    return {
        **_number_formats(),
        **_linear_layers(),
        **_norms_and_rotation(),
        **_experts(),
        **_hyper_connections(),
    }


def _rows_and(**fixed: object) -> dict[str, dict[str, Any]]:
    return {name: {**counts, **fixed} for name, counts in ROW_COUNTS.items()}


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
                **_rows_and(width=200, group=128),
                **{name: {**size, "group": 64} for name, size in edges.items()},
            },
            largest={**largest, "group": 128},
        ),
        "fake_quantize_fp4": sized(
            values,
            {
                **_rows_and(width=80, group=32),
                **{name: {**size, "group": 32} for name, size in edges.items()},
            },
            largest={**largest, "group": 32},
        ),
        "quantize_int8_token": sized(
            rows_alone, {**_rows_and(width=200), **edges, "edge-1": {"rows": 3, "width": 1}}, largest=largest
        ),
        "fake_quantize_mxfp8": sized(rows_alone, {**_rows_and(width=80), **edges}, largest=largest),
        "quantize_index": sized(
            index_values,
            {
                **_rows_and(width=64, **fp4_format),
                "edge-plain": {"rows": 3, "width": 64, **plain},
                "edge-256": {"rows": 3, "width": 256, **fp4_format},
                "edge-int8": {"rows": 3, "width": 64, "format": IndexFormat.INT8},
                "edge-fp8": {"rows": 3, "width": 64, "format": IndexFormat.FP8},
            },
            largest={"rows": 64 * 4096, "width": 64, **fp4_format},
        ),
        "dequantize_fp8_block": sized(
            fp8, {**_rows_and(width=200), **blocks}, largest=largest, dtypes=FLOAT32_ONLY
        ),
        "dequantize_fp4_group": sized(
            fp4, {**_rows_and(width=64), **groups}, largest=largest, dtypes=FLOAT32_ONLY
        ),
    }


def _weight(draw: Draw, format: str, num_outputs: int, num_inputs: int) -> StoredWeight:
    if format == "fp8":
        return draw.fp8_weight(num_outputs, num_inputs)
    if format == "fp4":
        return draw.fp4_weight(num_outputs, num_inputs)
    if format == "mxfp8":
        return draw.mxfp8_weight(num_outputs, num_inputs)
    if format in ("int8", "int4"):
        return draw.integer_weight(num_outputs, num_inputs, bits=int(format[-1]))
    return draw.plain_weight(
        num_outputs, num_inputs, torch.float32 if format == "float32" else torch.bfloat16
    )


def _activation(format: str) -> ActivationFormat:
    if format in ("int8", "int4"):
        return ActivationFormat.INT8_TOKEN
    if format == "mxfp8":
        return ActivationFormat.MXFP8
    return ActivationFormat.FP8_GROUP if format in ("fp8", "fp4") else ActivationFormat.NONE


def _linear_layers() -> dict[str, list[Recipe]]:
    def one(draw: Draw, *, rows: int, inputs: int, outputs: int, format: str) -> Inputs:
        weight = _weight(draw, format, outputs, inputs)
        arguments = {"x_TK": draw.uneven(rows, inputs), "weight": weight, "activation": _activation(format)}
        return Inputs(arguments=arguments, prepared="weight")

    def wide(draw: Draw, *, rows: int, inputs: int, outputs: int, format: str) -> Inputs:
        weight = _weight(draw, format, outputs, inputs)
        return Inputs(arguments={"x_TK": draw.uneven(rows, inputs), "weight": weight}, prepared="weight")

    def grouped(draw: Draw, *, rows: int, groups: int, inputs: int, outputs: int, format: str) -> Inputs:
        weight = _weight(draw, format, groups * outputs, inputs)
        return Inputs(
            arguments={"x_TGK": draw.normal(rows, groups, inputs), "weight": weight}, prepared="weight"
        )

    sizes = {
        **_rows_and(inputs=160, outputs=96, format="fp8"),
        "edge-fp8": {"rows": 3, "inputs": 129, "outputs": 257, "format": "fp8"},
        "edge-fp4": {"rows": 3, "inputs": 96, "outputs": 33, "format": "fp4"},
        "edge-mxfp8": {"rows": 3, "inputs": 96, "outputs": 130, "format": "mxfp8"},
        "edge-int8": {"rows": 3, "inputs": 1300, "outputs": 33, "format": "int8"},
        "edge-int4": {"rows": 2, "inputs": 129, "outputs": 130, "format": "int4"},
        "edge-bf16": {"rows": 3, "inputs": 127, "outputs": 1, "format": "bf16"},
        "edge-float32": {"rows": 1, "inputs": 128, "outputs": 129, "format": "float32"},
    }
    plain = {name: {**size, "format": "bf16"} for name, size in _rows_and(inputs=150, outputs=24).items()}
    plain["edge-float32"] = {"rows": 3, "inputs": 129, "outputs": 130, "format": "float32"}
    by_group = _rows_and(groups=3, inputs=64, outputs=48, format="fp8")
    by_group["edge-128"] = {"rows": 3, "groups": 2, "inputs": 128, "outputs": 128, "format": "bf16"}
    return {
        "linear": sized(
            one,
            sizes,
            largest={"rows": 512, "inputs": 16384, "outputs": 7168, "format": "fp8"},
            copies=KEEP_OR_COPY,
        ),
        "float32_linear": sized(
            wide,
            plain,
            largest={"rows": 64, "inputs": 7168, "outputs": 129280, "format": "bf16"},
            copies=KEEP_OR_COPY,
        ),
        "grouped_linear": sized(
            grouped,
            by_group,
            largest={"rows": 512, "groups": 16, "inputs": 4096, "outputs": 1024, "format": "fp8"},
            copies=KEEP_OR_COPY,
        ),
    }


def _norms_and_rotation() -> dict[str, list[Recipe]]:
    def weighted(draw: Draw, *, rows: int, width: int, weight: torch.dtype = torch.float32) -> Inputs:
        arguments = {
            "x_TD": draw.normal(rows, width),
            "weight_D": draw.normal(width, dtype=weight),
            "eps": EPS,
        }
        return Inputs(arguments=arguments)

    def by_head(draw: Draw, *, rows: int, heads: int, width: int) -> Inputs:
        return Inputs(arguments={"q_THD": draw.normal(rows, heads, width), "eps": EPS})

    def rotated(
        draw: Draw, *, rows: int, heads: int, width: int, inverse: bool = False, first: int = 0
    ) -> Inputs:
        frequencies = rope_frequencies(
            width // 2, theta=160000.0, factor=16.0, original_positions=4096, beta_fast=32.0, beta_slow=1.0
        )
        positions = torch.arange(first, first + rows, device=draw.device)
        return Inputs(
            arguments={"x_THD": draw.normal(rows, heads, width), "inverse": inverse},
            planned=Planned(
                parameter="rows", arguments={"positions_T": positions, "frequencies": frequencies}
            ),
            written_rows={"x_THD": None},
        )

    bf16_weight = {"rows": 3, "width": 129, "weight": torch.bfloat16}
    return {
        "rms_norm": sized(
            weighted,
            {**_rows_and(width=96), "edge-127": {"rows": 3, "width": 127}, "edge-bf16-weight": bf16_weight},
            largest={"rows": 4096, "width": 7168},
        ),
        "head_rms_norm": sized(
            by_head,
            {**_rows_and(heads=3, width=96), "edge-1": {"rows": 127, "heads": 1, "width": 129}},
            largest={"rows": 512, "heads": 128, "width": 512},
        ),
        "rotate": sized(
            rotated,
            {
                **_rows_and(heads=3, width=24),
                "edge-inverse": {"rows": 129, "heads": 1, "width": 16, "inverse": True},
                "edge-far": {"rows": 3, "heads": 2, "width": 32, "first": 1048573},
            },
            largest={"rows": 1024, "heads": 128, "width": 128},
        ),
    }


def _experts() -> dict[str, list[Recipe]]:
    return {
        "clamped_swiglu": sized(
            _swiglu,
            {
                **_rows_and(width=80),
                "edge-unweighted": {"rows": 3, "width": 256, "weighted": False},
                "edge-128": {"rows": 129, "width": 128},
            },
            largest={"rows": 6 * 1024, "width": 6144},
        ),
        "route_tokens": sized(
            _routing,
            {
                **_rows_and(experts=16, per_token=3),
                "edge-all": {"rows": 3, "experts": 4, "per_token": 4},
                "edge-hashed": {"rows": 129, "experts": 16, "per_token": 3, "hashed": torch.int64},
                "edge-hashed-int32": {"rows": 3, "experts": 16, "per_token": 3, "hashed": torch.int32},
                "edge-ties": {"rows": 7, "experts": 24, "per_token": 6, "tied": True},
                "edge-ties-few": {"rows": 2, "experts": 40, "per_token": 6, "tied": True},
            },
            largest={"rows": 8192, "experts": 384, "per_token": 6},
            dtypes=FLOAT32_ONLY,
        ),
        "routed_experts": sized(
            _expert_block,
            {
                **_rows_and(hidden=96, inner=64, format="fp4"),
                "edge-fp8": {"rows": 3, "hidden": 160, "inner": 129, "format": "fp8"},
                "edge-mxfp8": {"rows": 2, "hidden": 96, "inner": 64, "format": "mxfp8"},
                "edge-int8": {"rows": 37, "hidden": 160, "inner": 66, "format": "int8"},
                "edge-int8-few": {"rows": 2, "hidden": 160, "inner": 66, "format": "int8"},
                "edge-int4": {"rows": 5, "hidden": 160, "inner": 66, "format": "int4"},
                "edge-bf16": {"rows": 2, "hidden": 48, "inner": 33, "format": "bf16"},
                "edge-one-expert": {
                    "rows": 129,
                    "hidden": 64,
                    "inner": 32,
                    "format": "fp4",
                    "experts": 1,
                    "per_token": 1,
                },
            },
            largest={
                "rows": 3,
                "hidden": 7168,
                "inner": 3072,
                "format": "fp4",
                "experts": 384,
                "per_token": 6,
            },
            copies=KEEP_OR_COPY,
        ),
    }


def _swiglu(draw: Draw, *, rows: int, width: int, weighted: bool = True) -> Inputs:
    weights = draw.normal(rows, dtype=torch.float32) if weighted else None
    gate_up = draw.normal(rows, width, scale=4.0)
    return Inputs(arguments={"gate_up_TJ": gate_up, "row_weight_T": weights, "limit": 5.0})


def _routing(
    draw: Draw,
    *,
    rows: int,
    experts: int,
    per_token: int,
    hashed: torch.dtype | None = None,
    tied: bool = False,
) -> Inputs:
    logits = draw.whole(rows, experts, largest=1) if tied else draw.normal(rows, experts, scale=2.0)
    bias = None if hashed or tied else draw.normal(experts, scale=0.5)
    table = tokens = None
    if hashed is not None:
        table = draw.lay_out(draw.subsets(50, below=experts, width=per_token).to(hashed))
        tokens = draw.indices(rows, below=50)
    arguments = {"logits_TE": logits, "bias_E": bias, "token_ids_T": tokens, "expert_table_VK": table}
    return Inputs(arguments={**arguments, "experts_per_token": per_token, "scaling": 1.5})


def _expert_block(
    draw: Draw, *, rows: int, hidden: int, inner: int, format: str, experts: int = 8, per_token: int = 3
) -> Inputs:
    # Three sets of weights shared by all experts keep the largest case within memory.
    kinds = [
        (
            (_weight(draw, format, inner, hidden), _weight(draw, format, inner, hidden)),
            _weight(draw, format, hidden, inner),
        )
        for _ in range(min(experts, 3))
    ]
    block = ExpertWeights(
        gate_up=tuple(kinds[index % len(kinds)][0] for index in range(experts)),
        down=tuple(kinds[index % len(kinds)][1] for index in range(experts)),
    )
    ids = draw.lay_out(draw.subsets(rows, below=experts, width=per_token).to(torch.int32))
    arguments = {
        "x_TD": draw.uneven(rows, hidden),
        "weights_TK": draw.normal(rows, per_token, dtype=torch.float32),
        "expert_ids_TK": ids,
        "experts": block,
        "swiglu_limit": 2.0,
        "activation": _activation(format),
    }
    return Inputs(arguments=arguments, prepared="experts")


def _hyper_connections() -> dict[str, list[Recipe]]:
    def before(draw: Draw, *, rows: int, streams: int, hidden: int, iterations: int = 20) -> Inputs:
        mixes = (2 + streams) * streams
        fn_scale = (streams * hidden) ** -0.5
        arguments = {
            "streams_THD": draw.normal(rows, streams, hidden),
            "fn_MF": draw.normal(mixes, streams * hidden, scale=fn_scale, dtype=torch.float32),
            "scale_3": draw.normal(3, dtype=torch.float32),
            "base_M": draw.normal(mixes, dtype=torch.float32),
        }
        settings = {"sinkhorn_iterations": iterations, "norm_eps": 1e-5, "mix_eps": 1e-4}
        return Inputs(arguments={**arguments, **settings})

    def after(draw: Draw, *, rows: int, streams: int, hidden: int) -> Inputs:
        arguments = {
            "output_TD": draw.normal(rows, hidden),
            "streams_THD": draw.normal(rows, streams, hidden),
            "post_TH": draw.normal(rows, streams, dtype=torch.float32),
            "mix_THH": draw.normal(rows, streams, streams, dtype=torch.float32),
        }
        return Inputs(arguments=arguments)

    def head(draw: Draw, *, rows: int, streams: int, hidden: int) -> Inputs:
        fn_scale = (streams * hidden) ** -0.5
        arguments = {
            "streams_THD": draw.normal(rows, streams, hidden),
            "fn_HF": draw.normal(streams, streams * hidden, scale=fn_scale, dtype=torch.float32),
            "scale_1": draw.normal(1, dtype=torch.float32),
            "base_H": draw.normal(streams, dtype=torch.float32),
        }
        return Inputs(arguments={**arguments, "norm_eps": 1e-5, "mix_eps": 1e-4})

    edges = {
        "edge-8": {"rows": 8, "streams": 4, "hidden": 33},
        "edge-9": {"rows": 9, "streams": 4, "hidden": 33},
        "edge-streams": {"rows": 3, "streams": 7, "hidden": 16},
        "edge-one-stream": {"rows": 3, "streams": 1, "hidden": 129},
    }
    sizes = {**_rows_and(streams=4, hidden=48), **edges}
    largest = {"rows": 1024, "streams": 4, "hidden": 7168}
    once = {"rows": 3, "streams": 4, "hidden": 16, "iterations": 1}
    return {
        "hyper_connection_pre": sized(before, {**sizes, "edge-one-pass": once}, largest=largest),
        "hyper_connection_post": sized(after, sizes, largest=largest),
        "hyper_connection_head": sized(head, sizes, largest=largest),
    }

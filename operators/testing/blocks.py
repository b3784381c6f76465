"""Recipes of what makes up a block around attention: experts, their routing, hyper-connections."""

from __future__ import annotations

import torch

from ascend_v4.operators.contracts.moe import ExpertWeights
from ascend_v4.operators.testing.draw import Draw
from ascend_v4.operators.testing.recipe import (
    FLOAT32_ONLY,
    ROW_COUNTS,
    Inputs,
    Recipe,
    rows_and,
    sized,
    vendor_sized,
)
from ascend_v4.operators.testing.weights import activation_of, weight_of

KEEP_OR_COPY = (True, False)


def recipes() -> dict[str, list[Recipe]]:
    """Recipes by operator name."""
    return {**_activation_and_routing(), **_routed_experts(), **_hyper_connections()}


def _activation_and_routing() -> dict[str, list[Recipe]]:
    return {
        "clamped_swiglu": sized(
            _swiglu,
            {
                **rows_and(width=80),
                "edge-unweighted": {"rows": 3, "width": 256, "weighted": False},
                "edge-128": {"rows": 129, "width": 128},
            },
            largest={"rows": 6 * 1024, "width": 6144},
        )
        + vendor_sized(
            _swiglu,
            {
                **rows_and(width=256),
                "unweighted": {"rows": 37, "width": 256, "weighted": False},
                "low-limit": {"rows": 37, "width": 256, "weighted": False, "limit": 0.3},
            },
        ),
        "route_tokens": sized(
            _routing,
            {
                **rows_and(experts=16, per_token=3),
                "edge-all": {"rows": 3, "experts": 4, "per_token": 4},
                "edge-hashed": {"rows": 129, "experts": 16, "per_token": 3, "hashed": torch.int64},
                "edge-hashed-int32": {"rows": 3, "experts": 16, "per_token": 3, "hashed": torch.int32},
                "edge-ties": {"rows": 7, "experts": 24, "per_token": 6, "tied": True},
                "edge-ties-few": {"rows": 2, "experts": 40, "per_token": 6, "tied": True},
            },
            largest={"rows": 8192, "experts": 384, "per_token": 6},
            dtypes=FLOAT32_ONLY,
        )
        + vendor_sized(
            _routing,
            {
                **rows_and(experts=256, per_token=6),
                "hashed": {"rows": 37, "experts": 256, "per_token": 6, "hashed": torch.int64},
            },
            dtypes=FLOAT32_ONLY,
        ),
    }


def _routed_experts() -> dict[str, list[Recipe]]:
    return {
        "routed_experts": sized(
            _expert_block,
            {
                **rows_and(hidden=96, inner=64, format="fp4"),
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
        )
        + vendor_sized(
            _expert_block,
            {
                f"{format}-{name}": {**size, "hidden": 512, "inner": 128, "format": format}
                for format in ("int8", "int4", "mxfp8", "fp4+mxfp8")
                for name, size in ROW_COUNTS.items()
            },
            largest={
                f"largest-{format}": {"rows": 5, "hidden": 4096, "inner": 2048, "format": format}
                for format in ("int8", "int4", "fp4+mxfp8")
            },
        ),
    }


def _swiglu(draw: Draw, *, rows: int, width: int, weighted: bool = True, limit: float = 5.0) -> Inputs:
    weights = draw.normal(rows, dtype=torch.float32) if weighted else None
    gate_up = draw.normal(rows, width, scale=4.0)
    arguments = {"gate_up_TJ": gate_up, "row_weight_T": weights, "limit": limit}
    return Inputs(arguments=arguments, sizes={"intermediate": width // 2})


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
    return Inputs(
        arguments={**arguments, "experts_per_token": per_token, "scaling": 1.5},
        sizes={"experts": experts, "experts_per_token": per_token},
    )


def _expert_block(
    draw: Draw, *, rows: int, hidden: int, inner: int, format: str, experts: int = 8, per_token: int = 3
) -> Inputs:
    # Three sets of weights shared by all experts keep the largest case within memory.
    kinds = [
        (
            (weight_of(draw, format, inner, hidden), weight_of(draw, format, inner, hidden)),
            weight_of(draw, format, hidden, inner),
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
        "activation": activation_of(format),
    }
    sizes = {"hidden": hidden, "intermediate": inner, "experts": experts, "experts_per_token": per_token}
    return Inputs(arguments=arguments, prepared="experts", sizes=sizes)


def _hyper_connections() -> dict[str, list[Recipe]]:
    def before(
        draw: Draw,
        *,
        rows: int,
        streams: int,
        hidden: int,
        iterations: int = 20,
        norm_eps: float = 1e-5,
        mix_eps: float = 1e-4,
    ) -> Inputs:
        mixes = (2 + streams) * streams
        fn_scale = (streams * hidden) ** -0.5
        arguments = {
            "streams_THD": draw.normal(rows, streams, hidden),
            "fn_MF": draw.normal(mixes, streams * hidden, scale=fn_scale, dtype=torch.float32),
            "scale_3": draw.normal(3, dtype=torch.float32),
            "base_M": draw.normal(mixes, dtype=torch.float32),
        }
        settings = {"sinkhorn_iterations": iterations, "norm_eps": norm_eps, "mix_eps": mix_eps}
        sizes = {"hidden": hidden, "streams": streams, "sinkhorn": iterations}
        return Inputs(arguments={**arguments, **settings}, sizes=sizes)

    def after(draw: Draw, *, rows: int, streams: int, hidden: int) -> Inputs:
        arguments = {
            "output_TD": draw.normal(rows, hidden),
            "streams_THD": draw.normal(rows, streams, hidden),
            "post_TH": draw.normal(rows, streams, dtype=torch.float32),
            "mix_THH": draw.normal(rows, streams, streams, dtype=torch.float32),
        }
        return Inputs(arguments=arguments, sizes={"hidden": hidden, "streams": streams})

    def head(draw: Draw, *, rows: int, streams: int, hidden: int) -> Inputs:
        fn_scale = (streams * hidden) ** -0.5
        arguments = {
            "streams_THD": draw.normal(rows, streams, hidden),
            "fn_HF": draw.normal(streams, streams * hidden, scale=fn_scale, dtype=torch.float32),
            "scale_1": draw.normal(1, dtype=torch.float32),
            "base_H": draw.normal(streams, dtype=torch.float32),
        }
        return Inputs(
            arguments={**arguments, "norm_eps": 1e-5, "mix_eps": 1e-4},
            sizes={"hidden": hidden, "streams": streams},
        )

    edges = {
        "edge-8": {"rows": 8, "streams": 4, "hidden": 33},
        "edge-9": {"rows": 9, "streams": 4, "hidden": 33},
        "edge-streams": {"rows": 3, "streams": 7, "hidden": 16},
        "edge-one-stream": {"rows": 3, "streams": 1, "hidden": 129},
    }
    sizes = {**rows_and(streams=4, hidden=48), **edges}
    largest = {"rows": 1024, "streams": 4, "hidden": 7168}
    once = {"rows": 3, "streams": 4, "hidden": 16, "iterations": 1}
    chips = rows_and(streams=4, hidden=512)
    large_eps = {"rows": 5, "streams": 4, "hidden": 512, "norm_eps": 0.25, "mix_eps": 1e-3}
    return {
        "hyper_connection_pre": sized(before, {**sizes, "edge-one-pass": once}, largest=largest)
        + vendor_sized(before, {**chips, "large-eps": large_eps}),
        "hyper_connection_post": sized(after, sizes, largest=largest) + vendor_sized(after, chips),
        "hyper_connection_head": sized(head, sizes, largest=largest) + vendor_sized(head, chips),
    }

"""Small layers of routed experts in every stored format, and who runs them on which chip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ascend_v4.device.soc import Chip
from ascend_v4.operators.contract import Implementation, Operator
from ascend_v4.operators.contracts.moe import ExpertWeights, routed_experts
from ascend_v4.operators.contracts.quantize import ActivationFormat, StoredWeight, WeightFormat
from ascend_v4.operators.select import load_backend
from ascend_v4.operators.testing.draw import Draw

CPU = torch.device("cpu")
PROVIDERS = ("vllm-ascend", "cann-recipes", "torch_npu")
INTEGER_FORMATS = (WeightFormat.INT8_CHANNEL, WeightFormat.INT4_CHANNEL)
MX_FORMATS = (WeightFormat.FP4_GROUP, WeightFormat.MXFP8, WeightFormat.FP8_BLOCK)
ON_CHIP = [
    (Chip.A2, WeightFormat.INT8_CHANNEL),
    *((Chip.A3, format) for format in INTEGER_FORMATS),
    *((Chip.A950, format) for format in MX_FORMATS),
]
LIMIT = 1.0
"""Of the clamp: small enough to bite in every block drawn here."""


def candidate(declared: Operator[..., Any], provider: str, chip: Chip) -> Implementation[..., Any]:
    """The one implementation of a provider for a chip."""
    load_backend("npu")
    found = [
        each
        for each in declared.implementations
        if each.provider == provider and each.backend == "npu" and chip in (each.needs.chips or tuple(Chip))
    ]
    assert len(found) == 1, (provider, chip, found)
    return found[0]


def drawn_weight(draw: Draw, format: WeightFormat, num_outputs: int, num_inputs: int) -> StoredWeight:
    """A weight of one format."""
    if format in INTEGER_FORMATS:
        bits = 8 if format is WeightFormat.INT8_CHANNEL else 4
        return draw.integer_weight(num_outputs, num_inputs, bits=bits)
    make = {
        WeightFormat.FP4_GROUP: draw.fp4_weight,
        WeightFormat.MXFP8: draw.mxfp8_weight,
        WeightFormat.FP8_BLOCK: draw.fp8_weight,
        WeightFormat.PLAIN: lambda outputs, inputs: draw.plain_weight(outputs, inputs, torch.bfloat16),
    }[format]
    return make(num_outputs, num_inputs)


def drawn_experts(
    draw: Draw,
    gate_up: WeightFormat,
    down: WeightFormat | None = None,
    *,
    experts: int = 5,
    hidden: int = 128,
    inner: int = 128,
) -> ExpertWeights:
    """Experts as a file has them; gate and up apart."""
    return ExpertWeights(
        gate_up=tuple(
            (drawn_weight(draw, gate_up, inner, hidden), drawn_weight(draw, gate_up, inner, hidden))
            for _ in range(experts)
        ),
        down=tuple(drawn_weight(draw, down or gate_up, hidden, inner) for _ in range(experts)),
    )


@dataclass(frozen=True)
class Block:
    """Inputs of one call."""

    x: Tensor
    weights: Tensor
    expert_ids: Tensor
    experts: ExpertWeights
    activation: ActivationFormat

    def reference(self, *, limit: float = LIMIT) -> Tensor:
        """What the contract computes."""
        return routed_experts(
            self.x,
            self.weights,
            self.expert_ids,
            self.experts,
            swiglu_limit=limit,
            activation=self.activation,
        )

    def run(self, implementation: Implementation[..., Any], *, limit: float = LIMIT) -> Tensor:
        """What an adapter computes, with weights of its own layout."""
        assert implementation.prepare is not None
        out = implementation.call(
            self.x,
            self.weights,
            self.expert_ids,
            implementation.prepare(self.experts, copy=False),
            swiglu_limit=limit,
            activation=self.activation,
        )
        assert isinstance(out, Tensor)
        return out


def drawn_block(
    name: str, format: WeightFormat, *, tokens: int = 7, per_token: int = 3, down: WeightFormat | None = None
) -> Block:
    """A block whose last expert no token chose."""
    draw = Draw(name, dtype=torch.bfloat16, device=CPU)
    experts = drawn_experts(draw, format, down)
    ids_TK = draw.subsets(tokens, below=len(experts.down) - 1, width=per_token).to(torch.int32)
    is_integer = format in INTEGER_FORMATS
    return Block(
        x=draw.normal(tokens, 128),
        weights=draw.normal(tokens, per_token, dtype=torch.float32).abs() + 0.1,
        expert_ids=ids_TK,
        experts=experts,
        activation=ActivationFormat.INT8_TOKEN if is_integer else ActivationFormat.MXFP8,
    )


def require_alike(got: Tensor, want: Tensor, format: WeightFormat) -> None:
    """Equal but for the roundings in between: those of the products, and codes of hidden rows that these
    tip over, by one of 127 steps or by up to an eighth.
    """
    assert got.shape == want.shape
    assert got.dtype is want.dtype
    size = want.double().square().mean().sqrt()
    assert size > 0
    error = (got.double() - want.double()).square().mean().sqrt() / size
    allowed = 2.0**-6 if format in INTEGER_FORMATS else 2.0**-5
    assert error <= allowed, f"off by {error:.3g} of the size of the result, allowed {allowed:.3g}"

"""What every layer is built from: the weights, the chosen operators, and the numerics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_v4.checkpoint.names import LinearNames
from ascend_v4.config import ModelConfig
from ascend_v4.model.numerics import Numerics
from ascend_v4.model.weights import WeightSource
from ascend_v4.operators.contracts.linear import float32_linear, linear
from ascend_v4.operators.contracts.norm import rms_norm
from ascend_v4.operators.contracts.quantize import StoredWeight
from ascend_v4.operators.select import OperatorTable

Layer = Callable[[Tensor], Tensor]

UNPACK_BYTES = 512 << 20
"""Float32 copies made at load where the numerics do not ask for them: small models then decode at full
speed.
"""


class UnpackBudget:
    """Which weights get a float32 copy at load: all of them, or the first that fit into a budget."""

    def __init__(self, limit_bytes: float) -> None:
        self._left_bytes = limit_bytes

    def take(self, *weights: StoredWeight) -> bool:
        """Whether these weights together are copied."""
        wanted = sum(4 * weight.num_outputs * weight.num_inputs for weight in weights)
        if wanted > self._left_bytes:
            return False
        self._left_bytes -= wanted
        return True


@dataclass(frozen=True, kw_only=True, slots=True)
class Builder:
    """Handed down while a model is built; holds no model state itself."""

    config: ModelConfig
    weights: WeightSource
    operators: OperatorTable
    numerics: Numerics
    unpack: UnpackBudget

    @property
    def dtype(self) -> torch.dtype:
        """Of activations between operators."""
        return self.numerics.dtype

    def linear(self, names: LinearNames) -> Layer:
        """x [T, K] -> [T, N] in x's dtype; activations are quantised in front of quantised weights only."""
        stored = self.weights.linear(names)
        activation = self.numerics.activation_of(stored.format)
        prepared = self.operators.prepare(linear)(stored, copy=self.unpack.take(stored))
        run = self.operators[linear]

        def apply(x_TK: Tensor) -> Tensor:
            return run(x_TK, prepared, activation=activation)

        return apply

    def float32_linear(self, name: str) -> Layer:
        """x [T, K] -> [T, N] in float32."""
        stored = self.weights.matrix(name)
        prepared = self.operators.prepare(float32_linear)(stored, copy=self.unpack.take(stored))
        run = self.operators[float32_linear]

        def apply(x_TK: Tensor) -> Tensor:
            return run(x_TK, prepared)

        return apply

    def norm(self, name: str) -> Layer:
        """RMS norm over the last axis of [T, D]."""
        weight_D = self.operators.prepare(rms_norm)(self.weights.plain(name), copy=True)
        eps = self.config.rms_norm_eps
        run = self.operators[rms_norm]

        def apply(x_TD: Tensor) -> Tensor:
            return run(x_TD, weight_D, eps=eps)

        return apply

"""Mixture of experts of one layer: router, routed experts, shared expert. Legend: T tokens, D hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_v4.checkpoint.names import MoeNames
from ascend_v4.errors import CheckpointError
from ascend_v4.model.build import Builder
from ascend_v4.operators.contracts.activation import clamped_swiglu
from ascend_v4.operators.contracts.moe import ExpertWeights, route_tokens, routed_experts
from ascend_v4.operators.contracts.quantize import ActivationFormat, StoredWeight


class MixtureOfExperts:
    """Hash routing where the checkpoint has a table of token ids, learned routing otherwise."""

    def __init__(self, builder: Builder, names: MoeNames) -> None:
        config = builder.config
        self._per_token, self._scaling = config.num_experts_per_tok, config.routed_scaling_factor
        self._limit = config.swiglu_limit
        self._router = builder.float32_linear(names.router)
        self._bias_E = None if names.router_bias is None else builder.weights.float32(names.router_bias)
        table = None if names.token_experts is None else builder.weights.plain(names.token_experts)
        # int64 in the file; the vendors' gating takes int32, and half the memory does
        self._table_VK = None if table is None else table.to(torch.int32)
        stored = builder.weights.experts(names.experts)
        every = [part for parts in stored.gate_up for part in parts] + list(stored.down)
        self._activation = _shared_activation(builder, every, names.experts[0].down.weight)
        self._experts: ExpertWeights = builder.operators.prepare(routed_experts)(
            stored, copy=builder.unpack.take(*every)
        )
        self._shared_gate = builder.linear(names.shared_expert.gate)
        self._shared_up = builder.linear(names.shared_expert.up)
        self._shared_down = builder.linear(names.shared_expert.down)
        self._route = builder.operators[route_tokens]
        self._run_experts = builder.operators[routed_experts]
        self._swiglu = builder.operators[clamped_swiglu]

    def __call__(self, x_TD: Tensor, token_ids_T: Tensor) -> Tensor:
        """Sublayer output [T, D] in x's dtype; expert sums are float32."""
        weights_TK, ids_TK = self._route(
            self._router(x_TD),
            self._bias_E,
            token_ids_T,
            self._table_VK,
            experts_per_token=self._per_token,
            scaling=self._scaling,
        )
        routed_TD = self._run_experts(
            x_TD,
            weights_TK,
            ids_TK,
            self._experts,
            swiglu_limit=self._limit,
            activation=self._activation,
        )
        return (routed_TD + self._shared(x_TD)).to(x_TD.dtype)

    def _shared(self, x_TD: Tensor) -> Tensor:
        gate_up_TJ = torch.cat((self._shared_gate(x_TD), self._shared_up(x_TD)), dim=1)
        return self._shared_down(self._swiglu(gate_up_TJ, limit=self._limit))


def _shared_activation(builder: Builder, weights: list[StoredWeight], name: str) -> ActivationFormat:
    """What the inputs of the experts go through; plain weights beside integer ones leave theirs alone."""
    found = {builder.numerics.activation_of(weight.format) for weight in weights}
    if found == {ActivationFormat.NONE, ActivationFormat.INT8_TOKEN}:
        return ActivationFormat.INT8_TOKEN
    if len(found) > 1:
        formats = ", ".join(sorted({weight.format.name for weight in weights}))
        raise CheckpointError(
            f"the experts beside {name} are stored in {formats}, whose inputs are quantised differently. "
            "Store the experts of a layer alike, or use --numerics exact."
        )
    return found.pop()

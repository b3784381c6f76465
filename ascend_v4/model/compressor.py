"""One compressor of a layer: runs the pooling and caches the entries it completes."""

from __future__ import annotations

from torch import Tensor

from ascend_v4.checkpoint.names import CompressorNames
from ascend_v4.model.build import Builder
from ascend_v4.model.step import CompressionStep
from ascend_v4.operators.contracts.compressor import compress


class Compressor:
    """Projections, state and norm of a compressor. Writing its entries is the caller's business."""

    def __init__(self, builder: Builder, names: CompressorNames, *, overlap: bool) -> None:
        weights = builder.weights.compressor(names)
        self._weights = builder.operators.prepare(compress)(
            weights, copy=builder.unpack.take(*weights.projections)
        )
        self._overlap = overlap
        self._eps = builder.config.rms_norm_eps
        self._rounds_once = builder.numerics.rounds_once
        self._compress = builder.operators[compress]

    def __call__(self, x_TD: Tensor, state_cache: Tensor, step: CompressionStep) -> Tensor:
        """Entries [N, head] completed by the new tokens x [T, hidden]; their slots are in the step."""
        return self._compress(
            x_TD,
            self._weights,
            state_cache,
            step.plan,
            overlap=self._overlap,
            eps=self._eps,
            rounded_once=self._rounds_once,
        )

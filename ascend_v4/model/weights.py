"""From names in a checkpoint to the weights operators take.

Nothing is copied here: preparing decides that.
"""

from __future__ import annotations

from torch import Tensor

from ascend_v4.checkpoint.names import (
    CompressorNames,
    ExpertNames,
    HyperConnectionNames,
    LinearNames,
)
from ascend_v4.checkpoint.reader import CheckpointReader
from ascend_v4.errors import CheckpointError
from ascend_v4.operators.contracts.compressor import CompressorWeights
from ascend_v4.operators.contracts.moe import ExpertWeights
from ascend_v4.operators.contracts.quantize import StoredWeight, WeightFormat

FORMAT_BY_DTYPE = {
    "F8_E4M3": WeightFormat.FP8_BLOCK,
    "I8": WeightFormat.FP4_GROUP,
    "BF16": WeightFormat.PLAIN,
    "F32": WeightFormat.PLAIN,
}


class WeightSource:
    """Weights of one open checkpoint, as views of its mapping."""

    def __init__(self, reader: CheckpointReader) -> None:
        self.reader = reader

    def plain(self, name: str) -> Tensor:
        """A tensor as stored."""
        return self.reader.tensor(name)

    def matrix(self, name: str) -> StoredWeight:
        """A weight without a scale."""
        return StoredWeight(self.reader.tensor(name), None, WeightFormat.PLAIN)

    def linear(self, names: LinearNames) -> StoredWeight:
        """A weight with its scale, if it has one; the stored dtype tells the format."""
        dtype = self.reader.stored(names.weight).dtype
        if dtype not in FORMAT_BY_DTYPE:
            raise CheckpointError(
                f"{names.weight} has dtype {dtype}; linear weights are one of {', '.join(FORMAT_BY_DTYPE)}."
            )
        scale = None if names.scale is None else self.reader.tensor(names.scale)
        return StoredWeight(self.reader.tensor(names.weight), scale, FORMAT_BY_DTYPE[dtype])

    def compressor(self, names: CompressorNames) -> CompressorWeights:
        """Projections, positional bias and norm of a compressor."""
        projections = (self.matrix(names.value), self.matrix(names.gate))
        return CompressorWeights(projections, self.plain(names.position_bias), self.plain(names.norm))

    def experts(self, names: tuple[ExpertNames, ...]) -> ExpertWeights:
        """Gate, up and down of every expert."""
        return ExpertWeights(
            tuple((self.linear(expert.gate), self.linear(expert.up)) for expert in names),
            tuple(self.linear(expert.down) for expert in names),
        )

    def hyper_connection(self, names: HyperConnectionNames) -> tuple[Tensor, Tensor, Tensor]:
        """fn, scale and base."""
        return self.plain(names.mix), self.plain(names.scale), self.plain(names.base)

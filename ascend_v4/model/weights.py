"""From names in a checkpoint to the weights operators take.

Nothing is copied here: preparing decides that. In a pack the description says how a weight is stored, in the
release layout its dtype does.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ascend_v4.checkpoint.names import (
    CompressorNames,
    ExpertNames,
    HyperConnectionNames,
    LinearNames,
)
from ascend_v4.checkpoint.pack import Pack, PackedForm
from ascend_v4.config import ModelConfig
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


FORMAT_BY_FORM = {
    PackedForm.FP8_BLOCK: WeightFormat.FP8_BLOCK,
    PackedForm.FP4_GROUP: WeightFormat.FP4_GROUP,
    PackedForm.MXFP8: WeightFormat.MXFP8,
    PackedForm.INT8_CHANNEL: WeightFormat.INT8_CHANNEL,
    PackedForm.INT4_CHANNEL: WeightFormat.INT4_CHANNEL,
}


CPU = torch.device("cpu")


class TensorSource(Protocol):
    """Tensors by name: an open checkpoint or pack, or one that is repacked while it is read."""

    @property
    def config(self) -> ModelConfig:
        """Of the model."""

    @property
    def pack(self) -> Pack | None:
        """How weights are stored; None for the release layout."""

    @property
    def unexpected(self) -> tuple[str, ...]:
        """Tensors that nothing loads."""

    def verify(self) -> None:
        """Raise CheckpointError listing every difference from the config."""

    def dtype(self, name: str) -> str:
        """Safetensors spelling of a tensor's dtype."""

    def tensor(self, name: str) -> Tensor:
        """A tensor in its own dtype."""


class WeightSource:
    """Weights of one source."""

    def __init__(self, reader: TensorSource, device: torch.device = CPU) -> None:
        self.reader = reader
        self._device = device

    def plain(self, name: str) -> Tensor:
        """A tensor as stored, on the model's device; a CPU's stay where the file is mapped."""
        return self.reader.tensor(name).to(self._device)

    def float32(self, name: str) -> Tensor:
        """A tensor that the release stores in float32; other tools' packs may have it in bfloat16."""
        return self.plain(name).float()

    def matrix(self, name: str) -> StoredWeight:
        """A weight without a scale."""
        return StoredWeight(self.plain(name), None, WeightFormat.PLAIN)

    def linear(self, names: LinearNames) -> StoredWeight:
        """A weight with its scale, if it has one."""
        if self.reader.pack is not None:
            return self.packed(names.weight, self.reader.pack)
        dtype = self.reader.dtype(names.weight)
        if dtype not in FORMAT_BY_DTYPE:
            raise CheckpointError(
                f"{names.weight} has dtype {dtype}; linear weights are one of {', '.join(FORMAT_BY_DTYPE)}."
            )
        scale = None if names.scale is None else self.plain(names.scale)
        return StoredWeight(self.plain(names.weight), scale, FORMAT_BY_DTYPE[dtype])

    def packed(self, name: str, pack: Pack) -> StoredWeight:
        """A weight of a pack as its description has it.

        Raises CheckpointError for one that is asymmetric or has a scale that is not finite.
        """
        described = pack.weight(name)
        if described.form is PackedForm.PLAIN:
            return self.matrix(name)
        assert described.scale is not None, described
        format = FORMAT_BY_FORM[described.form]
        codes, scale = self.plain(name), self.plain(described.scale)
        if format is WeightFormat.FP4_GROUP:
            # ModelSlim packs spell packed codes as unsigned bytes
            codes = codes.view(torch.int8)
        if format in (WeightFormat.INT8_CHANNEL, WeightFormat.INT4_CHANNEL):
            scale = scale.view(-1)
            _require_finite(described.scale, scale)
        if described.offset is not None:
            _require_symmetric(described.offset, self.reader.tensor(described.offset))
        return StoredWeight(codes, scale, format)

    def compressor(self, names: CompressorNames) -> CompressorWeights:
        """Projections, positional bias and norm of a compressor."""
        projections = (self.matrix(names.value), self.matrix(names.gate))
        return CompressorWeights(projections, self.float32(names.position_bias), self.plain(names.norm))

    def experts(self, names: tuple[ExpertNames, ...]) -> ExpertWeights:
        """Gate, up and down of every expert."""
        return ExpertWeights(
            tuple((self.linear(expert.gate), self.linear(expert.up)) for expert in names),
            tuple(self.linear(expert.down) for expert in names),
        )

    def hyper_connection(self, names: HyperConnectionNames) -> tuple[Tensor, Tensor, Tensor]:
        """fn, scale and base."""
        return self.float32(names.mix), self.float32(names.scale), self.float32(names.base)


def _require_finite(name: str, scale: Tensor) -> None:
    if not bool(torch.isfinite(scale).all()):
        row = int((~torch.isfinite(scale)).nonzero()[0])
        raise CheckpointError(
            f"{name} is {scale[row].item()} in row {row}; a scale must be finite. Check the files with "
            "ascend-v4 repack --verify, or download them again."
        )


def _require_symmetric(name: str, offset: Tensor) -> None:
    if bool(offset.any()):
        raise CheckpointError(
            f"{name} is not all zeros: this weight is quantised asymmetrically, and this version runs "
            "symmetric ones only. Repack the official files."
        )

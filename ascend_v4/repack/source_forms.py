"""How each weight of a checkpoint is stored, told by the dtypes and shapes of the tensors beside it.

A weight `X.weight` may have companions `X.scale`, `X.weight_scale` and so on. A pack's own description, where
there is one, has the last word: a weight that does not look as described is an error, never a guess.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from ascend_v4.checkpoint.index import FP4_GROUP, FP8_BLOCK, fp8_scale_shape
from ascend_v4.errors import CheckpointError
from ascend_v4.repack.recipes import ModelPart, WeightForm, classify

WEIGHT_SUFFIX = "weight"


class TensorKind(Enum):
    """What one tensor is to its weight; the value is what follows the weight's stem in a native pack."""

    WEIGHT = "weight"
    SCALE = "scale"
    CHANNEL_SCALE = "weight_scale"
    BIAS = "weight_bias"
    OFFSET = "weight_offset"
    RELEASE_SCALE = "release_scale"
    RELEASE_WEIGHT = "release_weight"
    NEGATIVE_ZEROS = "negative_zeros"


class HasShape(Protocol):
    """A tensor as an index or a header has it; TensorSpec and StoredTensor both do."""

    @property
    def dtype(self) -> str:
        """Safetensors spelling."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Stored elements per axis."""


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor that is read."""

    name: str
    kind: TensorKind
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SourceWeight:
    """A tensor with everything that belongs to it; `tensors` has the weight first."""

    name: str
    part: ModelPart | None
    form: WeightForm
    shape: tuple[int, ...]
    """Of the numbers it stands for: packed weights count each one."""
    tensors: tuple[SourceTensor, ...]

    def find(self, kind: TensorKind) -> SourceTensor | None:
        """The companion of a kind, or None."""
        return next((tensor for tensor in self.tensors if tensor.kind is kind), None)


def find_weights(
    tensors: Mapping[str, HasShape], *, described: Mapping[str, WeightForm] | None = None
) -> Iterator[SourceWeight]:
    """Every tensor, each in one SourceWeight: weights with their companions, then all others by themselves.

    Raises CheckpointError for a weight of a known part whose scale is missing or has another shape, and for
    one that differs from its description.
    """
    taken: set[str] = set()
    stated = described or {}
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] != WEIGHT_SUFFIX:
            continue
        weight = _recognise(name, tensor, tensors, stated.get(name))
        if weight is not None:
            taken.update(source.name for source in weight.tensors)
            yield weight
    for name, tensor in tensors.items():
        if name not in taken:
            alone = SourceTensor(name, TensorKind.WEIGHT, tensor.dtype, tensor.shape)
            yield SourceWeight(name, classify(name), WeightForm.PLAIN, tensor.shape, (alone,))


Found = tuple[WeightForm, tuple[int, ...], tuple[tuple[TensorKind, str], ...]]
"""Form, shape of the numbers, and the names of the companions it stands on."""


def _recognise(
    name: str, tensor: HasShape, tensors: Mapping[str, HasShape], stated: WeightForm | None
) -> SourceWeight | None:
    stem = name.removesuffix(WEIGHT_SUFFIX)
    part = classify(name)
    found = _find_form(stem, tensor, tensors, stated)
    if found is None:
        if part is not None or stated is not None:
            raise CheckpointError(_no_scale(name, tensor, stem, tensors, stated))
        return None
    form, shape, companions = found
    if stated is not None and stated is not form:
        raise CheckpointError(
            f"{name} is described as {stated.value} and stored as {form.value} "
            f"({tensor.dtype} {list(tensor.shape)}). The description belongs to other files: "
            "download the pack again."
        )
    listed = [(TensorKind.WEIGHT, name), *companions, *_kept(stem, tensors)]
    sources = tuple(
        SourceTensor(item, kind, tensors[item].dtype, tensors[item].shape) for kind, item in listed
    )
    return SourceWeight(name, part, form, shape, sources)


def _kept(stem: str, tensors: Mapping[str, HasShape]) -> list[tuple[TensorKind, str]]:
    kinds = (TensorKind.RELEASE_WEIGHT, TensorKind.RELEASE_SCALE, TensorKind.NEGATIVE_ZEROS)
    return [(kind, stem + kind.value) for kind in kinds if stem + kind.value in tensors]


def _find_form(
    stem: str, tensor: HasShape, tensors: Mapping[str, HasShape], stated: WeightForm | None
) -> Found | None:
    if tensor.dtype not in ("I8", "U8", "F8_E4M3"):
        return WeightForm.PLAIN, tensor.shape, ()
    if len(tensor.shape) != 2:
        return None
    powers = _power_scale(stem, tensors)
    if powers is not None:
        return _with_power_scale(tensor, powers, tensors[powers].shape, stated)
    channel = stem + TensorKind.CHANNEL_SCALE.value
    scale = tensors.get(channel)
    if scale is None or scale.dtype != "F32" or tensor.dtype == "F8_E4M3":
        return None
    return _with_channel_scale(stem, tensor, channel, tensors)


def _power_scale(stem: str, tensors: Mapping[str, HasShape]) -> str | None:
    # ModelSlim packs keep power-of-two scales as plain bytes under weight_scale
    for suffix in (TensorKind.SCALE.value, TensorKind.CHANNEL_SCALE.value):
        scale = tensors.get(stem + suffix)
        if scale is not None and scale.dtype in ("F8_E8M0", "U8"):
            return stem + suffix
    return None


def _with_power_scale(
    tensor: HasShape, scale_name: str, scale_shape: tuple[int, ...], stated: WeightForm | None
) -> Found | None:
    rows, stored_columns = tensor.shape
    companions = ((TensorKind.SCALE, scale_name),)
    if tensor.dtype != "F8_E4M3":
        columns = 2 * stored_columns
        fits = columns % FP4_GROUP == 0 and scale_shape == (rows, columns // FP4_GROUP)
        return (WeightForm.FP4_GROUP, (rows, columns), companions) if fits else None
    by_block = scale_shape == fp8_scale_shape(rows, stored_columns)
    by_group = stored_columns % FP4_GROUP == 0 and scale_shape == (rows, stored_columns // FP4_GROUP)
    if by_block and by_group:
        # one row of at most 32 inputs: both readings give the same numbers
        form = WeightForm.MXFP8 if stated is WeightForm.MXFP8 else WeightForm.FP8_BLOCK
    elif by_block or by_group:
        form = WeightForm.FP8_BLOCK if by_block else WeightForm.MXFP8
    else:
        return None
    return form, (rows, stored_columns), companions


def _with_channel_scale(
    stem: str, tensor: HasShape, scale_name: str, tensors: Mapping[str, HasShape]
) -> Found | None:
    rows, columns = tensor.shape
    scale_shape = tensors[scale_name].shape
    companions = [(TensorKind.CHANNEL_SCALE, scale_name)]
    offset = stem + TensorKind.OFFSET.value
    if offset in tensors:
        companions.append((TensorKind.OFFSET, offset))
    if scale_shape in ((rows, 1), (rows,)):
        return WeightForm.INT8_CHANNEL, (rows, columns), tuple(companions)
    bias = next((stem + suffix for suffix in ("weight_bias", "scale_bias") if stem + suffix in tensors), None)
    if scale_shape not in ((2 * rows, 1), (2 * rows,)) or bias is None:
        return None
    companions.append((TensorKind.BIAS, bias))
    return WeightForm.INT4_CHANNEL, (2 * rows, columns), tuple(companions)


def _no_scale(
    name: str, tensor: HasShape, stem: str, tensors: Mapping[str, HasShape], stated: WeightForm | None
) -> str:
    beside = [
        f"{item} {tensors[item].dtype} {list(tensors[item].shape)}"
        for item in (stem + kind.value for kind in TensorKind if kind is not TensorKind.WEIGHT)
        if item in tensors
    ]
    described = "" if stated is None else f" (described as {stated.value})"
    return (
        f"{name} is {tensor.dtype} {list(tensor.shape)}{described} and no scale fits it; beside it: "
        f"{', '.join(beside) or 'nothing'}. FP8 takes one E8M0 scale per {FP8_BLOCK}x{FP8_BLOCK} block or "
        f"per {FP4_GROUP} inputs, FP4 one per {FP4_GROUP} inputs, INT8 and INT4 one F32 per row. "
        "Check the files with: ascend-v4 inspect."
    )

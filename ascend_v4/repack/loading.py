"""A checkpoint repacked while it is loaded: weights are converted into memory when the model asks for them.

What a repack to disk would write and a load would read back, without the files: the same plan, operators and
bytes. One weight is converted at a time and its source pages are let go after it, so memory stays near what
the model keeps.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ascend_v4.checkpoint.index import DTYPE_BYTES
from ascend_v4.checkpoint.pack import Pack, PackedForm, PackLayout, PackScheme, pack_config
from ascend_v4.checkpoint.reader import TORCH_DTYPES
from ascend_v4.config import ModelConfig
from ascend_v4.errors import CheckpointError, ConfigError
from ascend_v4.operators.select import select
from ascend_v4.repack.convert import ConversionRun, Scratch
from ascend_v4.repack.job import open_source
from ascend_v4.repack.plan import Action, Conversion, OutputTensor, plan_outputs
from ascend_v4.repack.recipes import Target, load_recipe
from ascend_v4.repack.source_forms import TensorKind
from ascend_v4.repack.stored import StoredTensors

QUANTIZE_TARGETS = (Target.W8A8, Target.W4A8, Target.MX, Target.BF16)


def quantize_target(name: str) -> Target:
    """The target of a name. Raises ConfigError for one that is not for running."""
    for target in QUANTIZE_TARGETS:
        if target.value == name:
            return target
    known = ", ".join(target.value for target in QUANTIZE_TARGETS)
    raise ConfigError(f"--quantize {name[:40]!r} is unknown; choose one of {known}.")


class RepackedTensors:
    """Tensors of the native pack that a checkpoint would become, by name. For one thread."""

    def __init__(self, checkpoint: Path, target: Target) -> None:
        """Opens and checks the checkpoint. Raises CheckpointError, ConfigError."""
        source = open_source(checkpoint, target=target)
        recipe = load_recipe(target)
        plan = plan_outputs(source.config, source.files.tensors, recipe, described=source.described)
        self._reader = source.reader
        # of a pack that is repacked, companions are no surprise
        self._unexpected = source.reader.unexpected if source.described is None else ()
        self._stored = StoredTensors(source.reader, source.stamps)
        self._made_by: dict[str, tuple[Conversion, OutputTensor]] = {
            output.name: (item, output) for item in plan.conversions for output in item.outputs
        }
        self._table, self._scratch = select("cpu"), Scratch()
        self._run: ConversionRun | None = None
        self._config = pack_config(source.config)
        self._pack = Pack(
            layout=PackLayout.NATIVE,
            scheme=PackScheme(target.value),
            forms={item.name: PackedForm(item.after.value) for item in plan.conversions},
            recipe=recipe.name,
        )

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self._config

    @property
    def pack(self) -> Pack:
        """The description the pack would have."""
        return self._pack

    @property
    def unexpected(self) -> tuple[str, ...]:
        """Tensors in the files that the model has no place for."""
        return self._unexpected

    def verify(self) -> None:
        """The checkpoint was compared with its config when it was opened; nothing is left to say."""

    def dtype(self, name: str) -> str:
        """Safetensors spelling of a tensor's dtype. Raises CheckpointError for a name that is not made."""
        return self._find(name)[1].dtype

    def tensor(self, name: str) -> Tensor:
        """A tensor of the pack: converted into memory of its own, or the file's where its bytes stay.

        Ask for a weight before what lies beside it, which is made with it. Raises CheckpointError.
        """
        conversion, output = self._find(name)
        copied = _copied_from(conversion, output)
        if copied is not None:
            self._stored.require_unchanged([copied])
            return self._reader.tensor(copied).view(TORCH_DTYPES[output.dtype])
        if self._run is None or self._run.conversion is not conversion:
            self._let_go()
            self._run = ConversionRun(conversion, self._stored, self._table, self._scratch)
        made = torch.empty(prod(output.shape) * DTYPE_BYTES[output.dtype], dtype=torch.uint8)
        filled = made.numpy()
        first = 0
        for chunk in self._run.chunks(output):
            filled[first : first + len(chunk)] = np.frombuffer(chunk, dtype=np.uint8)
            first += len(chunk)
        assert first == len(filled), (name, first, len(filled))
        return made.view(TORCH_DTYPES[output.dtype]).view(output.shape)

    def _find(self, name: str) -> tuple[Conversion, OutputTensor]:
        try:
            return self._made_by[name]
        except KeyError:
            raise CheckpointError(f"{self._reader.directory} gives no tensor {name} when repacked.") from None

    def _let_go(self) -> None:
        if self._run is not None:
            self._run.release()
            self._run = None


def _copied_from(conversion: Conversion, output: OutputTensor) -> str | None:
    """The source tensor whose bytes an output has, if it has one's."""
    if conversion.action is Action.COPY:
        return conversion.sources[conversion.outputs.index(output)].name
    if conversion.action is Action.FP8_TO_MX and output.kind is TensorKind.WEIGHT:
        return conversion.sources[0].name
    return None

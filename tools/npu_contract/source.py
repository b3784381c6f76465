"""Checkpoints without values: every tensor of a released model or of a pack of it, on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_v4.checkpoint.index import expected_tensors
from ascend_v4.checkpoint.pack import Pack, PackedForm, PackLayout, PackScheme, pack_config
from ascend_v4.checkpoint.reader import TORCH_DTYPES
from ascend_v4.config import ModelConfig, parse_model_config, resolve_config_path
from ascend_v4.config_file import read_config_fields
from ascend_v4.model.weights import FORMAT_BY_FORM, WeightSource
from ascend_v4.operators.contracts.quantize import StoredWeight
from ascend_v4.repack.plan import plan_outputs
from ascend_v4.repack.recipes import Target, load_recipe

META = torch.device("meta")
RATIOS = (0, 4, 128)
"""Compression ratios of the layers: sliding window with hash routing, CSA, HCA. The MTP block follows."""


def short_config(name: str, *, ratios: Sequence[int] = RATIOS, experts: int | None = None) -> ModelConfig:
    """A released config with few layers: the first routes by hash, an MTP block comes last.

    Every width is the release's; `experts` makes routed experts fewer. Raises ConfigError.
    """
    fields = read_config_fields(resolve_config_path(name))
    fields |= {
        "num_hidden_layers": len(ratios),
        "num_hash_layers": 1,
        "num_nextn_predict_layers": 1,
        "compress_ratios": [*ratios, 0],
    }
    if experts is not None:
        fields["n_routed_experts"] = experts
    return parse_model_config(fields, source=name)


@dataclass(frozen=True, slots=True)
class MetaTensors:
    """A `TensorSource` whose tensors have shapes and dtypes alone."""

    config: ModelConfig
    pack: Pack | None
    specs: Mapping[str, tuple[str, tuple[int, ...]]]
    """Safetensors dtype and shape by name."""
    unexpected: tuple[str, ...] = ()

    def verify(self) -> None:
        """Nothing was stored, so nothing differs."""

    def dtype(self, name: str) -> str:
        """Safetensors spelling of a tensor's dtype."""
        return self.specs[name][0]

    def tensor(self, name: str) -> Tensor:
        """A tensor on the meta device."""
        dtype, shape = self.specs[name]
        return torch.empty(shape, dtype=TORCH_DTYPES[dtype], device=META)


def meta_source(config: ModelConfig, scheme: PackScheme) -> MetaTensors:
    """The release itself, or the pack that repacking it would write.

    Raises CheckpointError for a scheme that cannot be made of the config's weights.
    """
    specs = expected_tensors(config)
    if scheme is PackScheme.RELEASE:
        stored = {name: (spec.dtype, spec.shape) for name, spec in specs.items()}
        return MetaTensors(config, None, stored)
    plan = plan_outputs(config, specs, load_recipe(Target(scheme.value)))
    pack = Pack(
        layout=PackLayout.NATIVE,
        scheme=scheme,
        forms={item.name: PackedForm(item.after.value) for item in plan.conversions},
        recipe=plan.recipe.name,
    )
    outputs = [output for item in plan.conversions for output in item.outputs]
    stored = {output.name: (output.dtype, output.shape) for output in outputs}
    return MetaTensors(pack_config(config), pack, stored)


class MetaWeights(WeightSource):
    """Weights without values: what `packed` checks of values has nothing to look at."""

    def __init__(self, tensors: MetaTensors) -> None:
        super().__init__(tensors, META)

    def packed(self, name: str, pack: Pack) -> StoredWeight:
        """As the description has it: scales of integers are one axis, packed FP4 codes signed bytes."""
        described = pack.weight(name)
        if described.form is PackedForm.PLAIN:
            return self.matrix(name)
        assert described.scale is not None, described
        codes, scale = self.plain(name), self.plain(described.scale)
        if described.form is PackedForm.FP4_GROUP:
            codes = codes.view(torch.int8)
        if described.form in (PackedForm.INT8_CHANNEL, PackedForm.INT4_CHANNEL):
            scale = scale.view(-1)
        return StoredWeight(codes, scale, FORMAT_BY_FORM[described.form])

"""transformers' DeepseekV4ForCausalLM over the same weights: the peer of the benchmarks, an oracle for the
tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ascend_v4.checkpoint.index import Role
from ascend_v4.checkpoint.names import CONFIG_FILE, SINGLE_FILE, is_mtp
from ascend_v4.checkpoint.reader import CheckpointReader
from ascend_v4.config import read_config_fields
from ascend_v4.errors import ConfigError
from ascend_v4.operators.contracts.quantize import StoredWeight, WeightFormat

FORMATS = {"F8_E4M3": WeightFormat.FP8_BLOCK, "I8": WeightFormat.FP4_GROUP}


def write_bfloat16_checkpoint(source: Path, target: Path) -> None:
    """The release checkpoint `source` with every weight in bfloat16, under the release's names, into
    `target`.

    Exact: FP4 and FP8 codes times powers of two are bfloat16 numbers. MTP blocks are left out: transformers
    ignores them. The config loses quantization_config.
    """
    target.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    with CheckpointReader.open(source) as reader:
        reader.verify()
        for name, spec in reader.specs.items():
            if is_mtp(name) or spec.role is Role.SCALE:
                continue
            stored = reader.tensor(name)
            scale_name = name.removesuffix("weight") + "scale"
            if spec.dtype in FORMATS:
                weight = StoredWeight(stored, reader.tensor(scale_name), FORMATS[spec.dtype])
                tensors[name] = weight.to_float32().to(torch.bfloat16)
            else:
                tensors[name] = stored.clone()
    save_file(tensors, str(target / SINGLE_FILE), metadata={"format": "pt"})
    fields = dict(read_config_fields(source))
    fields.pop("quantization_config", None)
    fields.pop("expert_dtype", None)
    scaling = fields.get("rope_scaling")
    if isinstance(scaling, dict) and "rope_type" not in scaling:
        fields["rope_scaling"] = {**scaling, "rope_type": scaling.get("type")}
    (target / CONFIG_FILE).write_text(json.dumps(fields), encoding="utf-8")


def load_peer(source: Path, workspace: Path) -> Any:  # noqa: ANN401 - transformers is untyped
    """DeepseekV4ForCausalLM in float32 on the CPU with the weights of a release checkpoint.

    Raises ConfigError where transformers is not installed.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ConfigError("transformers is not installed; it needs Python 3.11 or newer.") from None
    target = workspace / "bfloat16"
    write_bfloat16_checkpoint(source, target)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    model.train(False)
    return model

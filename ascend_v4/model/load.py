"""From a checkpoint directory to a model ready to run: read, compare, select operators, build."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from ascend_v4.checkpoint.reader import CheckpointReader
from ascend_v4.config import ModelConfig
from ascend_v4.device.target import Target, TargetRequest
from ascend_v4.env import CPU_THREADS
from ascend_v4.model.build import UNPACK_BYTES, Builder, UnpackBudget
from ascend_v4.model.deepseek_v4 import DeepSeekV4
from ascend_v4.model.mtp import MtpBlock, require_mtp_block
from ascend_v4.model.numerics import Numerics, numerics_by_name, numerics_on_chip
from ascend_v4.model.sizes import model_sizes
from ascend_v4.model.weights import TensorSource, WeightSource
from ascend_v4.operators.select import OperatorTable, select
from ascend_v4.operators.targets import open_target

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model, what it was built with, and the source whose mapping its weights may still point into."""

    config: ModelConfig
    numerics: Numerics
    operators: OperatorTable
    model: DeepSeekV4
    mtp: MtpBlock | None
    target: Target
    device: torch.device
    reader: TensorSource


def load_model(
    checkpoint: str | Path | TensorSource,
    *,
    device: Target | TargetRequest | str = "cpu",
    numerics: str = "auto",
    mtp: bool = False,
) -> LoadedModel:
    """Loads a checkpoint in the release layout or a pack, from its directory or a source of its tensors.

    Raises CheckpointError listing every difference between config and files before anything is loaded;
    ConfigError for a config, numerics, target or `mtp` that cannot be run; NoImplementationError where the
    target lacks operators or does not take the model's sizes; DeviceError for a device that is not there.
    """
    target = open_target(device)
    threads = CPU_THREADS.read()
    if threads is not None:
        torch.set_num_threads(threads)
    # a wrong name is worth no opening of files
    numerics_by_name(numerics)
    reader = CheckpointReader.open(checkpoint) if isinstance(checkpoint, (str, Path)) else checkpoint
    scheme = None if reader.pack is None else reader.pack.scheme
    if target.chip is None:
        chosen = numerics_by_name(numerics, scheme=scheme)
    else:
        chosen = numerics_on_chip(numerics, target.chip, scheme=scheme)
    operators = select(target, sizes=model_sizes(reader.config))
    if mtp:
        require_mtp_block(reader.config)
    reader.verify()
    for name in reader.unexpected[:10]:
        log.warning("unexpected tensor %s is ignored", name)
    if reader.config.unknown_fields:
        log.warning("config fields ignored: %s", ", ".join(reader.config.unknown_fields))
    torch_device = torch.device(target.torch_device)
    with torch.inference_mode():
        builder = Builder(
            config=reader.config,
            weights=WeightSource(reader, torch_device),
            operators=operators,
            numerics=chosen,
            unpack=UnpackBudget(math.inf if chosen.copies_weights else UNPACK_BYTES),
        )
        model = DeepSeekV4(builder)
        block = MtpBlock(builder, model) if mtp else None
    return LoadedModel(
        config=reader.config,
        numerics=chosen,
        operators=operators,
        model=model,
        mtp=block,
        target=target,
        device=torch_device,
        reader=reader,
    )

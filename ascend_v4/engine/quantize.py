"""`--quantize`: where the tensors of a checkpoint come from when it is repacked on the way to the model."""

from __future__ import annotations

import logging
from pathlib import Path

from ascend_v4.checkpoint.pack import find_pack
from ascend_v4.checkpoint.rank_sets import scan_pack
from ascend_v4.errors import CheckpointError, ConfigError
from ascend_v4.model.weights import TensorSource
from ascend_v4.repack.config import RepackConfig
from ascend_v4.repack.loading import RepackedTensors, quantize_target
from ascend_v4.repack.manifest import MANIFEST_FILE, read_manifest
from ascend_v4.repack.pipeline import run_repack
from ascend_v4.repack.recipes import Target, load_recipe
from ascend_v4.repack.source import SourceFiles

log = logging.getLogger(__name__)


def quantized_source(
    checkpoint: Path, quantize: str | None, *, cache_dir: Path | None = None
) -> Path | TensorSource:
    """What `load_model` takes: the checkpoint itself, one repacked while it loads, or the pack kept of it.

    With `cache_dir` the pack is written to `<cache_dir>/<checkpoint's name>-<target>`, or found there from an
    earlier run. Raises CheckpointError, ConfigError.
    """
    if quantize is None:
        if cache_dir is not None:
            raise ConfigError("--cache-dir keeps what --quantize makes; it needs --quantize.")
        return checkpoint
    target = quantize_target(quantize)
    if cache_dir is None:
        return RepackedTensors(checkpoint, target)
    kept = cache_dir / f"{checkpoint.resolve().name}-{target.value}"
    if (kept / MANIFEST_FILE).exists():
        _require_made_of(kept, checkpoint, target)
        log.info("%s was repacked before and is used", kept)
        return kept
    log.info("Repacking %s into %s", checkpoint, kept)
    run_repack(RepackConfig(source=checkpoint, output=kept, target=target))
    return kept


def _require_made_of(kept: Path, checkpoint: Path, target: Target) -> None:
    """Refuse a pack of other files, or one made with other options than --quantize uses."""
    manifest = read_manifest(kept)
    now = SourceFiles.read(checkpoint, scan_pack(checkpoint, find_pack(checkpoint)).shards).facts()
    wanted = RepackConfig(source=checkpoint, output=kept, target=target).options(load_recipe(target).name)
    if manifest.source != now:
        raise CheckpointError(
            f"{kept} was repacked from other files than those of {checkpoint}. Remove it, or use another "
            "--cache-dir."
        )
    if manifest.options != wanted:
        raise CheckpointError(
            f"{kept} was repacked with other options than --quantize {target.value} uses. Serve it as it is, "
            "without --quantize, or use another --cache-dir."
        )

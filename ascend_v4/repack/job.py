"""A repack decided in full before anything is written: conversions, parts, documents and their sizes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend_v4 import __version__
from ascend_v4.checkpoint.names import CONFIG_FILE, PACK_FILE
from ascend_v4.checkpoint.pack import MAX_DESCRIPTION_BYTES, find_pack
from ascend_v4.checkpoint.rank_sets import scan_pack
from ascend_v4.checkpoint.reader import CheckpointReader
from ascend_v4.checkpoint.shards import StoredFiles
from ascend_v4.config import ModelConfig, parse_model_config, read_config_fields
from ascend_v4.errors import CheckpointError
from ascend_v4.operators.select import OperatorTable
from ascend_v4.repack.config import RepackConfig
from ascend_v4.repack.files import parse_json, read_bounded
from ascend_v4.repack.layouts import (
    DocumentInputs,
    Part,
    copied_files,
    disk_bytes,
    layout_for,
    restore_release_fields,
)
from ascend_v4.repack.layouts.base import MAX_COPIED_BYTES
from ascend_v4.repack.on_device import operators_for, threads_of
from ascend_v4.repack.plan import RepackPlan, plan_outputs
from ascend_v4.repack.recipes import Target, WeightForm, load_recipe
from ascend_v4.repack.source import SourceFiles
from ascend_v4.repack.source_forms import HasShape
from ascend_v4.repack.stored import StoredTensors


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenSource:
    """A checkpoint or a pack whose files were found whole."""

    reader: CheckpointReader
    files: StoredFiles
    stamps: SourceFiles
    config: ModelConfig
    fields: Mapping[str, Any]
    """config.json, with the release's fields put back where a pack left them out."""
    described: dict[str, WeightForm] | None
    """How a pack says its weights are stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is read and what will be written."""

    config: RepackConfig
    model: ModelConfig
    stamps: SourceFiles
    stored: StoredTensors
    plan: RepackPlan
    parts: tuple[Part, ...]
    documents: dict[str, bytes]
    copied: tuple[tuple[str, int], ...]
    """Files taken over from the source: (name, bytes)."""
    table: OperatorTable

    @property
    def part_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def num_threads(self) -> int:
        """Threads of a run; a part is one thread's."""
        wanted = threads_of(self.config.jobs, self.table, self.plan.conversions)
        return max(1, min(wanted, len(self.parts)))

    @property
    def disk_bytes(self) -> int:
        """Free bytes an output from nothing needs, bookkeeping included."""
        return disk_bytes(self.parts, self.documents, copied_bytes=sum(size for _, size in self.copied))

    @property
    def options(self) -> dict[str, Any]:
        """What decides the bytes beside the source."""
        return self.config.options(self.plan.recipe.name)

    def identity(self) -> dict[str, str]:
        """What an interrupted run must have in common with the one that goes on, in a reader's words."""
        headers = hashlib.sha256()
        for part in self.parts:
            headers.update(f"{part.file_name} {part.num_bytes}\n".encode() + part.header)
        listed = {key: str(value) for key, value in self.options.items()}
        return {
            **listed,
            "ascend-v4": __version__,
            "source": self.stamps.digest(),
            "parts": headers.hexdigest(),
            "documents": hashlib.sha256(b"".join(self.documents.values())).hexdigest(),
        }

    def copied_bytes(self, name: str) -> bytes:
        """The content of a file that is taken over."""
        return read_bounded(self.config.source / name, MAX_COPIED_BYTES)


@dataclass(frozen=True, slots=True)
class LaidOut:
    """Everything that follows from names, shapes and options."""

    plan: RepackPlan
    parts: tuple[Part, ...]
    documents: dict[str, bytes]


def open_source(directory: Path, *, target: Target) -> OpenSource:
    """Open what is to be repacked and compare it with its own config or description.

    Raises CheckpointError listing everything that is missing or damaged, ConfigError.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory. Name the one that holds {CONFIG_FILE}.")
    pack = find_pack(directory)
    fields: Mapping[str, Any] = read_config_fields(directory / CONFIG_FILE)
    described: dict[str, WeightForm] | None = None
    if pack is not None:
        fields = restore_release_fields(fields, _pack_description(directory))
        described = {name: WeightForm(form.value) for name, form in pack.forms.items()}
    source = str(directory / CONFIG_FILE)
    files = scan_pack(directory, pack)
    reader = CheckpointReader(directory, parse_model_config(fields, source=source), files, pack=pack)
    reader.verify()
    if target is Target.RELEASE:
        # a plain bf16 source says nothing of the release's formats; what goes back takes them
        fields = restore_release_fields(fields)
    return OpenSource(
        reader=reader,
        files=files,
        stamps=SourceFiles.read(directory, files.shards),
        config=parse_model_config(fields, source=source),
        fields=fields,
        described=described,
    )


def plan_job(config: RepackConfig) -> Job:
    """Open the source and decide everything; writes nothing.

    Raises CheckpointError, ConfigError, DeviceError for a device that is not there or gives other bits.
    """
    source = open_source(config.source, target=config.target)
    inputs = DocumentInputs(config_fields=source.fields, source=source.stamps.facts(), ranks=config.ranks)
    layout = lay_out(config, source.config, source.files.tensors, inputs, described=source.described)
    return Job(
        config=config,
        model=source.config,
        stamps=source.stamps,
        stored=StoredTensors(source.reader, source.stamps),
        plan=layout.plan,
        parts=layout.parts,
        documents=layout.documents,
        copied=copied_files(config.source),
        table=operators_for(config.device, layout.plan.conversions),
    )


def lay_out(
    config: RepackConfig,
    model: ModelConfig,
    tensors: Mapping[str, HasShape],
    inputs: DocumentInputs,
    *,
    described: Mapping[str, WeightForm] | None = None,
) -> LaidOut:
    """What becomes of given tensors and in which files it will lie; opens none. Raises ConfigError."""
    plan = plan_outputs(
        model,
        tensors,
        load_recipe(config.target, config.recipe),
        rounding=config.rounding,
        keep=config.keep,
        reversible=config.reversible,
        described=described,
    )
    layout = layout_for(config.layout)
    parts = layout.parts(model, plan, max_part_bytes=config.max_part_bytes, ranks=config.ranks)
    return LaidOut(plan, parts, layout.documents(plan, parts, inputs))


def _pack_description(directory: Path) -> Mapping[str, Any] | None:
    """ascend_v4.json; None for a pack of another layout, which keeps no fields of the release."""
    path = directory / PACK_FILE
    if not path.exists():
        return None
    description = parse_json(read_bounded(path, MAX_DESCRIPTION_BYTES), source=path)
    assert isinstance(description, dict), f"{path} was found to be a pack and holds no object"
    return description

"""Layouts: under which names, in which files and with which descriptions a repacked checkpoint is written."""

from __future__ import annotations

from ascend_v4.repack.layouts.base import (
    DocumentInputs,
    Layout,
    LayoutName,
    copied_files,
    restore_release_fields,
)
from ascend_v4.repack.layouts.huggingface import HuggingfaceLayout
from ascend_v4.repack.layouts.modelslim import ModelslimLayout
from ascend_v4.repack.layouts.native import NativeLayout
from ascend_v4.repack.layouts.parts import DEFAULT_PART_BYTES, Part, PlacedTensor, expert_prefix
from ascend_v4.repack.layouts.ranks import Ranks, parse_ranks

__all__ = [
    "DEFAULT_PART_BYTES",
    "DocumentInputs",
    "Layout",
    "LayoutName",
    "Part",
    "PlacedTensor",
    "Ranks",
    "copied_files",
    "disk_bytes",
    "expert_prefix",
    "layout_for",
    "parse_ranks",
    "restore_release_fields",
]

BOOKKEEPING_BYTES = 64 << 20
"""Room for the journal, the manifest and the file system's own records."""


def layout_for(name: LayoutName) -> Layout:
    """The layout of a name."""
    layouts: dict[LayoutName, Layout] = {
        LayoutName.NATIVE: NativeLayout(),
        LayoutName.MODELSLIM: ModelslimLayout(),
        LayoutName.HUGGINGFACE: HuggingfaceLayout(),
    }
    return layouts[name]


def disk_bytes(parts: tuple[Part, ...], documents: dict[str, bytes], *, copied_bytes: int = 0) -> int:
    """Free bytes a run needs before it starts: every file it writes, and room for its bookkeeping."""
    files = sum(part.num_bytes for part in parts) + sum(len(text) for text in documents.values())
    return files + copied_bytes + BOOKKEEPING_BYTES

"""Options that several verbs share, so that they read alike everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

F = TypeVar("F", bound=Callable[..., object])


def model_options(command: F) -> F:
    """--device, --numerics, --quantize and --cache-dir: how a checkpoint is run."""
    options = (
        click.option("--device", default="cpu", show_default=True, help="Where the model runs."),
        click.option(
            "--numerics",
            type=click.Choice(["auto", "exact", "native"]),
            default="auto",
            show_default=True,
            help="exact: float32, nothing quantised. native: the release's own rounding. "
            "auto: the checkpoint's own.",
        ),
        click.option(
            "--quantize",
            type=click.Choice(["w8a8", "w4a8", "mx", "bf16"]),
            help="Repack while loading, without a copy on disk; the numerics are then the target's.",
        ),
        click.option(
            "--cache-dir",
            type=click.Path(path_type=Path),
            help="Keep what --quantize makes in this folder, and use it the next time.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command

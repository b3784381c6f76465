"""Options that several verbs share, so that they read alike everywhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ascend_v4.errors import ConfigError

DEVICE_OPTIONS = (
    click.option(
        "--device",
        type=click.Choice(["cpu", "cuda", "npu", "sim"]),
        default="cpu",
        show_default=True,
        help="Where the model runs. sim runs the Ascend path on the CPU, each vendor operator simulated.",
    ),
    click.option(
        "--chip",
        type=click.Choice(["a2", "a3", "950"]),
        help="The chip that sim stands for; on npu it is found, and this one only checked.",
    ),
    click.option(
        "--waive-limits",
        "waive",
        multiple=True,
        metavar="sizes|NAMES",
        help="sim only: model sizes that kernels take here though the chip's would not: hidden, head_dim, "
        "heads, index_heads, topk, row_width, or sizes for all. May be given several times.",
    ),
    click.option(
        "--sim-arithmetic",
        "arithmetic",
        type=click.Choice(["chip", "ideal"]),
        default="chip",
        show_default=True,
        help="sim only. chip: with the roundings that are known of the chip's kernels. ideal: without them, "
        "so that only layout and meaning are compared.",
    ),
    click.option(
        "--without",
        multiple=True,
        metavar="PACKAGE",
        help="npu and sim: treat a package as absent: vllm_ascend, custom_ops, ops_transformer. May be given "
        "several times.",
    ),
)
MODEL_OPTIONS = (
    click.option(
        "--numerics",
        type=click.Choice(["auto", "exact", "native"]),
        default="auto",
        show_default=True,
        help="exact: float32, nothing quantised. native: the release's own rounding. "
        "auto: the checkpoint's own, and on npu and sim the chip's.",
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


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceOptions:
    """What was typed about the device."""

    device: str
    chip: str | None
    waive: tuple[str, ...]
    arithmetic: str
    without: tuple[str, ...]

    def request(self) -> Any:  # noqa: ANN401 -- its module is imported when a verb runs
        """The TargetRequest for whoever opens the device. Raises ConfigError for an unknown package."""
        from ascend_v4.device.packages import MASKABLE
        from ascend_v4.device.target import TargetRequest

        unknown = [name for group in self.without for name in group.split(",") if name not in MASKABLE]
        if unknown:
            raise ConfigError(f"--without {unknown[0]!r} is no package. Known: {', '.join(MASKABLE)}.")
        if self.without and self.device in ("cpu", "cuda"):
            raise ConfigError(f"--without is for npu and sim; --device is {self.device}.")

        return TargetRequest(
            device=self.device,
            chip=self.chip,
            waive=self.waive,
            arithmetic=self.arithmetic,
            without=self.without,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """What was typed about how a checkpoint is run."""

    on: DeviceOptions
    numerics: str
    quantize: str | None
    cache_dir: Path | None


def device_options(command: Callable[..., object]) -> Callable[..., object]:
    """--device and what goes with it; the command gets them as `on`.

    A torch_npu that would break `import torch` is reported before the command begins.
    """

    @functools.wraps(command)
    def gather(**options: Any) -> object:  # noqa: ANN401 -- whatever the command's own options are
        return command(on=_take_device(options), **options)

    return _with(gather, DEVICE_OPTIONS)


def model_options(command: Callable[..., object]) -> Callable[..., object]:
    """Those of the device, --numerics, --quantize and --cache-dir; the command gets them as `model`."""

    @functools.wraps(command)
    def gather(**options: Any) -> object:  # noqa: ANN401 -- whatever the command's own options are
        on = _take_device(options)
        rest = {name: options.pop(name) for name in ("numerics", "quantize", "cache_dir")}
        return command(model=ModelOptions(on=on, **rest), **options)

    return _with(gather, (*DEVICE_OPTIONS, *MODEL_OPTIONS))


def _take_device(options: dict[str, Any]) -> DeviceOptions:
    from ascend_v4.device.software import require_torch

    require_torch()
    names = ("device", "chip", "waive", "arithmetic", "without")
    return DeviceOptions(**{name: options.pop(name) for name in names})


def _with(command: Callable[..., object], options: tuple[Callable[..., Any], ...]) -> Callable[..., object]:
    for option in reversed(options):
        command = option(command)
    return command

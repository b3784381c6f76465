"""Runs the parts in order and gathers their rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ascend_v4 import __version__
from ascend_v4.checkpoint.pack import require_finished
from ascend_v4.config import ModelConfig
from ascend_v4.device.inventory import take_inventory
from ascend_v4.device.opening import open_device
from ascend_v4.device.target import Target, TargetRequest
from ascend_v4.errors import DeviceError
from ascend_v4.operators.targets import open_target
from ascend_v4.smoke.memory import held_bytes
from ascend_v4.smoke.operators import check_operators
from ascend_v4.smoke.report import PARTS, Outcome, Recorder, Report, Row, SkippedError
from ascend_v4.smoke.whole import (
    Models,
    check_conversation,
    check_layers,
    check_memory,
    check_models,
    check_repeat,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SmokeConfig:
    """Everything `ascend-v4 smoke` was told."""

    target: TargetRequest
    checkpoint: Path | None = None
    only: frozenset[str] = frozenset()
    """Parts to run; empty means all."""
    operators: tuple[str, ...] = ()
    """Operators to check; empty means all."""
    required: str | None = None
    """A device that must be there; nothing may be skipped then."""
    largest: bool = False
    """Also the cases of the released models' sizes."""


def run_smoke(config: SmokeConfig, *, announce: Callable[[Row], None]) -> Report:
    """Runs the parts that are wanted; `announce` hears of each row as it is made.

    Raises ConfigError for a target that makes no sense, CheckpointError for a given checkpoint that cannot be
    read. A device that is not there is in the report.
    """
    started = time.perf_counter()
    if config.checkpoint is not None:
        require_finished(config.checkpoint)
        ModelConfig.from_file(config.checkpoint)
    facts = take_inventory()
    recorder = Recorder(only=config.only, required=config.required, announce=announce)
    target = _open(config, facts, recorder)
    if target is not None:
        _run_parts(config, target, recorder)
    return Report(
        described=_described(config, target, facts),
        rows=tuple(recorder.rows),
        seconds=time.perf_counter() - started,
    )


def _open(config: SmokeConfig, facts: Mapping[str, Any], recorder: Recorder) -> Target | None:
    try:
        target = open_target(config.target)
    except DeviceError as error:
        why = str(error)
        recorder.skip("device", config.target.device, why)
        for part in PARTS:
            if part != "device" and recorder.wants(part):
                recorder.leave(part, f"there is no {config.target.device}")
        return None
    if recorder.wants("device"):
        do = "ascend-v4 devices says what is missing."
        recorder.check("device", target.describe(), lambda: _facts_of(target, facts), do=do)
    return target


def _facts_of(target: Target, facts: Mapping[str, Any]) -> Outcome:
    memory = open_device(target).memory()
    gibibytes = f"{memory.free_bytes / 2**30:.1f} of {memory.total_bytes / 2**30:.1f} GiB free"
    if target.device in ("npu", "cuda"):
        names = ", ".join(device["name"] for device in facts[target.device]["devices"])
        if not names:
            raise SkippedError(f"{target.device} opened and the inventory lists none")
        packages = {"CANN": facts["npu"]["cann"], "torch_npu": facts["npu"]["torch_npu"]}
        software = "" if target.device == "cuda" else f", {packages}"
        return Outcome(compared=f"{names}, {gibibytes}, torch {facts['torch']}{software}")
    return Outcome(compared=f"{facts['cpu']['name']}, {gibibytes}, torch {facts['torch']}")


def _run_parts(config: SmokeConfig, target: Target, recorder: Recorder) -> None:
    device = open_device(target)
    recorder.synchronize = device.synchronize
    with TemporaryDirectory(prefix="ascend-v4-smoke-") as folder:
        models = Models(target=target, device=device, folder=Path(folder), checkpoint=config.checkpoint)
        if recorder.wants("operators"):
            check_operators(recorder, target, device, names=config.operators, largest=config.largest)
        before_bytes = held_bytes(target, device)
        if recorder.wants("layer"):
            check_layers(recorder, models)
        if recorder.wants("model"):
            check_models(recorder, models)
        if recorder.wants("chat"):
            check_conversation(recorder, models)
        if recorder.wants("repeat"):
            check_repeat(recorder, models)
        if recorder.wants("memory"):
            check_memory(recorder, models, before_bytes=before_bytes)
        models.close()


def _described(config: SmokeConfig, target: Target | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    chip = config.target.chip if target is None or target.chip is None else target.chip.value
    return {
        "version": __version__,
        "device": config.target.device,
        "chip": chip,
        "checkpoint": None if config.checkpoint is None else str(config.checkpoint),
        "waived_limits": [] if target is None else sorted(target.waived),
        "arithmetic": config.target.arithmetic,
        "without": [] if target is None else sorted(target.masked),
        "require": config.required,
        "facts": dict(facts),
    }

"""Conversions on an accelerator: slabs go there, the operators' references run there, results come back.

The references are plain torch, so every device that torch drives can run them. An output must not depend on
where it was made, so a device is believed only after it gave the CPU's bits, before anything is written, in
the operators' own test cases. Hashing, writing and copies stay on the CPU, and so does `--verify`: it makes
the same bytes again with other code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ascend_v4.device.opening import open_device
from ascend_v4.errors import DeviceError
from ascend_v4.operators.contract import CATALOG, Operator
from ascend_v4.operators.select import REFERENCE, OperatorTable, select
from ascend_v4.operators.targets import open_target
from ascend_v4.operators.testing import transcode
from ascend_v4.operators.testing.draw import Draw
from ascend_v4.operators.testing.recipe import Recipe
from ascend_v4.repack.config import default_threads
from ascend_v4.repack.plan import Action, Conversion
from ascend_v4.repack.source_forms import TensorKind

SHOWN_CHARACTERS = 200
REFERENCE_JOBS = 2
LIGHT = frozenset({"fp8_scale_to_mx", "mx_scale_to_fp8", "derive_fp4_scale", "derive_fp8_scale"})
"""Operators that see scales alone, or few rows at a time."""

OPERATORS: Mapping[Action, tuple[str, ...]] = {
    Action.COPY: (),
    Action.FP4_TO_INT8: ("fp4_to_int8",),
    Action.FP4_TO_INT4: ("fp4_to_int4",),
    Action.FP4_TO_BF16: ("fp4_to_bf16",),
    Action.FP8_TO_INT8: ("fp8_to_int8",),
    Action.FP8_TO_BF16: ("fp8_to_bf16",),
    Action.FP8_TO_MX: ("fp8_scale_to_mx",),
    Action.BF16_TO_INT8: ("bf16_to_int8",),
    Action.MX_TO_FP8: ("mx_scale_to_fp8",),
    Action.INT8_TO_FP4: ("int8_to_fp4", "bf16_to_fp4", "derive_fp4_scale"),
    Action.BF16_TO_FP4: ("bf16_to_fp4", "derive_fp4_scale"),
    Action.BF16_TO_FP8: ("bf16_to_fp8", "derive_fp8_scale"),
}
"""What a conversion may call, beside `negative_zeros` for a bitmap."""


def operators_for(device: str, conversions: Iterable[Conversion]) -> OperatorTable:
    """Operators that convert on a device; of cpu the CPU's own.

    Raises DeviceError where the machine lacks the device, or the device cannot run what these conversions
    need or gives other bits than the CPU.
    """
    host = select("cpu")
    if device == "cpu":
        return host
    target = open_target(device)
    # a real NPU's tensors need its runtime, which opening it imports
    open_device(target)
    names = operators_of(conversions)
    there = operators_there(target.torch_device, host, names)
    for name in names:
        _require_same_bits(CATALOG[name], there, host, device=device)
    return there


def operators_of(conversions: Iterable[Conversion]) -> tuple[str, ...]:
    """Names of the operators that some conversions may call, in the order first met."""
    names: dict[str, None] = {}
    for item in conversions:
        names.update(dict.fromkeys(OPERATORS[item.action]))
        if any(output.kind is TensorKind.NEGATIVE_ZEROS for output in item.outputs):
            names["negative_zeros"] = None
    return tuple(names)


def threads_of(jobs: int | None, table: OperatorTable, conversions: Iterable[Conversion]) -> int:
    """Threads asked for, or as many as there are processors for, at most MAX_DEFAULT_JOBS.

    With a reference among what is called REFERENCE_JOBS at most: it holds hundreds of megabytes per slab, of
    the host's memory or of a device's, which the threads share.
    """
    if jobs is not None:
        return jobs
    heavy = any(
        table.choices[name].backend == REFERENCE and name not in LIGHT for name in operators_of(conversions)
    )
    return min(REFERENCE_JOBS, default_threads()) if heavy else default_threads()


def operators_there(device: str, host: OperatorTable, names: Iterable[str]) -> OperatorTable:
    """A table whose named operators are references run on a torch device, for tensors of the CPU."""
    choices = dict(host.choices)
    for name in names:
        choices[name] = replace(
            choices[name],
            backend=REFERENCE,
            provider=f"{REFERENCE} on {device}",
            call=_sent(CATALOG[name], device),
            refused=(),
        )
    return OperatorTable(choices, host.target)


def _sent(declared: Operator[..., Any], device: str) -> Callable[..., Any]:
    signature = inspect.signature(declared.reference)

    def call(*args: object, **keywords: object) -> object:
        bound = signature.bind(*args, **keywords)
        given = dict(bound.arguments)
        try:
            for name, value in given.items():
                if isinstance(value, Tensor):
                    bound.arguments[name] = (
                        torch.empty_like(value, device=device)
                        if name in declared.mutates
                        else value.to(device)
                    )
            result = declared.reference(*bound.args, **bound.kwargs)
            for name in declared.mutates:
                given[name].copy_(bound.arguments[name])
            return result.cpu() if isinstance(result, Tensor) else result
        except RuntimeError as error:
            # torch's own, for what a device lacks; what is wrong with the weights has errors of this project
            raise DeviceError(
                f"{device} cannot run {declared.name}: {_first_line(error)}. Use fewer --jobs if its memory "
                "ran out, else --device cpu, which writes the same bytes."
            ) from error

    return call


def _require_same_bits(
    declared: Operator[..., Any], there: OperatorTable, host: OperatorTable, *, device: str
) -> None:
    for recipe in transcode.recipes()[declared.name]:
        if recipe.slow:
            continue
        differing = _differing(declared, recipe, there[declared], host[declared])
        if differing is not None:
            raise DeviceError(
                f"{device} does not give the CPU's bits: {differing} of {declared.name} differs for the "
                f"inputs {recipe.name!r}. A pack must not depend on where it was made: use --device cpu."
            )


def _differing(
    declared: Operator[..., Any], recipe: Recipe, mine: Callable[..., Any], other: Callable[..., Any]
) -> str | None:
    """What two implementations make differently of the same inputs; None where all bits are the same."""
    found = []
    for call in (mine, other):
        draw = Draw(recipe.name, dtype=recipe.dtypes[0], device=torch.device("cpu"), poisoned=False)
        arguments = dict(recipe.build(draw).arguments)
        result = call(**arguments)
        outputs = {name: arguments[name] for name in declared.mutates}
        found.append(outputs | ({} if result is None else {"the result": result}))
    return next((name for name, value in found[0].items() if not _same(value, found[1][name])), None)


def _same(mine: Tensor, other: Tensor) -> bool:
    return torch.equal(mine.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _first_line(error: RuntimeError) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:SHOWN_CHARACTERS].rstrip(". ")

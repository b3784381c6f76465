"""Every operator by every provider of a device, against its reference, with the shipped cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby

import torch

from ascend_v4.device.base import Device
from ascend_v4.device.target import Target
from ascend_v4.errors import AscendV4Error, ConfigError
from ascend_v4.operators.contract import CATALOG
from ascend_v4.operators.select import load_backend
from ascend_v4.operators.testing.cases import Case, Run, all_cases
from ascend_v4.operators.testing.close import tensors_in
from ascend_v4.operators.testing.draw import Draw, Layout
from ascend_v4.operators.testing.measure import share_of_allowed
from ascend_v4.operators.testing.released import at_released_widths
from ascend_v4.smoke.report import ANY_FAILURE, Outcome, Recorder, SkippedError, told

REFERENCE = "reference"
PACKAGE_OF = {"vllm-ascend": "vllm_ascend", "cann-recipes": "custom_ops"}
"""Providers that --without can leave out, and by which name."""
LARGEST = "largest"
COPIES = 3
"""Tensors in memory for each of a case's inputs: two runs and a copy that shows what was written."""


def check_operators(
    recorder: Recorder, target: Target, device: Device, *, names: tuple[str, ...], largest: bool
) -> None:
    """A row per operator and provider; `names` are some, empty means all. `largest` also runs the released
    models' sizes, which take long. Raises ConfigError for a name that no operator has.
    """
    load_backend(target.backend)
    unknown = [name for name in names if name not in CATALOG]
    if unknown:
        raise ConfigError(f"no operator is called {unknown[0]!r}; ascend-v4 ops lists them.")
    cases = [case for case in _cases(target, names) if largest or not case.slow or _is_far(case)]
    for (operator, provider), group in groupby(cases, key=_who):
        several = list(group)
        recorder.check(
            "operators",
            f"{operator} by {provider}",
            partial(_run, several, device),
            do=partial(advice, operator, provider, target),
        )


def advice(operator: str, provider: str, target: Target, error: BaseException) -> str:
    """The one thing to try where an operator failed."""
    command = f"ascend-v4 smoke --only operators --operator {operator} --device {target.device}"
    if target.device == "sim" and target.chip is not None:
        command += f" --chip {target.chip.value}"
    if "out of memory" in str(error).lower():
        return "Free the device's memory (npu-smi info or nvidia-smi shows who holds it) and run again."
    if provider in PACKAGE_OF:
        command += f" --without {PACKAGE_OF[provider]}"
        return f"Leave the package out and see what runs in its place: {command}"
    if provider == "native":
        return "Leave the compiled kernels out: set ASCEND_V4_CPU_KERNELS=0 and run again."
    if target.device == "npu":
        return (
            "Compare the CANN and torch_npu of `ascend-v4 devices` with docs/operators.md, and update them."
        )
    return f"Report it with the output of {command} --json: nothing else computes this here."


def _cases(target: Target, names: tuple[str, ...]) -> Iterator[Case]:
    """In the kit's order, an operator's providers one after the other, each with its cases together."""
    for case in all_cases(target, operators=names or None):
        yield case
        if target.chip is not None and not target.waived:
            yield from at_released_widths(case)


def _who(case: Case) -> tuple[str, str]:
    chosen = case.implementation
    return case.operator.name, REFERENCE if chosen is None else chosen.provider


def _is_far(case: Case) -> bool:
    return "far" in case.recipe.name.split("-")


def _run(cases: Iterable[Case], device: Device) -> Outcome:
    worst, num_run = 0.0, 0
    failures: list[str] = []
    left_out: Counter[str] = Counter()
    for case in cases:
        reason = case.unusable or case.left_out or _no_room(case, device)
        if reason is not None:
            left_out[reason] += 1
            continue
        num_run += 1
        try:
            worst = max(worst, _compare(case, device))
        except ANY_FAILURE as error:
            failures.append(f"{case}: {told(error)}")
            if not isinstance(error, (AssertionError, AscendV4Error)):
                break
    if not num_run:
        reasons = "; ".join(reason for reason, _ in left_out.most_common(2))
        raise SkippedError(f"every case is outside of what it takes: {reasons}")
    compared = f"{num_run} cases with the reference"
    if left_out:
        compared += f", {left_out.total()} left out ({left_out.most_common(1)[0][0]})"
    if failures:
        why = f"{len(failures)} of {num_run} cases, first {failures[0]}"
        return Outcome(compared=compared, why=why)
    return Outcome(compared=compared, measure="share of what is allowed", difference=worst, bound=1.0)


def _compare(case: Case, device: Device) -> float:
    got = case.run_implementation()
    device.synchronize()
    want: Run = case.run_reference_on_cpu()
    case.require_agreement(got, want)
    got.require_inputs_untouched()
    return share_of_allowed(case, got, want)


def _no_room(case: Case, device: Device) -> str | None:
    """Caches that are far apart exist only where they are written, but for a device's own memory."""
    if not case.slow or (_is_far(case) and case.device.type == "cpu"):
        return None
    draw = Draw(str(case), dtype=case.dtype, device=torch.device("cpu"), layout=Layout.PACKED, poisoned=False)
    inputs = case.recipe.build(draw)
    wanted = COPIES * sum(each.nbytes for _, each in tensors_in(inputs.arguments, path=""))
    free = device.memory().free_bytes
    return None if wanted <= free else f"it takes {wanted >> 20} MiB and {free >> 20} are free"

"""The process that holds the real torch_npu: it imports the wheel, compares its registry with our schemas,
and sends a whole model of released widths through every adapter on meta tensors.

    python -m tools.npu_contract.process REPORT.json [--only RUN ...] [--rename OPERATOR:ARGUMENT=NEW]

The folder with the wheel joins the search path after torch was imported: torch imports every backend that it
finds while it is imported itself.

Meta kernels prove names, ranks and result shapes only; values and layouts are the simulator's business.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ascend_v4.checkpoint.pack import PackScheme
from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Target
from ascend_v4.errors import AscendV4Error
from ascend_v4.model.sizes import model_sizes
from ascend_v4.operators.npu.schemas import schema_strings
from ascend_v4.operators.status import operator_rows
from tools.npu_contract import environment
from tools.npu_contract.drive import drive
from tools.npu_contract.record import Recorder, Spies
from tools.npu_contract.source import short_config
from tools.npu_contract.stand_ins import Everything, StandIns, compare_schemas
from tools.npu_contract.stub import build_stub, plan_stub, preload

PROVES = (
    "Meta kernels prove that names, ranks, dtypes and result shapes are accepted. They look at no value, and "
    "those of grouped products not at their weights: layouts and numbers are proved by the simulator."
)
PACKS = {
    Chip.A2: (PackScheme.W8A8, PackScheme.W4A8),
    Chip.A3: (PackScheme.W8A8, PackScheme.W4A8),
    Chip.A950: (PackScheme.RELEASE, PackScheme.MX),
}
MODELS = ("flash", "pro")
BEST = "best"
"""In place of a provider: whatever `select` chooses."""
PROVIDERS = ("vllm-ascend", "cann-recipes", "torch_npu", "aten")
REFUSALS = (AscendV4Error, RuntimeError, TypeError, ValueError, LookupError, AssertionError)
"""What a schema, a Meta kernel or an adapter raises where it does not accept a call."""


@dataclass(frozen=True, slots=True)
class Run:
    """One model on one chip, its operators from one provider where that has them."""

    model: str
    chip: Chip
    scheme: PackScheme
    provider: str

    @property
    def name(self) -> str:
        """`flash-a3-w8a8-vllm-ascend`."""
        return f"{self.model}-{self.chip.value}-{self.scheme.value}-{self.provider}"


def all_runs() -> Iterator[Run]:
    """Every model, chip and pack with the best providers, and with every provider in turn."""
    for chip, schemes in PACKS.items():
        for scheme, model, provider in itertools.product(schemes, MODELS, (BEST, *PROVIDERS)):
            yield Run(model, chip, scheme, provider)


def run_one(run: Run, spies: Spies) -> dict[str, Any]:
    """One run's part of the report; `error` is None where every call was accepted."""
    config = short_config(run.model)
    target = Target(device="npu", chip=run.chip, packages=Everything())
    rows = operator_rows(target, model_sizes(config))
    usable = [(row.operator, each.provider) for row in rows for each in row.candidates if each.reason is None]
    named = {operator: provider for operator, provider in usable if provider == run.provider}
    recorder = spies.recorder = Recorder()
    started = time.perf_counter()
    error = None
    try:
        drive(config, run.scheme, target, named=named, recorder=recorder)
    except REFUSALS as trouble:
        error = f"{type(trouble).__name__}: {trouble} ({_place(trouble)})"
    return {
        "name": run.name,
        "chip": run.chip.value,
        "error": error,
        "seconds": round(time.perf_counter() - started, 1),
        "usable": usable,
        "reached": sorted((caller.operator, caller.provider) for caller in recorder.reached),
        "calls": [
            {
                **asdict(caller),
                "call": name,
                "positional": spelling.num_positional,
                "keywords": spelling.keywords,
                "count": count,
            }
            for (caller, name, spelling), count in sorted(recorder.calls.items())
        ],
    }


def _place(trouble: BaseException) -> str:
    """The innermost line of the adapters, or of the model, that an error came through."""
    frames = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(trouble.__traceback__)]
    adapters = [place for place in frames if "/operators/npu/" in place]
    ours = [place for place in frames if place.startswith(str(environment.ROOT))]
    return (adapters or ours or frames)[-1].removeprefix(f"{environment.ROOT}/")


def bring_up() -> Any:  # noqa: ANN401 -- a module
    """Imports torch_npu over stub libraries. Raises StubError, ImportError, OSError."""
    package = environment.PACKAGE / "torch_npu"
    extensions = [path.name for path in package.glob("_C*.so")]
    plan = plan_stub(package, environment.torch_libraries(), [*extensions, "libtorch_npu.so"])
    preload(build_stub(plan, environment.STUB))
    sys.path.append(str(environment.PACKAGE))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("torch_npu")


def main() -> None:
    """Writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--only", nargs="*", help="names of runs; all of them unless given")
    parser.add_argument("--rename", metavar="OPERATOR:ARGUMENT=NEW")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    torch_npu = bring_up()
    import_seconds = round(time.perf_counter() - started, 1)
    stand_ins = StandIns()
    stand_ins.put()
    spies = Spies()
    spies.put(options.rename)
    runs = []
    for run in all_runs():
        if options.only is None or run.name in options.only:
            stand_ins.be(run.chip)
            runs.append(run_one(run, spies))
    report = {
        "torch_npu": torch_npu.__version__,
        "import_seconds": import_seconds,
        "proves": PROVES,
        "num_operators": sum(name.startswith("npu::") for name in torch._C._dispatch_get_all_op_names()),
        "schema_differences": compare_schemas(schema_strings("npu")),
        "our_meta": sorted(stand_ins.names),
        "runs": runs,
    }
    options.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

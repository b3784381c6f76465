"""Shared fixtures: seeds, poisoned memory, devices, golden data, the command line in process."""

from __future__ import annotations

import hashlib
import importlib.util
import random
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
POISONED = (ROOT / "tests" / "operators", ROOT / "tests" / "model")
DEVICES = ("npu", "cuda")
REQUIRABLE = (*DEVICES, "contract")

settings.register_profile("house", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("house")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ascend-v4")
    group.addoption("--seed", type=int, default=0, help="base seed; each test adds its own name to it")
    group.addoption(
        "--require",
        action="append",
        choices=REQUIRABLE,
        default=[],
        help="fail tests of this device, or against this wheel, instead of skipping them; CI uses it",
    )


def seed_of(nodeid: str, *, base: int) -> int:
    """32-bit seed of one test: stable across runs, machines and the order of tests."""
    return int.from_bytes(hashlib.sha256(f"{base}:{nodeid}".encode()).digest()[:4], "little")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """The test's own seed; random, numpy and torch are already seeded with it."""
    value = seed_of(request.node.nodeid, base=request.config.getoption("--seed"))
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Print the seed of a failing test; turn a required device's skips into failures."""
    report = yield
    required = [name for name in item.config.getoption("--require") if item.get_closest_marker(name)]
    if report.skipped and required and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"--require {required[0]}: this test may not skip ({skip_reason(report)})"
    if report.failed:
        base = item.config.getoption("--seed")
        report.sections.append(("seed", f"--seed {base} gives {seed_of(item.nodeid, base=base)} here"))
    return report


def skip_reason(report: pytest.TestReport) -> str:
    """What the skipped test said."""
    return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)


def num_devices(kind: str) -> int:
    """Devices of one kind that torch sees in this process."""
    if kind == "npu" and importlib.util.find_spec("torch_npu") is None:
        return 0
    if kind == "npu":
        importlib.import_module("torch_npu")
    backend = getattr(torch, kind)
    return backend.device_count() if backend.is_available() else 0


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests whose device is not here."""
    for kind in DEVICES:
        if item.get_closest_marker(kind) and num_devices(kind) == 0:
            pytest.skip(f"no {kind} device on this machine")
    marker = item.get_closest_marker("multicard")
    if marker is not None:
        most = max(num_devices(kind) for kind in DEVICES)
        if most < marker.args[0]:
            pytest.skip(f"needs {marker.args[0]} devices of one kind, found {most}")


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill uninitialised memory with values that no correct result survives."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return tensor
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
        return tensor.fill_(float("nan"))
    if tensor.dtype.is_floating_point:
        # 0x7F is NaN in every 8-bit format but e8m0, where it is 0xFF; in packed FP4 there is none.
        code = 0xFF if tensor.dtype == torch.float8_e8m0fnu else 0x7F
        tensor.view(torch.uint8).fill_(code)
        return tensor
    if tensor.dtype.is_complex:
        return tensor.fill_(complex("nan"))
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    limits = torch.iinfo(tensor.dtype)
    return tensor.fill_(limits.min // 2 if limits.min < 0 else limits.max - 1)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and its kin return NaN and absurd integers in operator and model tests."""
    if not any(folder in request.path.parents for folder in POISONED):
        return

    def poisoning(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: poison(make(*args, **kwargs))

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoning(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoning(getattr(torch.Tensor, name)))


@pytest.fixture(scope="session")
def golden_dir() -> Callable[[str], Path]:
    """Folder of a golden set by name: the repository's copy, else ../shared/golden, else the test skips."""

    def find(name: str) -> Path:
        for folder in (ROOT / "tests" / "golden" / name, ROOT.parent / "shared" / "golden" / name):
            if folder.is_dir():
                return folder
        pytest.skip(f"golden set {name} is neither in tests/golden nor in ../shared/golden")

    return find


@pytest.fixture
def run_cli() -> Callable[..., Result]:
    """Run `ascend-v4 ARGS...` in process; stdout, stderr and exit_code are on the result.

    An exception that is not of the AscendV4Error tree is raised here, since it would be our bug.
    """

    def run(*args: str | Path, stdin: str | None = None) -> Result:
        from ascend_v4.cli.main import cli

        result = CliRunner().invoke(cli, [str(arg) for arg in args], input=stdin, prog_name="ascend-v4")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run

"""Finding Ascend software without importing it, and saying in one sentence what is missing."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ascend_v4.device import software
from ascend_v4.device.software import AscendSoftware, explain_import_error, find_software, npu_problem

ROOT = Path(__file__).resolve().parents[2]
FINE = AscendSoftware(
    num_device_nodes=8,
    driver_version="25.5.1",
    cann_home=None,
    cann_version="9.1.0",
    finds_runtime=True,
    torch_npu_version="2.13.0",
    is_autoloaded=True,
)


def but(**changes: object) -> AscendSoftware:
    fields = {name: getattr(FINE, name) for name in FINE.__slots__}
    return AscendSoftware(**{**fields, **changes})


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine whose Ascend software is what a test puts below tmp_path."""
    for name in ("ASCEND_HOME_PATH", "LD_LIBRARY_PATH", "TORCH_DEVICE_BACKEND_AUTOLOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(software, "INSTALL_ROOT", tmp_path)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    return tmp_path


@pytest.fixture
def broken_torch_npu(tmp_path):
    """A folder with an installed torch_npu whose CANN is missing."""
    package, facts = tmp_path / "torch_npu", tmp_path / "torch_npu-2.13.0.dist-info"
    package.mkdir()
    facts.mkdir()
    (package / "__init__.py").write_text(
        'raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")\n'
    )
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\nVersion: 2.13.0\n")
    (facts / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return tmp_path


def run_verb(site: Path, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", **variables}
    return subprocess.run(
        [sys.executable, "-m", "ascend_v4", *args],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_complete_machine_has_no_problem():
    assert npu_problem(FINE) is None
    assert not FINE.breaks_torch


@pytest.mark.parametrize(
    ("found", "what", "do"),
    [
        (but(torch_npu_version=None, num_device_nodes=0), "neither an Ascend device nor torch_npu", "sim"),
        (but(torch_npu_version=None), "8 Ascend devices are here and torch_npu is not", "pip install"),
        (but(finds_runtime=False), "so that `import torch` fails", "TORCH_DEVICE_BACKEND_AUTOLOAD=0"),
        (but(finds_runtime=False, is_autoloaded=False), "libascendcl.so is not found", "set_env.sh"),
        (but(num_device_nodes=0), "no device node", "driver"),
        (but(finds_runtime=False, cann_home=Path("/opt/cann")), "libascendcl", "Source /opt/cann/set_env.sh"),
    ],
)
def test_each_missing_part_is_one_thing_to_do(found, what, do):
    problem = npu_problem(found)
    assert problem is not None
    assert what in problem.what
    assert do in problem.do
    assert problem.sentence() == f"{problem.what}. {problem.do}."


def test_versions_are_read_from_the_vendors_files(machine, monkeypatch):
    home = machine / "cann-9"
    toolkit = home / f"{platform.machine()}-linux"
    toolkit.mkdir(parents=True)
    (toolkit / "ascend_toolkit_install.info").write_text("package_name=toolkit\nversion=9.1.0\n")
    (machine / "driver").mkdir()
    (machine / "driver" / "version.info").write_text("Version=25.5.1\nascendhal_version=7\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(home))
    found = find_software()
    assert (found.driver_version, found.cann_version, found.cann_home) == ("25.5.1", "9.1.0", home)
    assert found.torch_npu_version is None


def test_the_runtime_counts_as_found_only_where_the_loader_looks(machine, monkeypatch):
    monkeypatch.setattr(software, "is_installed", lambda module: True)
    library = machine / "lib64" / "libascendcl.so"
    library.parent.mkdir()
    library.touch()
    monkeypatch.setenv("ASCEND_HOME_PATH", str(machine))
    assert find_software().breaks_torch
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library.parent))
    assert not find_software().breaks_torch


def test_an_error_about_something_else_is_not_explained():
    assert explain_import_error(RuntimeError("the shapes do not fit")) is None
    assert explain_import_error(ImportError("libfoo.so: cannot open shared object file")) is None


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libascend_hal.so: cannot open shared object file: No such file or directory"),
        RuntimeError("Failed to load the backend extension: torch_npu. You can disable it."),
    ],
)
def test_an_error_of_torch_npu_says_what_to_do(error, machine):
    problem = explain_import_error(error)
    assert problem is not None
    assert "torch_npu" in problem.what
    assert "set_env.sh" in problem.do


@pytest.mark.parametrize(
    "args",
    [
        ("score", "nowhere", "--input", "a", "--output", "b"),
        ("repack", "nowhere", "unwritten", "--to", "w8a8"),
        ("ops", "--device", "sim", "--chip", "a3"),
    ],
    ids=lambda args: args[0],
)
def test_a_torch_npu_that_breaks_torch_is_one_sentence_and_status_2(args, broken_torch_npu):
    done = run_verb(broken_torch_npu, *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "error: torch_npu 2.13.0 is installed and CANN's libascendcl.so is not found"
    )
    assert done.stderr.count("\n") == 1


def test_devices_reports_a_torch_npu_that_breaks_torch(broken_torch_npu):
    done = run_verb(broken_torch_npu, "devices")
    assert (done.returncode, done.stderr) == (0, "")
    assert "so that `import torch` fails" in done.stdout
    assert "torch_npu 2.13.0; not found: driver, CANN" in done.stdout


def test_without_autoload_the_other_devices_work(broken_torch_npu):
    done = run_verb(broken_torch_npu, "ops", "--device", "npu", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --device npu: torch_npu 2.13.0 is installed and CANN's")

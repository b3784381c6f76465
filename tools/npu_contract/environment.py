"""Where the real torch_npu lies for the contract tests, and how it gets there.

    python -m tools.npu_contract.environment

It is unpacked into a folder of its own that no other process looks into: an installed torch_npu would be
imported by every `import torch`. torch is the environment's own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from tools.npu_contract.stub import COMPILERS

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".npu-contract"
VERSION = "2.13.0"
"""The torch_npu that the adapters were written against; operators/npu/schemas/npu.txt is its."""
PACKAGE = HOME / VERSION
STUB = HOME / f"stub-{VERSION}"
WHEELS = HOME / "wheels"
OTHER_VERSIONS = ("2.10.0.post4", "2.12.0")
"""Releases whose schemas are compared. vLLM-Ascend pins the first."""
ONE_BUILD = (
    "--only-binary=:all:",
    "--platform=manylinux_2_28_x86_64",
    "--implementation=cp",
    "--python-version=3.11",
)
HOW = "Run make contract, which fetches it with pip."


class FetchError(Exception):
    """Why the wheel cannot be had, in one sentence."""


def problem() -> str | None:
    """Why the real torch_npu cannot be imported on this machine, or None."""
    if sys.platform != "linux":
        return f"torch_npu is built for Linux, this is {sys.platform}."
    if not (PACKAGE / "torch_npu").is_dir():
        return f"torch_npu {VERSION} is not in {PACKAGE.relative_to(ROOT)}. {HOW}"
    if not STUB.is_dir() and not any(map(shutil.which, COMPILERS)):
        return (
            f"no C compiler is here ({', '.join(COMPILERS)}) to stand in for CANN's libraries. Install gcc."
        )
    torch_version = importlib.metadata.version("torch").partition("+")[0]
    if torch_version != VERSION:
        return f"torch_npu {VERSION} needs torch {VERSION}, and this environment has {torch_version}."
    return None


def fetch() -> None:
    """Unpacks the wheel, unless it is there. Raises FetchError."""
    if (PACKAGE / "torch_npu").is_dir():
        return
    partial = HOME / f"{VERSION}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _pip("install", "--no-deps", "--no-compile", "--target", str(partial), f"torch_npu=={VERSION}")
        shutil.rmtree(PACKAGE, ignore_errors=True)
        partial.rename(PACKAGE)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fetch_wheel(version: str) -> Path:
    """The wheel of another release, downloaded once and not unpacked. It is one platform's, whatever this
    machine is: schemas are the same on all. Raises FetchError.
    """
    found = cached_wheel(version)
    if found is None:
        _pip("download", "--no-deps", "--dest", str(WHEELS), *ONE_BUILD, f"torch_npu=={version}")
        found = cached_wheel(version)
    if found is None:
        raise FetchError(f"pip left no wheel of torch_npu {version} in {WHEELS.relative_to(ROOT)}.")
    return found


def cached_wheel(version: str) -> Path | None:
    """A wheel that was downloaded before."""
    return next(iter(sorted(WHEELS.glob(f"torch_npu-{version}-*.whl"))), None)


def torch_libraries() -> Path:
    """The folder of torch's own shared libraries, without importing torch."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None, "the environment has no torch"
    assert spec.origin is not None, spec
    return Path(spec.origin).parent / "lib"


def _pip(command: str, *arguments: str) -> None:
    whole = [sys.executable, "-m", "pip", command, "--disable-pip-version-check", "--quiet", *arguments]
    if subprocess.run(whole, cwd=ROOT, check=False).returncode:
        raise FetchError(
            f"pip {command} {arguments[-1]} failed for Python {platform.python_version()} on "
            f"{platform.machine()}; its own message is above. Check the network, or point pip at an index "
            "you reach."
        )


def main() -> int:
    """Fetches the wheels; 1 with a sentence where one cannot be had."""
    try:
        fetch()
        for version in OTHER_VERSIONS:
            fetch_wheel(version)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    trouble = problem()
    if trouble is not None:
        print(f"error: {trouble}", file=sys.stderr)
        return 1
    print(
        f"torch_npu {VERSION} and the schemas of {', '.join(OTHER_VERSIONS)} are in {HOME.relative_to(ROOT)}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

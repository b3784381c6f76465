"""Shared libraries in place of CANN's, so that torch_npu can be imported where there is none.

Each has the name torch_npu is linked against, and together they define every symbol that nothing else here
defines. A function does nothing and returns 0, which is success in CANN's interfaces: no device is counted,
and whatever needs one raises.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ascend_v4.device.elf import exported_names
from tools.npu_contract.elf import wants_of

COMPILERS = ("cc", "gcc", "clang")
DATA_PREFIXES = ("_ZTV", "_ZTI", "_ZTS")
"""Mangled names of tables, which are data; everything else CANN exports is a function."""
DATA_BYTES = 256
LISTING = "stub.json"


class StubError(Exception):
    """Why there can be no stub libraries here, in one sentence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StubPlan:
    """What must be put in place of CANN."""

    libraries: tuple[str, ...]
    symbols: tuple[str, ...]

    def source(self) -> str:
        """C that defines every symbol."""
        return "".join(map(_definition, self.symbols))

    def digest(self) -> str:
        """Changes when other libraries would be made."""
        return hashlib.sha256(json.dumps([self.libraries, self.source()]).encode()).hexdigest()[:16]


def plan_stub(package: Path, torch_libraries: Path, roots: Iterable[str]) -> StubPlan:
    """Reads what a torch_npu needs: from some of its libraries, paths below the package, to all they pull in.

    Whatever is neither in the wheel, nor with torch, nor known to the system's loader, is CANN's.
    Raises OSError, ValueError for libraries that cannot be read.
    """
    ours = {path.name: path for path in package.rglob("*.so") if path.is_file()}
    with_torch = {path.name: path for path in torch_libraries.glob("*.so*") if path.is_file()}
    missing: dict[str, None] = {}
    wanted: set[str] = set()
    defined: set[bytes] = set().union(*map(exported_names, with_torch.values()))
    system = [ctypes.CDLL(None)]
    seen: set[str] = set()
    pending = list(roots)
    while pending:
        name = pending.pop(0)
        if name in seen:
            continue
        seen.add(name)
        if name in ours:
            wants = wants_of(ours[name])
            wanted |= wants.symbols
            defined |= exported_names(ours[name])
            pending += wants.libraries
        elif name not in with_torch:
            loaded = _system_library(name)
            if loaded is None:
                missing[name] = None
            else:
                system.append(loaded)
    symbols = sorted(
        name
        for name in wanted
        if name.encode() not in defined and not any(hasattr(library, name) for library in system)
    )
    return StubPlan(libraries=tuple(missing), symbols=tuple(symbols))


def build_stub(plan: StubPlan, folder: Path) -> list[Path]:
    """Compiles the libraries into a folder of their own, once. Raises StubError without a C compiler.

    The first defines every symbol; the others are empty, because a loader looks into all of them.
    """
    paths = [folder / name for name in plan.libraries]
    if not paths:
        return []
    listing = folder / LISTING
    if listing.is_file() and json.loads(listing.read_text(encoding="utf-8")) == plan.digest():
        return paths
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise StubError(f"no C compiler is here ({', '.join(COMPILERS)}). Install one, such as gcc.")
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for index, name in enumerate(plan.libraries):
            source = partial / f"{name}.c"
            source.write_text(plan.source() if index == 0 else "", encoding="ascii")
            command = [compiler, "-shared", "-fPIC", "-fno-builtin", "-w", f"-Wl,-soname,{name}"]
            command += [str(source), "-o", str(partial / name)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise StubError(f"{compiler} cannot make {name}: {done.stderr.strip()[:300]}")
        (partial / LISTING).write_text(json.dumps(plan.digest()), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return paths


def preload(paths: Iterable[Path]) -> None:
    """Loads the libraries into this process; a loader then takes them for those of their names."""
    for path in paths:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _definition(name: str) -> str:
    if name.startswith(DATA_PREFIXES):
        return f"char {name}[{DATA_BYTES}];\n"
    return f"long {name}(void) {{ return 0; }}\n"


def _system_library(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None

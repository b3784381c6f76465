"""What Ascend software this machine has, found without importing any of it. Standard library only.

torch imports every installed backend while it is imported itself, so a torch_npu whose CANN is missing breaks
`import torch`. What is found here says so before that happens, and what to do.
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import platform
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ascend_v4 import env
from ascend_v4.errors import DeviceError

RUNTIME_LIBRARY = "libascendcl.so"
"""CANN's runtime; torch_npu is linked against it."""
INSTALL_ROOT = Path("/usr/local/Ascend")
"""Where the vendor's installers put driver and CANN unless told otherwise."""
MAX_INFO_BYTES = 64 << 10
_VERSION = re.compile(r"^\s*[Vv]ersion\s*[=:]\s*\[?([\w.\-]+)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class AscendSoftware:
    """Driver, CANN and torch_npu as installed. None means that it is not there, or does not say."""

    num_device_nodes: int
    driver_version: str | None
    cann_home: Path | None
    cann_version: str | None
    finds_runtime: bool
    """Whether the loader finds CANN's runtime library."""
    torch_npu_version: str | None
    is_autoloaded: bool
    """Whether `import torch` imports torch_npu."""

    @property
    def has_torch_npu(self) -> bool:
        """Whether torch_npu is installed."""
        return self.torch_npu_version is not None

    @property
    def breaks_torch(self) -> bool:
        """Whether `import torch` itself will fail."""
        return self.has_torch_npu and self.is_autoloaded and not self.finds_runtime


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that keeps a device from being used, and the one thing to do about it."""

    what: str
    do: str

    def sentence(self) -> str:
        """Both, for an error message."""
        return f"{self.what}. {self.do}."


def find_software() -> AscendSoftware:
    """Looks at this machine as it is now."""
    version = version_of("torch_npu") if is_installed("torch_npu") else None
    home = next(iter(env.CANN_HOME.paths()), None)
    driver = INSTALL_ROOT / "driver" / "version.info"
    return AscendSoftware(
        num_device_nodes=sum(node.name[7:].isdecimal() for node in Path("/dev").glob("davinci*")),
        driver_version=_version_in(driver),
        cann_home=home,
        cann_version=None if home is None else _cann_version(home),
        # asking the loader starts processes: only where the answer matters
        finds_runtime=version is not None and _loader_finds(RUNTIME_LIBRARY),
        torch_npu_version=version,
        is_autoloaded=env.BACKEND_AUTOLOAD.read() != "0",
    )


def npu_problem(software: AscendSoftware) -> Problem | None:
    """Why no NPU can be used here, the first thing to mend first; None where nothing speaks against it."""
    if software.breaks_torch:
        return torch_problem(software)
    if not software.has_torch_npu:
        if software.num_device_nodes:
            return Problem(
                f"{software.num_device_nodes} Ascend devices are here and torch_npu is not installed",
                "Install the torch_npu that fits torch and CANN: pip install torch_npu",
            )
        return Problem(
            "this machine has neither an Ascend device nor torch_npu",
            "Use --device sim --chip a2, a3 or 950 to run the Ascend path on a CPU",
        )
    if not software.finds_runtime:
        return Problem(
            f"torch_npu {software.torch_npu_version} is installed and CANN's {RUNTIME_LIBRARY} is not found",
            _how_to_get_cann(software),
        )
    if not software.num_device_nodes:
        return Problem(
            "torch_npu and CANN are installed and there is no device node /dev/davinci*",
            "Install the driver, or give the container its devices: --device /dev/davinci0 and the like",
        )
    return None


def torch_problem(software: AscendSoftware) -> Problem | None:
    """Why `import torch` will fail here because of torch_npu; None where it will not."""
    if not software.breaks_torch:
        return None
    return Problem(
        f"torch_npu {software.torch_npu_version} is installed and CANN's {RUNTIME_LIBRARY} is not found, so "
        "that `import torch` fails",
        f"{_how_to_get_cann(software)}; or set {env.BACKEND_AUTOLOAD.name}=0 to do without the NPU",
    )


def require_torch() -> None:
    """Raises DeviceError, instead of torch's own traceback, where torch_npu would break `import torch`."""
    if "torch" in sys.modules:
        return
    problem = torch_problem(find_software())
    if problem is not None:
        raise DeviceError(problem.sentence())


def explain_import_error(error: BaseException) -> Problem | None:
    """What an exception means that importing torch or torch_npu raised; None when it is about something
    else.
    """
    texts: list[str] = []
    link: BaseException | None = error
    while link is not None and len(texts) < 8:
        texts.append(str(link))
        link = link.__cause__ or link.__context__
    about_backend = next((text for text in texts if "load the backend extension" in text), None)
    library = next((found for text in texts if (found := _missing_library(text))), None)
    if about_backend is None and library is None:
        return None
    software = find_software()
    known = torch_problem(software)
    if known is not None:
        return known
    cause = f"{library} is not found" if library else texts[min(1, len(texts) - 1)].splitlines()[0][:200]
    return Problem(
        f"torch_npu {software.torch_npu_version or '(version unknown)'} cannot be imported: {cause}",
        f"{_how_to_get_cann(software)}; check that torch, torch_npu and CANN fit each other; or set "
        f"{env.BACKEND_AUTOLOAD.name}=0 to do without the NPU",
    )


def _missing_library(text: str) -> str | None:
    found = re.search(r"(lib(?:ascend|hccl|acl|op_?api|ge_|msprof|runtime)[\w.]*\.so[\w.]*)", text)
    return found[1] if found and "cannot open shared object" in text else None


def _how_to_get_cann(software: AscendSoftware) -> str:
    if software.cann_home is not None:
        return f"Source {software.cann_home}/set_env.sh"
    for name in ("cann", "ascend-toolkit"):
        if (INSTALL_ROOT / name / "set_env.sh").is_file():
            return f"Source {INSTALL_ROOT / name / 'set_env.sh'}"
    return "Install CANN and source its set_env.sh"


def is_installed(module: str) -> bool:
    """Whether a module can be found, without importing more of it than its parent packages."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        # a parent that is absent or broken; ValueError for a module that was put there without a file
        return False


def version_of(module: str) -> str:
    """The version of an installed package, as its metadata has it."""
    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _cann_version(home: Path) -> str | None:
    """Of a toolkit as its installer notes it; the place changed with CANN 8.5."""
    folder = home / f"{platform.machine()}-linux"
    note = "ascend_toolkit_install.info"
    places = (folder / note, home / note, home / "version.cfg")
    return next((found for place in places if (found := _version_in(place))), None)


def _version_in(file: Path) -> str | None:
    """The `version=` line of one of the vendor's info files."""
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            found = _VERSION.search(stream.read(MAX_INFO_BYTES))
    except OSError:
        return None
    return found[1] if found else None


def _loader_finds(library: str) -> bool:
    if any((folder / library).is_file() for folder in env.LIBRARY_PATH.paths()):
        return True
    name = library.removeprefix("lib").partition(".")[0]
    return ctypes.util.find_library(name) is not None

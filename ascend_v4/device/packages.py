"""The vendors' operator packages on a machine with NPUs, asked in three steps: module, torch operator, aclnn
symbol.

A torch operator that is registered proves little: several are bindings whose kernels another package brings.
So the libraries with the kernels' entry points are read as well.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from ascend_v4 import env
from ascend_v4.device.elf import exported_names
from ascend_v4.device.software import is_installed

LIBRARIES = "*opapi*.so"
"""File names of the libraries that export aclnn functions: libopapi.so, libopapi_nn.so, libcust_opapi.so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorPackage:
    """A Python package that registers torch operators."""

    module: str
    extension: str
    """The module whose import registers them."""
    vendor_folder: str | None = None
    """Its own aclnn kernels, below the package, where it brings any."""
    install: str
    """What to do to have it."""


NAMESPACES: Mapping[str, OperatorPackage] = MappingProxyType(
    {
        "npu": OperatorPackage(
            module="torch_npu", extension="torch_npu", install="pip install torch_npu in the version of torch"
        ),
        "_C_ascend": OperatorPackage(
            module="vllm_ascend",
            extension="vllm_ascend.vllm_ascend_C",
            vendor_folder="_cann_ops_custom/vendors/custom_transformer",
            install="pip install vllm-ascend in its build for this chip",
        ),
        "custom": OperatorPackage(
            module="custom_ops",
            extension="custom_ops",
            install="build custom_ops of cann-recipes-infer, folder ops/ascendc",
        ),
    }
)
OPS_TRANSFORMER = "ops_transformer"
"""Not a Python module: CANN's package of kernels behind bindings that bring none."""
MASKABLE = (*(package.module for package in NAMESPACES.values()), OPS_TRANSFORMER)
SYMBOLS_PACKAGE = "ops-transformer of CANN, its experimental operators"
"""What brings the kernels that bindings alone lack."""


@dataclass
class InstalledPackages:
    """The `Packages` of a real machine. Imports a package when the first of its operators is asked for."""

    import_module: Callable[[str], object] = importlib.import_module
    """Replaced by tests."""
    masked: frozenset[str] = frozenset()
    """Packages treated as absent, by module name, or `ops_transformer`."""
    _failures: dict[str, str | None] = field(default_factory=dict, repr=False)
    """Namespace -> why its package does not import; None where it did."""

    def without(self, masked: frozenset[str]) -> InstalledPackages:
        """The same machine with packages treated as absent."""
        return InstalledPackages(import_module=self.import_module, masked=masked)

    def announce_kernels(self) -> None:
        """Lets CANN find the kernels that packages carry with them. CANN looks once, when it starts."""
        for package in NAMESPACES.values():
            _announce_kernels(package)

    def missing_module(self, name: str) -> str | None:
        """Whether a Python module can be found; it is not imported."""
        if name in self.masked:
            return f"module {name} is masked out"
        if is_installed(name):
            return None
        return f"module {name} is not installed"

    def missing_operator(self, qualified_name: str) -> str | None:
        """Whether `namespace::name`, or `namespace::name.overload`, is registered with torch."""
        namespace, _, name = qualified_name.partition("::")
        reason = self._import(namespace)
        if reason is not None:
            return reason
        import torch

        name, _, overload = name.partition(".")
        packet = getattr(getattr(torch.ops, namespace), name, None)
        if packet is None or (overload and overload not in packet.overloads()):
            module = NAMESPACES[namespace].module
            return f"{qualified_name} is not in this {module}"
        return None

    def missing_symbol(self, name: str) -> str | None:
        """Whether an op_api library that is loaded or installed exports an aclnn function."""
        if OPS_TRANSFORMER in self.masked:
            return f"{name}: package {OPS_TRANSFORMER} is masked out"
        if any(name.encode() in exported for exported in self._exports.values()):
            return None
        return (
            f"{name} is exported by none of {len(self._exports)} op_api libraries; it comes with "
            f"{SYMBOLS_PACKAGE}"
        )

    def libraries(self) -> list[Path]:
        """The op_api libraries that `missing_symbol` looks into, those loaded first."""
        return list(self._exports)

    @cached_property
    def _exports(self) -> dict[Path, frozenset[bytes]]:
        found: dict[Path, frozenset[bytes]] = {}
        for path in (*_loaded_libraries(), *_installed_libraries()):
            if path not in found:
                try:
                    found[path] = exported_names(path)
                except (OSError, ValueError):
                    # a stale link or a linker script exports nothing that could be called
                    found[path] = frozenset()
        return found

    def _import(self, namespace: str) -> str | None:
        if namespace not in NAMESPACES:
            return f"no known package registers operators in {namespace}"
        if namespace not in self._failures:
            self._failures[namespace] = self._try_import(NAMESPACES[namespace])
        return self._failures[namespace]

    def _try_import(self, package: OperatorPackage) -> str | None:
        reason = self.missing_module(package.module)
        if reason is not None:
            return f"{reason}: {package.install}"
        try:
            self.import_module(package.extension)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            # what a package built for another torch or CANN raises
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            return f"module {package.extension} does not import: {first_line[:200]}"
        return None


def _announce_kernels(package: OperatorPackage) -> None:
    if package.vendor_folder is None or not is_installed(package.module):
        return
    spec = importlib.util.find_spec(package.module)
    for root in spec.submodule_search_locations or () if spec is not None else ():
        folder = Path(root, package.vendor_folder)
        if folder.is_dir():
            env.CUSTOM_OPERATORS.prepend(folder)
            for library in sorted((folder / "op_api" / "lib").glob(LIBRARIES)):
                try:
                    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
                except OSError:
                    # the extension's own search path may still find what this one could not
                    continue


def _loaded_libraries() -> list[Path]:
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    names = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "opapi" in line}
    return sorted(path for path in map(Path, names) if path.match(LIBRARIES))


def _installed_libraries() -> list[Path]:
    folders = [path / "op_api" / "lib" for path in env.CUSTOM_OPERATORS.paths()]
    for operators in env.CANN_OPERATORS.paths():
        folders += sorted(operators.glob("vendors/*/op_api/lib"))
    folders += [home / "lib64" for home in env.CANN_HOME.paths()]
    return [library for folder in folders for library in sorted(folder.glob(LIBRARIES))]

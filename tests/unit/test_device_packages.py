"""Which vendor operators a machine has: module, torch operator, aclnn symbol."""

from __future__ import annotations

import ctypes
import struct
import sys

import pytest
import torch

from ascend_v4 import env
from ascend_v4.device import packages as packages_module
from ascend_v4.device.elf import exported_names
from ascend_v4.device.packages import MASKABLE, InstalledPackages, OperatorPackage


def library_of(*names: str) -> bytes:
    """The smallest ELF file that exports some names: a header, a symbol table, its strings."""
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in names)
    symbols = struct.pack("<IBBHQQ", 0, 0, 0, 0, 0, 0)
    for name in names:
        # section 0 marks a name that the library only needs
        section = 0 if name.startswith("needed") else 1
        symbols += struct.pack("<IBBHQQ", strings.index(name.encode()), 0x12, 0, section, 0, 0)
    sections = 64 + len(symbols) + len(strings)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, sections, 0, 64, 0, 0, 64, 3, 0)
    table = b"".join(
        struct.pack("<IIQQQQIIQQ", 0, kind, 0, 0, start, size, link, 0, 0, 0)
        for kind, start, size, link in (
            (0, 0, 0, 0),
            (11, 64, len(symbols), 2),
            (3, 64 + len(symbols), len(strings), 0),
        )
    )
    return header + symbols + strings + table


@pytest.fixture
def bare(monkeypatch):
    """A machine that announces no operator package."""
    for variable in (env.CUSTOM_OPERATORS, env.CANN_OPERATORS, env.CANN_HOME):
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setattr(packages_module, "_loaded_libraries", list)


def test_exported_names_are_those_that_are_defined(tmp_path):
    library = tmp_path / "libcust_opapi.so"
    library.write_bytes(library_of("aclnnCompressor", "needed_elsewhere", "aclnnHcPre"))
    assert exported_names(library) == {b"aclnnCompressor", b"aclnnHcPre"}


def test_names_of_a_real_library_are_found():
    loaded = ctypes.CDLL(None)
    path = next(path for path in maps_of("libc.so") if path.exists())
    assert {b"malloc", b"free"} <= exported_names(path)
    assert loaded.malloc


def maps_of(part):
    from pathlib import Path

    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({Path(line.split(maxsplit=5)[-1]) for line in lines if part in line})


@pytest.mark.parametrize("content", [b"", b"INPUT(libm.so)", library_of("aclnnA")[:-100], b"\x7fELF\x01\x01"])
def test_a_file_that_is_no_library_is_refused(tmp_path, content):
    file = tmp_path / "libopapi.so"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"libopapi\.so"):
        exported_names(file)


@pytest.mark.parametrize("place", ["custom", "vendor", "cann"])
def test_a_symbol_is_found_wherever_operator_packages_are_installed(place, bare, tmp_path, monkeypatch):
    folder = {
        "custom": tmp_path / "mine" / "op_api" / "lib",
        "vendor": tmp_path / "opp" / "vendors" / "customize" / "op_api" / "lib",
        "cann": tmp_path / "cann" / "lib64",
    }[place]
    folder.mkdir(parents=True)
    (folder / "libcust_opapi.so").write_bytes(library_of("aclnnCompressor"))
    (folder / "libopapi_broken.so").write_bytes(b"not a library")
    monkeypatch.setenv("ASCEND_CUSTOM_OPP_PATH", f"{tmp_path / 'absent'}:{tmp_path / 'mine'}")
    monkeypatch.setenv("ASCEND_OPP_PATH", str(tmp_path / "opp"))
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "cann"))
    found = InstalledPackages()
    assert found.missing_symbol("aclnnCompressor") is None
    assert found.missing_symbol("aclnnCompress") == (
        "aclnnCompress is exported by none of 2 op_api libraries; it comes with ops-transformer of CANN, its "
        "experimental operators"
    )
    masked = found.without(frozenset({"ops_transformer"}))
    assert masked.missing_symbol("aclnnCompressor") == (
        "aclnnCompressor: package ops_transformer is masked out"
    )


def test_a_module_is_found_without_being_imported(bare):
    found = InstalledPackages()
    assert found.missing_module("tokenizers.tools") is None
    assert "tokenizers.tools" not in sys.modules
    assert found.missing_module("vllm_ascend") == "module vllm_ascend is not installed"
    assert found.missing_module("vllm_ascend.inner") == "module vllm_ascend.inner is not installed"
    masked = found.without(frozenset({"vllm_ascend"}))
    assert masked.missing_module("vllm_ascend") == "module vllm_ascend is masked out"


@pytest.fixture
def aten_as_package(bare, monkeypatch):
    """torch's own operators, as if a package registered them."""
    package = OperatorPackage(module="colorsys", extension="colorsys", install="install it")
    monkeypatch.setattr(packages_module, "NAMESPACES", {"aten": package})


def test_an_operator_is_asked_of_torch_once_its_package_is_imported(aten_as_package):
    imported: list[str] = []
    found = InstalledPackages(import_module=imported.append)
    assert found.missing_operator("aten::add") is None
    assert found.missing_operator("aten::add.Scalar") is None
    assert found.missing_operator("aten::add.Nonsense") == "aten::add.Nonsense is not in this colorsys"
    assert found.missing_operator("aten::npu_hc_pre") == "aten::npu_hc_pre is not in this colorsys"
    assert found.missing_operator("other::add") == "no known package registers operators in other"
    assert imported == ["colorsys"]
    assert torch.ops.aten.add is not None


def test_a_package_that_does_not_import_is_a_reason_not_a_crash(aten_as_package):
    def fail(name: str) -> object:
        raise ImportError("undefined symbol: c10_foo\nmore lines")

    found = InstalledPackages(import_module=fail)
    reason = "module colorsys does not import: undefined symbol: c10_foo"
    assert found.missing_operator("aten::add") == reason
    assert found.missing_operator("aten::mul") == reason


def test_kernels_that_a_package_carries_are_announced_to_cann(bare, tmp_path, monkeypatch):
    folder = tmp_path / "carrier" / "vendors" / "custom"
    folder.mkdir(parents=True)
    (tmp_path / "carrier" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    package = OperatorPackage(
        module="carrier", extension="carrier.ext", vendor_folder="vendors/custom", install="install it"
    )
    monkeypatch.setattr(packages_module, "NAMESPACES", {"aten": package})
    monkeypatch.setenv("ASCEND_CUSTOM_OPP_PATH", "/elsewhere")
    InstalledPackages().announce_kernels()
    InstalledPackages().announce_kernels()
    assert env.CUSTOM_OPERATORS.read() == f"{folder}:/elsewhere"


def test_what_can_be_masked_is_what_brings_operators():
    assert MASKABLE == ("torch_npu", "vllm_ascend", "custom_ops", "ops_transformer")

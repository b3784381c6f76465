"""The compiled CPU kernels: declared as their sources are, left out on request, missing without harm."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ascend_v4.errors import NoImplementationError
from ascend_v4.operators import native
from ascend_v4.operators.contract import CATALOG
from ascend_v4.operators.contracts.hyper_connections import hyper_connection_pre
from ascend_v4.operators.select import load_backend, select

SOURCES = sorted((Path(native.__file__).parent / "cpu").glob("*.cpp"))
C_TYPES = {"int64_t": ctypes.c_int64, "float": ctypes.c_float}

load_backend("cpu")
NATIVE = [
    (declared.name, implementation)
    for declared in CATALOG.values()
    for implementation in declared.implementations
    if implementation.backend == "cpu" and implementation.provider == "native"
]
NAMES = [name for name, _ in NATIVE]


def declared_in_sources() -> dict[str, tuple[type, ...]]:
    """Parameters of every exported function, parsed from the C sources."""
    found: dict[str, tuple[type, ...]] = {}
    for source in SOURCES:
        exported = source.read_text(encoding="utf-8").split('extern "C" {', 1)[1]
        for name, parameters in re.findall(r"\bvoid (ascend_v4_\w+)\(([^)]*)\)\s*{", exported):
            assert name not in found, f"{name} is defined twice"
            kinds = [
                parameter.rsplit(maxsplit=1)[0].replace("const ", "") for parameter in parameters.split(",")
            ]
            found[name] = tuple(ctypes.c_void_p if "*" in kind else C_TYPES[kind.strip()] for kind in kinds)
    return found


def test_signatures_are_those_of_the_sources():
    assert declared_in_sources() == native.SIGNATURES


def test_every_kernel_is_in_the_library():
    if native.library_path() is None:
        pytest.skip(native.MISSING)
    library = native.cpu_kernels()
    for name, parameters in native.SIGNATURES.items():
        assert getattr(library, name).argtypes == parameters
        assert getattr(library, name).restype is None


def test_native_implementations_say_what_they_need():
    assert NAMES
    for _, implementation in NATIVE:
        assert implementation.needs is native.NEEDS
        assert implementation.unusable is native.cpu_unusable


@pytest.mark.parametrize("name", NAMES)
def test_the_switch_leaves_native_kernels_out_and_says_so(name, monkeypatch):
    monkeypatch.setenv("ASCEND_V4_CPU_KERNELS", "0")
    choice = select("cpu").choices[name]
    assert choice.provider != "native"
    assert "native: ASCEND_V4_CPU_KERNELS is 0" in choice.refused


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_extension_is_refused_with_the_way_to_get_it(name, monkeypatch):
    monkeypatch.delenv("ASCEND_V4_CPU_KERNELS", raising=False)
    monkeypatch.setattr(native, "library_path", lambda: None)
    choice = select("cpu").choices[name]
    assert choice.provider != "native"
    assert f"native: {native.MISSING}" in choice.refused


@pytest.mark.parametrize("name", NAMES)
def test_with_the_extension_native_kernels_come_first(name, monkeypatch):
    monkeypatch.delenv("ASCEND_V4_CPU_KERNELS", raising=False)
    if native.library_path() is None:
        pytest.skip(native.MISSING)
    choice = select("cpu").choices[name]
    assert (choice.backend, choice.provider, choice.refused) == ("cpu", "native", ())


def test_naming_native_where_it_is_switched_off_is_an_error(monkeypatch):
    monkeypatch.setenv("ASCEND_V4_CPU_KERNELS", "0")
    with pytest.raises(NoImplementationError, match=r"native was named; .*ASCEND_V4_CPU_KERNELS is 0"):
        select("cpu", named={"rms_norm": "native"})


@pytest.fixture
def fresh_kernels():
    native.cpu_kernels.cache_clear()
    yield
    native.cpu_kernels.cache_clear()


def test_loading_a_missing_extension_says_what_to_do(monkeypatch, fresh_kernels):
    monkeypatch.setattr(native, "library_path", lambda: None)
    with pytest.raises(OSError, match="install with a C\\+\\+ compiler"):
        native.cpu_kernels()


def test_an_extension_of_other_sources_is_refused_with_what_to_do(monkeypatch, fresh_kernels):
    if native.library_path() is None:
        pytest.skip(native.MISSING)
    monkeypatch.delenv("ASCEND_V4_CPU_KERNELS", raising=False)
    monkeypatch.setitem(native.SIGNATURES, "ascend_v4_of_tomorrow", ())
    choice = select("cpu").choices["rms_norm"]
    assert choice.provider != "native"
    assert "lacks ascend_v4_of_tomorrow: install this package again" in choice.refused[0]


def test_an_extension_that_cannot_be_loaded_is_refused_with_the_loaders_words(
    monkeypatch, tmp_path, fresh_kernels
):
    monkeypatch.delenv("ASCEND_V4_CPU_KERNELS", raising=False)
    damaged = tmp_path / "_cpu.so"
    damaged.write_bytes(b"not a library")
    monkeypatch.setattr(native, "library_path", lambda: damaged)
    choice = select("cpu").choices["rms_norm"]
    assert choice.provider != "native"
    assert str(damaged) in choice.refused[0]


@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_the_most_streams_the_kernels_hold_agree_with_the_reference(tokens):
    if native.library_path() is None:
        pytest.skip(native.MISSING)
    streams, hidden = native.MAX_STREAMS, 4
    mixes = (2 + streams) * streams
    arguments = (
        torch.randn(tokens, streams, hidden),
        torch.randn(mixes, streams * hidden) * 0.05,
        torch.randn(3),
        torch.randn(mixes),
    )
    settings: dict[str, Any] = {"sinkhorn_iterations": 3, "norm_eps": 1e-6, "mix_eps": 1e-6}
    (call,) = [each.call for name, each in NATIVE if name == "hyper_connection_pre"]
    for got, want in zip(
        call(*arguments, **settings), hyper_connection_pre(*arguments, **settings), strict=True
    ):
        hyper_connection_pre.tolerance.require(got, want)


def test_more_streams_than_the_kernels_hold_are_refused():
    streams = native.MAX_STREAMS + 1
    mixes = (2 + streams) * streams
    (call,) = [each.call for name, each in NATIVE if name == "hyper_connection_pre"]
    with pytest.raises(AssertionError, match=str(streams)):
        call(
            torch.zeros(1, streams, 2),
            torch.zeros(mixes, streams * 2),
            torch.zeros(3),
            torch.zeros(mixes),
            sinkhorn_iterations=1,
            norm_eps=1e-6,
            mix_eps=1e-6,
        )

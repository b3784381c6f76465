"""Modules that vendors' code imports: torch_npu, custom_ops, and as much of others as operator tests use."""

from __future__ import annotations

import enum
import functools
import importlib.machinery
import unittest
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ascend_v4.operators.npu.schemas import schema_strings
from ascend_v4.operators.simulator.dtypes import NAMES
from ascend_v4.operators.simulator.formats import format_of

F = TypeVar("F", bound=Callable[..., Any])
SIMULATED = "__simulated__"
"""Attribute that tells these modules from real ones."""
REAL_PACKAGES = ("torch_npu", "custom_ops", "vllm_ascend")
VERSION = "2.13.0"
"""Of the torch_npu whose schemas are declared."""


class Format(enum.IntEnum):
    """Storage formats by ACL number."""

    UNDEFINED = -1
    NCHW = 0
    NHWC = 1
    ND = 2
    NC1HWC0 = 3
    FRACTAL_Z = 4
    FRACTAL_NZ = 29


class TestCase(unittest.TestCase):
    """torch_npu.testing.testcase.TestCase, as far as operator tests use it."""

    def assertRtolEqual(
        self, x: object, y: object, prec: float = 1e-4, prec16: float = 1e-3, **_: object
    ) -> None:
        """Equal within a relative bound, which is wider for 16-bit floats."""
        left, right = np.asarray(_plain(x)), np.asarray(_plain(y))
        bound = prec16 if _is_half(x) or _is_half(y) else prec
        np.testing.assert_allclose(left, right, rtol=bound, atol=bound)


def _is_half(values: object) -> bool:
    return isinstance(values, Tensor) and values.dtype in (torch.float16, torch.bfloat16)


def _plain(values: object) -> object:
    return values.detach().float().numpy() if isinstance(values, Tensor) else values


def _unchanged(*_: object, **__: object) -> Callable[[F], F]:
    """A decorator with arguments that leaves its function alone."""

    def decorate(function: F) -> F:
        return function

    return decorate


def modules(device: ModuleType) -> dict[str, ModuleType]:
    """Every module to put into sys.modules, by name; device is the simulated torch.npu."""
    torch_npu = _torch_npu(device)
    testcase = _module("torch_npu.testing.testcase", TestCase=TestCase, run_tests=unittest.main)
    common = _module("torch_npu.testing.common_utils", SupportedDevices=_unchanged)
    testing = _module("torch_npu.testing", testcase=testcase, common_utils=common)
    torch_npu.testing = testing  # type: ignore[attr-defined]
    utils = _module(
        "vllm_ascend.utils", enable_custom_op=lambda: True, bootstrap_custom_op_env=lambda **_: None
    )
    extension = _module("vllm_ascend.vllm_ascend_C")
    configs = _module("torchair.configs.compiler_config", CompilerConfig=CompilerConfig)
    found = (
        device,
        torch_npu,
        testing,
        testcase,
        common,
        _module("custom_ops"),
        _module("vllm_ascend", utils=utils, vllm_ascend_C=extension),
        utils,
        extension,
        _module("torchair", get_npu_backend=get_npu_backend, CompilerConfig=CompilerConfig),
        _module("torchair.configs", compiler_config=configs),
        configs,
    )
    return {module.__name__: module for module in found}


def _module(name: str, **attributes: object) -> ModuleType:
    module = ModuleType(name)
    module.__doc__ = "Part of the simulator of Ascend operators."
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
    module.__path__ = []
    setattr(module, SIMULATED, True)
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


def _torch_npu(device: ModuleType) -> ModuleType:
    """Operators of npu, then those of custom over the same names, as importing custom_ops leaves it."""
    module = _module("torch_npu", npu=device, __version__=VERSION, Format=Format, **NAMES)
    for namespace in ("npu", "custom"):
        owner = getattr(torch.ops, namespace)
        for name in schema_strings(namespace):
            short = name.split(".")[0]
            setattr(module, short, getattr(owner, short))
    module.get_npu_format = format_of  # type: ignore[attr-defined]
    return module


class CompilerConfig:
    """torchair's compiler settings: any attribute may be set, none does anything."""

    mode: str = "max-autotune"

    @functools.cached_property
    def experimental_config(self) -> CompilerConfig:
        """A further level of settings."""
        return CompilerConfig()


def get_npu_backend(**_: object) -> Callable[..., Callable[..., Any]]:
    """A backend of torch.compile that runs the captured graph as it is."""

    def run_as_captured(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        return graph.forward

    return run_as_captured

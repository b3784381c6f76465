"""The face of an Ascend machine: modules, device names, copies; and how it comes off again."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Arithmetic
from ascend_v4.errors import ConfigError, SimulatorError
from ascend_v4.operators import simulator
from ascend_v4.operators.contract import WAIVABLE
from ascend_v4.operators.simulator import surface
from ascend_v4.operators.simulator.state import SimulatedChip
from ascend_v4.operators.testing.poison import poisoned_memory

patched: Any = torch
"""torch with the attributes that the simulator adds."""


@pytest.fixture(autouse=True)
def a3():
    simulator.install(Chip.A3)
    yield
    simulator.uninstall()


@pytest.mark.parametrize("device", ["npu", "npu:0", torch.device("cpu")])
def test_factories_take_the_device(device):
    made = torch.full((2, 3), 7, dtype=torch.int32, device=device)
    assert made.device.type == "cpu"
    assert made.tolist() == [[7] * 3] * 2


def test_a_device_object_works_like_its_name():
    device = torch.device("npu:0")
    assert torch.arange(3, device=device).tolist() == [0, 1, 2]
    assert torch.zeros(2).new_ones(1, device=device).tolist() == [1]


def test_moves_copy():
    x = patched.zeros(3)
    for moved in (x.npu(), x.to("npu:0"), x.to(device="npu"), x.to(torch.device("npu")), x.cpu()):
        moved.add_(1)
    assert x.tolist() == [0, 0, 0]


def test_a_move_can_convert():
    assert torch.ones(2).to("npu", torch.bfloat16).dtype is torch.bfloat16
    assert torch.ones(2).to(device="npu", dtype=torch.float16).dtype is torch.float16
    assert torch.ones(2).to(torch.int8).dtype is torch.int8


def test_modules_move():
    layer = patched.nn.Linear(2, 2, device="npu").to("npu:0").npu()
    assert layer(patched.ones(1, 2).npu()).shape == (1, 2)


def test_an_nz_tensor_stays_itself_on_the_device_and_comes_back_in_order():
    w = torch.arange(16 * 64).to(torch.int8).view(16, 64)
    nz: Any = torch.ops.npu.npu_format_cast(w, 29)
    assert nz.npu() is nz
    assert torch.equal(nz.cpu(), w)
    assert not torch.equal(nz, w)


@pytest.mark.parametrize(
    ("chip", "name", "low", "high"),
    [
        (Chip.A2, "Ascend910B", 220, 225),
        (Chip.A3, "Ascend910_93", 250, 255),
        (Chip.A950, "Ascend950", 260, 260),
    ],
)
def test_the_device_answers_for_the_chip(chip, name, low, high):
    simulator.install(chip)
    assert patched.npu.is_available()
    assert patched.npu.device_count() == 1
    assert patched.npu.current_device() == 0
    assert patched.npu.get_device_name().startswith(name)
    assert patched.npu.get_device_properties(0).name.startswith(name)
    assert low <= patched.npu.get_soc_version() <= high
    free, total = patched.npu.mem_get_info()
    assert 0 < free <= total


@pytest.mark.parametrize("device", [0, "npu", "npu:0", torch.device("cpu")])
def test_the_only_device_can_be_chosen(device):
    patched.npu.set_device(device)


@pytest.mark.parametrize("device", [1, "npu:3"])
def test_other_devices_are_not_there(device):
    with pytest.raises(SimulatorError, match="one simulated device"):
        patched.npu.set_device(device)


def test_streams_and_events_are_in_order():
    stream, event = patched.npu.Stream(), patched.npu.Event(enable_timing=True)
    with patched.npu.stream(stream):
        event.record(stream)
    patched.npu.current_stream().wait_event(event)
    patched.npu.synchronize()
    assert event.query()
    assert event.elapsed_time(patched.npu.Event()) == 0


def test_torch_npu_is_importable_with_custom_ops_on_top():
    torch_npu = importlib.import_module("torch_npu")
    importlib.import_module("custom_ops")
    assert torch_npu.npu is patched.npu
    assert torch_npu.float8_e8m0fnu == 293
    assert torch_npu.float4_e2m1fn_x2 == 296
    assert torch_npu.npu_rms_norm is torch.ops.npu.npu_rms_norm
    assert torch_npu.npu_moe_gating_top_k is torch.ops.custom.npu_moe_gating_top_k
    assert torch_npu.npu_dequant_swiglu_clamp_quant is torch.ops.custom.npu_dequant_swiglu_clamp_quant
    assert torch_npu.get_npu_format(torch.zeros(2, 2)) == torch_npu.Format.ND


def test_modules_of_vendors_operator_tests_are_importable():
    testcase = importlib.import_module("torch_npu.testing.testcase")
    testcase.TestCase().assertRtolEqual(torch.ones(2), torch.ones(2))
    with pytest.raises(AssertionError):
        testcase.TestCase().assertRtolEqual(torch.ones(2), torch.ones(2) * 1.1)
    utils = importlib.import_module("vllm_ascend.utils")
    assert utils.enable_custom_op()
    utils.bootstrap_custom_op_env(include_vendor_lib=True)
    importlib.import_module("vllm_ascend.vllm_ascend_C")


def test_a_graph_backend_runs_what_was_captured():
    torchair = importlib.import_module("torchair")
    config = importlib.import_module("torchair.configs.compiler_config").CompilerConfig()
    config.mode = "reduce-overhead"
    backend = torchair.get_npu_backend(compiler_config=config)
    graph = torch.fx.symbolic_trace(lambda x: x + 1)
    assert backend(graph, [])(torch.ones(1)).tolist() == [2]


def test_uninstalling_restores_the_process():
    simulator.uninstall()
    assert "torch_npu" not in sys.modules
    assert not patched.npu.is_available()
    assert not hasattr(torch.Tensor, "npu")
    assert not hasattr(torch.nn.Module, "npu")
    x = torch.zeros(2)
    assert x.cpu() is x
    assert x.to("cpu") is x
    assert not torch.accelerator.is_available()
    torch.manual_seed(0)
    with pytest.raises((RuntimeError, ModuleNotFoundError)):
        torch.zeros(1, device="npu")


def test_installing_twice_and_uninstalling_once_restores_the_process():
    simulator.install(Chip.A2)
    simulator.install(Chip.A950)
    simulator.uninstall()
    assert not hasattr(torch.Tensor, "npu")


def test_patches_of_others_are_left_alone():
    simulator.uninstall()
    original = torch.empty
    with poisoned_memory():
        simulator.install(Chip.A3)
        assert torch.empty(2, device="npu").isnan().all()
    assert torch.empty is original
    simulator.uninstall()
    assert torch.empty is original


@pytest.mark.parametrize("package", ["torch_npu", "custom_ops", "vllm_ascend"])
def test_a_real_package_in_the_process_is_refused(package, monkeypatch):
    simulator.uninstall()
    monkeypatch.setitem(sys.modules, package, ModuleType(package))
    with pytest.raises(SimulatorError, match=f"{package} is loaded"):
        simulator.install(Chip.A3)
    assert not hasattr(torch.Tensor, "npu")
    assert simulator.installed() is None


def test_a_machine_with_a_card_is_refused(tmp_path):
    (tmp_path / "davinci_manager").touch()
    surface.require_no_real_npu(tmp_path)
    (tmp_path / "davinci0").touch()
    with pytest.raises(SimulatorError, match="Ascend card"):
        surface.require_no_real_npu(tmp_path)


def test_chip_arithmetic_and_waived_sizes_may_be_given_by_name():
    try:
        simulator.install("A3", waived="sizes", arithmetic="ideal")
        assert simulator.installed() == SimulatedChip(
            chip=Chip.A3, arithmetic=Arithmetic.IDEAL, waived=frozenset(WAIVABLE)
        )
        with pytest.raises(ConfigError, match="chip 'a5' is unknown; choose one of a2, a3, 950"):
            simulator.install("a5")
    finally:
        simulator.uninstall()

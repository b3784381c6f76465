"""`ascend-v4 devices`: a report on any machine, and an exit status that never says failure."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from ascend_v4.cli.devices import report_lines
from ascend_v4.device import inventory
from ascend_v4.device.inventory import soc_facts, take_inventory
from ascend_v4.device.software import Problem

GIB = 1 << 30
MEMORY = {"total_bytes": 64 * GIB, "free_bytes": 60 * GIB, "allocated_bytes": 0, "reserved_bytes": 0}


def report(**npu: Any) -> dict[str, Any]:
    facts = {"devices": [], "driver": None, "cann": None, "packages": {}, "problem": None, **npu}
    return {
        "torch": "2.13.0",
        "problem": None,
        "cpu": {"name": "aarch64", "threads": 192, "memory": MEMORY},
        "cuda": {"devices": [], "problem": {"what": "there is none", "do": ""}},
        "npu": facts,
        "sim": {"chips": {"a3": "Atlas A3"}},
    }


def test_a_machine_without_accelerators_is_reported(run_cli):
    result = run_cli("devices")
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"torch     {torch.__version__}" in result.stdout
    assert "cpu       " in result.stdout
    assert "--device sim --chip a2" in result.stdout


def test_json_is_one_object_with_every_kind_of_device(run_cli):
    found = json.loads(run_cli("devices", "--json").stdout)
    assert found.keys() == {"torch", "problem", "cpu", "cuda", "npu", "sim"}
    assert found["cpu"]["memory"]["total_bytes"] > 0
    assert found["npu"]["packages"].keys() == {"torch_npu", "vllm_ascend", "custom_ops"}
    if not found["npu"]["devices"]:
        assert found["npu"]["problem"].keys() == {"what", "do"}


def test_a_torch_that_does_not_import_is_a_problem_of_the_report(monkeypatch):
    trouble = Problem("torch cannot be imported: no libtorch", "Install torch again")
    monkeypatch.setattr(inventory, "_import_torch", lambda: (None, trouble))
    found = take_inventory()
    assert found["torch"] is None
    assert found["cuda"]["problem"] == {"what": trouble.what, "do": trouble.do}
    assert "torch     cannot be imported" in list(report_lines(found))


def test_devices_are_listed_with_chip_and_memory_and_what_the_chip_runs():
    devices = [
        {"index": 0, "name": "Ascend910_9391", "memory": MEMORY, **soc_facts("Ascend910_9391")},
        {"index": 1, "name": "Ascend910_9391", "memory": None, **soc_facts("Ascend910_9391")},
    ]
    packages = {"torch_npu": "2.13.0", "vllm_ascend": None}
    lines = list(report_lines(report(devices=devices, driver="25.5.1", cann="9.1.0", packages=packages)))
    assert "npu:0     Ascend910_9391 (a3), 60.0 of 64.0 GiB free" in lines
    assert "npu:1     Ascend910_9391 (a3), memory unknown: another process holds it" in lines
    assert any("runs w8a8, w4a8" in line for line in lines)
    assert "          driver 25.5.1, CANN 9.1.0, torch_npu 2.13.0; not found: vllm_ascend" in lines


def test_a_problem_comes_with_what_to_do():
    lines = list(report_lines(report(problem={"what": "CANN is not here", "do": "Install it"})))
    assert "npu       CANN is not here. Install it." in lines
    assert "cuda      there is none." in lines


@pytest.mark.parametrize("name", ["Ascend910B4-1", "Ascend310P3"])
def test_a_soc_without_figures_gets_none(name):
    assert "nominal_hbm_bytes" not in soc_facts(name)

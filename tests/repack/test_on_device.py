"""Conversions on another device: the same bytes as the CPU's, or one refusal before anything is written.

No accelerator is at hand: the simulator's tensors lie on the CPU, and run everything but the copies between
two memories; tests/operators/test_references_elsewhere.py has those.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Target as DeviceTarget
from ascend_v4.errors import ConfigError, DeviceError
from ascend_v4.operators.contract import CATALOG
from ascend_v4.operators.select import OperatorTable, select
from ascend_v4.operators.testing import transcode
from ascend_v4.repack import job, on_device
from ascend_v4.repack.plan import Action
from ascend_v4.repack.recipes import Target
from tests.repack.packs import config_of, repacked, tree

TARGETS = (Target.W8A8, Target.W4A8, Target.MX, Target.BF16)


@pytest.fixture
def simulated(monkeypatch):
    """--device npu finds the simulator; operators that were not tried are refused in the run."""
    there = DeviceTarget(device="sim", chip=Chip.A3)
    monkeypatch.setattr(on_device, "open_target", lambda name: there)
    monkeypatch.setattr(on_device, "open_device", lambda target: None)

    def only_tried(device, conversions):
        conversions = list(conversions)
        table = on_device.operators_for(device, conversions)
        tried = on_device.operators_of(conversions)
        choices = {
            name: choice if name in tried else replace(choice, call=refused)
            for name, choice in table.choices.items()
        }
        return OperatorTable(choices, table.target)

    def refused(*arguments, **keywords):
        raise AssertionError("an operator was called that was not tried on the device")

    monkeypatch.setattr(job, "operators_for", only_tried)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.value)
@pytest.mark.parametrize("reversible", [False, True], ids=["plain", "reversible"])
def test_output_does_not_depend_on_the_device(simulated, source, tmp_path, target, reversible):
    options = {"reversible": reversible and target is not Target.MX}
    repacked(source, tmp_path / "cpu", target, **options)
    report = repacked(source, tmp_path / "npu", target, device="npu", **options)
    assert tree(tmp_path / "npu") == tree(tmp_path / "cpu")
    made = [item.action.value for item in report.plan.conversions]
    expected = {name: "reference on cpu" for name in made if name in transcode.recipes()}
    assert report.summary()["operators"] == expected


@pytest.mark.parametrize("target", [Target.W8A8, Target.MX, Target.BF16], ids=lambda target: target.value)
def test_the_way_back_does_not_depend_on_it_either(simulated, source, tmp_path, target):
    repacked(source, tmp_path / "pack", target)
    repacked(tmp_path / "pack", tmp_path / "cpu", Target.RELEASE)
    repacked(tmp_path / "pack", tmp_path / "npu", Target.RELEASE, device="npu")
    assert tree(tmp_path / "npu") == tree(tmp_path / "cpu")


def test_every_conversion_names_its_operators():
    assert on_device.OPERATORS.keys() == set(Action)
    named = {name for names in on_device.OPERATORS.values() for name in names}
    assert named | {"negative_zeros"} == transcode.recipes().keys()


@pytest.mark.parametrize("name", sorted(transcode.recipes()))
def test_device_that_gives_another_bit_is_refused(monkeypatch, name):
    host = select("cpu")
    right = host.choices[name].call

    def off_by_a_bit(*arguments, **keywords):
        result = right(*arguments, **keywords)
        written = keywords[CATALOG[name].mutates[-1]]
        if written.numel():
            written.view(torch.uint8)[-1] ^= 1
        return result

    choices = {**host.choices, name: replace(host.choices[name], call=off_by_a_bit)}
    declared = CATALOG[name]
    on_device._require_same_bits(declared, host, host, device="npu")
    with pytest.raises(DeviceError, match=f"does not give the CPU's bits: {declared.mutates[-1]} of {name}"):
        on_device._require_same_bits(declared, OperatorTable(choices, host.target), host, device="npu")


def test_device_that_cannot_run_an_operator_is_refused_and_nothing_is_written(
    simulated, source, tmp_path, monkeypatch
):
    # meta tensors hold no values: the reference asks for some and torch says no
    monkeypatch.setattr(DeviceTarget, "torch_device", property(lambda target: "meta"))
    with pytest.raises(DeviceError, match=r"meta cannot run fp\d_to_\w+: .*else --device cpu"):
        repacked(source, tmp_path / "out", device="npu")
    assert tree(tmp_path) == {}


def test_references_get_few_threads_unless_told(simulated, source, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(100))

    def threads(target=Target.W8A8, **options):
        planned = job.plan_job(config_of(source, tmp_path / "out", target, max_part_bytes=65_536, **options))
        return planned.num_threads

    assert threads(jobs=9, device="npu") == 9
    assert threads(jobs=None, device="npu") == 2
    assert threads(Target.MX, jobs=None, device="npu") == 16
    if select("cpu").choices["fp4_to_int8"].provider == "native":
        assert threads(jobs=None) == 16
    monkeypatch.setenv("ASCEND_V4_CPU_KERNELS", "0")
    assert threads(jobs=None) == 2


def test_unknown_device_is_refused(source, tmp_path):
    with pytest.raises(ConfigError, match="--device 'tpu' does not convert weights; choose one of cpu, cuda"):
        config_of(source, tmp_path / "out", device="tpu")


@pytest.mark.cuda
def test_gpu_writes_the_cpus_bytes(source, tmp_path):
    for target in TARGETS:
        by_cpu, by_cuda = (tmp_path / f"{target.value}-{device}" for device in ("cpu", "cuda"))
        repacked(source, by_cpu, target)
        repacked(source, by_cuda, target, device="cuda")
        assert tree(by_cuda) == tree(by_cpu)

"""Opening an NPU: set up once, refused in one sentence, and the runtime behind one small protocol."""

from __future__ import annotations

import contextlib
import sys
import types

import pytest
import torch

from ascend_v4.device import cuda, npu
from ascend_v4.device.base import Accelerator, Memory
from ascend_v4.device.cpu import CpuDevice
from ascend_v4.device.opening import open_device
from ascend_v4.device.soc import Chip
from ascend_v4.device.software import Problem
from ascend_v4.device.target import CPU, Target
from ascend_v4.errors import DeviceError


class Runtime:
    """torch.npu as far as the device layer uses it; keeps a list of what was called."""

    def __init__(self, *, soc: str = "Ascend910B3", count: int = 2) -> None:
        self.calls: list[str] = []
        self.soc, self.count = soc, count
        self.config = types.SimpleNamespace(allow_internal_format=False)

    def is_available(self) -> bool:
        return self.count > 0

    def device_count(self) -> int:
        return self.count

    def get_device_name(self, index: int) -> str:
        return self.soc

    def set_device(self, index: int) -> None:
        self.calls.append(f"set_device {index}")

    def set_compile_mode(self, *, jit_compile: bool) -> None:
        self.calls.append(f"jit_compile {jit_compile}")

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return 40, 64

    def memory_allocated(self, index: int) -> int:
        return 7

    def memory_reserved(self, index: int) -> int:
        return 9

    def synchronize(self, index: int) -> None:
        self.calls.append("synchronize")

    def Stream(self) -> types.SimpleNamespace:  # noqa: N802
        return types.SimpleNamespace(wait_stream=lambda other: self.calls.append(f"wait for {other}"))

    def current_stream(self) -> str:
        return "current"

    def stream(self, stream: object) -> contextlib.AbstractContextManager[None]:
        self.calls.append("own stream")
        return contextlib.nullcontext()

    def graph_pool_handle(self) -> str:
        self.calls.append("pool")
        return "pool"

    def NPUGraph(self) -> types.SimpleNamespace:  # noqa: N802
        return types.SimpleNamespace(replay=lambda: self.calls.append("replay"))

    def graph(self, graph: object, *, pool: str) -> contextlib.AbstractContextManager[None]:
        self.calls.append(f"capture into {pool}")
        return contextlib.nullcontext()


@pytest.fixture
def machine(monkeypatch):
    """A machine with a complete installation, whose runtime a test may change."""

    def install(runtime: Runtime) -> Runtime:
        monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))
        monkeypatch.setattr(torch, "npu", runtime, raising=False)
        monkeypatch.setattr(npu, "npu_problem", lambda software: None)
        return runtime

    return install


def test_the_runtime_is_set_up_before_anything_is_allocated(machine):
    runtime = machine(Runtime())
    found = npu.require(1)
    assert runtime.config.allow_internal_format is True
    assert runtime.calls == ["set_device 1", "jit_compile False"]
    assert (found.chip, found.soc_name, found.num_devices) == (Chip.A2, "Ascend910B3", 2)
    assert (found.device.name, found.device.collective_backend) == ("npu:1", "hccl")


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        (Runtime(count=0), "device 0 is asked for and torch_npu sees 0"),
        (Runtime(soc="Ascend310P3"), "the soc of this machine is Ascend310P3"),
        (Runtime(soc="Ascend910A"), "Use --device cpu"),
    ],
)
def test_a_machine_that_cannot_run_v4_is_refused(runtime, message, machine):
    machine(runtime)
    with pytest.raises(DeviceError, match=message):
        npu.require()


def test_missing_software_is_refused_before_torch_npu_is_imported(monkeypatch):
    monkeypatch.setattr(npu, "npu_problem", lambda software: Problem("CANN is not here", "Install it"))
    monkeypatch.setattr(npu, "import_runtime", lambda: pytest.fail("torch_npu was imported"))
    with pytest.raises(DeviceError, match=r"--device npu: CANN is not here\. Install it\."):
        npu.require()


def test_a_torch_npu_that_fails_to_import_is_one_sentence(monkeypatch):
    def fail(name: str) -> object:
        raise ImportError("libascend_hal.so: cannot open shared object file: No such file or directory")

    monkeypatch.setattr("ascend_v4.device.npu.importlib.import_module", fail)
    with pytest.raises(DeviceError, match=r"libascend_hal\.so is not found"):
        npu.import_runtime()


def test_memory_figures_are_the_runtimes():
    device = Accelerator(Runtime(), kind="npu", index=0, collective_backend="hccl", graph_class="NPUGraph")
    assert device.memory() == Memory(total_bytes=64, free_bytes=40, allocated_bytes=7, reserved_bytes=9)


def test_a_capture_warms_up_on_a_stream_of_its_own_and_shares_one_pool():
    runtime = Runtime()
    device = Accelerator(runtime, kind="npu", index=0, collective_backend="hccl", graph_class="NPUGraph")
    runs: list[int] = []

    def run() -> torch.Tensor:
        runs.append(len(runtime.calls))
        return torch.zeros(1)

    graph = device.capture(run)
    device.capture(run)
    graph.replay()
    warm = ["wait for current", "own stream", "synchronize"]
    assert runtime.calls == [*warm, "pool", "capture into pool", *warm, "capture into pool", "replay"]
    # two runs in the stream, one in the capture
    assert runs[:3] == [2, 2, 5]


def test_the_cpu_counts_its_memory_and_its_time():
    device = CpuDevice()
    memory = device.memory()
    assert 0 < memory.free_bytes <= memory.total_bytes
    first, second = device.new_event(timed=True), device.new_event(timed=True)
    first.record()
    second.record()
    assert first.elapsed_time(second) >= 0
    with device.new_stream():
        device.synchronize()


def test_a_target_opens_its_own_device(machine):
    machine(Runtime())
    assert open_device(CPU).name == "cpu"
    assert open_device(Target(device="npu", chip=Chip.A2)).collective_backend == "hccl"
    assert open_device(Target(device="sim", chip=Chip.A2)).captures_graphs


def test_a_build_without_cuda_says_so():
    if cuda.count_devices():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(DeviceError, match="--device cuda: device 0 is asked for and torch, built for"):
        cuda.require()


@pytest.mark.cuda
def test_a_cuda_device_records_and_replays_a_run():
    device = cuda.require().device
    x = torch.ones(4, device="cuda")
    graph = device.capture(lambda: x * 2)
    x.fill_(3)
    graph.replay()
    device.synchronize()
    assert graph.output.tolist() == [6, 6, 6, 6]
    assert device.memory().allocated_bytes > 0

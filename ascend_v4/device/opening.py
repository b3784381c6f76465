"""From a target to its device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ascend_v4.device.base import WARM_UPS, Accelerator, Device, Graph
from ascend_v4.device.cpu import CpuDevice
from ascend_v4.device.target import Target

if TYPE_CHECKING:
    from torch import Tensor


class SimulatedNpu(Accelerator):
    """The NPU that the simulator puts in torch.npu. It records graphs by noting the operators that a run
    calls.
    """

    def capture(self, run: Callable[[], Tensor]) -> Graph:
        """Raises DeviceError where a real one could not capture the run."""
        from ascend_v4.device.recorder import record

        for _ in range(WARM_UPS):
            run()
        return record(run)


def open_device(target: Target, index: int = 0) -> Device:
    """The device of a target that `operators.targets.open_target` made, which checked that it is there."""
    if target.device == "cpu":
        return CpuDevice()
    if target.device == "cuda":
        from ascend_v4.device import cuda

        return cuda.open_device(index)
    if target.device == "npu":
        from ascend_v4.device import npu

        return npu.open_device(npu.import_runtime(), index)
    import torch

    runtime = torch.npu  # type: ignore[attr-defined]
    return SimulatedNpu(runtime, kind="npu", index=index, collective_backend="gloo", graph_class="NPUGraph")

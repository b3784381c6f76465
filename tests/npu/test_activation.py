"""The clamped SwiGLU of 950, which is made of clamps and a kernel that does not clamp."""

from __future__ import annotations

import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Arithmetic
from ascend_v4.operators import simulator
from ascend_v4.operators.contracts.activation import clamped_swiglu
from tests.npu.expert_blocks import candidate


@pytest.mark.parametrize("limit", [10.0, 0.3])
def test_a_limit_that_bfloat16_does_not_hold_is_not_rounded(limit):
    """Every number is clamped, so that the result is that of the limit alone."""
    gate_up_TJ = torch.full((3, 64), 100.0, dtype=torch.bfloat16)
    simulator.install(Chip.A950, arithmetic=Arithmetic.IDEAL)
    try:
        got = candidate(clamped_swiglu, "torch_npu", Chip.A950).call(gate_up_TJ, limit=limit)
    finally:
        simulator.uninstall()
    assert torch.equal(got, clamped_swiglu.reference(gate_up_TJ, limit=limit))


def test_no_rows_reach_no_kernel():
    nothing = torch.zeros(0, 64, dtype=torch.bfloat16)
    for chip in Chip:
        out_TI = candidate(clamped_swiglu, "torch_npu", chip).call(nothing, limit=1.0)
        assert out_TI.shape == (0, 32)

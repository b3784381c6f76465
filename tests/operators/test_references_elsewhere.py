"""Every reference on a device that is not the CPU: it makes no tensor in the wrong place, and the bits that a
contract fixes hold where sums and divisions go another way.
"""

from __future__ import annotations

import pytest
import torch

from ascend_v4.operators.contract import CATALOG
from ascend_v4.operators.contracts.transcode import RowStats
from ascend_v4.operators.contracts.transcode_exact import int8_to_fp4
from ascend_v4.operators.testing import transcode
from ascend_v4.operators.testing.cases import Case, all_cases
from tests.elsewhere import CPU, DEVICE, elsewhere

KERNEL_WIDTHS = frozenset({"sparse_attention", "compress", "routed_experts"})
"""Operators whose recipes for kernels ask a reference nothing that narrower ones do not."""


CASES = [
    *(case for case in all_cases("cuda", device=DEVICE) if case.implementation is None),
    *(
        Case(CATALOG[name], None, recipe, torch.float32, DEVICE, True)
        for name, recipes in transcode.recipes().items()
        for recipe in recipes
    ),
]


def is_slow(case: Case) -> bool:
    """The released models' sizes, caches of gigabytes, and the widths of kernels."""
    name = case.recipe.name
    is_wide = name.startswith("vendor-") and case.operator.name in KERNEL_WIDTHS
    return case.slow or "far" in name or is_wide


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if is_slow(case) else ()) for case in CASES], ids=str
)
def test_reference_elsewhere_agrees_with_itself_on_the_cpu(case):
    with elsewhere():
        got = case.run_implementation()
        case.require_agreement(got, case.run_reference_on_cpu())
        got.require_inputs_untouched()


def test_every_operator_runs_elsewhere():
    assert {case.operator.name for case in CASES if not is_slow(case)} == CATALOG.keys()


def statistics_of_rows(codes, row_scale, scale, *, device):
    """The sums of `int8_to_fp4` of one row after the other, [N, 6]."""
    out = torch.zeros(1, codes.shape[1] // 2, dtype=torch.int8, device=device)
    rows = zip(
        codes.to(device).split(1), row_scale.to(device).split(1), scale.to(device).split(1), strict=True
    )
    return torch.stack([int8_to_fp4.reference(*row, None, out) for row in rows])


def test_statistics_of_inexact_rows_have_the_same_bits_elsewhere():
    codes = torch.randint(-127, 128, (12, 288), dtype=torch.int8)
    row_scale = torch.rand(12) + 0.01
    scale = torch.randint(115, 128, (12, 9)).to(torch.uint8)
    want = statistics_of_rows(codes, row_scale, scale, device=CPU)
    with elsewhere():
        got = statistics_of_rows(codes, row_scale, scale, device=DEVICE)
    assert got.device == DEVICE
    assert torch.equal(got.cpu(), want)
    assert [RowStats.of(row).exact_rows for row in want] == [0] * 12

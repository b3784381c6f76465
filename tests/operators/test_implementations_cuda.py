"""Every contract on a GPU: what the cuda backend can choose agrees with the reference on the CPU.

The cases are those of the CPU; a reference is plain torch, so today it is what cuda chooses. Run with
`--require cuda` on a machine that has a GPU: the result, with machine and date, belongs in docs/benchmarks/.
"""

from __future__ import annotations

import pytest
import torch

from ascend_v4.operators.select import select
from ascend_v4.operators.testing.cases import Case, all_cases

pytestmark = pytest.mark.cuda
DEVICE = torch.device("cuda")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow if case.slow else ())
        for case in all_cases("cuda", device=DEVICE)
    ],
    ids=str,
)
def test_implementation_on_a_gpu_agrees_with_the_reference_on_the_cpu(case: Case):
    if case.unusable is not None:
        pytest.skip(case.unusable)
    case.require_correct()


def test_every_operator_has_a_choice_on_a_gpu():
    assert {choice.backend for choice in select("cuda").choices.values()} <= {"cuda", "reference"}

"""What tests/conftest.py promises to every test."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import poison, seed_of

TESTS = Path(__file__).resolve().parents[1]
POISONED_TEST = """
import pytest, torch

def test_empty_memory_is_poisoned():
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(3, dtype=torch.bfloat16)).isnan().all()
    assert torch.zeros(2).new_empty((2, 2)).isnan().all()
    assert (torch.empty(3, dtype=torch.int64) < -(2**60)).all()

@pytest.mark.npu
def test_on_a_device():
    pass

def test_that_fails():
    assert False, "on purpose"
"""
MARKERS = (
    "[pytest]\nmarkers =\n    npu: needs an NPU.\n    cuda: needs CUDA.\n    multicard(n): needs n devices.\n"
)


def run_inner_suite(folder: Path, *arguments: str) -> str:
    """Output of pytest over a folder that holds our conftest and one operator test file."""
    (folder / "tests" / "operators").mkdir(parents=True)
    shutil.copy(TESTS / "conftest.py", folder / "tests")
    (folder / "pytest.ini").write_text(MARKERS)
    (folder / "tests" / "operators" / "test_inner.py").write_text(POISONED_TEST)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-ra", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout


@pytest.mark.skipif(getattr(torch, "npu", None) is not None, reason="an NPU is here, so nothing is missing")
def test_missing_device_skips_and_a_failure_prints_its_seed(tmp_path):
    output = run_inner_suite(tmp_path, "--seed", "7")
    seed = seed_of("tests/operators/test_inner.py::test_that_fails", base=7)
    assert "1 failed, 1 passed, 1 skipped" in output
    assert "no npu device on this machine" in output
    assert f"--seed 7 gives {seed} here" in output


@pytest.mark.skipif(getattr(torch, "npu", None) is not None, reason="an NPU is here, so nothing is missing")
def test_required_device_turns_its_skips_into_errors(tmp_path):
    output = run_inner_suite(tmp_path, "--require", "npu")
    assert "1 failed, 1 passed, 1 error" in output
    assert "--require npu: this test may not skip" in output


def test_numbers_are_seeded_from_the_tests_own_name(seed, request):
    assert seed == seed_of(request.node.nodeid, base=request.config.getoption("--seed"))
    drawn = (random.random(), np.random.rand(), torch.rand(1).item())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_poisoned_float_is_nan(dtype):
    assert poison(torch.zeros(4, dtype=dtype)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu])
def test_poisoned_8_bit_float_is_nan(dtype):
    assert poison(torch.zeros(4, dtype=torch.uint8).view(dtype)).to(torch.float32).isnan().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
def test_poisoned_integer_is_large_and_negative(dtype):
    assert (poison(torch.zeros(4, dtype=dtype)) == torch.iinfo(dtype).min // 2).all()


def test_poison_leaves_meta_and_empty_tensors_alone():
    assert poison(torch.empty(2, device="meta")).shape == (2,)
    assert poison(torch.empty(0)).numel() == 0

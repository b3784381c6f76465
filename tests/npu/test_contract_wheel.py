"""The adapters against the real torch_npu wheel, in a process of its own: `make contract`.

Meta kernels prove names, ranks and result shapes only; what a call computes is shown by the simulator.
"""

from __future__ import annotations

import pytest

from ascend_v4.device.soc import Chip
from ascend_v4.operators.contract import CATALOG, Where
from ascend_v4.operators.npu.schemas import schema_strings
from ascend_v4.operators.select import load_backend
from tools.npu_contract import environment
from tools.npu_contract.process import all_runs
from tools.npu_contract.report import contract_report
from tools.npu_contract.versions import (
    adapters_of,
    differences,
    load_table,
    wheel_schemas,
)

pytestmark = pytest.mark.contract
RUNS = [run.name for run in all_runs()]
RENAMED = {
    "npu::npu_quant_matmul:pertoken_scale=per_token_scale": "flash-a3-w8a8-torch_npu",
    "_C_ascend::npu_hc_pre_v2:hc_eps=eps": "flash-a3-w8a8-vllm-ascend",
    "custom::kv_compress_epilog:quant_group_size=group": "flash-950-mx-cann-recipes",
}
"""An argument by another name, and a run that passes it."""


@pytest.fixture(scope="session")
def wheel():
    """The real torch_npu is there, or the test skips."""
    problem = environment.problem()
    if problem is not None:
        pytest.skip(problem)


@pytest.fixture(scope="session")
def report(wheel):
    """What the process found; it is started once."""
    return contract_report()


@pytest.fixture
def runs(report):
    return {run["name"]: run for run in report["runs"]}


def test_the_wheel_is_imported_with_all_its_operators(report):
    assert report["torch_npu"].startswith(environment.VERSION)
    assert report["num_operators"] >= 400


def test_the_wheel_has_the_schemas_that_the_adapters_were_written_against(report):
    assert report["schema_differences"] == []


@pytest.mark.parametrize("name", RUNS)
def test_every_call_of_a_whole_model_is_accepted(name, runs):
    assert runs[name]["error"] is None


@pytest.mark.parametrize("chip", [chip.value for chip in Chip])
def test_every_adapter_of_a_chip_was_called(chip, report):
    runs = [run for run in report["runs"] if run["chip"] == chip]
    usable = {tuple(each) for run in runs for each in run["usable"]}
    reached = {tuple(each) for run in runs for each in run["reached"]}
    assert reached == usable
    load_backend("npu")
    assert {operator for operator, _ in usable} == {
        declared.name for declared in CATALOG.values() if declared.where is Where.DEVICE
    }


def called(report, chip: str) -> dict[tuple[str, str], set[str]]:
    """Vendor operators without overloads, by adapter."""
    found: dict[tuple[str, str], set[str]] = {}
    for run in report["runs"]:
        if run["chip"] == chip:
            for each in run["calls"]:
                found.setdefault((each["operator"], each["provider"]), set()).add(each["call"])
    return found


@pytest.mark.parametrize("chip", list(Chip), ids=lambda chip: chip.value)
def test_an_adapter_needs_exactly_the_operators_it_calls(chip, report):
    load_backend("npu")
    needed = {
        (declared.name, each.provider): {name.partition(".")[0] for name in each.needs.torch_operators}
        for declared in CATALOG.values()
        for each in declared.implementations
        if each.backend == "npu" and chip in (each.needs.chips or tuple(Chip))
    }
    found = called(report, chip.value)
    assert {key: found.get(key, set()) for key in needed} == needed


def test_no_vendor_operator_is_called_outside_an_adapter(report):
    assert [each for run in report["runs"] for each in run["calls"] if not each["operator"]] == []


def test_our_meta_kernels_stand_in_only_where_the_wheel_has_none(report):
    schemas = schema_strings("npu")
    assert {name.removeprefix("npu::") for name in report["our_meta"]} <= schemas.keys()
    # what the adapters call of torch_npu is judged by the vendor's kernels, but for the format cast
    used = {each["call"] for run in report["runs"] for each in run["calls"]}
    assert used & set(report["our_meta"]) == {"npu::npu_format_cast"}


@pytest.mark.parametrize("renaming", RENAMED)
def test_a_renamed_argument_is_found(renaming, wheel):
    name = RENAMED[renaming]
    (run,) = contract_report(only=[name], rename=renaming)["runs"]
    new = renaming.rpartition("=")[2]
    assert new in str(run["error"])
    assert "operators/npu/" in run["error"]


def test_the_recorded_calls_are_those_of_the_adapters(report):
    assert load_table().adapters == adapters_of(report), "run python -m tools.npu_contract.versions"


@pytest.mark.parametrize("version", environment.OTHER_VERSIONS)
def test_the_recorded_schemas_are_those_of_the_other_wheels(version):
    wheel = environment.cached_wheel(version)
    if wheel is None:
        pytest.skip(f"the wheel of torch_npu {version} is not here. {environment.HOW}")
    assert load_table().schemas[version] == differences(wheel_schemas(wheel))

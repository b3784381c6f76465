"""Which operators each simulated chip gets, with every vendor package and with none."""

from __future__ import annotations

import json

import pytest

from ascend_v4.operators import simulator
from ascend_v4.operators.contract import CATALOG, Where

VENDORS = ("vllm_ascend", "custom_ops", "ops_transformer")
WITHOUT_VENDORS = tuple(argument for name in VENDORS for argument in ("--without", name))
NO_VENDOR_OPERATOR = {"embed_tokens", "float32_linear", "hyper_connection_head"}
"""No package has an operator for these on any chip."""
ATEN_WITHOUT_VENDORS = {
    *NO_VENDOR_OPERATOR,
    "hyper_connection_pre",
    "hyper_connection_post",
    "compress",
    "sparse_attention",
}


@pytest.fixture
def ops(run_cli):
    """`ascend-v4 ops --json` on a simulated chip."""

    def run(*args: str):
        result = run_cli("ops", "--device", "sim", *args, "--json")
        return result.exit_code, json.loads(result.stdout)

    yield run
    simulator.uninstall()


def providers(found) -> dict[str, str]:
    return {row["operator"]: row["provider"] for row in found["operators"]}


@pytest.mark.parametrize("model", ["flash", "pro"])
@pytest.mark.parametrize("chip", ["a2", "a3", "950"])
def test_every_operator_of_the_model_has_an_adapter(chip, model, ops):
    status, found = ops(model, "--chip", chip)
    chosen = providers(found)
    assert (status, found["missing"], found["too_slow"]) == (0, [], {})
    assert set(chosen) == {name for name, each in CATALOG.items() if each.where is Where.DEVICE}
    assert {row["backend"] for row in found["operators"]} == {"npu"}
    assert {name for name, provider in chosen.items() if provider == "aten"} <= NO_VENDOR_OPERATOR


@pytest.mark.parametrize("chip", ["a2", "a3", "950"])
def test_without_the_vendors_packages_attention_alone_is_too_slow(chip, ops):
    status, found = ops("flash", "--chip", chip, *WITHOUT_VENDORS)
    chosen = providers(found)
    assert (status, found["missing"], list(found["too_slow"])) == (0, [], ["sparse_attention"])
    assert set(chosen.values()) == {"torch_npu", "aten"}
    assert {name for name, provider in chosen.items() if provider == "aten"} <= ATEN_WITHOUT_VENDORS


@pytest.mark.parametrize("chip", ["a2", "a3", "950"])
def test_every_chosen_operator_but_the_slow_ones_can_be_captured(chip, ops):
    _, found = ops("flash", "--chip", chip)
    chosen = {
        row["operator"]: next(each for each in row["candidates"] if each["is_chosen"])
        for row in found["operators"]
    }
    assert [name for name, each in chosen.items() if not each["capturable"]] == []


def test_a_model_that_kernels_do_not_take_runs_only_waived(ops):
    status, refused = ops("tiny", "--chip", "a3")
    assert (status, refused["waived_limits"]) == (2 if refused["missing"] else 0, [])
    _, waived = ops("tiny", "--chip", "a3", "--waive-limits", "sizes")
    outside = {
        size
        for row in waived["operators"]
        for each in row["candidates"]
        if each["is_chosen"]
        for size in each["waived"]
    }
    assert waived["missing"] == []
    assert outside
    assert outside <= set(waived["waived_limits"])


@pytest.mark.parametrize(("model", "most"), [("flash", 1), ("pro", 2)])
def test_on_950_attention_is_not_shared_further_than_its_heads_allow(model, most, ops):
    assert ops(model, "--chip", "950", "--tp", str(most))[0] == 0
    status, found = ops(model, "--chip", "950", "--tp", str(2 * most))
    assert status == 2
    assert found["problem"].endswith(f"use attention tensor parallelism of at most {most}.")

"""Binding through the schema: every argument arrives, chips differ, uninstalled kernels refuse."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.errors import ContractError, SimulatorError
from ascend_v4.operators import simulator
from ascend_v4.operators.npu.schemas import NAMESPACES, schema_strings
from ascend_v4.operators.simulator import dtypes
from ascend_v4.operators.simulator.binding import _kernel_of
from ascend_v4.operators.simulator.kernels import KERNELS
from ascend_v4.operators.simulator.state import SimulatedChip


@pytest.fixture(autouse=True)
def a3():
    simulator.install(Chip.A3)
    yield
    simulator.uninstall()


def received(monkeypatch, name):
    """Arguments of the calls of one kernel, which does nothing else."""
    calls = []

    def record(sim, **arguments):
        calls.append(arguments)

    monkeypatch.setitem(KERNELS, name, dataclasses.replace(KERNELS[name], run=record))
    return calls


def test_defaults_come_from_the_schema(monkeypatch):
    calls = received(monkeypatch, "custom::inplace_partial_rotary_mul")
    x = torch.zeros(1, 1, 1, 4)
    torch.ops.custom.inplace_partial_rotary_mul(x, x, x, rotary_mode="interleave", partial_slice=[0, 4])
    assert calls[0].keys() == {"x", "r1", "r2", "rotary_mode", "partial_slice"}
    prefetch = received(monkeypatch, "npu::npu_prefetch")
    torch.ops.npu.npu_prefetch(x, None, 1)
    assert prefetch == [{"input": x, "dependency": None, "max_size": 1, "offset": 0}]


def test_an_argument_equal_to_its_default_arrives_too(monkeypatch):
    calls = received(monkeypatch, "npu::npu_prefetch")
    x = torch.zeros(2)
    torch.ops.npu.npu_prefetch(x, None, max_size=7, offset=0)
    assert calls[0]["offset"] == 0


def test_defaults_of_one_call_are_not_those_of_the_next(monkeypatch):
    name = "npu::npu_moe_init_routing_v2"
    if name not in KERNELS:
        pytest.skip("no kernel yet")
    calls = []

    def change(sim, **arguments):
        calls.append(list(arguments["active_expert_range"]))
        arguments["active_expert_range"].append(1)
        x = arguments["x"]
        return x, x, x, x

    monkeypatch.setitem(KERNELS, name, dataclasses.replace(KERNELS[name], run=change))
    x = torch.zeros(2, 2)
    torch.ops.npu.npu_moe_init_routing_v2(x, x)
    torch.ops.npu.npu_moe_init_routing_v2(x, x)
    assert calls == [[], []]


def test_overloads_are_kernels_of_their_own():
    w = torch.zeros(16, 32, dtype=torch.int8)
    nz = torch.ops.npu.npu_format_cast(w, 29)
    like = torch.ops.npu.npu_format_cast(w, nz)
    assert torch.ops.npu.get_npu_format(like) == 29
    assert torch.ops.npu.get_npu_format(w) == 2


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_every_schema_is_registered_as_written(namespace):
    for name, text in schema_strings(namespace).items():
        packet, _, overload = name.partition(".")
        found = getattr(getattr(torch.ops, namespace), packet)
        assert str(getattr(found, overload or "default")._schema) == str(torch._C.parse_schema(text))


def test_every_kernel_is_bound_under_its_schema():
    known = {f"{namespace}::{name}" for namespace in NAMESPACES for name in schema_strings(namespace)}
    assert KERNELS.keys() <= known


def test_an_operator_without_a_kernel_says_so():
    name = next(f"npu::{name}" for name in schema_strings("npu") if f"npu::{name}" not in KERNELS)
    with pytest.raises(SimulatorError, match="no simulated kernel"):
        _kernel_of(name, SimulatedChip(chip=Chip.A3))


def test_an_operator_of_another_chip_is_refused():
    x = torch.zeros(2, 4, dtype=torch.bfloat16)
    gamma = torch.ones(4, dtype=torch.bfloat16)
    torch.ops._C_ascend.npu_rms_norm_dynamic_quant(x + 1, gamma)
    simulator.install(Chip.A950)
    with pytest.raises(SimulatorError, match="builds it for a2/a3, this is 950"):
        torch.ops._C_ascend.npu_rms_norm_dynamic_quant(x + 1, gamma)


def test_operators_without_tensors_dispatch(monkeypatch):
    name = "custom::npu_sparse_attn_sharedkv_metadata"
    calls = received(monkeypatch, name)
    torch.ops.custom.npu_sparse_attn_sharedkv_metadata(64, 1, 512, batch_size=2)
    assert (calls[0]["num_heads_q"], calls[0]["batch_size"], calls[0]["ori_win_left"]) == (64, 2, 127)
    made = torch.ops.custom.npu_sparse_attn_sharedkv_metadata(64, 1, 512, batch_size=2, device="meta")
    assert made.is_meta
    assert len(calls) == 1


def test_meta_tensors_give_meta_results():
    x = torch.empty(3, 8, device="meta", dtype=torch.bfloat16)
    y, rstd = torch.ops.npu.npu_rms_norm(x, torch.empty(8, device="meta", dtype=torch.bfloat16))
    assert y.is_meta
    assert y.shape == (3, 8)
    assert rstd.shape == (3, 1)
    assert rstd.dtype is torch.float32


def test_uninstalled_kernels_refuse():
    simulator.uninstall()
    assert simulator.installed() is None
    with pytest.raises(SimulatorError, match="uninstalled"):
        torch.ops.npu.npu_rms_norm(torch.ones(1, 2), torch.ones(2))


def test_errors_are_runtime_errors_as_torch_raises_them():
    with pytest.raises(RuntimeError, match="gamma"):
        torch.ops.npu.npu_rms_norm(torch.ones(1, 2), torch.ones(3))


def test_declare_knows_its_namespaces():
    simulator.declare("custom", chip=Chip.A950)
    with pytest.raises(ContractError, match="no schemas are known for namespace aten"):
        simulator.declare("aten")


@pytest.mark.parametrize(
    ("number", "dtype"),
    [
        (1, torch.int8),
        (15, torch.bfloat16),
        (24, torch.float8_e4m3fn),
        (292, torch.float8_e4m3fn),
        (291, torch.float8_e5m2),
        (293, torch.float8_e8m0fnu),
        (296, torch.float4_e2m1fn_x2),
        (torch.int8, torch.int8),
    ],
)
def test_dtype_numbers_of_both_kinds(number, dtype):
    assert dtypes.dtype_of(number, "operator") is dtype


@pytest.mark.parametrize("number", [44, 45, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2, 290, 999])
def test_other_dtypes_are_refused(number):
    with pytest.raises(SimulatorError, match="operator:"):
        dtypes.dtype_of(number, "operator")


def test_packages_answer_by_chip_and_mask():
    a3 = simulator.packages(Chip.A3)
    assert a3.missing_module("torch_npu") is None
    assert "not simulated" in str(a3.missing_module("sgl_kernel_npu"))
    assert a3.missing_operator("npu::npu_rms_norm") is None
    assert a3.missing_operator("_C_ascend::npu_rms_norm_dynamic_quant") is None
    assert "is 950" in str(
        simulator.packages(Chip.A950).missing_operator("_C_ascend::npu_rms_norm_dynamic_quant")
    )
    assert "no simulated kernel" in str(a3.missing_operator("npu::npu_mrope"))
    assert "namespace sgl" in str(a3.missing_operator("sgl::anything"))
    masked = simulator.packages(Chip.A3, frozenset({"vllm_ascend"}))
    assert "masked" in str(masked.missing_module("vllm_ascend"))
    assert "masked" in str(masked.missing_operator("_C_ascend::npu_hc_post"))
    assert masked.missing_operator("custom::npu_hc_post") is None


def test_symbols_are_those_of_kernels_and_can_be_masked(monkeypatch):
    name = "custom::npu_hc_post"
    with_symbol = dataclasses.replace(KERNELS[name], symbol="aclnnTried", symbol_package="ops_transformer")
    monkeypatch.setitem(KERNELS, name, with_symbol)
    assert simulator.packages(Chip.A3).missing_symbol("aclnnTried") is None
    masked = simulator.packages(Chip.A3, frozenset({"ops_transformer"}))
    assert masked.missing_symbol("aclnnTried") == "aclnnTried: package ops_transformer is masked out"
    assert "no simulated kernel" in str(masked.missing_symbol("aclnnNever"))

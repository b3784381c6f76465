"""Expert adapters against the contract, on simulated chips."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Arithmetic, Target
from ascend_v4.errors import ContractError
from ascend_v4.operators import simulator
from ascend_v4.operators.contract import WAIVABLE
from ascend_v4.operators.contracts.moe import routed_experts
from ascend_v4.operators.contracts.quantize import WeightFormat
from tests.npu.expert_blocks import ON_CHIP, PROVIDERS, candidate, drawn_block, require_alike

INT8, INT4 = WeightFormat.INT8_CHANNEL, WeightFormat.INT4_CHANNEL
IDS = [f"{chip.value}-{format.name}" for chip, format in ON_CHIP]


@pytest.fixture(params=ON_CHIP, ids=IDS)
def chip_and_format(request):
    chip, _ = request.param
    simulator.install(chip, waived=frozenset(WAIVABLE), arithmetic=Arithmetic.IDEAL)
    yield request.param
    simulator.uninstall()


@pytest.fixture(params=PROVIDERS)
def implementation(request, chip_and_format):
    return candidate(routed_experts, request.param, chip_and_format[0])


@pytest.fixture
def format(chip_and_format):
    return chip_and_format[1]


@pytest.mark.parametrize("tokens", [1, 33])
def test_experts_agree_with_the_contract(implementation, format, tokens):
    block = drawn_block(f"agree-{tokens}", format, tokens=tokens)
    require_alike(block.run(implementation), block.reference(), format)


def test_the_clamp_bites(implementation, format):
    block = drawn_block("clamp", format)
    close, far = block.reference(limit=0.25), block.reference(limit=100.0)
    assert (close - far).abs().max() > 0.1 * far.abs().max()
    require_alike(block.run(implementation, limit=0.25), close, format)


def test_no_tokens_give_no_rows(implementation, format):
    block = drawn_block("none", format, tokens=2)
    empty = replace(
        block,
        x=block.x[:0],
        weights=block.weights[:0],
        expert_ids=block.expert_ids[:0],
    )
    out = empty.run(implementation)
    assert out.shape == (0, 128)
    assert out.dtype is torch.float32


def test_the_routing_weight_is_applied_once(implementation, format):
    block = drawn_block("once", format)
    doubled = replace(block, weights=2 * block.weights)
    torch.testing.assert_close(doubled.run(implementation), 2 * block.run(implementation))


def test_every_choice_keeps_its_own_weight(implementation, format):
    block = drawn_block("choices", format, tokens=5)
    weights = torch.zeros_like(block.weights)
    weights[:, 1] = 1.0
    only = replace(block, weights=weights)
    require_alike(only.run(implementation), only.reference(), format)


def test_inputs_need_not_be_contiguous(implementation, format):
    block = drawn_block("strided", format)
    wide = torch.stack((block.x, block.x), dim=-1)[..., 0]
    strided = replace(
        block,
        x=wide,
        weights=block.weights.t().contiguous().t(),
        expert_ids=block.expert_ids.t().contiguous().t(),
    )
    assert torch.equal(strided.run(implementation), block.run(implementation))


def test_float32_inputs_are_refused(implementation, format):
    block = drawn_block("float32", format)
    with pytest.raises(ContractError, match=r"x has dtype torch\.float32"):
        replace(block, x=block.x.float()).run(implementation)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_int4_gates_may_stand_beside_int8_down_projections(provider):
    simulator.install(Chip.A3, waived=frozenset(WAIVABLE))
    block = drawn_block("mixed", INT4, down=INT8)
    require_alike(block.run(candidate(routed_experts, provider, Chip.A3)), block.reference(), INT4)
    simulator.uninstall()


@pytest.mark.parametrize(
    ("provider", "chip", "sizes", "size"),
    [
        ("torch_npu", Chip.A3, {"experts": 1025}, "experts"),
        ("torch_npu", Chip.A2, {"intermediate": 10560}, "intermediate"),
        ("torch_npu", Chip.A3, {"intermediate": 96}, "intermediate"),
        ("cann-recipes", Chip.A3, {"intermediate": 5184}, "intermediate"),
        ("vllm-ascend", Chip.A2, {"intermediate": 5184}, "intermediate"),
        ("vllm-ascend", Chip.A950, {"intermediate": 192}, "intermediate"),
        ("cann-recipes", Chip.A950, {"intermediate": 192}, "intermediate"),
        ("torch_npu", Chip.A950, {"hidden": 96}, "hidden"),
    ],
)
def test_sizes_just_outside_the_vendor_s_are_refused(provider, chip, sizes, size):
    target = Target(device="sim", chip=chip, packages=simulator.packages(chip))
    refusal = candidate(routed_experts, provider, chip).refusal(target, sizes)
    assert refusal is not None
    assert f"{size} is {sizes[size]}" in refusal

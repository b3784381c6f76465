"""Linear adapters: how weights are laid out at load, where products are split, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Arithmetic
from ascend_v4.errors import ContractError
from ascend_v4.operators import simulator
from ascend_v4.operators.contract import WAIVABLE, Implementation
from ascend_v4.operators.contracts.linear import grouped_linear, linear
from ascend_v4.operators.contracts.quantize import ActivationFormat, StoredWeight, WeightFormat
from ascend_v4.operators.npu.constants import MATMUL_AXIS_LIMIT
from ascend_v4.operators.npu.formats import blocks_to_mx_scale, mx_scale_pairs, to_nz
from ascend_v4.operators.npu.linear import Int8Weight, MxWeight, mx_codes, prepare_int8, prepare_mx
from ascend_v4.operators.npu.linear_grouped import prepare_mx_groups, prepare_real
from ascend_v4.operators.testing.draw import Draw
from tests.npu.expert_blocks import candidate

INT8, MXFP8 = ActivationFormat.INT8_TOKEN, ActivationFormat.MXFP8


@pytest.fixture
def on_chip():
    """Simulates a chip, ideal and waived, until the test ends."""

    def put(chip: Chip) -> None:
        simulator.install(chip, waived=frozenset(WAIVABLE), arithmetic=Arithmetic.IDEAL)

    yield put
    simulator.uninstall()


@pytest.fixture
def draw(request):
    return Draw(request.node.name, dtype=torch.bfloat16, device=torch.device("cpu"))


def prepared_by(implementation: Implementation, stored: StoredWeight) -> Any:
    assert implementation.prepare is not None
    return implementation.prepare(stored, copy=True)


def part_shapes(weight: object) -> list[tuple[int, ...]]:
    assert isinstance(weight, Int8Weight)
    return [tuple(part.codes.shape) for part in weight.parts]


def test_an_int8_weight_is_input_major(on_chip, draw):
    on_chip(Chip.A3)
    prepared = prepare_int8(draw.integer_weight(33, 48, bits=8), copy=True)
    assert part_shapes(prepared) == [(48, 33)]


def test_a_weight_of_whole_tiles_is_cast_and_others_are_not(on_chip):
    on_chip(Chip.A2)
    for inputs, outputs, is_cast in ((16, 32, True), (48, 64, True), (24, 32, False), (16, 48, False)):
        weight_KN = torch.zeros(inputs, outputs, dtype=torch.int8)
        assert (to_nz(weight_KN) is not weight_KN) is is_cast, (inputs, outputs)


def test_outputs_at_the_axis_limit_stay_in_one_product_and_beyond_it_are_split(on_chip, draw):
    on_chip(Chip.A3)
    at = prepare_int8(draw.integer_weight(MATMUL_AXIS_LIMIT, 16, bits=8), copy=True)
    beyond = prepare_int8(draw.integer_weight(MATMUL_AXIS_LIMIT + 1, 16, bits=8), copy=True)
    assert part_shapes(at) == [(16, 65535)]
    assert part_shapes(beyond) == [(16, 32768), (16, 32768)]


def test_inputs_beyond_the_axis_limit_are_refused(draw):
    codes = torch.zeros(2, MATMUL_AXIS_LIMIT + 1, dtype=torch.int8)
    wide = StoredWeight(codes, torch.ones(2), WeightFormat.INT8_CHANNEL)
    with pytest.raises(ContractError, match="65536 inputs; npu_quant_matmul takes at most 65535"):
        prepare_int8(wide, copy=True)


def test_an_int4_weight_is_widened_to_the_same_whole_numbers(on_chip, draw):
    on_chip(Chip.A3)
    stored = draw.integer_weight(48, 24, bits=4)
    prepared = prepare_int8(stored, copy=True)
    assert isinstance(prepared, Int8Weight)
    (part,) = prepared.parts
    assert torch.equal(part.codes.t().float(), stored.whole_numbers())


@pytest.mark.parametrize("make", ["fp8_weight", "fp4_weight", "mxfp8_weight"])
def test_integer_chips_refuse_weights_of_floats(draw, make):
    with pytest.raises(ContractError, match="Repack the checkpoint with --to w8a8 or w4a8"):
        prepare_int8(getattr(draw, make)(4, 64), copy=True)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("prepare", [prepare_mx, prepare_mx_groups])
def test_950_refuses_integer_weights(draw, prepare, bits):
    with pytest.raises(ContractError, match="Repack the checkpoint with --to mx"):
        prepare(draw.integer_weight(4, 64, bits=bits), copy=True)


@pytest.mark.parametrize("make", ["fp8_weight", "fp4_weight", "mxfp8_weight"])
def test_every_format_becomes_e4m3_of_the_same_numbers(draw, make):
    stored = getattr(draw, make)(130, 160)
    codes_NK, scale_NG = mx_codes(stored)
    assert codes_NK.dtype is torch.float8_e4m3fn
    same = StoredWeight(codes_NK, scale_NG, WeightFormat.MXFP8)
    assert torch.equal(same.to_float32(), stored.to_float32())


def test_block_scales_are_repeated_over_rows_and_groups(draw):
    blocks = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)
    scale_NG = blocks_to_mx_scale(blocks, num_outputs=129, num_inputs=161)
    assert scale_NG.shape == (129, 6)
    assert scale_NG[127].tolist() == [1, 1, 1, 1, 2, 2]
    assert scale_NG[128].tolist() == [3, 3, 3, 3, 4, 4]


def test_scales_lie_in_pairs_and_an_odd_one_is_padded(draw):
    scale_NG = torch.arange(15, dtype=torch.uint8).view(3, 5)
    pairs_PN2 = mx_scale_pairs(scale_NG)
    assert pairs_PN2.shape == (3, 3, 2)
    assert pairs_PN2[1, 2].tolist() == [12, 13]
    assert pairs_PN2[2, 0].tolist() == [4, 0]


def test_an_mx_weight_is_a_transposed_view_of_its_file(draw):
    stored = draw.mxfp8_weight(5, 128)
    prepared = prepare_mx(stored, copy=True)
    assert isinstance(prepared, MxWeight)
    assert prepared.codes.data_ptr() == stored.codes.data_ptr()
    assert prepared.codes.stride() == (1, 128)
    assert prepared.scale.shape == (2, 5, 2)


@pytest.mark.parametrize("chip", Chip, ids=lambda chip: chip.value)
def test_no_tokens_reach_no_kernel(chip, draw):
    is_950 = chip is Chip.A950
    stored = draw.mxfp8_weight(34, 64) if is_950 else draw.integer_weight(34, 64, bits=4)
    implementation = candidate(linear, "torch_npu", chip)
    if not is_950:
        simulator.install(chip)
    prepared = prepared_by(implementation, stored)
    simulator.uninstall()
    nothing = torch.zeros(0, 64, dtype=torch.bfloat16)
    out_TN = implementation.call(nothing, prepared, activation=MXFP8 if is_950 else INT8)
    assert (out_TN.shape, out_TN.dtype) == ((0, 34), torch.bfloat16)


def test_a_row_of_zeros_gives_zeros(on_chip, draw):
    on_chip(Chip.A3)
    implementation = candidate(linear, "torch_npu", Chip.A3)
    prepared = prepared_by(implementation, draw.integer_weight(32, 64, bits=8))
    x_TK = draw.normal(3, 64)
    x_TK[1] = 0.0
    out_TN = implementation.call(x_TK, prepared, activation=INT8)
    assert torch.equal(out_TN[1], torch.zeros(32, dtype=torch.bfloat16))
    assert out_TN[0].abs().max() > 0


def test_the_grouped_weight_keeps_numbers_that_bfloat16_does_not_hold(draw):
    integers = draw.integer_weight(6, 32, bits=8)
    powers = draw.fp8_weight(6, 32)
    assert prepare_real(integers, copy=True).matrix.dtype is torch.float32
    prepared = prepare_real(powers, copy=True)
    assert prepared.matrix.dtype is torch.bfloat16
    assert torch.equal(prepared.matrix.float(), powers.to_float32())


def test_a_grouped_weight_of_integers_is_multiplied_in_float32(on_chip, draw):
    on_chip(Chip.A2)
    stored = draw.integer_weight(2 * 16, 64, bits=8)
    implementation = candidate(grouped_linear, "torch_npu", Chip.A2)
    x_TGK = draw.normal(3, 2, 64)
    none = ActivationFormat.NONE
    got = implementation.call(x_TGK, prepared_by(implementation, stored), activation=none)
    grouped_linear.tolerance.require(got, grouped_linear.reference(x_TGK, stored, activation=none))

"""How routed experts are laid out at load. The cast to FRACTAL_NZ is left out here: it moves tiles only."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ascend_v4.errors import CheckpointError
from ascend_v4.operators.contracts.moe import ExpertWeights
from ascend_v4.operators.contracts.quantize import StoredWeight, WeightFormat, unpack_int4
from ascend_v4.operators.npu import experts_weights
from ascend_v4.operators.npu.experts_weights import (
    INTEGERS,
    MICROSCALED,
    GateUp,
    GroupedExperts,
    interleaved_int4,
    prepare_grouped_experts,
)
from ascend_v4.operators.testing.draw import Draw
from tests.npu.expert_blocks import CPU, drawn_experts

INT8, INT4 = WeightFormat.INT8_CHANNEL, WeightFormat.INT4_CHANNEL
HIDDEN, INNER = 64, 128


@pytest.fixture(autouse=True)
def row_major(monkeypatch):
    """Leaves the bytes where they are, and notes in which dtype they would have been cast."""
    seen: list[torch.dtype] = []

    def kept(weight):
        seen.append(weight.dtype)
        return weight

    monkeypatch.setattr(experts_weights, "to_nz", kept)
    monkeypatch.setattr(experts_weights, "_fp4_nz", kept)
    return seen


def stored(format: WeightFormat, down: WeightFormat | None = None) -> ExpertWeights:
    draw = Draw(f"experts-{format}-{down}", dtype=torch.bfloat16, device=CPU)
    return drawn_experts(draw, format, down, experts=3, hidden=HIDDEN, inner=INNER)


def prepared(weights: ExpertWeights, order: GateUp = GateUp.HALVES) -> GroupedExperts:
    formats = INTEGERS if weights.down[0].is_integer else MICROSCALED
    return prepare_grouped_experts(weights, copy=False, order=order, formats=formats)


def scale_of(weight: StoredWeight) -> torch.Tensor:
    assert weight.scale is not None
    return weight.scale


def joined_weight(gate: StoredWeight, up: StoredWeight) -> StoredWeight:
    scale = torch.cat((scale_of(gate), scale_of(up)))
    return StoredWeight(torch.cat((gate.codes, up.codes)), scale, gate.format)


def whole(weight: StoredWeight) -> torch.Tensor:
    return weight.whole_numbers().to(torch.int8)


def int4_of(codes_EKJ: torch.Tensor) -> torch.Tensor:
    """Numbers [E, K, N] of int32 codes [E, K, N/8], read as the kernel does: lowest nibble first."""
    nibbles = torch.stack([(codes_EKJ >> (4 * place)) & 15 for place in range(8)], dim=-1).flatten(-2)
    return (nibbles - ((nibbles & 8) << 1)).to(torch.int8)


def test_int8_experts_have_inputs_as_rows_and_gates_before_ups():
    weights = stored(INT8)
    gate_up = prepared(weights).gate_up
    assert gate_up.codes.shape == (3, HIDDEN, 2 * INNER)
    assert gate_up.codes.is_contiguous()
    for index, (gate, up) in enumerate(weights.gate_up):
        assert torch.equal(gate_up.codes[index, :, :INNER], gate.codes.t())
        assert torch.equal(gate_up.codes[index, :, INNER:], up.codes.t())
        assert torch.equal(gate_up.scale[index], torch.cat((scale_of(gate), scale_of(up))))


def test_interleaved_int8_experts_alternate_gate_and_up_in_codes_and_scales():
    weights = stored(INT8)
    gate_up = prepared(weights, GateUp.INTERLEAVED).gate_up
    for index, (gate, up) in enumerate(weights.gate_up):
        assert torch.equal(gate_up.codes[index, :, 0::2], gate.codes.t())
        assert torch.equal(gate_up.codes[index, :, 1::2], up.codes.t())
        assert torch.equal(gate_up.scale[index, 0::2], scale_of(gate))
        assert torch.equal(gate_up.scale[index, 1::2], scale_of(up))


def test_scales_are_float32_before_the_activation_and_bfloat16_after_it():
    experts = prepared(stored(INT8))
    assert experts.gate_up.scale.dtype is torch.float32
    assert experts.down.scale.dtype is torch.bfloat16


@pytest.mark.parametrize("order", GateUp)
def test_int4_experts_hold_eight_outputs_per_int32_lowest_nibble_first(order):
    weights = stored(INT4)
    experts = prepared(weights, order)
    assert experts.gate_up.codes.dtype is torch.int32
    assert experts.gate_up.codes.shape == (3, HIDDEN, 2 * INNER // 8)
    numbers_EKN = int4_of(experts.gate_up.codes)
    gates = numbers_EKN[..., 0::2] if order is GateUp.INTERLEAVED else numbers_EKN[..., :INNER]
    ups = numbers_EKN[..., 1::2] if order is GateUp.INTERLEAVED else numbers_EKN[..., INNER:]
    for index, (gate, up) in enumerate(weights.gate_up):
        assert torch.equal(gates[index], whole(gate).t())
        assert torch.equal(ups[index], whole(up).t())
    assert torch.equal(int4_of(experts.down.codes)[2], whole(weights.down[2]).t())


def test_int4_experts_are_cast_while_they_are_bytes(row_major):
    prepared(stored(INT4))
    assert row_major == [torch.int8, torch.int8]


def test_int4_bias_is_eight_times_the_sum_of_each_output_s_numbers():
    weights = stored(INT4)
    down = prepared(weights).down
    assert down.bias is not None
    want = 8 * whole(weights.down[1]).double().sum(1) * scale_of(weights.down[1]).double()
    torch.testing.assert_close(down.bias[1].double(), want, rtol=1e-6, atol=0)


def test_int4_scales_are_the_bits_of_float32_in_int64():
    weights = stored(INT4)
    scale = prepared(weights).down.scale
    assert scale.dtype is torch.int64
    assert torch.equal(scale.to(torch.int32).view(torch.float32)[0], scale_of(weights.down[0]))


@pytest.mark.parametrize("first", [-8, -1, 0, 7])
def test_interleaving_int4_keeps_every_pair_of_numbers(first):
    gate_NK = torch.arange(first, first + 8).remainder(16).sub(8).view(4, 2).to(torch.int8)
    up_NK = gate_NK.flip(0)

    def packed(numbers_NK):
        return (numbers_NK[1::2] << 4) | (numbers_NK[0::2] & 15)

    got = unpack_int4(interleaved_int4(packed(gate_NK), packed(up_NK)))
    assert torch.equal(got, torch.stack((gate_NK, up_NK), dim=1).flatten(0, 1))


@pytest.mark.parametrize("format", [WeightFormat.MXFP8, WeightFormat.FP4_GROUP], ids=lambda each: each.name)
def test_microscaled_experts_are_transposed_views_with_their_scales_in_pairs(format):
    weights = stored(format)
    down = prepared(weights).down
    inputs = weights.down[0].codes.shape[1]
    assert down.codes.shape == (3, inputs, HIDDEN)
    assert down.codes.stride(-2) == 1
    assert torch.equal(down.codes[1].view(torch.uint8), weights.down[1].codes.view(torch.uint8).t())
    assert down.scale.shape == (3, INNER // 64, HIDDEN, 2)
    bytes_NG = scale_of(weights.down[1]).view(torch.uint8)
    assert torch.equal(down.scale[1, 1, :, 0], bytes_NG[:, 2])
    assert torch.equal(down.scale[1, 0, :, 1], bytes_NG[:, 1])


def test_block_scales_are_repeated_for_every_group_of_32_inputs():
    weights = stored(WeightFormat.FP8_BLOCK)
    experts = prepared(weights)
    assert experts.gate_up.format is WeightFormat.MXFP8
    assert experts.gate_up.scale.shape == (3, HIDDEN // 64, 2 * INNER, 2)
    for index, (gate, up) in enumerate(weights.gate_up):
        for half, weight in enumerate((gate, up)):
            (byte,) = scale_of(weight).view(torch.uint8).flatten().tolist()
            rows = slice(half * INNER, (half + 1) * INNER)
            assert bool((experts.gate_up.scale[index, :, rows] == byte).all())


def test_a_joined_gate_and_up_is_split_in_the_middle():
    weights = stored(INT8)
    joined = ExpertWeights(
        gate_up=tuple(
            (
                StoredWeight(
                    torch.cat((gate.codes, up.codes)), torch.cat((scale_of(gate), scale_of(up))), INT8
                ),
            )
            for gate, up in weights.gate_up
        ),
        down=weights.down,
    )
    order = GateUp.INTERLEAVED
    assert torch.equal(prepared(joined, order).gate_up.codes, prepared(weights, order).gate_up.codes)


@pytest.mark.parametrize(
    ("gate_up", "down", "formats"),
    [
        (WeightFormat.PLAIN, WeightFormat.PLAIN, INTEGERS),
        (INT8, WeightFormat.PLAIN, INTEGERS),
        (WeightFormat.FP4_GROUP, WeightFormat.FP4_GROUP, INTEGERS),
        (INT8, INT8, MICROSCALED),
    ],
)
def test_experts_that_the_chip_cannot_multiply_are_refused(gate_up, down, formats):
    prepare = partial(prepare_grouped_experts, copy=False, order=GateUp.HALVES, formats=formats)
    taken = ", ".join(each.name for each in formats)
    with pytest.raises(CheckpointError, match=f"take {taken}. Repack"):
        prepare(stored(gate_up, down))


def test_experts_of_one_layer_in_two_formats_are_refused():
    weights = stored(INT8)
    mixed = ExpertWeights(weights.gate_up, (*weights.down[:2], stored(INT4).down[2]))
    with pytest.raises(CheckpointError, match="stored in INT4_CHANNEL, INT8_CHANNEL; one grouped product"):
        prepared(mixed)


def test_projections_may_differ_in_format():
    experts = prepared(stored(INT4, INT8))
    assert (experts.gate_up.format, experts.down.format) == (INT4, INT8)

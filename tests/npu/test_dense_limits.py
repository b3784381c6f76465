"""The adapters' limits and the simulated kernels' own: just outside, both refuse; inside, neither does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Target
from ascend_v4.errors import SimulatorError
from ascend_v4.operators import simulator
from ascend_v4.operators.contract import Implementation
from ascend_v4.operators.contracts.hyper_connections import hyper_connection_post, hyper_connection_pre
from ascend_v4.operators.contracts.linear import grouped_linear, linear
from ascend_v4.operators.contracts.quantize import ActivationFormat
from ascend_v4.operators.contracts.rope import rope_frequencies, rotate
from ascend_v4.operators.npu.rope import plan_rope
from ascend_v4.operators.testing.draw import Draw
from tests.npu.expert_blocks import candidate

CPU = torch.device("cpu")
VENDORS = ("vllm-ascend", "cann-recipes")


def pre(chosen: Implementation, *, hidden: int = 4096, streams: int = 4, sinkhorn: int = 20) -> None:
    mixes = (2 + streams) * streams
    chosen.call(
        torch.zeros(1, streams, hidden, dtype=torch.bfloat16),
        torch.zeros(mixes, streams * hidden),
        torch.zeros(3),
        torch.zeros(mixes),
        sinkhorn_iterations=sinkhorn,
        norm_eps=1e-6,
        mix_eps=1e-6,
    )


def post(chosen: Implementation, *, streams: int = 4, hidden: int = 4096) -> None:
    output = torch.zeros(1, hidden, dtype=torch.bfloat16)
    wide = torch.zeros(1, streams, hidden, dtype=torch.bfloat16)
    chosen.call(output, wide, torch.zeros(1, streams), torch.zeros(1, streams, streams))


def turn(chosen: Implementation, *, head_dim: int = 128, rope_dim: int = 64, heads: int = 1) -> None:
    plan = plan_rope(torch.arange(1), rope_frequencies(rope_dim, theta=10000.0))
    width = max(head_dim, rope_dim)
    chosen.call(torch.zeros(1, heads, width, dtype=torch.bfloat16), plan)


def multiply_groups(chosen: Implementation, *, o_group_inputs: int = 64, o_lora: int = 16) -> None:
    draw = Draw("grouped", dtype=torch.bfloat16, device=CPU)
    is_950 = chosen.needs.chips == (Chip.A950,)
    make = draw.mxfp8_weight if is_950 else draw.plain_weight
    activation = ActivationFormat.MXFP8 if is_950 else ActivationFormat.NONE
    assert chosen.prepare is not None
    prepared = chosen.prepare(make(2 * o_lora, o_group_inputs), copy=True)
    chosen.call(draw.normal(1, 2, o_group_inputs), prepared, activation=activation)


@dataclass(frozen=True)
class Edge:
    """One size of one adapter: a value that it takes, and the nearest that it does not."""

    chosen: Implementation
    chip: Chip
    call: Callable[..., None]
    size: str
    inside: int
    outside: int

    def __str__(self) -> str:
        return f"{self.call.__name__}-{self.chosen.provider}-{self.chip.value}-{self.size}-{self.outside}"


def edges() -> list[Edge]:
    found = []
    for chip in Chip:
        for name in VENDORS:
            chosen = candidate(hyper_connection_pre, name, chip)
            found += [Edge(chosen, chip, pre, "hidden", 4096, each) for each in (4095, 4097, 4224)]
            found += [Edge(chosen, chip, pre, "hidden", 7168, 7169)]
            found += [Edge(chosen, chip, pre, "streams", 4, each) for each in (3, 5)]
            chosen = candidate(hyper_connection_post, name, chip)
            found += [Edge(chosen, chip, post, "streams", 4, each) for each in (3, 5)]
            chosen = candidate(rotate, name, chip)
            found += [Edge(chosen, chip, turn, "head_dim", 1024, 1026)]
        recipes = candidate(hyper_connection_pre, "cann-recipes", chip)
        found += [Edge(recipes, chip, pre, "sinkhorn", 20, each) for each in (19, 21)]
        recipes = candidate(hyper_connection_post, "cann-recipes", chip)
        found += [Edge(recipes, chip, post, "hidden", 7168, each) for each in (4095, 7169)]
        composed = candidate(rotate, "torch_npu", chip)
        found += [Edge(composed, chip, turn, "rope_dim", 894, 896)]
        found += [Edge(composed, chip, turn, "heads", 999, 1000)]
    found += [
        Edge(candidate(grouped_linear, "torch_npu", chip), chip, multiply_groups, size, *values)
        for chip, size, values in (
            *((chip, "o_group_inputs", (65520, 65536)) for chip in (Chip.A2, Chip.A3)),
            *((chip, "o_group_inputs", (65520, 65519)) for chip in (Chip.A2, Chip.A3)),
            *((chip, "o_lora", (32, 40)) for chip in (Chip.A2, Chip.A3)),
            (Chip.A950, "o_group_inputs", (64, 96)),
        )
    ]
    return found


@pytest.fixture
def on_chip():
    yield simulator.install
    simulator.uninstall()


@pytest.mark.parametrize("edge", edges(), ids=str)
def test_adapter_and_kernel_refuse_the_same_size(edge, on_chip):
    on_chip(edge.chip)
    target = Target(device="sim", chip=edge.chip, packages=simulator.packages(edge.chip))
    assert edge.chosen.refusal(target, {edge.size: edge.inside}) is None
    assert edge.size in str(edge.chosen.refusal(target, {edge.size: edge.outside}))
    edge.call(edge.chosen, **{edge.size: edge.inside})
    with pytest.raises(SimulatorError):
        edge.call(edge.chosen, **{edge.size: edge.outside})


@pytest.mark.parametrize("size", ["hidden", "q_lora", "intermediate"])
def test_layers_beyond_the_axis_limit_are_refused_by_name(size):

    target = Target(device="sim", chip=Chip.A3, packages=simulator.packages(Chip.A3))
    chosen = candidate(linear, "torch_npu", Chip.A3)
    assert chosen.refusal(target, {size: 65535}) is None
    assert "at most 65535" in str(chosen.refusal(target, {size: 65536}))

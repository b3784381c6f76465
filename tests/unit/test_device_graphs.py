"""Recorded steps: what is copied, what is refused, and what a replay computes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cached_property

import pytest
import torch
from torch import Tensor

from ascend_v4.device.cpu import CpuDevice
from ascend_v4.device.graphs import Overwriter, StepChangedError, StepGraphs, graph_sizes
from ascend_v4.device.recorder import record
from ascend_v4.errors import DeviceError


@dataclass(frozen=True)
class Inner:
    rows: Tensor
    ratio: int = 4
    parts: tuple[Tensor, ...] = ()
    table: dict[str, Tensor] = field(default_factory=dict)
    starts: tuple[int, ...] = (0,)

    @cached_property
    def doubled(self) -> Tensor:
        return self.rows * 2


@dataclass(frozen=True, slots=True)
class Outer:
    ids: Tensor
    inner: Inner | None = None


PUT = Overwriter({Inner: frozenset({"starts"})}).put


def step_of(*values: float, **inner: object) -> Outer:
    rows = torch.tensor(values, dtype=torch.float32)
    return Outer(rows + 1, Inner(rows, **inner))  # type: ignore[arg-type]


class RecordingDevice(CpuDevice):
    """Records like the simulated NPU, without warming up."""

    def capture(self, run):
        return record(run)


def test_overwrite_reaches_every_tensor_and_keeps_its_memory():
    recorded = step_of(1, 2, parts=(torch.zeros(2),), table={"a": torch.zeros(1)})
    assert recorded.inner is not None
    places = (recorded.ids.data_ptr(), recorded.inner.doubled.data_ptr())
    PUT(recorded, step_of(5, 6, parts=(torch.ones(2),), table={"a": torch.ones(1)}, starts=(9,)))
    assert recorded.ids.tolist() == [6, 7]
    assert recorded.inner.doubled.tolist() == [10, 12]
    assert (recorded.inner.parts[0].tolist(), recorded.inner.table["a"].tolist()) == ([1, 1], [1])
    assert places == (recorded.ids.data_ptr(), recorded.inner.doubled.data_ptr())


@pytest.mark.parametrize(
    ("fresh", "complaint"),
    [
        (step_of(1, 2, 3), r"step.ids is torch.float32 \(3,\), recorded torch.float32 \(2,\)"),
        (step_of(1, 2, ratio=8), r"step.inner.ratio is 8, recorded 4"),
        (Outer(torch.zeros(2)), r"step.inner is NoneType, recorded Inner"),
        (step_of(1, 2, parts=(torch.zeros(1),)), r"step.inner.parts has parts \[0\], recorded \[\]"),
        (step_of(1, 2, table={"b": torch.zeros(1)}), r"step.inner.table has parts \['b'\], recorded \[\]"),
        (Outer(torch.zeros(2).double()), r"float64"),
    ],
)
def test_a_step_that_is_not_alike_is_refused(fresh, complaint):
    with pytest.raises(StepChangedError, match=complaint):
        PUT(step_of(1, 2), fresh)


def test_fields_of_the_host_may_differ_and_no_others():
    recorded = step_of(1, 2, starts=(3,))
    PUT(recorded, step_of(5, 6, starts=(7, 8)))
    assert recorded.inner is not None
    assert recorded.inner.starts == (3,)
    with pytest.raises(StepChangedError, match=r"step.inner.starts.0 is 7, recorded 3"):
        Overwriter({}).put(recorded, step_of(5, 6, starts=(7,)))


def test_a_replay_computes_on_what_now_stands_in_the_same_memory():
    x, weight, cache = torch.randn(3, 4), torch.randn(4, 4), torch.zeros(5, 4)
    slots = torch.tensor([0, 2, 4])

    def run():
        hidden = torch.relu(x @ weight).reshape(3, 2, 2).transpose(1, 2).flatten(1)
        cache.index_copy_(0, slots, hidden)
        values, _ = hidden.topk(2, dim=1)
        first, second = values.split(1, dim=1)
        return torch.cat((first, second), dim=1).softmax(1) + cache.sum()

    with torch.inference_mode():
        graph = record(run)
        x.copy_(torch.randn(3, 4))
        slots.copy_(torch.tensor([1, 2, 3]))
        cache.zero_()
        graph.replay()
        replayed, written = graph.output.clone(), cache.clone()
        cache.zero_()
        assert torch.equal(replayed, run())
    assert torch.equal(written, cache)


@pytest.mark.parametrize(
    ("run", "named"),
    [
        (lambda x: x[:1] * x.sum().item(), "Tensor.item"),
        (lambda x: x * len(x.tolist()), "Tensor.tolist"),
        (lambda x: x if x.sum() > 0 else -x, "Tensor.__bool__"),
        (lambda x: x * float(x[0]), "Tensor.__float__"),
        (lambda x: x[x > 0], "aten::index by a mask"),
        (lambda x: x.nonzero(), "aten::nonzero"),
        (lambda x: torch.masked_select(x, x > 0), "aten::masked_select"),
        (lambda x: x.unique(), "aten::_unique2"),
        (lambda x: x.repeat_interleave(torch.full_like(x, 2).long()), "aten::repeat_interleave"),
        (lambda x: x + torch.tensor([1.0, 2.0]), "torch.tensor copies host values"),
        (lambda x: x if torch.equal(x, x) else -x, "aten::equal"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("inference", [True, False])
def test_what_makes_the_host_wait_is_refused_while_recording(run, named, inference):
    with torch.inference_mode(inference):
        x = torch.randn(2)
        with pytest.raises(DeviceError, match=named):
            record(lambda: run(x))


def test_a_graph_serves_its_size_and_the_next_ones_below(caplog):
    ran: list[int] = []

    def run(step: Outer) -> Tensor:
        ran.append(len(step.ids))
        return step.ids * 3

    graphs = StepGraphs(
        RecordingDevice(), sizes=graph_sizes(6), plan=lambda size: Outer(torch.zeros(size)), run=run
    )
    graphs.warm()
    assert ran == [6, 4, 2, 1]
    assert [graphs.size_for(count) for count in (1, 2, 3, 5, 6)] == [1, 2, 4, 6, 6]
    found = graphs.replay(4, Outer(torch.arange(4.0)))
    assert found is not None
    assert found.tolist() == [0, 3, 6, 9]
    assert ran == [6, 4, 2, 1]
    with caplog.at_level(logging.WARNING):
        assert graphs.size_for(7) is None
        assert graphs.size_for(7) is None
    assert len(caplog.records) == 1
    assert "a batch of 7 is larger than any that was recorded (6)" in caplog.text


def test_a_step_that_cannot_be_put_in_place_is_said_once(caplog):
    graphs = StepGraphs(
        RecordingDevice(), sizes=(1,), plan=lambda size: step_of(0), run=lambda step: step.ids * 3
    )
    graphs.warm()
    with caplog.at_level(logging.WARNING):
        assert graphs.replay(1, step_of(1, ratio=8)) is None
        assert graphs.replay(1, step_of(2, ratio=8)) is None
    assert [record.getMessage() for record in caplog.records] == [
        "a step cannot be replayed: step.inner.ratio is 8, recorded 4. It runs operator by operator"
    ]
    found = graphs.replay(1, step_of(2))
    assert found is not None
    assert found.tolist() == [9]


def test_on_a_cpu_a_graph_is_the_run_itself():
    x = torch.ones(2)
    graph = CpuDevice().capture(lambda: x * 2)
    x.fill_(3)
    graph.replay()
    assert graph.output.tolist() == [6, 6]


def test_graph_sizes_double_up_to_the_most():
    assert [graph_sizes(most) for most in (1, 2, 3, 8)] == [(1,), (1, 2), (1, 2, 3), (1, 2, 4, 8)]

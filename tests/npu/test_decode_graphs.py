"""Decoding steps recorded on simulated chips: nothing in them makes the host wait, and a replay gives the
same bits as running operator by operator.
"""

from __future__ import annotations

import logging

import pytest
import torch

from ascend_v4.device.recorder import RecordedGraph
from ascend_v4.device.target import TargetRequest
from ascend_v4.engine.protocol import Chunk
from ascend_v4.engine.runner import ModelRunner, build_runner
from ascend_v4.operators import simulator

LONGEST = 300
PROMPTS = (3, 127, 257)
"""Lengths in front of the edges of a CSA entry, a window page and an HCA page of state."""


@pytest.fixture(autouse=True)
def process_as_before():
    yield
    simulator.uninstall()


@pytest.fixture
def runner_on(golden_dir):
    """A runner of the smallest model with every kind of layer."""

    def build(
        chip: str, *, graphs: bool, max_sequences: int = 3, without: tuple[str, ...] = ()
    ) -> ModelRunner:
        target = TargetRequest(device="sim", chip=chip, waive=("sizes",), without=without)
        return build_runner(
            golden_dir("nano"),
            device=target,
            quantize="mx" if chip == "950" else "w8a8",
            max_sequence_tokens=LONGEST,
            cache_tokens=4 * LONGEST,
            max_sequences=max_sequences,
            graphs=graphs,
        )

    return build


def decode(runner: ModelRunner, *, steps: int) -> torch.Tensor:
    """Logits of steps over changing batches, after prompts of several lengths."""
    torch.manual_seed(0)
    sequences = [runner.open_sequence(LONGEST) for _ in PROMPTS]
    for sequence, count in zip(sequences, PROMPTS, strict=True):
        runner.forward([Chunk(sequence, torch.randint(runner.vocab_size, (count,)).tolist())])
    rows = []
    for step in range(steps):
        batch = sequences[step % 2 :]
        ids = torch.randint(runner.vocab_size, (len(batch),)).tolist()
        rows.append(runner.forward([Chunk(one, [id_]) for one, id_ in zip(batch, ids, strict=True)]))
    for sequence in sequences:
        runner.close_sequence(sequence)
    return torch.cat(rows)


@pytest.mark.parametrize("chip", ["a2", "a3", "950"])
def test_replayed_steps_give_the_same_bits(chip, runner_on, monkeypatch):
    replays: list[int] = []
    replay = RecordedGraph.replay

    def count(graph: RecordedGraph) -> None:
        replays.append(len(graph.calls))
        replay(graph)

    monkeypatch.setattr(RecordedGraph, "replay", count)
    recorded = decode(runner_on(chip, graphs=True), steps=5)
    assert len(replays) == 5
    assert min(replays) > 100
    assert torch.equal(recorded, decode(runner_on(chip, graphs=False), steps=5))
    assert len(replays) == 5


def test_a_step_of_several_tokens_is_not_replayed(runner_on, monkeypatch):
    runner = runner_on("a3", graphs=True, max_sequences=1)
    monkeypatch.setattr(RecordedGraph, "replay", lambda graph: pytest.fail("a prompt was replayed"))
    sequence = runner.open_sequence(8)
    assert runner.forward([Chunk(sequence, [1, 2])]).shape == (1, runner.vocab_size)


def test_operators_that_cannot_be_captured_are_named_and_nothing_is_recorded(runner_on, caplog):
    without = ("vllm_ascend", "custom_ops", "ops_transformer")
    with caplog.at_level(logging.WARNING):
        runner = runner_on("a3", graphs=True, without=without)
    assert "decoding steps are not recorded: " in caplog.text
    assert "compress (aten)" in caplog.text
    assert decode(runner, steps=1).shape == (3, runner.vocab_size)


def test_graphs_are_asked_for_on_sim_and_pointless_on_a_cpu(golden_dir, caplog):
    with caplog.at_level(logging.INFO):
        build_runner(golden_dir("nano"), max_sequence_tokens=8, cache_tokens=8, graphs=True)
    assert "the CPU has no device graphs" in caplog.text

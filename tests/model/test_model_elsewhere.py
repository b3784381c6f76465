"""The whole small model on a device that is not the CPU: nothing of it is left on the CPU."""

from __future__ import annotations

import pytest
import torch

from ascend_v4.device.target import CPU, Target
from ascend_v4.engine.protocol import Chunk
from ascend_v4.engine.runner import ModelRunner
from ascend_v4.model import load
from tests.elsewhere import DEVICE, elsewhere
from tests.model.builders import require_same_rows, token_ids

COUNTS = (260, 3, 131)
"""New tokens: past the window, fewer than an entry, past an entry of HCA."""


def logits(checkpoint, target: Target, numerics: str) -> list[torch.Tensor]:
    """Rows of three ragged sequences: prefill in slices, two decoding steps, the MTP block's."""
    loaded = load.load_model(checkpoint, device=target, numerics=numerics, mtp=True)
    runner = ModelRunner(
        loaded, max_sequence_tokens=512, cache_tokens=2048, max_sequences=4, max_step_tokens=100
    )
    sequences = [runner.open_sequence(count + 8) for count in COUNTS]
    rows = []
    for step in range(3):
        counts = COUNTS if step == 0 else (1, 1, 1)
        ids = [token_ids(count, seed=step * 3 + index) for index, count in enumerate(counts)]
        rows.append(runner.forward([Chunk(*each) for each in zip(sequences, ids, strict=True)]))
    alone = runner.open_sequence(16)
    streams = runner.streams(Chunk(alone, token_ids(9, seed=9)))
    rows.append(runner.mtp_logits(alone, streams, token_ids(9, seed=10)))
    return rows


@pytest.fixture
def target(monkeypatch) -> Target:
    """The CUDA target, whose tensors live elsewhere."""
    monkeypatch.setattr(Target, "torch_device", property(lambda self: "cpu" if self == CPU else str(DEVICE)))
    return Target(device="cuda")


def test_exact_logits_elsewhere_are_the_cpus(checkpoint, target):
    with elsewhere():
        got = logits(checkpoint, target, "exact")
    want = logits(checkpoint, CPU, "exact")
    assert {row.device for row in got} == {DEVICE}
    for mine, theirs in zip(got, want, strict=True):
        require_same_rows(mine.cpu(), theirs)


def test_native_model_runs_elsewhere(checkpoint, target):
    with elsewhere():
        got = logits(checkpoint, target, "native")
    assert {row.device for row in got} == {DEVICE}
    for mine, theirs in zip(got, logits(checkpoint, CPU, "native"), strict=True):
        assert torch.cosine_similarity(mine.cpu().double(), theirs.double()).mean().item() > 0.97

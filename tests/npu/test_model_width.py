"""Models as wide as Flash and Pro on simulated chips, with no limit waived: every size that a kernel fixes is
the released one. Depth, experts and vocabulary are cut, weights come from a seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ascend_v4.checkpoint.synthesize import plan_synthesis, synthesize
from ascend_v4.config import read_config_fields
from ascend_v4.device.target import TargetRequest
from ascend_v4.engine.protocol import Chunk
from ascend_v4.engine.runner import ModelRunner, build_runner
from ascend_v4.operators import simulator
from tests.model.builders import token_ids

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
PACKS = {"a3": "w8a8", "950": None}
"""What each chip is given; None: the release's own files, which the CPU then reads as mx."""
PROMPT = 130
"""Tokens: completes an entry of every kind of layer and pushes the window on."""
FORCED = 2
VOCAB = 512
LEAST_COSINE = 0.99
"""Of three layers with random weights, in the chip's arithmetic; docs/ascend.md has what was measured."""

pytestmark = pytest.mark.slow


@pytest.fixture
def one_thread() -> None:
    """As many threads as there are: these products are large."""


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    yield
    simulator.uninstall()


@pytest.fixture(scope="module", params=["flash-width", "pro-width"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1 GB for Flash's width, 2.5 GB for Pro's; removed by pytest with its other temporary folders."""
    folder = tmp_path_factory.mktemp("width") / request.param
    synthesize(folder, plan_synthesis(read_config_fields(CONFIGS / f"{request.param}.yaml")))
    return folder


def rows_of(runner: ModelRunner) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits after every token of a prefill and of some decoding steps, and those of the MTP block."""
    ids = token_ids(PROMPT + FORCED, seed=0, vocab_size=VOCAB)
    sequence = runner.open_sequence(len(ids))
    streams = runner.streams(Chunk(sequence, ids[:PROMPT]))
    drafted = runner.mtp_logits(sequence, streams, ids[1 : PROMPT + 1])
    rows = [runner.logits(streams)]
    rows += [runner.forward([Chunk(sequence, [token_id])]) for token_id in ids[PROMPT:]]
    return torch.cat(rows), drafted


def runner_on(checkpoint: Path, device: TargetRequest | str, *, quantize: str | None) -> ModelRunner:
    return build_runner(
        checkpoint,
        device=device,
        quantize=quantize,
        max_sequence_tokens=PROMPT + FORCED,
        cache_tokens=PROMPT + FORCED,
        max_sequences=1,
        mtp=True,
    )


@pytest.mark.parametrize("chip", ["a3", "950"])
def test_true_width_runs_unwaived_and_agrees_with_the_cpu_engine(checkpoint, chip):
    pack = PACKS[chip]
    want = rows_of(runner_on(checkpoint, "cpu", quantize=pack or "mx"))
    runner = runner_on(checkpoint, TargetRequest(device="sim", chip=chip), quantize=pack)
    assert not any(choice.waived for choice in runner.loaded.operators.choices.values())
    assert not runner.loaded.operators.too_slow
    for found, expected in zip(rows_of(runner), want, strict=True):
        assert torch.isfinite(found).all()
        cosine = torch.cosine_similarity(found.double(), expected.double(), dim=1).mean().item()
        assert cosine >= LEAST_COSINE, f"mean cosine {cosine:.6f} over {len(found)} rows"

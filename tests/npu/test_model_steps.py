"""Steps that `score` does not make, over simulated operators and on the CPU: several new tokens of a sequence
after a prefill, several sequences of different lengths at once, positions taken back, a prompt in uneven
parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ascend_v4.device.target import TargetRequest
from ascend_v4.engine.protocol import Chunk
from ascend_v4.engine.runner import ModelRunner, ModelSequence, build_runner
from ascend_v4.operators import simulator
from tests.model.builders import token_ids
from tools.golden_report import Closeness
from tools.sim_report import ONE_LAYER

VOCAB = 256
LONGEST = 300
KINDS = ("layer-swa", "layer-csa", "layer-hca")
QUICK = {("layer-csa", "a3"), ("layer-csa", "950"), ("layer-hca", "a2")}
QUANTIZE = {"a2": "w4a8", "a3": "w8a8", "950": "mx"}

pytestmark = pytest.mark.golden


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    yield
    simulator.uninstall()


class Steps:
    """A runner, and the logits of every row it was asked for."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.rows: list[torch.Tensor] = []

    def opened(self) -> ModelSequence:
        return self.runner.open_sequence(LONGEST)

    def every_row(self, sequence: ModelSequence, ids: list[int]) -> None:
        """One step of one sequence, judged at all its tokens."""
        self.rows.append(self.runner.logits(self.runner.streams(Chunk(sequence, ids))))

    def last_rows(self, *pieces: tuple[ModelSequence, list[int]]) -> None:
        """One step of several sequences, judged at the last token of each."""
        self.rows.append(self.runner.forward([Chunk(sequence, ids) for sequence, ids in pieces]))


def several_tokens(steps: Steps) -> None:
    ids = token_ids(220, seed=1, vocab_size=VOCAB)
    sequence = steps.opened()
    steps.every_row(sequence, ids[:121])
    for first in range(121, 220, 3):
        steps.every_row(sequence, ids[first : first + 3])


def uneven_parts(steps: Steps) -> None:
    ids = token_ids(270, seed=2, vocab_size=VOCAB)
    sequence, first = steps.opened(), 0
    for count in (1, 2, 4, 120, 1, 1, 128, 13):
        steps.every_row(sequence, ids[first : first + count])
        first += count


def ragged_batches(steps: Steps) -> None:
    sequences = [steps.opened() for _ in range(5)]
    prefills = [(1, 130, 3, 64, 127), (5, 1, 1, 64, 1), (1, 1, 125, 1, 2), (122, 2, 1, 1, 130)]
    for number, step in enumerate([*prefills, *[(1,) * 5] * 20]):
        pieces = [
            (sequence, token_ids(count, seed=10 * number + index, vocab_size=VOCAB))
            for index, (sequence, count) in enumerate(zip(sequences, step, strict=True))
        ]
        # a sequence joins and another leaves from step to step
        steps.last_rows(*(pieces if number % 3 else pieces[number % 2 :]))


def taken_back(steps: Steps) -> None:
    ids = token_ids(200, seed=3, vocab_size=VOCAB)
    sequence = steps.opened()
    steps.every_row(sequence, ids[:126])
    for first in range(126, 180, 2):
        steps.every_row(sequence, token_ids(4, seed=first, vocab_size=VOCAB))
        steps.runner.truncate(sequence, first)
        steps.every_row(sequence, ids[first : first + 2])


def rows_on(
    folder: Path, device: TargetRequest | str, chip: str, script: Callable[[Steps], None]
) -> torch.Tensor:
    runner = build_runner(
        folder,
        device=device,
        quantize=QUANTIZE[chip],
        max_sequence_tokens=LONGEST,
        cache_tokens=5 * LONGEST,
        max_sequences=5,
    )
    steps = Steps(runner)
    script(steps)
    return torch.cat(steps.rows).double()


@pytest.mark.parametrize("script", [several_tokens, uneven_parts, ragged_batches, taken_back])
@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        pytest.param(kind, chip, marks=() if (kind, chip) in QUICK else pytest.mark.slow)
        for kind in KINDS
        for chip in QUANTIZE
    ],
)
def test_other_steps_agree_with_the_cpu_engine_too(golden_dir, kind, chip, script):
    folder = golden_dir(kind)
    want = rows_on(folder, "cpu", chip, script)
    target = TargetRequest(device="sim", chip=chip, waive=("sizes",), arithmetic="ideal")
    got = rows_on(folder, target, chip, script)
    close = Closeness(
        worst=(got - want).abs().max().item(),
        cosine=torch.cosine_similarity(got, want, dim=1).mean().item(),
        argmax=(got.argmax(1) == want.argmax(1)).double().mean().item(),
    )
    assert ONE_LAYER["ideal"].keep(close), f"{close} over {len(want)} rows"

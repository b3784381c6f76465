"""What exact rounding is worth at the end of the model: the official reference's logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ascend_v4.engine.protocol import Chunk
from ascend_v4.engine.runner import ModelRunner
from ascend_v4.model.load import load_model
from ascend_v4.repack.config import RepackConfig
from ascend_v4.repack.pipeline import run_repack
from ascend_v4.repack.recipes import RoundingChoice, Target

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
LAYERS = ("layer-swa", "layer-csa", "layer-hca", "layer-hash", "layer-clamp")


@pytest.fixture(autouse=True)
def one_thread():
    """Layers this small lose more to threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logits(pack: Path, prompt: list[int], numerics: str) -> torch.Tensor:
    model = load_model(pack, numerics=numerics)
    runner = ModelRunner(model, max_sequence_tokens=512, cache_tokens=512, max_sequences=1)
    return runner.logits(runner.streams(Chunk(runner.open_sequence(len(prompt)), prompt)))


def mean_distance(folder: Path, rounding: RoundingChoice, numerics: str, reference: str) -> float:
    """Relative distance of W8A8 packs' logits from the reference's, averaged over the layers."""
    distances = []
    for layer in LAYERS:
        pack = folder / f"{layer}-{rounding.value}"
        source = GOLDEN / layer
        run_repack(RepackConfig(source=source, output=pack, target=Target.W8A8, rounding=rounding, jobs=1))
        expected = load_file(source / f"expected-{reference}.safetensors")
        want = expected["p1.prefill_logits"].double()
        found = logits(pack, expected["p1.input_ids"].tolist(), numerics).double()
        distances.append(((found - want).norm() / want.norm()).item())
    return sum(distances) / len(distances)


@pytest.mark.golden
@pytest.mark.parametrize(("numerics", "reference"), [("auto", "native"), ("exact", "exact")])
def test_exact_packs_are_no_further_from_the_reference_than_absmax_packs(numerics, reference, tmp_path):
    exact = mean_distance(tmp_path, RoundingChoice.EXACT, numerics, reference)
    absmax = mean_distance(tmp_path, RoundingChoice.ABSMAX, numerics, reference)

    assert 0 < exact <= absmax

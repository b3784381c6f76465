"""The official reference's logits, through `ascend-v4 score`, whole and in chunks.

The bounds are those the vectors were published with: exact is judged by every number, native by cosines
pooled over a set, because one rounding can flip a choice and carry on.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

ONE_LAYER = ("layer-swa", "layer-csa", "layer-hca", "layer-hash", "layer-clamp")
DEEP = ("nano", "flash-tiny", "pro-tiny")
MAIN, MTP = ("prefill_logits", "decode_logits"), ("mtp_prefill_logits",)

pytestmark = pytest.mark.golden
every_chunk = pytest.mark.parametrize(
    "chunk_options", [(), ("--chunk", "7"), ("--chunk", "128")], ids=["whole", "7", "128"]
)


class Scored:
    """Expected and computed logits of one set."""

    def __init__(self, expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], num_prompts: int):
        self.expected, self.found, self.num_prompts = expected, found, num_prompts

    def pooled(self, kinds: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """(found, expected) rows of all prompts, one below the other."""
        names = [f"p{index}.{kind}" for index in range(self.num_prompts) for kind in kinds]
        assert [self.found[name].shape for name in names] == [self.expected[name].shape for name in names]
        return torch.cat([self.found[name] for name in names]), torch.cat(
            [self.expected[name] for name in names]
        )


@pytest.fixture
def score(golden_dir, run_cli, tmp_path):
    def run(name: str, *options: str, numerics: str) -> Scored:
        folder = golden_dir(name)
        expected = load_file(folder / f"expected-{numerics}.safetensors")
        num_prompts = sum(key.endswith(".input_ids") for key in expected)
        prompts = [
            {part: expected[f"p{index}.{part}"].tolist() for part in ("input_ids", "decode_ids")}
            for index in range(num_prompts)
        ]
        (tmp_path / "in.json").write_text(json.dumps({"prompts": prompts}))
        output = tmp_path / "out.safetensors"
        arguments = ("--input", tmp_path / "in.json", "--output", output, "--numerics", numerics, "--mtp")
        result = run_cli("score", folder, *arguments, *options)
        assert result.exit_code == 0, result.stderr
        return Scored(expected, load_file(output), num_prompts)

    return run


def mean_cosine(found: torch.Tensor, expected: torch.Tensor) -> float:
    return torch.cosine_similarity(found.double(), expected.double()).mean().item()


def argmax_share(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found.argmax(-1) == expected.argmax(-1)).double().mean().item()


@every_chunk
@pytest.mark.parametrize("name", ONE_LAYER + DEEP)
def test_exact_logits_are_the_references(score, name, chunk_options):
    scored = score(name, *chunk_options, numerics="exact")
    found, expected = scored.pooled(MAIN + MTP)
    assert (found - expected).abs().max().item() <= 1e-4
    assert argmax_share(found, expected) == 1.0


@every_chunk
@pytest.mark.parametrize("name", ONE_LAYER)
def test_native_logits_of_one_layer_round_like_the_reference(score, name, chunk_options):
    scored = score(name, *chunk_options, numerics="native")
    main, mtp = scored.pooled(MAIN), scored.pooled(MTP)
    assert mean_cosine(*main) >= 0.9999
    assert argmax_share(*main) >= 0.99
    assert mean_cosine(*mtp) >= 0.999
    assert argmax_share(*mtp) >= 0.93


@every_chunk
@pytest.mark.parametrize("name", DEEP)
def test_native_logits_of_deep_models_stay_near_the_reference(score, name, chunk_options):
    scored = score(name, *chunk_options, numerics="native")
    assert mean_cosine(*scored.pooled(MAIN)) >= 0.97


@pytest.mark.parametrize("name", ["layer-swa", "layer-csa", "layer-hca"])
def test_native_bounds_tell_exact_arithmetic_apart(score, golden_dir, name):
    native = load_file(golden_dir(name) / "expected-native.safetensors")
    exact = score(name, numerics="exact")
    against_native = Scored(native, exact.found, exact.num_prompts)
    assert mean_cosine(*against_native.pooled(MAIN)) < 0.9999

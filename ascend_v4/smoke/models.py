"""The models that are run: drawn from shipped configs on the spot, in the ways that a device computes.

A way is one kind of weights and arithmetic. What a device gives is compared with the CPU in the same way, and
with logits that were written down when this version was made (`golden.safetensors`).

Legend: T rows of logits, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from ascend_v4.checkpoint.pack import find_pack
from ascend_v4.checkpoint.reader import CheckpointReader
from ascend_v4.checkpoint.synthesize import plan_synthesis, synthesize
from ascend_v4.checkpoint.tokenizer_files import default_choice
from ascend_v4.config import LayerKind, ModelConfig, parse_model_config
from ascend_v4.config_file import read_config_fields
from ascend_v4.device.soc import Chip
from ascend_v4.device.target import CPU, Arithmetic, Target
from ascend_v4.engine.runner import ModelRunner, build_runner
from ascend_v4.engine.scoring import FORCED_LOGITS, LOGITS, ScorePrompt, score_logits
from ascend_v4.errors import NoImplementationError
from ascend_v4.model.build import UNPACK_BYTES, Builder, UnpackBudget
from ascend_v4.model.deepseek_v4 import DeepSeekV4
from ascend_v4.model.load import LoadedModel
from ascend_v4.model.numerics import numerics_by_name
from ascend_v4.model.sizes import model_sizes
from ascend_v4.model.weights import WeightSource
from ascend_v4.operators.contract import CATALOG
from ascend_v4.operators.select import REFERENCE, load_backend, select
from ascend_v4.smoke.report import Outcome

SMALL, RELEASED = "tiny", "flash-width"
"""Shipped configs: one for anything without limits, one whose widths are those of Flash."""
WIDE_HIDDEN = 1024
"""From here on a layer counts as wide."""
MOST_EXPERTS, MOST_TOKENS = 8, 512
"""Of models of one layer after a given checkpoint's config."""
NUM_PROMPT_TOKENS, NUM_FORCED_TOKENS, CHUNK_TOKENS = 140, 4, 100
"""Past the edge of an HCA page and of the window, the chunks apart from all of them."""
GOLDEN_FILE = "golden.safetensors"
GOLDEN_ROWS = (0, 3, 4, 62, 99, 100, 126, 127, 128, 139, 140, 143)
"""Rows of logits that are written down: around entries, pages, chunks, and the forced tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One kind of weights and arithmetic on a device, and how the CPU computes the same."""

    name: str
    numerics: str = "auto"
    quantize: str | None = None
    cpu_quantize: str | None = None

    @property
    def golden(self) -> str:
        """Under which name its logits were written down: those of the CPU's computation."""
        return self.cpu_quantize or self.name


EXACT, NATIVE = Way(name="exact", numerics="exact"), Way(name="native", numerics="native")
W8A8 = Way(name="w8a8", quantize="w8a8", cpu_quantize="w8a8")
W4A8 = Way(name="w4a8", quantize="w4a8", cpu_quantize="w4a8")
RELEASE = Way(name="release", cpu_quantize="mx")
MX = Way(name="mx", quantize="mx", cpu_quantize="mx")
ON_HOST = (EXACT, NATIVE)
ON_CHIP: Mapping[Chip, tuple[Way, ...]] = {
    Chip.A2: (W8A8, W4A8),
    Chip.A3: (W8A8, W4A8),
    Chip.A950: (RELEASE, MX),
}


def ways_of(target: Target) -> tuple[Way, ...]:
    """What a device computes, the most usual first."""
    return ON_HOST if target.chip is None else ON_CHIP[target.chip]


def shipped_fields(name: str) -> dict[str, Any]:
    """The fields of a shipped config."""
    with resources.as_file(resources.files("ascend_v4.configs") / "model" / f"{name}.yaml") as path:
        return read_config_fields(path)


def fitting_config(target: Target) -> str:
    """The smallest shipped config that the target's operators take.

    Raises NoImplementationError where there is none.
    """
    try:
        select(target, sizes=model_sizes(parse_model_config(shipped_fields(SMALL), source=SMALL)))
    except NoImplementationError:
        select(target, sizes=model_sizes(parse_model_config(shipped_fields(RELEASED), source=RELEASED)))
        return RELEASED
    return SMALL


def one_layer(fields: Mapping[str, Any], kind: LayerKind, *, hashed: bool = False) -> dict[str, Any]:
    """A config of a single layer, with few experts and a short vocabulary, every width as it is."""
    return {
        **fields,
        "num_hidden_layers": 1,
        "num_hash_layers": int(hashed),
        "num_nextn_predict_layers": 0,
        "compress_ratios": [kind.ratio],
        "n_routed_experts": min(fields["n_routed_experts"], MOST_EXPERTS),
        "vocab_size": min(fields["vocab_size"], MOST_TOKENS),
    }


def draw_checkpoint(folder: Path, name: str, fields: Mapping[str, Any]) -> Path:
    """A checkpoint of random values below `folder`, drawn once, with a tokenizer where one fits."""
    path = folder / name
    if not path.is_dir():
        choice, _ = default_choice(parse_model_config(fields, source=name))
        synthesize(path, plan_synthesis(fields, seed=0, tokenizer=choice, source=name))
    return path


def prompt_of(vocab_size: int) -> ScorePrompt:
    """Token ids that any vocabulary of 256 and more holds, the same on every machine."""
    below = min(vocab_size, 256)
    ids = [
        (7 * index * index + 13 * index + 5) % below for index in range(NUM_PROMPT_TOKENS + NUM_FORCED_TOKENS)
    ]
    return ScorePrompt(ids[:NUM_PROMPT_TOKENS], ids[NUM_PROMPT_TOKENS:])


def score(runner: ModelRunner, prompt: ScorePrompt | None = None) -> Tensor:
    """Float32 logits [T, V] after each prompt token and each forced one."""
    given = prompt or prompt_of(runner.vocab_size)
    found = score_logits(runner, given, chunk_tokens=CHUNK_TOKENS, mtp=False)
    return torch.cat([found[LOGITS], found[FORCED_LOGITS]]).cpu()


def open_runner(
    checkpoint: Path, target: Target, way: Way, *, packs: Path, max_tokens: int | None = None
) -> ModelRunner:
    """The checkpoint on a target; packs made of it are kept in a folder."""
    most = max_tokens or NUM_PROMPT_TOKENS + NUM_FORCED_TOKENS
    return build_runner(
        checkpoint,
        device=target,
        numerics=way.numerics,
        quantize=way.quantize,
        cache_dir=None if way.quantize is None else packs,
        max_sequence_tokens=most,
        cache_tokens=2 * most,
        max_sequences=2,
    )


def cpu_logits(checkpoint: Path, target: Target, way: Way, *, packs: Path) -> tuple[Tensor, str]:
    """The same prompt on the CPU in the same way, and who computed it: where the target is the CPU itself,
    the references of all operators.
    """
    if target.device != "cpu":
        cpu_way = Way(name=way.name, numerics=way.numerics, quantize=way.cpu_quantize)
        return score(open_runner(checkpoint, CPU, cpu_way, packs=packs)), "the CPU engine"
    return score(_plain_runner(checkpoint, way)), "plain torch"


def _plain_runner(checkpoint: Path, way: Way) -> ModelRunner:
    load_backend("cpu")
    reader = CheckpointReader.open(checkpoint)
    numerics = numerics_by_name(way.numerics)
    operators = select(CPU, named=dict.fromkeys(CATALOG, REFERENCE), sizes=model_sizes(reader.config))
    device = torch.device("cpu")
    with torch.inference_mode():
        builder = Builder(
            config=reader.config,
            weights=WeightSource(reader, device),
            operators=operators,
            numerics=numerics,
            unpack=UnpackBudget(math.inf if numerics.copies_weights else UNPACK_BYTES),
        )
        model = DeepSeekV4(builder)
    loaded = LoadedModel(
        config=reader.config,
        numerics=numerics,
        operators=operators,
        model=model,
        mtp=None,
        target=CPU,
        device=device,
        reader=reader,
    )
    most = NUM_PROMPT_TOKENS + NUM_FORCED_TOKENS
    return ModelRunner(loaded, max_sequence_tokens=most, cache_tokens=2 * most, max_sequences=2)


@cache
def golden_logits() -> Mapping[str, Tensor]:
    """`<config>.<way>` -> float32 [GOLDEN_ROWS, V]."""
    data = resources.files(__package__).joinpath(GOLDEN_FILE).read_bytes()
    return {name: tensor.float() for name, tensor in load_tensors(data).items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How near two sets of logits must be."""

    distance: float
    """Largest 1 - mean cosine."""
    argmax_share: float = 0.0
    """Smallest share of equal most probable tokens."""

    def judge(self, got: Tensor, want: Tensor, *, against: str) -> Outcome:
        """The outcome, for logits in the same rows."""
        assert got.shape == want.shape, f"logits {tuple(got.shape)}, want {tuple(want.shape)}"
        finite = bool(torch.isfinite(got).all())
        cosine = torch.cosine_similarity(got.double(), want.double(), dim=-1).mean().item()
        share = (got.argmax(-1) == want.argmax(-1)).double().mean().item()
        why = None
        if not finite:
            why = "logits are NaN or infinite"
        elif share < self.argmax_share:
            allowed = 1 - self.argmax_share
            why = f"the most probable token is another in {1 - share:.1%} of rows, {allowed:.1%} may be"
        return Outcome(
            compared=f"{len(got)} rows of logits with {against}, {share:.1%} equal argmax",
            measure="1 - mean cosine",
            difference=max(1 - cosine, 0.0) if finite else math.nan,
            bound=self.distance,
            why=why,
        )


def layer_agreement(target: Target, way: Way, *, is_wide: bool) -> Agreement:
    """One layer: roundings differ in few places, and none can be carried on.

    In wide layers sums of thousands of terms in another order flip a few roundings to begin with, and every
    quantised product after them triples what differs: to 1% of a logit at the width of Flash, a quarter of
    what the quantisation itself costs.
    """
    if way is EXACT:
        return Agreement(distance=1e-8, argmax_share=1.0)
    if is_wide:
        return Agreement(distance=1e-3, argmax_share=0.9)
    if target.chip is None or target.arithmetic is Arithmetic.IDEAL:
        return Agreement(distance=1e-4, argmax_share=0.99)
    return Agreement(distance=1e-3, argmax_share=0.97)


def deep_agreement(way: Way) -> Agreement:
    """Several layers: a rounding that falls the other way changes what later layers choose."""
    return Agreement(distance=1e-8, argmax_share=1.0) if way is EXACT else Agreement(distance=0.03)


RELEASED_FORMATS = ("expert_dtype", "quantization_config")


def config_fields(checkpoint: Path) -> dict[str, Any]:
    """The fields of a checkpoint's config, with the released formats in place of a pack's."""
    fields = read_config_fields(checkpoint)
    if find_pack(checkpoint) is None:
        return fields
    return {**fields, **{name: shipped_fields(SMALL)[name] for name in RELEASED_FORMATS}}


def config_of(checkpoint: Path) -> ModelConfig:
    """A checkpoint's config."""
    return ModelConfig.from_file(checkpoint)

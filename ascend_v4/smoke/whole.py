"""Models of one layer and whole ones: against the CPU, against golden logits, and against themselves."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import ascend_v4
from ascend_v4.checkpoint.pack import find_pack
from ascend_v4.config import LayerKind
from ascend_v4.device.base import Device
from ascend_v4.device.target import Target
from ascend_v4.engine.runner import ModelRunner
from ascend_v4.engine.scoring import ScorePrompt
from ascend_v4.errors import NoImplementationError
from ascend_v4.model.sizes import model_sizes
from ascend_v4.operators.select import select
from ascend_v4.smoke.chat import MAX_CHAT_TOKENS, chat_prompt, check_chat
from ascend_v4.smoke.memory import held_bytes
from ascend_v4.smoke.models import (
    EXACT,
    GOLDEN_ROWS,
    NATIVE,
    RELEASED,
    WIDE_HIDDEN,
    Agreement,
    Way,
    config_fields,
    config_of,
    cpu_logits,
    deep_agreement,
    draw_checkpoint,
    fitting_config,
    golden_logits,
    layer_agreement,
    one_layer,
    open_runner,
    prompt_of,
    score,
    shipped_fields,
    ways_of,
)
from ascend_v4.smoke.report import Outcome, Recorder, SkippedError

LAYERS = {
    "hash-routed SWA": (LayerKind.SWA, True),
    "CSA": (LayerKind.CSA, False),
    "HCA": (LayerKind.HCA, False),
}
FROM_RELEASE = 0.1
"""Largest 1 - mean cosine of a chip's logits from the official reference's, whose arithmetic is another."""
NUM_REPEATS = 2
GROWTH_BYTES = 32 << 20
"""Over the repeats: results and caches of one run are given back, fragments may stay."""
LEFT_BYTES = {"cpu": 1 << 30, "sim": 2 << 30}
"""Of the process, whose allocator keeps pages; a device's own memory is counted exactly."""
LEFT_ON_DEVICE_BYTES = 64 << 20

RUN_OPERATORS = "Run it with --only operators first: a wrong operator shows there by name."
FREE_MEMORY = "Give the process more memory, or run parts one by one with --only."


@dataclass(kw_only=True)
class Models:
    """What the checks of whole models share: the target, the checkpoints, one open runner."""

    target: Target
    device: Device
    folder: Path
    checkpoint: Path | None
    """A given one; otherwise models are drawn."""
    _runner: ModelRunner | None = field(default=None)
    _name: str | None = field(default=None)

    @property
    def packs(self) -> Path:
        """Where packs are kept while the checks run."""
        return self.folder / "packs"

    def config_name(self) -> str:
        """The shipped config that models are drawn from. Raises NoImplementationError where none runs."""
        if self._name is None:
            self._name = fitting_config(self.target)
        return self._name

    def ways(self) -> tuple[Way, ...]:
        """All that the device computes; on the CPU at the released widths only the first, for the time."""
        ways = ways_of(self.target)
        is_slow = self.target.torch_device == "cpu" and self.config_name() == RELEASED
        return ways[:1] if is_slow else ways

    def drawn(self) -> Path:
        """The drawn whole model."""
        name = self.config_name()
        return draw_checkpoint(self.folder, name, shipped_fields(name))

    def subject(self) -> tuple[Path, Way]:
        """The given checkpoint, else the drawn one, and the way it runs."""
        if self.checkpoint is None:
            return self.drawn(), ways_of(self.target)[-1 if self.target.chip is None else 0]
        return self.checkpoint, way_of_checkpoint(self.checkpoint, self.target)

    def runner(self) -> ModelRunner:
        """One runner of the subject, kept open."""
        if self._runner is None:
            path, way = self.subject()
            self._runner = open_runner(path, self.target, way, packs=self.packs, max_tokens=MAX_CHAT_TOKENS)
        return self._runner

    def close(self) -> None:
        """Lets the runner's memory go."""
        self._runner = None
        gc.collect()


def way_of_checkpoint(checkpoint: Path, target: Target) -> Way:
    """How a given checkpoint runs: a pack as it is, the release layout in the device's first way."""
    pack = find_pack(checkpoint)
    if pack is not None:
        return Way(name=pack.scheme.value)
    return NATIVE if target.chip is None else ways_of(target)[0]


def check_layers(recorder: Recorder, models: Models) -> None:
    """A row per kind of layer and way. A given checkpoint lends its widths."""

    def compare(name: str, kind: LayerKind, way: Way, *, hashed: bool) -> Outcome:
        if models.checkpoint is None:
            fields = shipped_fields(models.config_name())
        else:
            fields = config_fields(models.checkpoint)
        path = draw_checkpoint(models.folder, f"layer-{name}", one_layer(fields, kind, hashed=hashed))
        got = score(open_runner(path, models.target, way, packs=models.packs))
        want, who = cpu_logits(path, models.target, way, packs=models.packs)
        is_wide = fields["hidden_size"] >= WIDE_HIDDEN
        return layer_agreement(models.target, way, is_wide=is_wide).judge(got, want, against=who)

    for way in _ways(recorder, "layer", models):
        for name, (kind, hashed) in LAYERS.items():
            run = partial(compare, "hash" if hashed else kind.name.lower(), kind, way, hashed=hashed)
            recorder.check("layer", f"one layer of {name}, {way.name}", run, do=RUN_OPERATORS)


def check_models(recorder: Recorder, models: Models) -> None:
    """The drawn model against logits of this version, then every checkpoint at hand with official ones."""
    for way in _ways(recorder, "model", models):
        recorder.check(
            "model", f"golden logits, {way.name}", partial(_against_golden, models, way), do=RUN_OPERATORS
        )
    for path in _official_sets(models):
        for numerics, way in _official_ways(path, models):
            recorder.check(
                "model",
                f"official logits of {path.name}, {way.name}",
                partial(_against_official, models, path, way, numerics),
                do=RUN_OPERATORS,
            )


def check_conversation(recorder: Recorder, models: Models) -> None:
    """One row: the conversation on the given checkpoint, or on the drawn one."""

    def run() -> Outcome:
        path, _ = models.subject()
        vocabulary, prompt_ids = chat_prompt(path, config_of(path))
        return check_chat(models.runner(), vocabulary, prompt_ids)

    recorder.check("chat", "a tool call in the prompt", run, do=RUN_OPERATORS)


def check_repeat(recorder: Recorder, models: Models) -> None:
    """One row: equal bits, with another sequence run in between so that pages are used again."""

    def run() -> Outcome:
        runner = models.runner()
        given = prompt_of(runner.vocab_size)
        first = score(runner)
        score(runner, ScorePrompt(given.input_ids[::-1], given.decode_ids[:1]))
        again = score(runner)
        differ = int((first != again).sum().item())
        return Outcome(
            compared=f"{first.numel()} logits computed twice",
            measure="logits that differ",
            difference=float(differ),
            bound=0.0,
        )

    do = "Look for the operator: --only operators, then --without one package after the other."
    recorder.check("repeat", "the same prompt twice", run, do=do)


def check_memory(recorder: Recorder, models: Models, *, before_bytes: int) -> None:
    """Two rows: growth over repeated runs, and what is left when all is closed."""

    def growth() -> Outcome:
        runner = models.runner()
        score(runner)
        start = held_bytes(models.target, models.device)
        for _ in range(NUM_REPEATS):
            score(runner)
        gc.collect()
        grown = held_bytes(models.target, models.device) - start
        return _bytes_outcome(f"memory over {NUM_REPEATS} equal runs", grown, GROWTH_BYTES)

    def left() -> Outcome:
        models.close()
        after = held_bytes(models.target, models.device)
        bound = LEFT_BYTES.get(models.target.device, LEFT_ON_DEVICE_BYTES)
        what = f"{before_bytes >> 20} MiB before, {after >> 20} MiB after"
        return _bytes_outcome(what, after - before_bytes, bound)

    recorder.check(
        "memory", "growth", growth, do="Report it with --json: runs must give back what they take."
    )
    recorder.check("memory", "left at the end", left, do=FREE_MEMORY)


def _bytes_outcome(compared: str, grown_bytes: int, bound_bytes: int) -> Outcome:
    return Outcome(
        compared=compared, measure="bytes", difference=float(max(grown_bytes, 0)), bound=float(bound_bytes)
    )


def _ways(recorder: Recorder, part: str, models: Models) -> tuple[Way, ...]:
    """The ways, or a failed row where the device lacks operators for any model."""
    found: list[Way] = []

    def look() -> Outcome:
        found.extend(models.ways())
        return Outcome(compared=f"drawn from {models.config_name()}: {', '.join(way.name for way in found)}")

    do = "ascend-v4 ops lists what each operator lacks on this device."
    recorder.check(part, "operators for a model", look, do=do)
    return tuple(found)


def _against_golden(models: Models, way: Way) -> Outcome:
    want = golden_logits().get(f"{models.config_name()}.{way.golden}")
    if want is None:
        raise SkippedError(f"no logits of {models.config_name()} in {way.golden} come with this version")
    got = score(open_runner(models.drawn(), models.target, way, packs=models.packs))
    return deep_agreement(way).judge(got[list(GOLDEN_ROWS)], want, against="those of this version")


def _official_sets(models: Models) -> list[Path]:
    """The given checkpoint if it has logits beside it, and the repository's own in a working copy."""
    sets = [] if models.checkpoint is None else [models.checkpoint]
    nano = Path(ascend_v4.__file__).resolve().parents[1] / "tests" / "golden" / "nano"
    if nano.is_dir() and all(path.resolve() != nano for path in sets):
        sets.append(nano)
    return [
        path for path in sets if any(path.glob("expected-*.safetensors")) and _is_taken(path, models.target)
    ]


def _is_taken(checkpoint: Path, target: Target) -> bool:
    try:
        select(target, sizes=model_sizes(config_of(checkpoint)))
    except NoImplementationError:
        return False
    return True


def _official_ways(path: Path, models: Models) -> list[tuple[str, Way]]:
    """(numerics of the logits, way to run): the same on the CPU, the release's for chips."""
    if models.target.chip is None:
        return [(way.name, way) for way in (EXACT, NATIVE) if _expected(path, way.name).is_file()]
    return [("native", way_of_checkpoint(path, models.target))] if _expected(path, "native").is_file() else []


def _expected(path: Path, numerics: str) -> Path:
    return path / f"expected-{numerics}.safetensors"


def _against_official(models: Models, path: Path, way: Way, numerics: str) -> Outcome:
    expected = load_file(_expected(path, numerics))
    prompts = [
        ScorePrompt(*(expected[f"p{index}.{part}"].tolist() for part in ("input_ids", "decode_ids")))
        for index in range(sum(name.endswith(".input_ids") for name in expected))
    ]
    longest = max(len(prompt.input_ids) + len(prompt.decode_ids) for prompt in prompts)
    runner = open_runner(path, models.target, way, packs=models.packs, max_tokens=longest)
    got = [score(runner, prompt) for prompt in prompts]
    want: list[Tensor] = [
        torch.cat([expected[f"p{index}.{part}"].float() for part in ("prefill_logits", "decode_logits")])
        for index in range(len(prompts))
    ]
    agreement = deep_agreement(way) if models.target.chip is None else Agreement(distance=FROM_RELEASE)
    return agreement.judge(torch.cat(got), torch.cat(want), against=f"the official {numerics} ones")

"""The plan of a repack: which operator turns which tensors into which, in the order they will be written.

Pure arithmetic over names, dtypes and shapes; no file is opened and no number is looked at. A layout
(`layouts/`) then says in which file each output lies.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import translate
from math import prod

from ascend_v4.checkpoint.index import DTYPE_BYTES, FP4_GROUP, expected_tensors, fp8_scale_shape
from ascend_v4.checkpoint.names import is_mtp
from ascend_v4.config import ExpertFormat, ModelConfig
from ascend_v4.errors import CheckpointError, ConfigError
from ascend_v4.repack.recipes import (
    Recipe,
    RoundingChoice,
    Rule,
    Target,
    Wanted,
    WeightForm,
    stored_reason,
)
from ascend_v4.repack.source_forms import (
    WEIGHT_SUFFIX,
    HasShape,
    SourceTensor,
    SourceWeight,
    TensorKind,
    find_weights,
)


class Action(Enum):
    """What is done to one weight. All but COPY are operators of contracts/transcode.

    COPY writes the bytes of `sources[i]` as `outputs[i]`. INT8_TO_FP4, BF16_TO_FP4 and BF16_TO_FP8 use the
    release's scales where the pack kept them, and otherwise derive scales that give the same numbers.
    """

    COPY = "copy"
    FP4_TO_INT8 = "fp4_to_int8"
    FP4_TO_INT4 = "fp4_to_int4"
    FP4_TO_BF16 = "fp4_to_bf16"
    FP8_TO_INT8 = "fp8_to_int8"
    FP8_TO_BF16 = "fp8_to_bf16"
    FP8_TO_MX = "fp8_to_mx"
    BF16_TO_INT8 = "bf16_to_int8"
    MX_TO_FP8 = "mx_to_fp8"
    INT8_TO_FP4 = "int8_to_fp4"
    BF16_TO_FP4 = "bf16_to_fp4"
    BF16_TO_FP8 = "bf16_to_fp8"


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor that is written; `dtype` is the safetensors spelling."""

    name: str
    kind: TensorKind
    dtype: str
    shape: tuple[int, ...]
    window: tuple[tuple[int, int], ...] | None = None
    """Per axis, the range of the whole output that a rank keeps; `shape` is already the range's."""

    @property
    def num_bytes(self) -> int:
        """Bytes the tensor takes in a file."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Conversion:
    """Everything made from one weight: `sources` and `outputs` have the weight first, then its companions.

    Outputs of kind RELEASE_SCALE and RELEASE_WEIGHT are byte copies of the source's scale and weight.
    """

    name: str
    """The weight's, the same before and after."""
    action: Action
    part: str | None
    before: WeightForm
    after: WeightForm
    shape: tuple[int, ...]
    """Of the numbers, unsliced: packed weights count each one."""
    sources: tuple[SourceTensor, ...]
    outputs: tuple[OutputTensor, ...]
    reason: str
    rounding: RoundingChoice | None
    reversible: bool
    """Whether --to release gives back the identical bytes; of INT8 from FP4, those of every exact row."""
    kept_rows: tuple[int, int] | None = None
    """Rows of the weight a rank keeps. None: all."""
    kept_columns: tuple[int, int] | None = None
    """Columns a rank keeps, cut after whole rows were converted: all ranks share the scale of a row."""


@dataclass(frozen=True, slots=True)
class PlanTotals:
    """Sizes of a plan without file headers."""

    num_weights: int
    num_tensors: int
    read_bytes: int
    written_bytes: int
    bytes_by_dtype: dict[str, int]
    bytes_by_action: dict[str, int]


@dataclass(frozen=True, slots=True)
class RepackPlan:
    """All conversions in model order: layers, MTP blocks, then the rest; an expert's matrices together."""

    recipe: Recipe
    rounding: RoundingChoice
    reversible: bool
    conversions: tuple[Conversion, ...]
    unruled: tuple[str, ...]
    """Tensors of no known part; they pass through unchanged and the report lists them."""
    stuck: tuple[str, ...]
    """For --to release: weights that were rounded when packed and therefore stay as they are."""


def parse_keep(values: Iterable[str]) -> tuple[str, ...]:
    """Patterns of `--keep bf16=PATTERN`. Raises ConfigError for other kinds and for an empty pattern."""
    patterns = []
    for value in values:
        kind, equals, pattern = value.partition("=")
        if kind != "bf16" or not equals or not pattern:
            raise ConfigError(
                f"--keep {value[:80]!r} is not bf16=PATTERN. Weights can be kept in bf16 only, for example "
                "--keep 'bf16=*.attn.wo_b.weight'."
            )
        patterns.append(pattern)
    return tuple(patterns)


def plan_outputs(
    config: ModelConfig,
    tensors: Mapping[str, HasShape],
    recipe: Recipe,
    *,
    rounding: RoundingChoice = RoundingChoice.EXACT,
    keep: Sequence[str] = (),
    reversible: bool = False,
    described: Mapping[str, WeightForm] | None = None,
) -> RepackPlan:
    """What becomes of every tensor of a checkpoint.

    `tensors` are those in the files (or expected_tensors for an estimate), `keep` fnmatch patterns of weight
    names, `described` the forms a pack's description states. Give the config of a pack with its release
    fields restored: it says whether experts were FP4 or FP8.

    Raises ConfigError for options that do not go together and for a pattern that matches no weight;
    CheckpointError for weights the recipe cannot start from.
    """
    _check_options(recipe, rounding=rounding, keep=keep, reversible=reversible)
    planner = _Planner(config, recipe, rounding, reversible, tuple(keep))
    weights = list(find_weights(tensors, described=described))
    weights.sort(key=_model_order(config))
    conversions = tuple(planner.convert(weight) for weight in weights)
    planner.raise_unmatched()
    return RepackPlan(
        recipe=recipe,
        rounding=rounding,
        reversible=reversible,
        conversions=conversions,
        unruled=tuple(source.name for item in conversions if item.part is None for source in item.sources),
        stuck=tuple(item.name for item in conversions if _is_stuck(item, recipe)),
    )


def plan_totals(conversions: Iterable[Conversion]) -> PlanTotals:
    """Sizes of a list of conversions; pass those of the parts to count what ranks replicate."""
    weights = outputs = read = written = 0
    by_dtype: dict[str, int] = {}
    by_action: dict[str, int] = {}
    for item in conversions:
        weights += 1
        outputs += len(item.outputs)
        read += sum(prod(source.shape) * DTYPE_BYTES[source.dtype] for source in item.sources)
        for output in item.outputs:
            num_bytes = output.num_bytes
            written += num_bytes
            by_dtype[output.dtype] = by_dtype.get(output.dtype, 0) + num_bytes
            by_action[item.action.value] = by_action.get(item.action.value, 0) + num_bytes
    return PlanTotals(weights, outputs, read, written, by_dtype, by_action)


def _check_options(
    recipe: Recipe, *, rounding: RoundingChoice, keep: Sequence[str], reversible: bool
) -> None:
    if recipe.target is Target.RELEASE and (keep or reversible):
        option = "--keep" if keep else "--reversible"
        raise ConfigError(
            f"{option} does not go with --to release, which gives back what was stored. Leave it out."
        )
    if reversible and rounding is RoundingChoice.ABSMAX:
        raise ConfigError(
            "--reversible does not go with --rounding absmax: absmax changes the weights themselves, and the "
            "scales alone do not bring them back. Use --rounding exact."
        )


_FORM_OF_ACTION: dict[Action, WeightForm] = {
    Action.FP4_TO_INT8: WeightForm.INT8_CHANNEL,
    Action.FP8_TO_INT8: WeightForm.INT8_CHANNEL,
    Action.BF16_TO_INT8: WeightForm.INT8_CHANNEL,
    Action.FP4_TO_INT4: WeightForm.INT4_CHANNEL,
    Action.FP4_TO_BF16: WeightForm.PLAIN,
    Action.FP8_TO_BF16: WeightForm.PLAIN,
    Action.FP8_TO_MX: WeightForm.MXFP8,
    Action.MX_TO_FP8: WeightForm.FP8_BLOCK,
    Action.BF16_TO_FP8: WeightForm.FP8_BLOCK,
    Action.INT8_TO_FP4: WeightForm.FP4_GROUP,
    Action.BF16_TO_FP4: WeightForm.FP4_GROUP,
}

_STEPS: dict[tuple[WeightForm, Wanted], Action] = {
    (WeightForm.FP4_GROUP, Wanted.INT8): Action.FP4_TO_INT8,
    (WeightForm.FP8_BLOCK, Wanted.INT8): Action.FP8_TO_INT8,
    (WeightForm.PLAIN, Wanted.INT8): Action.BF16_TO_INT8,
    (WeightForm.INT8_CHANNEL, Wanted.INT8): Action.COPY,
    (WeightForm.FP4_GROUP, Wanted.INT4): Action.FP4_TO_INT4,
    (WeightForm.INT4_CHANNEL, Wanted.INT4): Action.COPY,
    (WeightForm.FP4_GROUP, Wanted.BF16): Action.FP4_TO_BF16,
    (WeightForm.FP8_BLOCK, Wanted.BF16): Action.FP8_TO_BF16,
    (WeightForm.PLAIN, Wanted.BF16): Action.COPY,
    # FP4 with a scale per 32 inputs is MXFP4 as it stands
    (WeightForm.FP4_GROUP, Wanted.MX): Action.COPY,
    (WeightForm.FP8_BLOCK, Wanted.MX): Action.FP8_TO_MX,
    (WeightForm.MXFP8, Wanted.MX): Action.COPY,
    (WeightForm.PLAIN, Wanted.MX): Action.COPY,
    (WeightForm.FP8_BLOCK, Wanted.RELEASE): Action.COPY,
    (WeightForm.FP4_GROUP, Wanted.RELEASE): Action.COPY,
    (WeightForm.MXFP8, Wanted.RELEASE): Action.MX_TO_FP8,
    # rounded to 4 bits: the FP4 codes are gone, the numbers stay
    (WeightForm.INT4_CHANNEL, Wanted.RELEASE): Action.COPY,
}
"""(stored form, wanted) -> what to do. INT8 and bf16 back to the release depend on what the pack kept."""


class _Planner:
    """Turns one weight after another into its conversion."""

    def __init__(
        self,
        config: ModelConfig,
        recipe: Recipe,
        rounding: RoundingChoice,
        reversible: bool,
        patterns: tuple[str, ...],
    ) -> None:
        self.config = config
        self.recipe = recipe
        self.rounding = rounding
        self.reversible = reversible
        self.rules = {rule.part: rule for rule in recipe.rules}
        self.unmatched = {pattern: re.compile(translate(pattern)) for pattern in patterns}
        self.patterns = tuple(self.unmatched.values())

    def convert(self, weight: SourceWeight) -> Conversion:
        rule = None if weight.part is None else self.rules.get(weight.part.name)
        if (rule is not None or weight.form is not WeightForm.PLAIN) and self._is_kept(weight.name):
            rule = Rule(part="", wanted=Wanted.BF16, why="kept in bf16 by --keep")
        if rule is None:
            unknown = "no recipe knows this tensor; passed through unchanged"
            reason = unknown if weight.part is None else stored_reason()
            return self._conversion(weight, Action.COPY, reason)
        action = self._action(weight, rule)
        reason = rule.why
        if action is Action.COPY and rule.wanted is Wanted.RELEASE and not _gives_release(weight):
            reason = f"rounded to {weight.form.value} when it was packed; the numbers stay as they are"
        return self._conversion(weight, action, reason)

    def raise_unmatched(self) -> None:
        """Complain about a --keep pattern that did nothing."""
        if self.unmatched:
            pattern = next(iter(self.unmatched))
            raise ConfigError(
                f"--keep bf16={pattern[:80]} matches no weight that {self.recipe.target.value} converts. "
                "Patterns match whole tensor names, for example '*.attn.wo_b.weight'; "
                "ascend-v4 inspect lists the names."
            )

    def _is_kept(self, name: str) -> bool:
        kept = False
        for pattern in self.patterns:
            if pattern.match(name):
                kept = True
                self.unmatched = {text: item for text, item in self.unmatched.items() if item is not pattern}
        return kept

    def _action(self, weight: SourceWeight, rule: Rule) -> Action:
        action = _STEPS.get((weight.form, rule.wanted))
        if rule.wanted is Wanted.RELEASE and action is None:
            action = self._back_to_release(weight)
        if action is None:
            raise CheckpointError(self._refusal(weight, rule.wanted))
        if action is not Action.COPY and len(weight.shape) != 2:
            raise CheckpointError(
                f"{weight.name} has shape {list(weight.shape)}; {rule.wanted.value} is made from matrices "
                "only. The files are not of this model: check them with ascend-v4 inspect."
            )
        plain = weight.tensors[0].dtype if weight.form is WeightForm.PLAIN else "BF16"
        if action is not Action.COPY and plain != "BF16":
            raise CheckpointError(
                f"{weight.name} is stored in {plain}; {rule.wanted.value} is made from BF16, FP8 or FP4. "
                "Store the weight in BF16."
            )
        return action

    def _back_to_release(self, weight: SourceWeight) -> Action | None:
        born_fp4 = self._is_born_fp4(weight)
        if weight.form is WeightForm.PLAIN:
            return Action.BF16_TO_FP4 if born_fp4 else Action.BF16_TO_FP8
        assert weight.form is WeightForm.INT8_CHANNEL, f"no way back is stated for {weight.form}"
        whole = weight.find(TensorKind.RELEASE_WEIGHT) is not None
        return Action.INT8_TO_FP4 if born_fp4 and not whole else Action.COPY

    def _is_born_fp4(self, weight: SourceWeight) -> bool:
        kept = weight.find(TensorKind.RELEASE_SCALE)
        if kept is not None and len(weight.shape) == 2:
            return kept.shape == (weight.shape[0], weight.shape[1] // FP4_GROUP)
        routed = weight.part is not None and weight.part.routed
        return routed and self.config.expert_format is ExpertFormat.FP4

    def _refusal(self, weight: SourceWeight, wanted: Wanted) -> str:
        packed = weight.form in (WeightForm.INT8_CHANNEL, WeightForm.INT4_CHANNEL, WeightForm.MXFP8)
        advice = (
            "Repack the official files, or give this pack back first with --to release."
            if packed
            else "INT4 is made from FP4 experts only: use --to w8a8."
        )
        return f"{weight.name} is stored as {weight.form.value} and cannot become {wanted.value}. {advice}"

    def _conversion(self, weight: SourceWeight, action: Action, reason: str) -> Conversion:
        sources, after = _sources(weight, action, self.recipe.target)
        outputs = _outputs(weight, action, sources, keep_release=self.reversible)
        return Conversion(
            name=weight.name,
            action=action,
            part=None if weight.part is None else weight.part.name,
            before=weight.form,
            after=after,
            shape=weight.shape,
            sources=sources,
            outputs=outputs,
            reason=reason,
            rounding=self.rounding if action is Action.FP4_TO_INT8 else None,
            reversible=_is_reversible(weight, action, after, outputs),
        )


def _gives_release(weight: SourceWeight) -> bool:
    """Whether copying is enough for --to release."""
    stored_so = weight.form in (WeightForm.FP8_BLOCK, WeightForm.FP4_GROUP)
    return stored_so or weight.find(TensorKind.RELEASE_WEIGHT) is not None


def _is_stuck(item: Conversion, recipe: Recipe) -> bool:
    rounded = item.after in (WeightForm.INT8_CHANNEL, WeightForm.INT4_CHANNEL)
    return recipe.target is Target.RELEASE and rounded


def _sources(
    weight: SourceWeight, action: Action, target: Target
) -> tuple[tuple[SourceTensor, ...], WeightForm]:
    """What is read, and the form it leads to."""
    if action is not Action.COPY:
        return weight.tensors, _FORM_OF_ACTION[action]
    whole, scale = weight.find(TensorKind.RELEASE_WEIGHT), weight.find(TensorKind.RELEASE_SCALE)
    if target is Target.RELEASE and whole is not None and scale is not None:
        return (whole, scale), WeightForm.FP8_BLOCK
    # the offsets of symmetric weights are zeros; layouts that want them write them anew
    return tuple(item for item in weight.tensors if item.kind is not TensorKind.OFFSET), weight.form


def _outputs(
    weight: SourceWeight, action: Action, sources: tuple[SourceTensor, ...], *, keep_release: bool
) -> tuple[OutputTensor, ...]:
    if action is Action.COPY:
        return _copies(weight, sources)
    rows, columns = weight.shape
    unit = _COLUMN_UNITS.get(_FORM_OF_ACTION[action], 1)
    if columns % unit:
        raise CheckpointError(
            f"{weight.name} has {columns} columns; {action.value} needs a multiple of {unit}. "
            "Keep it in bf16: --keep bf16=" + weight.name
        )
    stem = weight.name.removesuffix(WEIGHT_SUFFIX)
    shapes = _main_outputs(weight, action, rows, columns)
    if keep_release:
        shapes += _release_outputs(weight, action, rows, columns)
    return tuple(OutputTensor(f"{stem}{kind.value}", kind, dtype, shape) for kind, dtype, shape in shapes)


_COLUMN_UNITS: dict[WeightForm, int] = {
    WeightForm.MXFP8: FP4_GROUP,
    WeightForm.FP4_GROUP: FP4_GROUP,
}

Shaped = tuple[TensorKind, str, tuple[int, ...]]


def _main_outputs(weight: SourceWeight, action: Action, rows: int, columns: int) -> list[Shaped]:
    after = _FORM_OF_ACTION[action]
    if after is WeightForm.PLAIN:
        return [(TensorKind.WEIGHT, "BF16", (rows, columns))]
    if after is WeightForm.INT8_CHANNEL:
        return [
            (TensorKind.WEIGHT, "I8", (rows, columns)),
            (TensorKind.CHANNEL_SCALE, "F32", (rows, 1)),
        ]
    if after is WeightForm.INT4_CHANNEL:
        if rows % 2:
            raise CheckpointError(f"{weight.name} has {rows} rows; INT4 packs pairs of rows. Use --to w8a8.")
        return [
            (TensorKind.WEIGHT, "I8", (rows // 2, columns)),
            (TensorKind.CHANNEL_SCALE, "F32", (rows, 1)),
            (TensorKind.BIAS, "F32", (rows, 1)),
        ]
    if after is WeightForm.FP4_GROUP:
        return [
            (TensorKind.WEIGHT, "I8", (rows, columns // 2)),
            (TensorKind.SCALE, "F8_E8M0", (rows, columns // FP4_GROUP)),
        ]
    by_block = after is WeightForm.FP8_BLOCK
    scale = fp8_scale_shape(rows, columns) if by_block else (rows, columns // FP4_GROUP)
    return [(TensorKind.WEIGHT, "F8_E4M3", (rows, columns)), (TensorKind.SCALE, "F8_E8M0", scale)]


def _release_outputs(weight: SourceWeight, action: Action, rows: int, columns: int) -> list[Shaped]:
    """What --reversible keeps beside a weight so that --to release gives the identical bytes."""
    scale = weight.find(TensorKind.SCALE)
    if scale is None or action not in _KEEPS_RELEASE:
        return []
    kept = (TensorKind.RELEASE_SCALE, "F8_E8M0", scale.shape)
    if action is Action.FP4_TO_INT8:
        return [kept, (TensorKind.NEGATIVE_ZEROS, "U8", (rows, columns // 8))]
    if action is Action.FP8_TO_INT8:
        # INT8 rounds FP8 codes, so the codes themselves are kept; these matrices are few
        return [(TensorKind.RELEASE_WEIGHT, "F8_E4M3", (rows, columns)), kept]
    return [kept]


_KEEPS_RELEASE = {Action.FP4_TO_INT8, Action.FP8_TO_INT8, Action.FP4_TO_BF16, Action.FP8_TO_BF16}


def _copies(weight: SourceWeight, sources: tuple[SourceTensor, ...]) -> tuple[OutputTensor, ...]:
    """The sources one to one, under native names."""
    if len(sources) == 1:
        alone = sources[0]
        return (OutputTensor(weight.name, TensorKind.WEIGHT, alone.dtype, alone.shape),)
    stem = weight.name.removesuffix(WEIGHT_SUFFIX)
    given_back = sources[0].kind is TensorKind.RELEASE_WEIGHT
    renamed = {TensorKind.RELEASE_WEIGHT: TensorKind.WEIGHT, TensorKind.RELEASE_SCALE: TensorKind.SCALE}
    outputs = []
    for source in sources:
        kind = renamed.get(source.kind, source.kind) if given_back else source.kind
        outputs.append(OutputTensor(f"{stem}{kind.value}", kind, _native_dtype(source, kind), source.shape))
    return tuple(outputs)


def _native_dtype(source: SourceTensor, kind: TensorKind) -> str:
    # ModelSlim packs spell FP4 codes and E8M0 scales as plain bytes
    if source.dtype != "U8" or kind is TensorKind.NEGATIVE_ZEROS:
        return source.dtype
    return "F8_E8M0" if kind in (TensorKind.SCALE, TensorKind.RELEASE_SCALE) else "I8"


def _is_reversible(
    weight: SourceWeight, action: Action, after: WeightForm, outputs: tuple[OutputTensor, ...]
) -> bool:
    if action in (Action.FP8_TO_MX, Action.MX_TO_FP8):
        return True
    if action in (Action.INT8_TO_FP4, Action.BF16_TO_FP4, Action.BF16_TO_FP8):
        return weight.find(TensorKind.RELEASE_SCALE) is not None
    if action is Action.COPY and after not in (WeightForm.INT8_CHANNEL, WeightForm.INT4_CHANNEL):
        return True
    return any(output.kind is TensorKind.RELEASE_SCALE for output in outputs)


def _model_order(config: ModelConfig) -> Callable[[SourceWeight], OrderKey]:
    """Sorts layers first, then MTP blocks, then the rest; inside a block as the release has it."""
    known = {name: rank for rank, name in enumerate(expected_tensors(config))}

    def key(weight: SourceWeight) -> OrderKey:
        name = weight.name
        _, number, _ = (*name.split(".", 2), "", "")[:3]
        if number.isdigit():
            section, block = (1 if is_mtp(name) else 0), int(number)
        else:
            section, block = 2, 0
        # digits compare as numbers: the odd places of the split are always digits
        natural = tuple(int(text) if place % 2 else text for place, text in enumerate(_DIGITS.split(name)))
        return section, block, known.get(name, len(known)), natural

    return key


OrderKey = tuple[int, int, int, tuple[int | str, ...]]
_DIGITS = re.compile(r"(\d+)")

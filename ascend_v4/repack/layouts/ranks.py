"""Rank-local file sets: which slice of which tensor a rank reads.

The rules of the release's own converter: heads, output groups, indexer heads and the vocabulary over tensor
parallelism, routed experts by contiguous ids over expert parallelism, everything else on every rank. What
is split, and in which units, is in recipes.yaml.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ascend_v4.checkpoint.index import FP4_GROUP, FP8_BLOCK, fp8_scale_shape
from ascend_v4.config import ModelConfig
from ascend_v4.errors import ConfigError
from ascend_v4.repack.layouts.parts import expert_prefix
from ascend_v4.repack.plan import Conversion, OutputTensor
from ascend_v4.repack.recipes import Split, SplitAxis, WeightForm, model_parts
from ascend_v4.repack.source_forms import TensorKind

MAX_RANKS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Tensor and expert parallelism. There are `ep` ranks; rank r has tp rank r % tp and ep rank r."""

    tp: int
    ep: int

    def __post_init__(self) -> None:
        if not (1 <= self.tp <= MAX_RANKS and 1 <= self.ep <= MAX_RANKS):
            raise ConfigError(f"--ranks tp={self.tp},ep={self.ep}: both must be in [1, {MAX_RANKS}].")
        if self.ep % self.tp:
            raise ConfigError(
                f"--ranks tp={self.tp},ep={self.ep}: ep must be a multiple of tp, because routed experts are "
                f"shared out by id and every rank holds some. Use ep={self.tp} or a multiple of it."
            )


def parse_ranks(text: str) -> Ranks:
    """Ranks from `tp=8,ep=16`; ep is tp where it is left out. Raises ConfigError for anything else."""
    counts: dict[str, int] = {}
    for item in text.split(","):
        key, _, value = item.strip().partition("=")
        if (
            key not in ("tp", "ep")
            or key in counts
            or not (value.isascii() and value.isdigit())
            or len(value) > 5
        ):
            raise ConfigError(f"--ranks {text[:60]!r} is not of the form tp=8,ep=16.")
        counts[key] = int(value)
    tp = counts.get("tp", 1)
    return Ranks(tp=tp, ep=counts.get("ep", tp))


def check_ranks(config: ModelConfig, ranks: Ranks) -> None:
    """Raise ConfigError unless everything that is shared out divides over the ranks."""
    if config.n_routed_experts % ranks.ep:
        raise ConfigError(_indivisible("routed experts", config.n_routed_experts, "ep", ranks.ep))
    units = {part.split.unit: part.what for part in model_parts().values() if part.split is not None}
    for unit in units:
        count = int(getattr(config, unit))
        if count % ranks.tp:
            raise ConfigError(_indivisible(unit, count, "tp", ranks.tp))


def rank_conversions(
    config: ModelConfig, conversions: Iterable[Conversion], ranks: Ranks, *, rank: int
) -> tuple[Conversion, ...]:
    """The conversions of one rank: its experts, its slices, and what every rank holds.

    Raises ConfigError where a slice would cut a scale block or a packed pair in two.
    """
    experts = config.n_routed_experts // ranks.ep
    tp_rank = rank % ranks.tp
    parts = model_parts()
    kept = []
    for item in conversions:
        part = None if item.part is None else parts[item.part]
        if part is not None and part.routed:
            if int(expert_prefix(item).rpartition(".")[2]) // experts == rank:
                kept.append(item)
        elif part is not None and part.split is not None and ranks.tp > 1:
            kept.append(_sliced(item, part.split, tp_rank=tp_rank, tp=ranks.tp))
        else:
            kept.append(item)
    return tuple(kept)


def _indivisible(what: str, count: int, axis: str, ways: int) -> str:
    # counts reach a whole vocabulary; divisors beyond the ranks there can be are no help
    fitting = [divisor for divisor in range(1, MAX_RANKS + 1) if count % divisor == 0]
    return (
        f"{what} ({count}) do not divide over {axis}={ways}. Use one of: {', '.join(map(str, fitting[:12]))}."
    )


def _sliced(item: Conversion, split: Split, *, tp_rank: int, tp: int) -> Conversion:
    axis = 0 if split.axis is SplitAxis.ROWS else 1
    extent = item.shape[axis]
    if extent % tp:
        raise ConfigError(_indivisible(f"{split.axis.value} of {item.name}", extent, "tp", tp))
    kept = (extent // tp * tp_rank, extent // tp * (tp_rank + 1))
    outputs = tuple(_cut(item, output, axis=axis, kept=kept) for output in item.outputs)
    if axis == 0:
        return replace(item, outputs=outputs, kept_rows=kept)
    return replace(item, outputs=outputs, kept_columns=kept)


def _cut(item: Conversion, output: OutputTensor, *, axis: int, kept: tuple[int, int]) -> OutputTensor:
    covered = _covered(item, output)[axis]
    if covered is None:
        # a sum over all columns cannot be shared out; a scale of whole rows is every rank's
        assert output.kind is not TensorKind.BIAS, f"{output.name} is cut along its sum"
        return output
    start, stop = kept
    extent = item.shape[axis]
    if start % covered or (stop % covered and stop != extent):
        raise ConfigError(
            f"{item.name}: a rank's {'rows' if axis == 0 else 'columns'} [{start}, {stop}) cut through "
            f"{output.name}, which has one element per {covered}. Use a smaller tp."
        )
    window = [(0, length) for length in output.shape]
    window[axis] = (start // covered, -(-stop // covered))
    shape = tuple(last - first for first, last in window)
    return replace(output, shape=shape, window=tuple(window))


def _covered(item: Conversion, output: OutputTensor) -> tuple[int, int | None]:
    """Rows and columns of the weight behind one element of an output; None where columns are not its axis."""
    if output.kind in (TensorKind.CHANNEL_SCALE, TensorKind.OFFSET, TensorKind.BIAS):
        return 1, None
    if output.kind in (TensorKind.SCALE, TensorKind.RELEASE_SCALE):
        by_block = output.shape == fp8_scale_shape(item.shape[0], item.shape[1])
        return (FP8_BLOCK, FP8_BLOCK) if by_block else (1, FP4_GROUP)
    if output.kind is TensorKind.NEGATIVE_ZEROS:
        return 1, 8
    packed = {WeightForm.INT4_CHANNEL: (2, 1), WeightForm.FP4_GROUP: (1, 2)}
    return packed.get(item.after, (1, 1)) if output.kind is TensorKind.WEIGHT else (1, 1)

"""From the release's FP4 and FP8 weights to INT8 and INT4 with one scale per output.

Legend: N outputs (rows), K inputs, J packed bytes of a row (K/2), G groups of 32 inputs, H pairs of rows, S
parts of the reduction. Every operator writes into given tensors. Rows are independent: any run of rows may be
passed alone, and the statistics of the runs add up.

Rules that every implementation repeats to the bit:
- A row is scaled by 2^-x first, so that its largest magnitude is in [0.5, 1): float32 then neither over- nor
  underflows on the way. A code is the quotient in float32, rounded to nearest, ties to even, cut at the
  largest code.
- An E2M1 number is m * 2^(byte - 128) with m of 0 1 2 3 4 6 8 12. All sums over a row of FP4 therefore come
  from how often each (byte, m) stands in it, taken by rising byte into one sum per m, then by rising m.
- A device's own sum has an order of its own. It is asked only for whole numbers, exact in any order; float64
  terms are added element by element in the order above. Rows are added one after the other on the host.
- A constant that is no power of two divides as a tensor (`divided`): by a number, a device may multiply with
  its reciprocal instead.
- A row without a nonzero number has scale 1 and codes 0. No other scale is below 2^-126: devices take
  subnormal ones for zero.
The sources of the rules are issue B 2 and reference/model.md 3 and 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

import torch
from torch import Tensor

from ascend_v4.errors import CheckpointError, ContractError
from ascend_v4.operators.contract import BITWISE, FLOAT32, Spec, Where, operator
from ascend_v4.operators.contracts.quantize import FP4_GROUP, WEIGHT_BLOCK, divided

INT8_MAX, INT4_MAX = 127, 7
E8M0_NAN = 255
NUM_STATS = 6
MAX_INPUTS = 65_504
"""Widest row: counts of a row fit 16 bits in the native kernels."""
DOUBLED_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)
E2M1_BIAS = 128
"""A doubled E2M1 number times 2^(scale byte - 128) is the weight."""
STATS_UNIT = 2.0**-12
"""Numbers over the scale of a row that is not FP4 are rounded to multiples of this before their squares and
those of their errors are summed: whole numbers below 2^55, whose sum does not depend on the order."""
SHIFT_FLOOR = -100
"""Blocks this many powers of two below the row's largest round to zero whatever lies in them."""
SMALLEST_SCALE = 2.0**-126
NO_EXPONENT = -(1 << 20)
CLIP_FLOOR = 2.0**-10
"""Smallest INT4 scale the search considers, for rows scaled to [0.5, 1)."""
BIAS_SHIFT = 8
"""W4A8 kernels multiply with activations lowered by this; the bias adds it back."""

E8M0 = (torch.uint8, torch.float8_e8m0fnu)
INT8 = (torch.int8,)
FP8 = (torch.float8_e4m3fn,)
BF16 = (torch.bfloat16,)
STATS = (torch.float64,)


class Rounding(Enum):
    """How an FP4 row chooses its INT8 scale."""

    EXACT = "exact"
    """The smallest power of two that clips nothing, or absmax where that has the smaller squared error."""
    ABSMAX = "absmax"
    """Largest magnitude over 127."""


@dataclass(frozen=True, slots=True)
class RowStats:
    """What conversion did to a run of rows, in the units of the weights. Sums, so runs add up."""

    rows: int
    exact_rows: int
    """Rows that decode to the identical real numbers."""
    changed_weights: int
    squared_error: float
    squared_norm: float
    absmax_squared_error: float
    """What a scale of largest magnitude over largest code would have cost."""

    @classmethod
    def of(cls, stats: Tensor) -> RowStats:
        """The named sums of an operator's [6] result."""
        rows, exact_rows, changed, error, norm, absmax = stats.tolist()
        return cls(int(rows), int(exact_rows), int(changed), error, norm, absmax)

    def __add__(self, other: RowStats) -> RowStats:
        return RowStats(
            self.rows + other.rows,
            self.exact_rows + other.exact_rows,
            self.changed_weights + other.changed_weights,
            self.squared_error + other.squared_error,
            self.squared_norm + other.squared_norm,
            self.absmax_squared_error + other.absmax_squared_error,
        )


@operator(
    source="issue B 2; reference/model.md 3, 4.1",
    tolerance=BITWISE,
    mutates=("out_NK", "out_scale_N"),
    where=Where.HOST,
)
def fp4_to_int8(
    codes_NJ: Annotated[Tensor, Spec("N J", INT8)],
    scale_NG: Annotated[Tensor, Spec("N G", E8M0)],
    out_NK: Annotated[Tensor, Spec("N K", INT8)],
    out_scale_N: Annotated[Tensor, Spec("N", FLOAT32)],
    *,
    rounding: Rounding,
) -> Annotated[Tensor, Spec("6", STATS)]:
    """FP4 weights as INT8 within +-127 with one scale per row; returns the sums of `RowStats`.

    With EXACT a row is without error when its largest number over its lowest set bit is at most 127, which
    holds whenever the scales of its nonzero groups span at most 2^3. Of two equal squared errors the power of
    two wins. The sign of a negative zero is lost: `negative_zeros` keeps it.

    Raises CheckpointError for a NaN scale, ContractError for shapes that do not belong together.
    """
    check_rows(out_scale_N, len(codes_NJ))
    rows = _Fp4Rows.of(codes_NJ, scale_NG, wanted=out_NK.shape)
    absmax = _Candidate.of(rows, divided(rows.largest, INT8_MAX), limit=INT8_MAX)
    chosen = absmax
    if rounding is Rounding.EXACT:
        # The largest magnitude is 0.5 or 0.75: 64 or 96 steps of 2^-7, and the next smaller step would not
        # fit.
        power = _Candidate.of(rows, torch.full_like(rows.largest, 2.0**-7), limit=INT8_MAX)
        chosen = power.where(power.error <= absmax.error, absmax)
    out_NK.copy_(rows.lookup(chosen.codes))
    out_scale_N.copy_(rows.stored_scale(chosen.scale))
    return rows.stats(chosen, absmax)


@operator(
    source="issue B 1; reference/model.md 4.1, 4.2; reference/ascend-operators.md 13.4",
    tolerance=BITWISE,
    mutates=("out_HK", "out_scale_N", "out_bias_NS"),
    where=Where.HOST,
)
def fp4_to_int4(
    codes_NJ: Annotated[Tensor, Spec("N J", INT8)],
    scale_NG: Annotated[Tensor, Spec("N G", E8M0)],
    out_HK: Annotated[Tensor, Spec("H K", INT8)],
    out_scale_N: Annotated[Tensor, Spec("N", FLOAT32)],
    out_bias_NS: Annotated[Tensor, Spec("N S", FLOAT32)],
) -> Annotated[Tensor, Spec("6", STATS)]:
    """FP4 weights as INT4 within +-7, one scale per row, in pairs of rows; returns the sums of `RowStats`.

    Byte [h, k] holds row 2h in its low nibble and row 2h + 1 in its high one: N must be even. The bias is
    8 * scale * (sum of codes) over each of S equal parts of the row; S divides K.
    The scale is the one of least squared error, clipping allowed: for given codes q of numbers v the best
    scale is sum(vq) / sum(qq), and the codes only change where v / scale passes a half, so all possible codes
    are tried.

    Raises CheckpointError for a NaN scale, ContractError for shapes that do not belong together.
    """
    num_rows, parts = out_bias_NS.shape
    check_pairs(out_HK, num_rows=num_rows, parts=parts)
    check_rows(out_scale_N, len(codes_NJ))
    rows = _Fp4Rows.of(codes_NJ, scale_NG, wanted=(num_rows, out_HK.shape[1]))
    absmax = _Candidate.of(rows, divided(rows.largest, INT4_MAX), limit=INT4_MAX)
    clipped = _Candidate.of(rows, _best_int4_scale(rows, fallback=absmax.scale), limit=INT4_MAX)
    chosen = clipped.where(clipped.error <= absmax.error, absmax)
    codes = rows.lookup(chosen.codes)
    out_HK.copy_((codes[0::2] & 15) | (codes[1::2] << 4))
    stored = rows.stored_scale(chosen.scale)
    out_scale_N.copy_(stored)
    sums = codes.view(num_rows, parts, -1).sum(-1, dtype=torch.int64) if num_rows else out_bias_NS
    out_bias_NS.copy_((sums * BIAS_SHIFT).double() * stored.double().unsqueeze(1))
    return rows.stats(chosen, absmax)


@operator(
    source="issue B 1; reference/model.md 3, 4.2",
    tolerance=BITWISE,
    mutates=("out_NK", "out_scale_N"),
    where=Where.HOST,
)
def fp8_to_int8(
    codes_NK: Annotated[Tensor, Spec("N K", FP8)],
    scale_blocks: Annotated[Tensor, Spec("R C", E8M0)],
    out_NK: Annotated[Tensor, Spec("N K", INT8)],
    out_scale_N: Annotated[Tensor, Spec("N", FLOAT32)],
    *,
    first_row: int,
) -> Annotated[Tensor, Spec("6", STATS)]:
    """FP8 weights as INT8 with scale absmax / 127 per row; returns the sums of `RowStats`.

    scale_blocks holds the scales of the whole tensor, [ceil(N/128), ceil(K/128)]; the given rows begin at its
    row `first_row`.

    Raises CheckpointError for a NaN code or scale, or a scale beyond float32; ContractError for too few
    scales.
    """
    shift_NC = block_exponents(codes_NK, scale_blocks, first_row=first_row)
    codes = codes_NK.float()
    if bool(codes.isnan().any()):
        raise CheckpointError(
            f"row {_first_row(codes.isnan())} of an FP8 weight holds NaN; the file is damaged"
        )
    if not codes.numel():
        return _absmax_int8(codes, shift_NC, out_NK, out_scale_N)
    block_max_NC = _block_maxima(codes)
    top = shift_NC.masked_fill(block_max_NC == 0, NO_EXPONENT).amax(1, keepdim=True)
    top = top.masked_fill(top == NO_EXPONENT, 0)
    relative_NC = (shift_NC - top).clamp(SHIFT_FLOOR, 0)
    values_NK = codes * _per_input(power_of_two(relative_NC).float(), codes.shape[1])
    return _absmax_int8(values_NK, top, out_NK, out_scale_N)


@operator(source="issue B 1", tolerance=BITWISE, mutates=("out_NK", "out_scale_N"), where=Where.HOST)
def bf16_to_int8(
    weight_NK: Annotated[Tensor, Spec("N K", BF16)],
    out_NK: Annotated[Tensor, Spec("N K", INT8)],
    out_scale_N: Annotated[Tensor, Spec("N", FLOAT32)],
) -> Annotated[Tensor, Spec("6", STATS)]:
    """Plain weights as INT8 with scale absmax / 127 per row; returns the sums of `RowStats`.

    Raises CheckpointError for a number that is not finite.
    """
    values = weight_NK.float()
    if not bool(values.isfinite().all()):
        raise CheckpointError(
            f"row {_first_row(~values.isfinite())} of a bfloat16 weight is not finite; the file is damaged"
        )
    unscaled = torch.zeros(len(values), 1, dtype=torch.int32, device=values.device)
    return _absmax_int8(values, unscaled, out_NK, out_scale_N)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64 for whole exponents within +-1022, exact where torch's pow need not be."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def block_exponents(codes_NK: Tensor, scale_blocks: Tensor, *, first_row: int) -> Tensor:
    """Power of two of every row's 128-input blocks, [N, C] int32. Raises as `fp8_to_int8` does."""
    check_block_scales(codes_NK, scale_blocks, first_row=first_row)
    num_rows = len(codes_NK)
    scale = scale_blocks.view(torch.uint8)
    blocks = (torch.arange(num_rows, device=scale.device) + first_row) // WEIGHT_BLOCK
    exponents = scale.int()[blocks] - 127
    refuse_nan_scale(exponents == E8M0_NAN - 127)
    return exponents


def refuse_nan_scale(is_nan: Tensor) -> None:
    """Raises CheckpointError with the first row and group whose E8M0 scale is NaN."""
    if bool(is_nan.any()):
        row, group = is_nan.nonzero()[0].tolist()
        raise CheckpointError(f"the scale of row {row}, group {group} is NaN (byte 255); the file is damaged")


def check_fp4_shapes(codes_NJ: Tensor, scale_NG: Tensor, wanted: tuple[int, ...]) -> None:
    """Raises ContractError unless codes, scales and the [N, K] they become belong together."""
    num_rows, packed = codes_NJ.shape
    inputs = 2 * packed
    fits = inputs % FP4_GROUP == 0 and tuple(scale_NG.shape) == (num_rows, inputs // FP4_GROUP)
    if not fits or tuple(wanted) != (num_rows, inputs) or inputs > MAX_INPUTS:
        raise ContractError(
            f"FP4 codes {list(codes_NJ.shape)} with scales {list(scale_NG.shape)} do not make "
            f"{list(wanted)}: each row needs a scale per {FP4_GROUP} inputs, and at most {MAX_INPUTS} inputs"
        )


def check_block_scales(codes_NK: Tensor, scale_blocks: Tensor, *, first_row: int) -> None:
    """Raises ContractError unless 128x128 block scales reach the given rows."""
    num_rows, num_inputs = codes_NK.shape
    wanted = (-(-(first_row + num_rows) // WEIGHT_BLOCK), -(-num_inputs // WEIGHT_BLOCK))
    if first_row < 0 or scale_blocks.shape[0] < wanted[0] or scale_blocks.shape[1] != wanted[1]:
        raise ContractError(
            f"rows {first_row} to {first_row + num_rows} of {num_inputs} inputs need at least "
            f"{list(wanted)} block scales, got {list(scale_blocks.shape)}"
        )


def check_pairs(out_HK: Tensor, *, num_rows: int, parts: int) -> None:
    """Raises ContractError unless rows pair up and inputs divide into the parts of the bias."""
    if num_rows % 2 or out_HK.shape[0] * 2 != num_rows:
        raise ContractError(
            f"{num_rows} rows do not pack into {out_HK.shape[0]} pairs; pass an even number of rows"
        )
    if parts < 1 or out_HK.shape[1] % parts:
        raise ContractError(
            f"{out_HK.shape[1]} inputs do not divide into {parts} bias parts; use 1 or a divisor"
        )


def check_rows(
    out_scale_N: Tensor | None, num_rows: int, out_NK: Tensor | None = None, values_NK: Tensor | None = None
) -> None:
    """Raises ContractError unless the outputs have the rows, and the shape of the values where given."""
    if out_scale_N is not None and tuple(out_scale_N.shape) != (num_rows,):
        raise ContractError(f"{num_rows} rows do not fit scales of shape {list(out_scale_N.shape)}")
    if out_NK is not None and values_NK is not None and out_NK.shape != values_NK.shape:
        raise ContractError(f"{list(values_NK.shape)} weights do not fit an output of {list(out_NK.shape)}")
    if values_NK is not None and values_NK.shape[1] > MAX_INPUTS:
        raise ContractError(f"rows of {values_NK.shape[1]} inputs are wider than {MAX_INPUTS}")


@dataclass(frozen=True, slots=True)
class _Fp4Rows:
    """FP4 rows as counts: E the distinct scale bytes of nonzero numbers, rising; M the magnitudes 1 to 7."""

    nibbles: Tensor
    """[N, K] int64."""
    slot: Tensor
    """[N, K] int64: which of the E bytes scales a number (any, for zeros)."""
    counts: Tensor
    """[N, E, M] float64."""
    values: Tensor
    """[N, E, M] float64 magnitudes times 2^-x."""
    largest: Tensor
    """[N] float32, in [0.5, 1); 0.5 for a row of zeros."""
    exponent: Tensor
    """[N] int32, x."""
    empty: Tensor
    """[N] bool: no nonzero number."""

    @classmethod
    def of(cls, codes_NJ: Tensor, scale_NG: Tensor, *, wanted: tuple[int, ...]) -> _Fp4Rows:
        check_fp4_shapes(codes_NJ, scale_NG, wanted)
        scale = scale_NG.view(torch.uint8).long()
        refuse_nan_scale(scale == E8M0_NAN)
        num_rows, device = len(codes_NJ), codes_NJ.device
        packed = codes_NJ.view(torch.uint8).long()
        nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(1)
        magnitude = nibbles & 7
        per_input = scale.repeat_interleave(FP4_GROUP, 1)
        bytes_used = torch.unique(per_input[magnitude > 0])
        slot = torch.searchsorted(bytes_used, per_input).clamp_max(max(len(bytes_used) - 1, 0))
        cells = max(len(bytes_used), 1) * 8
        first_cell = torch.arange(num_rows, device=device).unsqueeze(1) * cells
        index = first_cell + slot * 8 + magnitude
        counts = torch.bincount(index.flatten(), minlength=num_rows * cells).view(num_rows, cells // 8, 8)[
            ..., 1:
        ]
        if not len(bytes_used):
            bytes_used = torch.zeros(1, dtype=torch.int64, device=device)
        doubled = torch.tensor(DOUBLED_E2M1[1:], dtype=torch.float64, device=device)
        real = doubled * power_of_two(bytes_used - E2M1_BIAS).unsqueeze(1)
        present = torch.where(counts > 0, real, 0.0).flatten(1)
        largest = present.amax(1) if num_rows else present.new_zeros(0)
        mantissa, exponent = torch.frexp(largest.double())
        empty = largest == 0
        return cls(
            nibbles=nibbles,
            slot=slot,
            counts=counts.double(),
            values=real * power_of_two(-exponent)[:, None, None],
            largest=mantissa.masked_fill(empty, 0.5).float(),
            exponent=exponent.int(),
            empty=empty,
        )

    def stored_scale(self, scale: Tensor) -> Tensor:
        """A row's scale in the units of the weights, float32."""
        stored = (scale.double() * power_of_two(self.exponent)).float().clamp_min(SMALLEST_SCALE)
        return stored.masked_fill(self.empty, 1.0)

    def lookup(self, codes_NEM: Tensor) -> Tensor:
        """Signed codes of every weight, [N, K] int8."""
        with_zero = torch.cat((torch.zeros_like(codes_NEM[..., :1]), codes_NEM), -1)
        signed = torch.cat((with_zero, -with_zero), -1).flatten(1)
        return torch.gather(signed, 1, self.slot * 16 + self.nibbles).to(torch.int8)

    def in_order(self, terms_NEM: Tensor) -> Tensor:
        """Sum per row in the order the module's rules give, in the units of the weights squared."""
        by_magnitude = torch.zeros_like(terms_NEM[:, 0])
        for terms in terms_NEM.unbind(1):
            by_magnitude = by_magnitude + terms
        total = terms_NEM.new_zeros(len(terms_NEM))
        for terms in by_magnitude.unbind(1):
            total = total + terms
        return total * power_of_two(2 * self.exponent)

    def stats(self, chosen: _Candidate, absmax: _Candidate) -> Tensor:
        norm = self.in_order(self.counts * (self.values * self.values))
        return row_stats(chosen.changed, chosen.error, norm, absmax.error)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One scale per row and what it makes of the row."""

    scale: Tensor
    """[N] float32 for rows scaled by 2^-x."""
    codes: Tensor
    """[N, E, M] float32."""
    error: Tensor
    """[N] float64 squared error in the units of the weights."""
    changed: Tensor
    """[N] int64."""

    @classmethod
    def of(cls, rows: _Fp4Rows, scale: Tensor, *, limit: int) -> _Candidate:
        kept = (scale.double() * power_of_two(rows.exponent)).float().clamp_min(SMALLEST_SCALE)
        kept = (kept.double() * power_of_two(-rows.exponent)).float()
        each = kept[:, None, None]
        codes = torch.round(rows.values.float() / each).clamp_max(limit)
        difference = rows.values - codes.double() * each.double()
        error = rows.in_order(rows.counts * (difference * difference))
        changed = torch.where(difference != 0, rows.counts, 0.0).sum((1, 2)).long()
        return cls(kept, codes, error, changed)

    def where(self, mine: Tensor, other: _Candidate) -> _Candidate:
        return _Candidate(
            torch.where(mine, self.scale, other.scale),
            torch.where(mine[:, None, None], self.codes, other.codes),
            torch.where(mine, self.error, other.error),
            torch.where(mine, self.changed, other.changed),
        )


def int4_events() -> list[tuple[float, int]]:
    """(number, code it leaves) in falling order of the scale below which the number takes the next code.

    Numbers are those E2M1 rows consist of once scaled to [0.5, 1): 3 * 2^-i and 2^-i. Of two equal scales the
    larger number comes first; which one does not matter, since no best scale lies on such a border.
    """
    numbers = sorted((odd * 2.0**-power for odd in (1, 3) for power in range(1, 16)), reverse=True)
    events = [(number, code) for number in numbers if number < 1.0 for code in range(INT4_MAX)]
    borders = [(number / (code + 0.5), number, code) for number, code in events]
    kept = sorted((each for each in borders if each[0] >= CLIP_FLOOR), key=lambda each: -each[0])
    return [(number, code) for _, number, code in kept]


def _best_int4_scale(rows: _Fp4Rows, *, fallback: Tensor) -> Tensor:
    """Scale of least squared error, float32 [N], for rows scaled by 2^-x."""
    count_of: dict[float, Tensor] = {}
    product = torch.zeros_like(rows.largest, dtype=torch.float64)
    square = torch.zeros_like(product)
    best, scale = torch.zeros_like(product), fallback.double()
    for number, code in int4_events():
        if number not in count_of:
            count_of[number] = torch.where(rows.values == number, rows.counts, 0.0).sum((1, 2))
        count = count_of[number]
        product = product + count * number
        square = square + count * (2 * code + 1)
        score = torch.where(square > 0, product * product / square, 0.0)
        scale = torch.where(score > best, product / square, scale)
        best = torch.maximum(score, best)
    return scale.float()


def _absmax_int8(values_NK: Tensor, exponent: Tensor, out_NK: Tensor, out_scale_N: Tensor) -> Tensor:
    """values times 2^exponent, [N, 1], as INT8. Raises CheckpointError where a scale would be infinite."""
    check_rows(out_scale_N, len(values_NK), out_NK, values_NK)
    if not values_NK.numel():
        out_scale_N.fill_(1.0)
        return _stats_of([len(values_NK), len(values_NK), 0, 0, 0, 0], values_NK.device)
    largest = values_NK.abs().amax(1, keepdim=True)
    empty = largest == 0
    exponent = exponent.masked_fill(empty, 0)
    stored = (divided(largest, INT8_MAX).double() * power_of_two(exponent)).float().clamp_min(SMALLEST_SCALE)
    stored = stored.masked_fill(empty, 1.0)
    if bool(stored.isinf().any()):
        raise CheckpointError(
            f"the scale of row {_first_row(stored.isinf())} is beyond float32; the file is damaged"
        )
    kept = (stored.double() * power_of_two(-exponent)).float()
    quotient = values_NK / kept
    codes = torch.round(quotient).clamp(-INT8_MAX, INT8_MAX)
    out_NK.copy_(codes)
    out_scale_N.copy_(stored.squeeze(1))
    changed = (codes.double() * kept.double() != values_NK.double()).sum(1)
    unit = stored.double().squeeze(1).square()
    error = _fixed_squares(quotient - codes) * unit
    norm = _fixed_squares(quotient) * unit
    return row_stats(changed, error, norm, error)


def _fixed_squares(numbers_NK: Tensor) -> Tensor:
    """Sum per row of the squares of numbers rounded to whole multiples of the unit, float64."""
    return torch.round(numbers_NK / STATS_UNIT).long().square().sum(1).double() * STATS_UNIT**2


def _block_maxima(codes_NK: Tensor) -> Tensor:
    missing = -codes_NK.shape[1] % WEIGHT_BLOCK
    padded = torch.nn.functional.pad(codes_NK.abs(), (0, missing))
    return padded.view(len(codes_NK), -1, WEIGHT_BLOCK).amax(-1)


def _per_input(blocks_NC: Tensor, num_inputs: int) -> Tensor:
    return blocks_NC.repeat_interleave(WEIGHT_BLOCK, 1)[:, :num_inputs]


def _first_row(where_NK: Tensor) -> int:
    return int(where_NK.nonzero()[0, 0])


def row_stats(changed: Tensor, error: Tensor, norm: Tensor, absmax_error: Tensor) -> Tensor:
    """The [6] sums of `RowStats` from values per row, added row by row."""
    sums = [0.0, 0.0, 0.0]
    # Not sum(): from Python 3.12 on it compensates, and a kernel adds plainly.
    for index, column in enumerate((error, norm, absmax_error)):
        for value in column.tolist():
            sums[index] += value
    exact = int((changed == 0).sum())
    return _stats_of([len(changed), exact, int(changed.sum()), *sums], changed.device)


def _stats_of(sums: list[float], device: torch.device) -> Tensor:
    return torch.tensor(sums, dtype=torch.float64, device=device)

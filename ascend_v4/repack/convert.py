"""Makes the bytes of output tensors, a slab of rows at a time, with the operators of contracts/transcode.

A slab fits a processor's last cache, so hashing and writing read it there. Buffers belong to one thread and
are reused, so a slab is valid until the next is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from ascend_v4.checkpoint.index import DTYPE_BYTES, FP4_GROUP, FP8_BLOCK, fp8_scale_shape
from ascend_v4.errors import CheckpointError
from ascend_v4.operators.contracts.transcode import (
    Rounding,
    RowStats,
    bf16_to_int8,
    fp4_to_int4,
    fp4_to_int8,
    fp8_to_int8,
)
from ascend_v4.operators.contracts.transcode_exact import (
    bf16_to_fp4,
    bf16_to_fp8,
    derive_fp4_scale,
    derive_fp8_scale,
    fp4_to_bf16,
    fp8_scale_to_mx,
    fp8_to_bf16,
    int8_to_fp4,
    mx_scale_to_fp8,
    negative_zeros,
)
from ascend_v4.operators.select import OperatorTable
from ascend_v4.repack.plan import Action, Conversion, OutputTensor
from ascend_v4.repack.source_forms import SourceTensor, TensorKind

SLAB_BYTES = 8 << 20
"""Output bytes converted at once, at least 128 rows. Statistics add up slab by slab: they depend on it.

Smaller slabs stay in a nearer cache and cost more: between slabs Python runs with cold caches and waits for
the other threads' lock.
"""

COPY_BYTES = 16 << 20
"""Bytes handed on at once where bytes are copied, which takes no buffer."""

RELEASED_BYTES = 64 << 20
"""Mapped source pages of one tensor that may pile up before they are let go."""


class TensorBytes(Protocol):
    """Where source tensors come from."""

    def bytes_of(self, name: str) -> Tensor:
        """A tensor's bytes, uint8 of one axis."""

    def runs_of(self, name: str) -> Sequence[Tensor]:
        """The same bytes in order, in pieces that need not be joined to be read."""

    def require_unchanged(self, names: Iterable[str]) -> None:
        """Raise CheckpointError where these are not what they were: a map of a cut file kills its reader."""

    def release(self, names: Iterable[str]) -> None:
        """These tensors were consumed; they may be asked for again."""


class Scratch:
    """Buffers that grow to the largest slab and stay."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, use: str, num_bytes: int) -> Tensor:
        """Bytes for one use, with what the last use left in them."""
        held = self._buffers.get(use)
        if held is None or held.numel() < num_bytes:
            held = torch.empty(num_bytes, dtype=torch.uint8)
            self._buffers[use] = held
        return held[:num_bytes]


class ConversionRun:
    """One conversion on its way into one part: its outputs may be asked for in any order."""

    def __init__(
        self, conversion: Conversion, stored: TensorBytes, table: OperatorTable, scratch: Scratch
    ) -> None:
        self.conversion = conversion
        self.stats: RowStats | None = None
        """What became of the rows, once the weight was made; None where bytes were copied."""
        self._stored = stored
        self._table = table
        self._scratch = scratch
        self._held: dict[TensorKind, Tensor] = {}
        self._views: dict[TensorKind, Tensor] = {}

    def chunks(self, output: OutputTensor) -> Iterator[memoryview]:
        """The bytes of one output."""
        copied = self._copied_source(output)
        if copied is not None:
            yield from self._copy(copied, output)
        elif output.kind is TensorKind.OFFSET:
            yield from self._zeros(output)
        elif output.kind in (TensorKind.CHANNEL_SCALE, TensorKind.BIAS):
            if output.kind not in self._held:
                # a layout put it before its weight, as it does with the odd bytes of very small tensors
                for _ in self._slabs(self.conversion.outputs[0]):
                    pass
            first, stop = _row_window(output)
            yield from _pieces(self._held[output.kind][first:stop])
        else:
            for slab in self._slabs(output):
                yield _bytes(slab)

    def release(self) -> None:
        """Let the source's pages go."""
        self._views.clear()
        self._stored.release(source.name for source in self.conversion.sources)

    def _copied_source(self, output: OutputTensor) -> SourceTensor | None:
        """What an output is a byte copy of; None for one that is made."""
        conversion, kind = self.conversion, output.kind
        if conversion.action is Action.COPY and kind is not TensorKind.OFFSET:
            copied = [other for other in conversion.outputs if other.kind is not TensorKind.OFFSET]
            return conversion.sources[copied.index(output)]
        keeps_codes = conversion.action in (Action.FP8_TO_MX, Action.MX_TO_FP8)
        if kind is TensorKind.RELEASE_WEIGHT or (kind is TensorKind.WEIGHT and keeps_codes):
            return conversion.sources[0]
        if kind is TensorKind.RELEASE_SCALE:
            return self._source(TensorKind.SCALE) or self._source(TensorKind.RELEASE_SCALE)
        if kind is TensorKind.SCALE and not keeps_codes:
            # back to the release with the scales the pack kept; derived ones are made
            return self._source(TensorKind.RELEASE_SCALE)
        return None

    def _source(self, kind: TensorKind) -> SourceTensor | None:
        return next((source for source in self.conversion.sources if source.kind is kind), None)

    def _view(self, kind: TensorKind, dtype: torch.dtype) -> Tensor:
        """A source tensor as its file holds it, under the dtype an operator wants."""
        if kind not in self._views:
            source = self._source(kind)
            assert source is not None, f"{self.conversion.name} has no {kind.value} to read"
            raw = self._stored.bytes_of(source.name)
            self._views[kind] = raw.view(source.shape[0], -1)
        return self._views[kind].view(dtype)

    def _copy(self, source: SourceTensor, output: OutputTensor) -> Iterator[memoryview]:
        if self.conversion.action is not Action.COPY and output.kind is TensorKind.WEIGHT:
            # the codes stay and the scales are respelled: no number changes
            first, stop = _row_window(output)
            self.stats = _exact(stop - first)
        if output.window is None:
            runs = self._stored.runs_of(source.name)
            yield from self._released((piece for run in runs for piece in _pieces(run)), source)
            return
        raw = self._stored.bytes_of(source.name)
        if raw.numel() == 0:
            return
        first, stop = output.window[0]
        rows = raw.view(source.shape[0], -1)[first:stop]
        if len(output.window) == 1 or output.window[1] == (0, source.shape[1]):
            yield from self._released(_pieces(rows), source)
            return
        # only matrices are cut by columns
        low, high = (edge * DTYPE_BYTES[source.dtype] for edge in output.window[1])
        step = max(1, SLAB_BYTES // max(1, high - low))
        pieces = (
            _bytes(self._cut(rows[start : start + step], low, high)) for start in range(0, len(rows), step)
        )
        yield from self._released(pieces, source)

    def _released(self, pieces: Iterator[memoryview], source: SourceTensor) -> Iterator[memoryview]:
        mapped_bytes = 0
        for piece in pieces:
            self._stored.require_unchanged([source.name])
            yield piece
            mapped_bytes += len(piece)
            if mapped_bytes >= RELEASED_BYTES:
                self._stored.release([source.name])
                mapped_bytes = 0

    def _zeros(self, output: OutputTensor) -> Iterator[memoryview]:
        left_bytes = output.num_bytes
        nothing = self._scratch.take("zeros", min(left_bytes, SLAB_BYTES)).zero_()
        while left_bytes > 0:
            yield _bytes(nothing[:left_bytes])
            left_bytes -= SLAB_BYTES

    def _slabs(self, output: OutputTensor) -> Iterator[Tensor]:
        """Rows of an output that an operator makes, contiguous and cut to the output's window."""
        make, rows, row_bytes, row_step = self._maker(output)
        first, stop = (0, rows) if output.window is None else output.window[0]
        step = max(1, SLAB_BYTES // max(1, row_bytes) // row_step) * row_step
        read_bytes = 0
        if output.kind is TensorKind.WEIGHT:
            self.stats = _exact(0)
        while first < stop:
            # slabs end where they would in an unsliced tensor
            end = min(stop, first - first % step + step)
            slab = self._scratch.take("slab", (end - first) * row_bytes).view(end - first, row_bytes)
            self._stored.require_unchanged(source.name for source in self.conversion.sources)
            try:
                make(first, end, slab)
            except CheckpointError as error:
                raise self._with_place(error, first) from None
            if output.window is not None and len(output.window) > 1:
                low, high = (edge * DTYPE_BYTES[output.dtype] for edge in output.window[1])
                slab = slab if high - low == row_bytes else self._cut(slab, low, high)
            yield slab
            read_bytes += slab.numel()
            if read_bytes >= RELEASED_BYTES:
                self._stored.release(source.name for source in self.conversion.sources)
                read_bytes = 0
            first = end

    def _with_place(self, error: CheckpointError, first_row: int) -> CheckpointError:
        item = self.conversion
        advice = ""
        if item.action in (Action.INT8_TO_FP4, Action.BF16_TO_FP4, Action.BF16_TO_FP8):
            advice = (
                ". --to release gives back numbers that the release's formats hold; these were changed when "
                "they were packed or after. Repack the official files instead"
            )
        return CheckpointError(f"{item.name}, counting rows from {first_row}: {error}{advice}.")

    def _cut(self, rows: Tensor, low: int, high: int) -> Tensor:
        kept = self._scratch.take("cut", len(rows) * (high - low)).view(len(rows), high - low)
        return kept.copy_(rows[:, low:high])

    def _maker(self, output: OutputTensor) -> tuple[Callable[[int, int, Tensor], None], int, int, int]:
        """How to fill bytes with output rows, how many rows the whole has, bytes of a row, rows to go by."""
        conversion, kind = self.conversion, output.kind
        rows, columns = conversion.shape
        if kind is TensorKind.WEIGHT:
            self._hold_companions(rows)
            if conversion.action is Action.FP4_TO_INT4:
                return self._make_weight, rows // 2, columns, FP8_BLOCK // 2
            to_fp4 = conversion.action in (Action.INT8_TO_FP4, Action.BF16_TO_FP4)
            row_bytes = columns // 2 if to_fp4 else columns * DTYPE_BYTES[output.dtype]
            return self._make_weight, rows, row_bytes, FP8_BLOCK
        if kind is TensorKind.NEGATIVE_ZEROS:
            return self._make_negative_zeros, rows, columns // 8, FP8_BLOCK
        assert kind is TensorKind.SCALE, f"nothing makes {kind.value} in {conversion.action.value}"
        if conversion.action is Action.FP8_TO_MX:
            return self._make_mx_scale, rows, columns // FP4_GROUP, FP8_BLOCK
        if conversion.action is Action.MX_TO_FP8:
            return self._make_block_scale, *fp8_scale_shape(rows, columns), 1
        derived = self._release_scale()
        return self._copy_rows(derived), len(derived), derived.shape[1], FP8_BLOCK

    def _hold_companions(self, rows: int) -> None:
        """Room for what comes out beside a weight and is written after it."""
        for other in self.conversion.outputs:
            if other.kind is TensorKind.CHANNEL_SCALE or other.kind is TensorKind.BIAS:
                parts = prod(other.shape) // max(1, other.shape[0])
                self._held[other.kind] = torch.empty(rows, parts, dtype=torch.float32)

    def _make_weight(self, first: int, stop: int, slab: Tensor) -> None:
        stats = _MAKERS[self.conversion.action](self, first, stop, slab)
        assert self.stats is not None, f"{self.conversion.name}: rows were made outside of a pass"
        self.stats += _exact(stop - first) if stats is None else RowStats.of(stats)

    def _fp4_to_int8(self, first: int, stop: int, slab: Tensor) -> Tensor:
        rounding = self.conversion.rounding
        assert rounding is not None, f"{self.conversion.name} has no rounding"
        return self._table[fp4_to_int8](
            self._view(TensorKind.WEIGHT, torch.int8)[first:stop],
            self._view(TensorKind.SCALE, torch.uint8)[first:stop],
            slab.view(torch.int8),
            self._held[TensorKind.CHANNEL_SCALE][first:stop].view(-1),
            rounding=Rounding(rounding.value),
        )

    def _fp4_to_int4(self, first: int, stop: int, slab: Tensor) -> Tensor:
        rows = slice(2 * first, 2 * stop)
        return self._table[fp4_to_int4](
            self._view(TensorKind.WEIGHT, torch.int8)[rows],
            self._view(TensorKind.SCALE, torch.uint8)[rows],
            slab.view(torch.int8),
            self._held[TensorKind.CHANNEL_SCALE][rows].view(-1),
            self._held[TensorKind.BIAS][rows],
        )

    def _fp8_to_int8(self, first: int, stop: int, slab: Tensor) -> Tensor:
        return self._table[fp8_to_int8](
            self._view(TensorKind.WEIGHT, torch.float8_e4m3fn)[first:stop],
            self._view(TensorKind.SCALE, torch.uint8),
            slab.view(torch.int8),
            self._held[TensorKind.CHANNEL_SCALE][first:stop].view(-1),
            first_row=first,
        )

    def _bf16_to_int8(self, first: int, stop: int, slab: Tensor) -> Tensor:
        return self._table[bf16_to_int8](
            self._view(TensorKind.WEIGHT, torch.bfloat16)[first:stop],
            slab.view(torch.int8),
            self._held[TensorKind.CHANNEL_SCALE][first:stop].view(-1),
        )

    def _fp4_to_bf16(self, first: int, stop: int, slab: Tensor) -> None:
        self._table[fp4_to_bf16](
            self._view(TensorKind.WEIGHT, torch.int8)[first:stop],
            self._view(TensorKind.SCALE, torch.uint8)[first:stop],
            slab.view(torch.bfloat16),
        )

    def _fp8_to_bf16(self, first: int, stop: int, slab: Tensor) -> None:
        self._table[fp8_to_bf16](
            self._view(TensorKind.WEIGHT, torch.float8_e4m3fn)[first:stop],
            self._view(TensorKind.SCALE, torch.uint8),
            slab.view(torch.bfloat16),
            first_row=first,
        )

    def _int8_to_fp4(self, first: int, stop: int, slab: Tensor) -> Tensor | None:
        if self._source(TensorKind.RELEASE_SCALE) is None:
            # nothing says which FP4 numbers were meant, so only those that are FP4 numbers can go back
            numbers = self._int8_numbers(slice(first, stop))
            self._table[bf16_to_fp4](numbers, self._release_scale()[first:stop], slab.view(torch.int8))
            return None
        marked = self._source(TensorKind.NEGATIVE_ZEROS)
        return self._table[int8_to_fp4](
            self._view(TensorKind.WEIGHT, torch.int8)[first:stop],
            self._view(TensorKind.CHANNEL_SCALE, torch.float32)[first:stop].view(-1),
            self._release_scale()[first:stop],
            None if marked is None else self._view(TensorKind.NEGATIVE_ZEROS, torch.uint8)[first:stop],
            slab.view(torch.int8),
        )

    def _bf16_to_fp4(self, first: int, stop: int, slab: Tensor) -> None:
        self._table[bf16_to_fp4](
            self._view(TensorKind.WEIGHT, torch.bfloat16)[first:stop],
            self._release_scale()[first:stop],
            slab.view(torch.int8),
        )

    def _bf16_to_fp8(self, first: int, stop: int, slab: Tensor) -> None:
        self._table[bf16_to_fp8](
            self._view(TensorKind.WEIGHT, torch.bfloat16)[first:stop],
            self._release_scale(),
            slab.view(torch.float8_e4m3fn),
            first_row=first,
        )

    def _make_negative_zeros(self, first: int, stop: int, slab: Tensor) -> None:
        self._table[negative_zeros](self._view(TensorKind.WEIGHT, torch.int8)[first:stop], slab)

    def _make_mx_scale(self, first: int, stop: int, slab: Tensor) -> None:
        self._table[fp8_scale_to_mx](self._view(TensorKind.SCALE, torch.uint8), slab, first_row=first)

    def _make_block_scale(self, first: int, stop: int, slab: Tensor) -> None:
        rows = slice(first * FP8_BLOCK, stop * FP8_BLOCK)
        self._table[mx_scale_to_fp8](self._view(TensorKind.SCALE, torch.uint8)[rows], slab)

    def _copy_rows(self, rows: Tensor) -> Callable[[int, int, Tensor], None]:
        def copy(first: int, stop: int, slab: Tensor) -> None:
            slab.copy_(rows[first:stop])

        return copy

    def _release_scale(self) -> Tensor:
        """The release's scales: those the pack kept, else derived from all rows, once."""
        if self._source(TensorKind.RELEASE_SCALE) is not None:
            return self._view(TensorKind.RELEASE_SCALE, torch.uint8)
        if TensorKind.SCALE not in self._held:
            self._held[TensorKind.SCALE] = self._derive_scale()
        return self._held[TensorKind.SCALE]

    def _int8_numbers(self, rows: slice) -> Tensor:
        codes = self._view(TensorKind.WEIGHT, torch.int8)[rows]
        return codes.float() * self._view(TensorKind.CHANNEL_SCALE, torch.float32)[rows].view(-1, 1)

    def _derive_scale(self) -> Tensor:
        rows, columns = self.conversion.shape
        by_block = self.conversion.action is Action.BF16_TO_FP8
        per_row = self.conversion.action is Action.INT8_TO_FP4
        scale = torch.empty(
            fp8_scale_shape(rows, columns) if by_block else (rows, columns // FP4_GROUP), dtype=torch.uint8
        )
        for first in range(0, rows, FP8_BLOCK):
            span = slice(first, first + FP8_BLOCK)
            if by_block:
                numbers = self._view(TensorKind.WEIGHT, torch.bfloat16)[span]
                block = first // FP8_BLOCK
                self._table[derive_fp8_scale](numbers, scale[block : block + 1])
            elif per_row:
                self._table[derive_fp4_scale](self._int8_numbers(span), scale[span])
            else:
                self._table[derive_fp4_scale](
                    self._view(TensorKind.WEIGHT, torch.bfloat16)[span], scale[span]
                )
        return scale


_MAKERS: dict[Action, Callable[[ConversionRun, int, int, Tensor], Tensor | None]] = {
    Action.FP4_TO_INT8: ConversionRun._fp4_to_int8,
    Action.FP4_TO_INT4: ConversionRun._fp4_to_int4,
    Action.FP8_TO_INT8: ConversionRun._fp8_to_int8,
    Action.BF16_TO_INT8: ConversionRun._bf16_to_int8,
    Action.FP4_TO_BF16: ConversionRun._fp4_to_bf16,
    Action.FP8_TO_BF16: ConversionRun._fp8_to_bf16,
    Action.INT8_TO_FP4: ConversionRun._int8_to_fp4,
    Action.BF16_TO_FP4: ConversionRun._bf16_to_fp4,
    Action.BF16_TO_FP8: ConversionRun._bf16_to_fp8,
}


def _exact(rows: int) -> RowStats:
    return RowStats(rows, rows, 0, 0.0, 0.0, 0.0)


def _row_window(output: OutputTensor) -> tuple[int, int]:
    return (0, output.shape[0]) if output.window is None else output.window[0]


def _pieces(stored: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in memory, a slab at a time, not copied."""
    raw = stored.reshape(-1).view(torch.uint8)
    for first in range(0, len(raw), COPY_BYTES):
        yield _bytes(raw[first : first + COPY_BYTES])


def _bytes(slab: Tensor) -> memoryview:
    flat: memoryview = slab.reshape(-1).numpy().data
    return flat

"""Recipes of the operators over paged caches: attention, indexer, compressor, cache writes.

Pages are shuffled, page 0 and unowned pages hold poison, and so do the rows a token must not see: freed
window pages, entries that are not complete, state that nobody keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ascend_v4.operators.contracts.batch import TokenBatch, rows_of
from ascend_v4.operators.contracts.compressor import CompressorWeights
from ascend_v4.operators.contracts.quantize import IndexFormat, KvFormat
from ascend_v4.operators.contracts.rope import rope_frequencies
from ascend_v4.operators.testing.draw import Draw
from ascend_v4.operators.testing.recipe import Inputs, Planned, Recipe, sized

WINDOW_TOKENS = 128
PAGE_TOKENS = 128
CSA_RATIO, HCA_RATIO = 4, 128
EPS = 1e-6

BATCHES: dict[str, dict[str, Any]] = {
    "zero": {"starts": (), "counts": ()},
    "one": {"starts": (0,), "counts": (1,)},
    "odd": {"starts": (5,), "counts": (3,)},
    "edge": {"starts": (126, 127, 128, 129, 130), "counts": (1, 1, 1, 1, 1)},
    "edge-127": {"starts": (0,), "counts": (127,)},
    "edge-128": {"starts": (0,), "counts": (128,)},
    "edge-129": {"starts": (0,), "counts": (129,)},
    "edge-several": {"starts": (125, 251), "counts": (5, 5)},
    "ragged": {"starts": (0, 130, 3, 255), "counts": (7, 5, 140, 1)},
    "poison": {"starts": (300, 2, 400), "counts": (3, 1, 8)},
}
"""Sequences by tokens they had and new tokens. `poison` has freed window pages and one sequence without
entries.
"""


@dataclass(frozen=True, slots=True)
class Pages:
    """Page tables of a batch in one page group."""

    table_BP: Tensor
    num_pages: int
    per_page: int

    def rows(self, wanted: Iterable[range]) -> Tensor:
        """Physical rows of each sequence's logical ones, int64, on the CPU."""
        table = self.table_BP.cpu()
        parts = [torch.empty(0, dtype=torch.int64)]
        for index, span in enumerate(wanted):
            positions = torch.tensor(span, dtype=torch.int64)
            sequence = torch.full_like(positions, index)
            parts.append(rows_of(table, sequence, positions, per_page=self.per_page))
        return torch.cat(parts)


def deal_pages(draw: Draw, held: Sequence[Iterable[int]], *, per_page: int) -> Pages:
    """Shuffled page ids for the page numbers a sequence holds, 0 for the others. Two pages stay unowned."""
    numbers = [sorted(set(sequence)) for sequence in held]
    count = sum(len(sequence) for sequence in numbers)
    ids = [1 + page_id for page_id in draw.permutation(count + 2)]
    longest = max((sequence[-1] + 1 for sequence in numbers if sequence), default=1)
    table = torch.zeros(len(numbers), longest, dtype=torch.int64)
    for row, sequence in zip(table, numbers, strict=True):
        for number in sequence:
            row[number] = ids.pop()
    return Pages(draw.lay_out(table), count + 3, per_page)


def pages_of(rows: range, per_page: int) -> range:
    """Page numbers that cover a run of rows."""
    return range(rows.start // per_page, -(-rows.stop // per_page))


def token_batch(draw: Draw, starts: tuple[int, ...], counts: tuple[int, ...]) -> TokenBatch:
    """A batch on the case's device."""
    return TokenBatch(starts=starts, counts=counts, device=draw.device)


def recipes() -> dict[str, list[Recipe]]:
    """Recipes by operator name."""
    return {
        "sparse_attention": _attention_recipes(),
        "select_entries": _index_recipes(),
        "compress": _compressor_recipes(),
        **_write_recipes(),
    }


def _entry_pages(draw: Draw, batch: TokenBatch, *, ratio: int) -> tuple[Pages, Tensor]:
    """Pages that cover every position, and the physical rows of the entries that are complete."""
    per_page = PAGE_TOKENS // ratio
    pages = deal_pages(draw, [pages_of(range(end), PAGE_TOKENS) for end in _ends(batch)], per_page=per_page)
    return pages, pages.rows(range(end // ratio) for end in _ends(batch))


def _ends(batch: TokenBatch) -> list[int]:
    return [start + count for _, count, start in batch.spans]


def _visible(batch: TokenBatch, ratio: int) -> list[int]:
    return [
        (position + 1) // ratio for _, count, start in batch.spans for position in range(start, start + count)
    ]


def _attention(
    draw: Draw,
    *,
    starts: tuple[int, ...],
    counts: tuple[int, ...],
    ratio: int = 0,
    topk: int | None = None,
    heads: int = 3,
    width: int = 32,
    sink: float | None = None,
) -> Inputs:
    batch = token_batch(draw, starts, counts)
    seen = [range(max(0, start - WINDOW_TOKENS + 1), start + count) for _, count, start in batch.spans]
    window = deal_pages(draw, [pages_of(span, PAGE_TOKENS) for span in seen], per_page=PAGE_TOKENS)
    q_THD = draw.normal(batch.num_tokens, heads, width)
    sinks = draw.normal(heads, dtype=torch.float32)
    arguments: dict[str, Any] = {
        "q_THD": q_THD,
        "window_cache_CSD": draw.cache((window.num_pages, PAGE_TOKENS, width), window.rows(seen)),
        "window_table_BP": window.table_BP,
        "compressed_cache_CSD": None,
        "compressed_table_BP": None,
        "selected_TK": None,
        "sinks_H": sinks if sink is None else draw.lay_out(torch.full((heads,), sink)),
        "batch": batch,
        "ratio": ratio,
        "window_tokens": WINDOW_TOKENS,
        "scale": width**-0.5,
    }
    if ratio:
        entries, rows = _entry_pages(draw, batch, ratio=ratio)
        shape = (entries.num_pages, entries.per_page, width)
        arguments["compressed_cache_CSD"] = draw.cache(shape, rows)
        arguments["compressed_table_BP"] = entries.table_BP
        if topk is not None:
            arguments["selected_TK"] = _selection(draw, _visible(batch, ratio), topk)
    planned = {
        "batch": batch,
        "ratio": ratio,
        "window_tokens": WINDOW_TOKENS,
        "window_table": window.table_BP,
        "window_page_tokens": PAGE_TOKENS,
        "compressed_table": arguments["compressed_table_BP"],
        "entries_per_page": PAGE_TOKENS // ratio if ratio else 0,
    }
    return Inputs(arguments=arguments, planned=Planned(parameter="plan", arguments=planned))


def _selection(draw: Draw, visible: list[int], topk: int) -> Tensor:
    """Distinct visible entries of each token in random order, then -1."""
    selected = torch.full((len(visible), topk), -1, dtype=torch.int32)
    for row, count in zip(selected, visible, strict=True):
        kept = min(topk, count)
        row[:kept] = draw.subsets(1, below=max(count, 1), width=kept)[0].to(torch.int32)
    return draw.lay_out(selected)


def _attention_recipes() -> list[Recipe]:
    kinds: dict[str, dict[str, Any]] = {
        "swa": {},
        "csa": {"ratio": CSA_RATIO, "topk": 16},
        "csa-few": {"ratio": CSA_RATIO, "topk": 2},
        "csa-all": {"ratio": CSA_RATIO},
        "hca": {"ratio": HCA_RATIO},
    }
    deep = ("edge", "edge-several", "ragged", "poison")
    sizes = {name: {**batch, **kinds["csa"]} for name, batch in BATCHES.items()}
    for kind in ("swa", "hca"):
        sizes |= {f"{name}-{kind}": {**batch, **kinds[kind]} for name, batch in BATCHES.items()}
    for kind in ("csa-few", "csa-all"):
        sizes |= {f"{name}-{kind}": {**BATCHES[name], **kinds[kind]} for name in deep}
    for name, sink in (("no-sink", -torch.inf), ("all-sink", torch.inf), ("huge-sink", 1e4)):
        sizes[name] = {**BATCHES["ragged"], **kinds["csa"], "sink": sink}
    largest = {
        "starts": (65536, 0),
        "counts": (2, 300),
        "ratio": CSA_RATIO,
        "topk": 1024,
        "heads": 128,
        "width": 512,
    }
    return sized(_attention, sizes, largest=largest)


def _index(
    draw: Draw,
    *,
    starts: tuple[int, ...],
    counts: tuple[int, ...],
    topk: int = 5,
    heads: int = 4,
    width: int = 64,
    format: IndexFormat = IndexFormat.PLAIN,
) -> Inputs:
    """Whole numbers throughout: every score is exact, many are equal, and one choice is right."""
    batch = token_batch(draw, starts, counts)
    pages, rows = _entry_pages(draw, batch, ratio=CSA_RATIO)
    arguments = {
        "q_THD": draw.whole(batch.num_tokens, heads, width, largest=2),
        "weights_TH": draw.whole(batch.num_tokens, heads, largest=2),
        "key_cache_CSD": draw.cache((pages.num_pages, pages.per_page, width), rows, whole=True),
        "key_table_BP": pages.table_BP,
        "batch": batch,
        "ratio": CSA_RATIO,
        "topk": topk,
        "format": format,
    }
    planned = {
        "batch": batch,
        "ratio": CSA_RATIO,
        "topk": topk,
        "key_table": pages.table_BP,
        "keys_per_page": pages.per_page,
    }
    return Inputs(arguments=arguments, planned=Planned(parameter="plan", arguments=planned))


def _index_recipes() -> list[Recipe]:
    sizes: dict[str, dict[str, Any]] = dict(BATCHES)
    sizes |= {
        f"{name}-fp4": {**BATCHES[name], "format": IndexFormat.FP4_GROUP} for name in ("edge", "ragged")
    }
    sizes |= {f"{name}-wide": {**BATCHES[name], "topk": 64} for name in ("edge", "ragged")}
    sizes["decode"] = {"starts": (200, 127, 513), "counts": (1, 1, 1)}
    sizes["decode-unequal"] = {"starts": (200, 2, 13), "counts": (1, 1, 1)}
    sizes["edge-topk"] = {"starts": (18, 19, 20, 22, 23), "counts": (1, 1, 1, 1, 1)}
    largest = {"starts": (262143, 4095), "counts": (1, 2), "topk": 1024, "heads": 64, "width": 64}
    return sized(_index, sizes, largest=largest)


def _compression(
    draw: Draw,
    *,
    starts: tuple[int, ...],
    counts: tuple[int, ...],
    ratio: int,
    page_tokens: int,
    hidden: int = 40,
    width: int = 24,
) -> Inputs:
    overlap = ratio == CSA_RATIO
    batch = token_batch(draw, starts, counts)
    reach = ratio if overlap else 0
    # Rows a later step can read, and those this one may: what lies between is neither held nor kept.
    old = [range(max(0, start - start % ratio - reach), start) for start in starts]
    kept = [range(max(0, end - ratio - reach), end) for end in _ends(batch)]
    held = [{*pages_of(a, page_tokens), *pages_of(b, page_tokens)} for a, b in zip(old, kept, strict=True)]
    state = deal_pages(draw, held, per_page=page_tokens)
    entries, _ = _entry_pages(draw, batch, ratio=ratio)
    row_width = (4 if overlap else 2) * width
    written = state.rows(range(start, end) for start, end in zip(starts, _ends(batch), strict=True))
    half = row_width // 2
    weights = CompressorWeights(
        projections=(draw.plain_weight(half, hidden), draw.plain_weight(half, hidden)),
        ape=draw.normal(ratio, half, dtype=torch.float32),
        norm=draw.normal(width, dtype=torch.bfloat16),
    )
    arguments = {
        "x_TK": draw.normal(batch.num_tokens, hidden),
        "weights": weights,
        "state_cache_CSW": draw.cache((state.num_pages, page_tokens, row_width), state.rows(old), state=True),
        "overlap": overlap,
        "eps": EPS,
    }
    planned = {
        "batch": batch,
        "ratio": ratio,
        "overlap": overlap,
        "state_table": state.table_BP,
        "state_page_tokens": page_tokens,
        "entry_table": entries.table_BP,
        "entries_per_page": entries.per_page,
        "frequencies": rope_frequencies(
            width // 2, theta=160000.0, factor=4.0, original_positions=256, beta_fast=16.0, beta_slow=2.0
        ),
    }
    return Inputs(
        arguments=arguments,
        planned=Planned(parameter="plan", arguments=planned),
        prepared="weights",
        written_rows={"state_cache_CSW": written[written >= page_tokens]},
    )


def _compressor_recipes() -> list[Recipe]:
    csa = {"ratio": CSA_RATIO, "page_tokens": 8}
    hca = {"ratio": HCA_RATIO, "page_tokens": 32}
    sizes = {name: {**batch, **csa} for name, batch in BATCHES.items()}
    sizes |= {f"{name}-hca": {**batch, **hca} for name, batch in BATCHES.items()}
    largest = {"starts": (130, 0), "counts": (3, 1024), **csa, "hidden": 7168, "width": 512}
    return sized(_compression, sizes, largest=largest, copies=(True, False))


def _written(draw: Draw, *, rows: int, width: int, kind: str, skip: tuple[int, ...] = ()) -> dict[str, Any]:
    """Arguments of a cache write: distinct slots of which some are -1."""
    per_page = 16
    num_pages = 2 + -(-(rows + 3) // per_page)
    slots = draw.subsets(1, below=(num_pages - 1) * per_page, width=rows)[0] + per_page
    slots[list(skip)] = -1
    return {
        "cache_CSD": draw.cache((num_pages, per_page, width), torch.arange(per_page, 2 * per_page)),
        kind: draw.uneven(rows, width, scale=20.0) if kind == "kv_TD" else draw.whole(rows, width, largest=7),
        "slots_T": draw.lay_out(slots),
    }


def _kv_write(
    draw: Draw, *, rows: int, width: int = 136, skip: tuple[int, ...] = (), **settings: object
) -> Inputs:
    arguments = _written(draw, rows=rows, width=width, kind="kv_TD", skip=skip)
    settings = {"nope_dim": width - 8, "format": KvFormat.FP8_GROUP, **settings}
    return _write_inputs({**arguments, **settings})


def _key_write(
    draw: Draw, *, rows: int, width: int = 64, skip: tuple[int, ...] = (), **settings: object
) -> Inputs:
    arguments = _written(draw, rows=rows, width=width, kind="keys_TD", skip=skip)
    return _write_inputs({**arguments, "format": IndexFormat.FP4_GROUP, **settings})


def _write_inputs(arguments: dict[str, Any]) -> Inputs:
    slots = arguments["slots_T"].cpu()
    return Inputs(arguments=arguments, written_rows={"cache_CSD": slots[slots >= 0]})


def _write_recipes() -> dict[str, list[Recipe]]:
    sizes: dict[str, dict[str, Any]] = {
        "zero": {"rows": 0},
        "one": {"rows": 1},
        "odd": {"rows": 5},
        "edge": {"rows": 129},
        "poison": {"rows": 7, "skip": (0, 3, 6)},
        "poison-all": {"rows": 3, "skip": (0, 1, 2)},
    }
    plain_kv: dict[str, dict[str, Any]] = {
        "edge-plain": {"rows": 5, "format": KvFormat.PLAIN},
        "edge-group": {"rows": 5, "nope_dim": 65},
    }
    plain_keys: dict[str, dict[str, Any]] = {"edge-plain": {"rows": 5, "format": IndexFormat.PLAIN}}
    return {
        "write_kv": sized(
            _kv_write, {**sizes, **plain_kv}, largest={"rows": 8192, "width": 512, "nope_dim": 448}
        ),
        "write_index_keys": sized(_key_write, {**sizes, **plain_keys}, largest={"rows": 8192, "width": 64}),
    }

"""Recipes of the operators over paged caches: attention, indexer, compressor, cache writes.

Pages are shuffled, page 0 and unowned pages hold poison, and so do the rows a token must not see: freed
window pages, entries that are not complete, state that nobody keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ascend_v4.operators.contracts.batch import TokenBatch
from ascend_v4.operators.contracts.compressor import CompressorWeights
from ascend_v4.operators.contracts.quantize import IndexFormat, KvFormat
from ascend_v4.operators.contracts.rope import rope_frequencies
from ascend_v4.operators.testing.draw import Draw
from ascend_v4.operators.testing.pages import Pages, deal_pages, first_page, pages_of
from ascend_v4.operators.testing.recipe import (
    IndexKeyCache,
    Inputs,
    KvCache,
    Planned,
    Recipe,
    sized,
    vendor_sized,
)

WINDOW_TOKENS = 128
PAGE_TOKENS = 128
FEWEST_ROWS = 16
CSA_RATIO, HCA_RATIO = 4, 128
EPS = 1e-6
ROPE_CHANNELS, FEW_ROPE_CHANNELS = 64, 8
"""Of rows that are wide enough for the vendors' kernels, and of others."""
ENDLESS_SINK = "kernels start their running maximum at the sink, and no checkpoint has an infinite one"

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


def rope_channels(width: int) -> int:
    """Rotated channels of a row."""
    return ROPE_CHANNELS if width >= 2 * ROPE_CHANNELS else FEW_ROPE_CHANNELS


def entries_per_page(ratio: int) -> int:
    """As the engine pages them: at least 16, which is what vendors' kernels take."""
    return max(PAGE_TOKENS // ratio, FEWEST_ROWS)


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


def _entry_pages(draw: Draw, batch: TokenBatch, *, ratio: int, first: int = 1) -> tuple[Pages, Tensor]:
    """Pages that cover every position, and the physical rows of the entries that are complete."""
    per_page = entries_per_page(ratio)
    held = [pages_of(range(end), per_page * ratio) for end in _ends(batch)]
    pages = deal_pages(draw, held, per_page=per_page, first=first)
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
    sink_in_peak: bool = True,
    garbage: bool = False,
    far: bool = False,
) -> Inputs:
    batch = token_batch(draw, starts, counts)
    row_bytes = width * draw.dtype.itemsize
    seen = [range(max(0, start - WINDOW_TOKENS + 1), start + count) for _, count, start in batch.spans]
    window = deal_pages(
        draw,
        [pages_of(span, PAGE_TOKENS) for span in seen],
        per_page=PAGE_TOKENS,
        first=first_page(PAGE_TOKENS, row_bytes, far=far),
    )
    shape = (window.num_pages, PAGE_TOKENS, width)
    q_THD = draw.normal(batch.num_tokens, heads, width)
    sinks = draw.normal(heads, dtype=torch.float32)
    arguments: dict[str, Any] = {
        "q_THD": q_THD,
        "window_cache_CSD": draw.cache(shape, window.rows(seen), far=far),
        "window_table_BP": window.table_BP,
        "compressed_cache_CSD": None,
        "compressed_table_BP": None,
        "selected_TK": None,
        "sinks_H": sinks if sink is None else draw.lay_out(torch.full((heads,), sink)),
        "batch": batch,
        "ratio": ratio,
        "window_tokens": WINDOW_TOKENS,
        "scale": width**-0.5,
        "sink_in_peak": sink_in_peak,
    }
    stored = KvCache(width=width, nope_dim=width - rope_channels(width))
    caches = {"window_cache_CSD": stored}
    if ratio:
        first = first_page(entries_per_page(ratio), row_bytes, far=far)
        entries, rows = _entry_pages(draw, batch, ratio=ratio, first=first)
        shape = (entries.num_pages, entries.per_page, width)
        arguments["compressed_cache_CSD"] = draw.cache(shape, rows, far=far)
        arguments["compressed_table_BP"] = entries.table_BP
        caches["compressed_cache_CSD"] = stored
        if topk is not None:
            arguments["selected_TK"] = _selection(draw, _visible(batch, ratio), topk, garbage=garbage)
    planned = {
        "batch": batch,
        "ratio": ratio,
        "window_tokens": WINDOW_TOKENS,
        "window_table": window.table_BP,
        "window_page_tokens": PAGE_TOKENS,
        "compressed_table": arguments["compressed_table_BP"],
        "entries_per_page": entries_per_page(ratio) if ratio else 0,
        "num_heads": heads,
        "head_dim": width,
        "topk": topk or 0,
    }
    return Inputs(
        arguments=arguments,
        planned=Planned(parameter="plan", arguments=planned),
        caches=caches,
        sizes={**_row_sizes(width), "heads": heads, **({} if topk is None else {"topk": topk})},
        not_on_chips=ENDLESS_SINK if sink == torch.inf else None,
        far=far,
    )


def _row_sizes(width: int) -> dict[str, int]:
    """Sizes that limits on caches of such rows speak of."""
    rope = rope_channels(width)
    return {
        "head_dim": width,
        "row_width": width,
        "rope_dim": rope,
        "nope_dim": width - rope,
        "window": WINDOW_TOKENS,
        "window_block": PAGE_TOKENS,
        "csa_block": entries_per_page(CSA_RATIO),
        "hca_block": entries_per_page(HCA_RATIO),
    }


def _selection(draw: Draw, visible: list[int], topk: int, *, garbage: bool) -> Tensor:
    """Distinct visible entries of each token in random order, then -1, or what no cache has."""
    rest = torch.iinfo(torch.int32).max if garbage else -1
    selected = torch.full((len(visible), topk), rest, dtype=torch.int32)
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
        sizes[name] = {**BATCHES["ragged"], **kinds["csa"], "sink": sink, "sink_in_peak": False}
    for name in deep:
        sizes[f"{name}-release"] = {**BATCHES[name], **kinds["csa"], "sink_in_peak": False}
    sizes["huge-sink-in-peak"] = {**BATCHES["ragged"], **kinds["csa"], "sink": 1e4}
    largest = {
        "starts": (65536, 0),
        "counts": (2, 300),
        "ratio": CSA_RATIO,
        "topk": 1024,
        "heads": 128,
        "width": 512,
    }
    return sized(_attention, sizes, largest=largest) + _vendor_attention()


def _vendor_attention() -> list[Recipe]:
    """Rows of 64 + 64 channels and four heads: what kernels take once their fixed sizes are waived."""
    fixed = {"heads": 4, "width": 128}
    csa = {**fixed, "ratio": CSA_RATIO, "topk": 12}
    kinds: dict[str, dict[str, Any]] = {
        "swa": fixed,
        "csa": csa,
        "csa-all": {**fixed, "ratio": CSA_RATIO},
        "hca": {**fixed, "ratio": HCA_RATIO},
    }
    sizes = {
        f"{batch}-{kind}": {**BATCHES[batch], **settings}
        for kind, settings in kinds.items()
        for batch in BATCHES
    }
    sizes["garbage"] = {**BATCHES["ragged"], **csa, "garbage": True}
    sizes["no-sink"] = {**BATCHES["ragged"], **csa, "sink": -torch.inf}
    sizes |= {
        f"far-{kind}": {**BATCHES["edge-several"], **settings, "far": True}
        for kind, settings in kinds.items()
    }
    real = {"heads": 64, "width": 512}
    largest = {
        "largest-swa": {**BATCHES["ragged"], **real},
        "largest-csa": {"starts": (4096, 300), "counts": (2, 5), **real, "ratio": CSA_RATIO, "topk": 512},
        "largest-hca": {**BATCHES["ragged"], **real, "ratio": HCA_RATIO},
    }
    return vendor_sized(_attention, sizes, largest=largest)


def _index(
    draw: Draw,
    *,
    starts: tuple[int, ...],
    counts: tuple[int, ...],
    topk: int = 5,
    heads: int = 4,
    width: int = 64,
    format: IndexFormat = IndexFormat.PLAIN,
    far: bool = False,
) -> Inputs:
    """Whole numbers where nothing quantises them by rows: every score is exact, many are equal, and one
    choice is right. Otherwise normal ones, weights of both signs included.
    """
    whole = format not in (IndexFormat.INT8, IndexFormat.FP8)
    batch = token_batch(draw, starts, counts)
    first = first_page(entries_per_page(CSA_RATIO), width * draw.dtype.itemsize, far=far)
    pages, rows = _entry_pages(draw, batch, ratio=CSA_RATIO, first=first)
    shape = (pages.num_pages, pages.per_page, width)

    def numbers(*sizes: int) -> Tensor:
        return draw.whole(*sizes, largest=2) if whole else draw.normal(*sizes)

    arguments = {
        "q_THD": numbers(batch.num_tokens, heads, width),
        "weights_TH": numbers(batch.num_tokens, heads),
        "key_cache_CSD": draw.cache(shape, rows, whole=whole, far=far),
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
        "num_heads": heads,
        "head_dim": width,
    }
    sizes = {
        "index_heads": heads,
        "index_head_dim": width,
        "topk": topk,
        "csa_block": pages.per_page,
    }
    return Inputs(
        arguments=arguments,
        planned=Planned(parameter="plan", arguments=planned),
        caches={"key_cache_CSD": IndexKeyCache(width=width, format=format)},
        sizes=sizes,
        far=far,
    )


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
    fixed: dict[str, Any] = {"heads": 16, "width": 128, "topk": 12}
    vendor = {
        f"{name}-{format.name.lower()}": {**batch, **fixed, "format": format}
        for format in (IndexFormat.INT8, IndexFormat.FP8)
        for name, batch in {**BATCHES, "decode": sizes["decode"]}.items()
    }
    vendor["far"] = {**BATCHES["edge-several"], **fixed, "far": True}
    real = {
        f"largest-{format.name.lower()}": {
            "starts": (8191, 100),
            "counts": (1, 3),
            "heads": 64,
            "width": 128,
            "topk": 512,
            "format": format,
        }
        for format in (IndexFormat.INT8, IndexFormat.FP8)
    }
    return sized(_index, sizes, largest=largest) + vendor_sized(_index, vendor, largest=real)


def _compression(
    draw: Draw,
    *,
    starts: tuple[int, ...],
    counts: tuple[int, ...],
    ratio: int,
    page_tokens: int,
    hidden: int = 40,
    width: int = 24,
    far: bool = False,
    rounded_once: bool = True,
) -> Inputs:
    overlap = ratio == CSA_RATIO
    row_width = (4 if overlap else 2) * width
    rope = min(width // 2, ROPE_CHANNELS)
    batch = token_batch(draw, starts, counts)
    reach = ratio if overlap else 0
    # Rows a later step can read, and those this one may: what lies between is neither held nor kept.
    old = [range(max(0, start - start % ratio - reach), start) for start in starts]
    kept = [range(max(0, end - ratio - reach), end) for end in _ends(batch)]
    held = [{*pages_of(a, page_tokens), *pages_of(b, page_tokens)} for a, b in zip(old, kept, strict=True)]
    first = first_page(page_tokens, row_width * torch.float32.itemsize, far=far)
    state = deal_pages(draw, held, per_page=page_tokens, first=first)
    entries, _ = _entry_pages(draw, batch, ratio=ratio)
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
        "state_cache_CSW": draw.cache(
            (state.num_pages, page_tokens, row_width), state.rows(old), state=True, far=far
        ),
        "overlap": overlap,
        "eps": EPS,
        "rounded_once": rounded_once,
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
            rope, theta=160000.0, factor=4.0, original_positions=256, beta_fast=16.0, beta_slow=2.0
        ),
    }
    return Inputs(
        arguments=arguments,
        planned=Planned(parameter="plan", arguments=planned),
        prepared="weights",
        written_rows={"state_cache_CSW": written[written >= page_tokens]},
        sizes={"hidden": hidden, "head_dim": width, "rope_dim": rope},
        far=far,
    )


def _compressor_recipes() -> list[Recipe]:
    csa = {"ratio": CSA_RATIO, "page_tokens": 8}
    hca = {"ratio": HCA_RATIO, "page_tokens": 32}
    sizes = {name: {**batch, **csa} for name, batch in BATCHES.items()}
    sizes |= {f"{name}-hca": {**batch, **hca} for name, batch in BATCHES.items()}
    for name in ("odd", "ragged"):
        sizes[f"{name}-release"] = {**BATCHES[name], **csa, "rounded_once": False}
    largest = {"starts": (130, 0), "counts": (3, 1024), **csa, "hidden": 7168, "width": 512}
    fixed = {"hidden": 512, "width": 128}
    kinds = {"csa": {**csa, **fixed}, "hca": {**hca, **fixed}}
    vendor = {
        f"{name}-{kind}": {**batch, **settings}
        for kind, settings in kinds.items()
        for name, batch in BATCHES.items()
    }
    vendor |= {
        f"far-{kind}": {**BATCHES["edge-several"], **settings, "far": True}
        for kind, settings in kinds.items()
    }
    real = {
        f"largest-{kind}": {**BATCHES["ragged"], **settings, "hidden": 4096, "width": 512}
        for kind, settings in kinds.items()
    }
    return sized(_compression, sizes, largest=largest, copies=(True, False)) + vendor_sized(
        _compression, vendor, largest=real
    )


def _written(
    draw: Draw, *, rows: int, width: int, kind: str, skip: tuple[int, ...], per_page: int, far: bool
) -> dict[str, Any]:
    """Arguments of a cache write: distinct slots of which some are -1."""
    first = first_page(per_page, width * draw.dtype.itemsize, far=far)
    num_pages = first + 1 + -(-(rows + 3) // per_page)
    held = torch.arange(first * per_page, (first + 1) * per_page)
    slots = draw.subsets(1, below=(num_pages - first) * per_page, width=rows)[0] + first * per_page
    slots[list(skip)] = -1
    return {
        "cache_CSD": draw.cache((num_pages, per_page, width), held, far=far),
        kind: draw.uneven(rows, width, scale=20.0) if kind == "kv_TD" else draw.whole(rows, width, largest=7),
        "slots_T": draw.lay_out(slots),
    }


def _kv_write(
    draw: Draw,
    *,
    rows: int,
    width: int = 136,
    skip: tuple[int, ...] = (),
    per_page: int = 16,
    nope_dim: int | None = None,
    format: KvFormat = KvFormat.FP8_GROUP,
    far: bool = False,
) -> Inputs:
    arguments = _written(draw, rows=rows, width=width, kind="kv_TD", skip=skip, per_page=per_page, far=far)
    nope_dim = width - FEW_ROPE_CHANNELS if nope_dim is None else nope_dim
    sizes = {
        "row_width": width,
        "head_dim": width,
        "nope_dim": nope_dim,
        "rope_dim": width - nope_dim,
        "window_block": per_page,
    }
    return _write_inputs(
        {**arguments, "nope_dim": nope_dim, "format": format},
        stored=KvCache(width=width, nope_dim=nope_dim, format=format),
        sizes=sizes,
        far=far,
    )


def _key_write(
    draw: Draw,
    *,
    rows: int,
    width: int = 64,
    skip: tuple[int, ...] = (),
    per_page: int = 16,
    format: IndexFormat = IndexFormat.FP4_GROUP,
    far: bool = False,
) -> Inputs:
    arguments = _written(draw, rows=rows, width=width, kind="keys_TD", skip=skip, per_page=per_page, far=far)
    return _write_inputs(
        {**arguments, "format": format},
        stored=IndexKeyCache(width=width, format=format),
        sizes={"index_head_dim": width, "csa_block": per_page},
        far=far,
    )


def _write_inputs(
    arguments: dict[str, Any], *, stored: KvCache | IndexKeyCache, sizes: dict[str, int], far: bool
) -> Inputs:
    slots = arguments["slots_T"].cpu()
    return Inputs(
        arguments=arguments,
        written_rows={"cache_CSD": slots[slots >= 0]},
        caches={"cache_CSD": stored},
        sizes=sizes,
        far=far,
    )


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
    keys: dict[str, Any] = {"width": 128, "per_page": entries_per_page(CSA_RATIO)}
    rows: dict[str, Any] = {**keys, "nope_dim": ROPE_CHANNELS}
    vendor_kv = _in_formats(sizes, rows, (KvFormat.PLAIN, KvFormat.FP8_GROUP))
    vendor_keys = _in_formats(sizes, keys, (IndexFormat.INT8, IndexFormat.FP8))
    vendor_kv["far"] = {**sizes["poison"], **rows, "format": KvFormat.PLAIN, "far": True}
    vendor_keys["far"] = {**sizes["poison"], **keys, "format": IndexFormat.PLAIN, "far": True}
    many = {"largest": {"rows": 1000, "skip": (0, 500)}}
    real_rows = {"width": 512, "nope_dim": 448, "per_page": PAGE_TOKENS}
    largest_kv = _in_formats(many, real_rows, (KvFormat.PLAIN, KvFormat.FP8_GROUP))
    largest_keys = _in_formats(many, keys, (IndexFormat.INT8, IndexFormat.FP8))
    return {
        "write_kv": sized(
            _kv_write, {**sizes, **plain_kv}, largest={"rows": 8192, "width": 512, "nope_dim": 448}
        )
        + vendor_sized(_kv_write, vendor_kv, largest=largest_kv),
        "write_index_keys": sized(_key_write, {**sizes, **plain_keys}, largest={"rows": 8192, "width": 64})
        + vendor_sized(_key_write, vendor_keys, largest=largest_keys),
    }


def _in_formats(
    sizes: Mapping[str, Mapping[str, Any]],
    fixed: Mapping[str, Any],
    formats: tuple[KvFormat, ...] | tuple[IndexFormat, ...],
) -> dict[str, dict[str, Any]]:
    return {
        f"{name}-{format.name.lower()}": {**size, **fixed, "format": format}
        for format in formats
        for name, size in sizes.items()
    }

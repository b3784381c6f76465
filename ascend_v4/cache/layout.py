"""Which caches a model owns and how they are paged: pure arithmetic, no torch.

One block covers 128 positions of one sequence: 128 window rows, 32 CSA entries and 32 indexer keys. HCA
entries, one in 128 positions, are paged by 16, the fewest rows that Ascend's kernels take in a page
(docs/adr/0008-ascend-path.md). Rows that only the newest tokens need (windows, compressor state) live in page
groups of their own and are freed as a sequence moves on. All ids and offsets are Python integers or int64:
they do not wrap.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ascend_v4.config import LayerKind, ModelConfig

BLOCK_TOKENS = 128
"""Positions per block: the sliding window, the HCA ratio, and a multiple of the CSA ratio."""
ROLLBACK_TOKENS = 16
"""Newest positions that a sequence can take back after a step (rejected speculative tokens)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PageGroup:
    """Caches that share page tables because their rows live equally long."""

    name: str
    page_tokens: int
    """Positions covered by one page."""
    retain_tokens: int | None
    """Newest positions a later step may still read; None keeps all."""
    read_by_own_step: bool = True
    """False for rows that only later steps read: a long step then writes its last ones alone."""

    def pages_for(self, tokens: int) -> int:
        """Pages that cover `tokens` positions starting at a page's first."""
        return -(-tokens // self.page_tokens)

    @property
    def live_pages(self) -> int:
        """Most pages a sequence holds between steps; only for groups that do not keep all."""
        assert self.retain_tokens is not None, self.name
        return self.pages_for(self.retain_tokens + ROLLBACK_TOKENS) + 1


WINDOW = PageGroup(name="window", page_tokens=BLOCK_TOKENS, retain_tokens=BLOCK_TOKENS)
ENTRIES = PageGroup(name="entries", page_tokens=BLOCK_TOKENS, retain_tokens=None)
HCA_ENTRIES = PageGroup(name="hca_entries", page_tokens=16 * BLOCK_TOKENS, retain_tokens=None)
CSA_STATE = PageGroup(name="csa_state", page_tokens=8, retain_tokens=8, read_by_own_step=False)
HCA_STATE = PageGroup(name="hca_state", page_tokens=32, retain_tokens=128, read_by_own_step=False)

STATE_GROUP = {LayerKind.CSA: CSA_STATE, LayerKind.HCA: HCA_STATE}
ENTRIES_GROUP = {LayerKind.CSA: ENTRIES, LayerKind.HCA: HCA_ENTRIES}


class CacheRole(Enum):
    """What a cache holds, which decides how its rows are stored."""

    KV = "key-values: window rows or compressed entries"
    INDEX_KEYS = "indexer keys"
    STATE = "compressor state, float32 whatever the model's dtype"


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSpec:
    """One cache of one layer."""

    name: str
    group: PageGroup
    rows_per_page: int
    row_width: int
    """Numbers per row."""
    role: CacheRole = CacheRole.KV


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCaches:
    """The caches of one layer; None where its kind has no such cache."""

    window: CacheSpec
    entries: CacheSpec | None = None
    state: CacheSpec | None = None
    index_keys: CacheSpec | None = None
    index_state: CacheSpec | None = None

    def specs(self) -> list[CacheSpec]:
        """Those that exist."""
        found = (self.window, self.entries, self.state, self.index_keys, self.index_state)
        return [spec for spec in found if spec is not None]


def entries_per_page(kind: LayerKind) -> int:
    """Compressed entries in one page of their group; 0 for a kind without any."""
    return ENTRIES_GROUP[kind].page_tokens // kind.ratio if kind in ENTRIES_GROUP else 0


def layer_caches(config: ModelConfig, kind: LayerKind, *, prefix: str) -> LayerCaches:
    """The caches of a layer of `kind`."""
    width = config.head_dim
    window = CacheSpec(
        name=f"{prefix}.window", group=WINDOW, rows_per_page=WINDOW.page_tokens, row_width=width
    )
    if kind is LayerKind.SWA:
        return LayerCaches(window=window)
    entries = CacheSpec(
        name=f"{prefix}.entries",
        group=ENTRIES_GROUP[kind],
        rows_per_page=entries_per_page(kind),
        row_width=width,
    )
    state = _state(prefix, "state", kind, width)
    if kind is LayerKind.HCA:
        return LayerCaches(window=window, entries=entries, state=state)
    return LayerCaches(
        window=window,
        entries=entries,
        state=state,
        index_keys=CacheSpec(
            name=f"{prefix}.index_keys",
            group=ENTRIES,
            rows_per_page=entries_per_page(kind),
            row_width=config.index_head_dim,
            role=CacheRole.INDEX_KEYS,
        ),
        index_state=_state(prefix, "index_state", kind, config.index_head_dim),
    )


def _state(prefix: str, name: str, kind: LayerKind, width: int) -> CacheSpec:
    group = STATE_GROUP[kind]
    halves = 2 if kind is LayerKind.CSA else 1
    return CacheSpec(
        name=f"{prefix}.{name}",
        group=group,
        rows_per_page=group.page_tokens,
        row_width=2 * halves * width,
        role=CacheRole.STATE,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolPlan:
    """Pages per group, the reserved page 0 included."""

    pages: dict[PageGroup, int]

    def bytes_of(self, spec: CacheSpec, element_bytes: int) -> int:
        """Size of one cache."""
        return self.pages[spec.group] * spec.rows_per_page * spec.row_width * element_bytes


def plan_pools(
    groups: set[PageGroup], *, cache_tokens: int, max_sequences: int, max_step_tokens: int
) -> PoolPlan:
    """Pages so that `max_sequences` sequences holding `cache_tokens` positions together can always take a
    step.

    Short-lived groups hold what every sequence retains plus the pages of the largest step.
    """
    pages: dict[PageGroup, int] = {}
    for group in groups:
        if group.retain_tokens is None:
            pages[group] = 1 + group.pages_for(cache_tokens) + max_sequences
        else:
            in_flight = max_sequences * group.live_pages
            if group.read_by_own_step:
                in_flight = group.pages_for(max_step_tokens) + max_sequences
            pages[group] = 1 + max_sequences * group.live_pages + in_flight
    return PoolPlan(pages=pages)

"""Who holds which page: never two at once, never page 0, and every page comes back."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_v4.cache.layout import (
    CSA_STATE,
    ENTRIES,
    HCA_ENTRIES,
    HCA_STATE,
    ROLLBACK_TOKENS,
    WINDOW,
    PageGroup,
    PoolPlan,
    plan_pools,
)
from ascend_v4.cache.pages import PagePool, SequencePages, make_pools
from ascend_v4.errors import CacheFullError

GROUPS = (WINDOW, ENTRIES, HCA_ENTRIES, CSA_STATE, HCA_STATE)
READ_BEHIND = {WINDOW: 127, CSA_STATE: 7, HCA_STATE: 127}
"""Positions before its first new token that a step reads at most: the window, or a run and the one before."""


def fresh_pools(pages: int = 200) -> dict[PageGroup, PagePool]:
    return make_pools(PoolPlan(pages=dict.fromkeys(GROUPS, pages)))


def held(sequences: list[SequencePages], group: PageGroup) -> list[int]:
    return [page for each in sequences for page in each.tables[group] if page]


def require_balanced(pools: dict[PageGroup, PagePool], sequences: list[SequencePages]) -> None:
    for group, pool in pools.items():
        pages = held(sequences, group)
        assert max(Counter(pages).values(), default=1) == 1, f"{group.name}: a page has two owners"
        assert all(0 < page < pool.num_pages for page in pages)
        assert len(pages) + pool.num_free == pool.num_pages - 1


def require_readable(pages: SequencePages) -> None:
    """Every position that the next step may read is held."""
    for group in GROUPS:
        behind = READ_BEHIND.get(group, pages.num_tokens)
        for position in range(max(0, pages.num_tokens - behind), pages.num_tokens):
            assert pages.tables[group][position // group.page_tokens], f"{group.name}: {position} is gone"


def require_writable(pages: SequencePages, count: int) -> None:
    """Between extend and advance, every new position that matters has a page."""
    total = pages.num_tokens + count
    for group in GROUPS:
        first = pages.num_tokens
        if not group.read_by_own_step:
            first = max(first, total - READ_BEHIND[group] - ROLLBACK_TOKENS)
        for position in range(first, total):
            assert pages.tables[group][position // group.page_tokens], f"{group.name}: {position} has no page"


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["step", "step", "step", "truncate", "close"]),
        st.integers(0, 2),
        st.integers(1, 300),
    ),
    max_size=40,
)


@given(operations=OPERATIONS)
@settings(max_examples=150)
def test_pools_stay_balanced_whatever_sequences_do(operations):
    pools = fresh_pools(400)
    sequences = [SequencePages(pools) for _ in range(3)]
    for verb, index, number in operations:
        pages = sequences[index]
        if verb == "step":
            pages.extend(number)
            require_balanced(pools, sequences)
            require_writable(pages, number)
            pages.advance(number)
        elif verb == "truncate":
            try:
                pages.truncate(pages.num_tokens - number % (ROLLBACK_TOKENS + 2))
            except ValueError:
                continue
        else:
            pages.close()
        require_balanced(pools, sequences)
        require_readable(pages)
    for pages in sequences:
        pages.close()
    assert all(pool.num_free == pool.num_pages - 1 for pool in pools.values())


@given(
    sequences=st.integers(1, 4),
    step_tokens=st.integers(4, 300),
    cache_tokens=st.integers(16, 1500),
    choices=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 300), st.integers(0, 4)), max_size=40),
)
@settings(max_examples=150)
def test_a_planned_pool_never_runs_out_within_its_limits(sequences, step_tokens, cache_tokens, choices):
    pools = make_pools(
        plan_pools(
            set(GROUPS), cache_tokens=cache_tokens, max_sequences=sequences, max_step_tokens=step_tokens
        )
    )
    running = [SequencePages(pools) for _ in range(sequences)]
    for index, wanted, rejected in choices:
        used = sum(pages.num_tokens for pages in running)
        pages = running[index % sequences]
        count = min(wanted, step_tokens, cache_tokens - used)
        if count < 1:
            pages.close()
            continue
        pages.extend(count)
        pages.advance(count)
        pages.truncate(pages.num_tokens - min(rejected, count - 1))


@given(
    sequences=st.integers(1, 4),
    step_tokens=st.integers(4, 300),
    rounds=st.lists(st.lists(st.integers(0, 80), min_size=4, max_size=4), max_size=12),
)
@settings(max_examples=100)
def test_a_planned_pool_carries_all_sequences_in_one_step(sequences, step_tokens, rounds):
    pools = make_pools(
        plan_pools(set(GROUPS), cache_tokens=2000, max_sequences=sequences, max_step_tokens=step_tokens)
    )
    running = [SequencePages(pools) for _ in range(sequences)]
    for counts in rounds:
        room = min(step_tokens, 2000 - sum(pages.num_tokens for pages in running))
        step = []
        for pages, wanted in zip(running, counts, strict=False):
            count = min(wanted, room)
            room -= count
            if count:
                pages.extend(count)
                step.append((pages, count))
        for pages, count in step:
            pages.advance(count)


def test_all_sequences_may_cross_into_another_page_in_one_step():
    sequences, before, count = 12, 271, 114
    assert WINDOW.pages_for(before + count) == WINDOW.pages_for(before) + 1
    pools = make_pools(
        plan_pools(
            set(GROUPS),
            cache_tokens=sequences * (before + count),
            max_sequences=sequences,
            max_step_tokens=sequences * count,
        )
    )
    running = [SequencePages(pools) for _ in range(sequences)]
    for pages in running:
        pages.extend(before)
        pages.advance(before)
    assert len(held(running, WINDOW)) == sequences * WINDOW.live_pages
    for pages in running:
        pages.extend(count)
    require_balanced(pools, running)


@given(steps=st.lists(st.integers(1, 200), min_size=1, max_size=12))
@settings(max_examples=60)
def test_slots_of_live_positions_are_injective(steps):
    pools = fresh_pools()
    sequences = [SequencePages(pools), SequencePages(pools)]
    for count in steps:
        for pages, tokens in zip(sequences, (count, count // 2 + 1), strict=True):
            pages.extend(tokens)
            pages.advance(tokens)
        for group in GROUPS:
            slots = [
                pages.tables[group][position // group.page_tokens] * group.page_tokens
                + position % group.page_tokens
                for pages in sequences
                for position in range(
                    max(0, pages.num_tokens - READ_BEHIND.get(group, pages.num_tokens)), pages.num_tokens
                )
            ]
            assert len(set(slots)) == len(slots)
            assert min(slots) >= group.page_tokens


def test_a_long_step_takes_state_pages_for_its_last_tokens_alone():
    pools = fresh_pools()
    pages = SequencePages(pools)
    pages.extend(10_000)
    assert 0 < len(held([pages], CSA_STATE)) <= CSA_STATE.live_pages
    assert 0 < len(held([pages], HCA_STATE)) <= HCA_STATE.live_pages
    assert len(held([pages], WINDOW)) == WINDOW.pages_for(10_000)


def test_advancing_frees_what_no_later_step_reads():
    pages = SequencePages(fresh_pools())
    for _ in range(20):
        pages.extend(100)
        pages.advance(100)
    assert len(held([pages], WINDOW)) <= WINDOW.live_pages
    assert len(held([pages], ENTRIES)) == ENTRIES.pages_for(2000)


def test_an_extension_that_does_not_fit_changes_nothing():
    pools = make_pools(PoolPlan(pages={**dict.fromkeys(GROUPS, 200), WINDOW: 4}))
    pages = SequencePages(pools)
    pages.extend(128)
    pages.advance(128)
    before = {group: list(table) for group, table in pages.tables.items()}
    free = {group: pool.num_free for group, pool in pools.items()}
    with pytest.raises(CacheFullError, match="3 window pages of 128 tokens are wanted, 2 of 3 are free"):
        pages.extend(300)
    assert {group: list(table) for group, table in pages.tables.items()} == before
    assert {group: pool.num_free for group, pool in pools.items()} == free


@pytest.mark.parametrize("dropped", [0, 1, ROLLBACK_TOKENS])
def test_the_newest_tokens_can_be_taken_back(dropped):
    pages = SequencePages(fresh_pools())
    pages.extend(300)
    pages.advance(300)
    pages.truncate(300 - dropped)
    assert pages.num_tokens == 300 - dropped
    require_readable(pages)


@pytest.mark.parametrize("tokens", [-1, 300 - ROLLBACK_TOKENS - 1, 301])
def test_older_tokens_cannot_be_taken_back(tokens):
    pages = SequencePages(fresh_pools())
    pages.extend(300)
    pages.advance(300)
    with pytest.raises(ValueError, match=f"300 tokens cannot be cut to {tokens}"):
        pages.truncate(tokens)
    assert pages.num_tokens == 300


def test_taking_back_twice_reaches_no_further_than_once():
    pages = SequencePages(fresh_pools())
    pages.extend(400)
    pages.advance(400)
    pages.truncate(400 - ROLLBACK_TOKENS)
    with pytest.raises(ValueError, match="at most 16 of the newest"):
        pages.truncate(400 - ROLLBACK_TOKENS - 1)
    pages.extend(4)
    pages.advance(4)
    pages.truncate(400 - ROLLBACK_TOKENS)
    require_readable(pages)


def test_a_closed_sequence_starts_again():
    pools = fresh_pools()
    pages = SequencePages(pools)
    pages.extend(300)
    pages.advance(300)
    pages.close()
    assert pages.num_tokens == 0
    pages.extend(5)
    pages.advance(5)
    pages.truncate(0)
    assert held([pages], WINDOW) == []
    require_balanced(pools, [pages])


def test_a_page_given_back_twice_is_our_bug():
    pool = PagePool(WINDOW, 3)
    (page,) = pool.take(1)
    pool.give_back([page])
    with pytest.raises(AssertionError, match="given back twice"):
        pool.give_back([page])


def test_the_lowest_free_pages_are_taken_first():
    assert PagePool(WINDOW, 5).take(3) == [1, 2, 3]

"""Who holds which page: free lists per group, and the page tables of each sequence. No torch.

A page table maps a position's page number to a page id. Id 0 is reserved: it marks pages not held, and
operators treat it as "do not touch".
"""

from __future__ import annotations

from collections.abc import Iterable

from ascend_v4.cache.layout import ROLLBACK_TOKENS, PageGroup, PoolPlan
from ascend_v4.errors import CacheFullError


class PagePool:
    """Free pages of one group."""

    def __init__(self, group: PageGroup, num_pages: int) -> None:
        self.group = group
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Page ids, lowest free first. Raises CacheFullError and takes none when there are too few."""
        if count > len(self._free):
            raise CacheFullError(
                f"{count} {self.group.name} pages of {self.group.page_tokens} tokens are wanted, "
                f"{len(self._free)} of "
                f"{self.num_pages - 1} are free. Raise --cache-tokens or run fewer sequences at once."
            )
        return [self._free.pop() for _ in range(count)]

    def give_back(self, page_ids: Iterable[int]) -> None:
        """Returns pages."""
        self._free.extend(page_ids)
        assert len(self._free) < self.num_pages, f"{self.group.name}: a page was given back twice"


class SequencePages:
    """The pages of one sequence, group by group, and how many positions it has."""

    def __init__(self, pools: dict[PageGroup, PagePool]) -> None:
        self._pools = pools
        self.tables: dict[PageGroup, list[int]] = {group: [] for group in pools}
        self.num_tokens = 0
        self._most_tokens = 0
        """Positions it had at its longest: older pages were freed by that."""

    def extend(self, count: int) -> None:
        """Pages for `count` new positions, as far as they are needed in or after the step.

        Window rows of every new token are read within the step. State rows are read only by later steps, so a
        long prefill writes its last ones alone. Raises CacheFullError, holding what it held before.
        """
        wanted = {group: self._wanted(group, count) for group in self._pools}
        for group, numbers in wanted.items():
            if len(numbers) > self._pools[group].num_free:
                self._pools[group].take(len(numbers))
        for group, numbers in wanted.items():
            table = self.tables[group]
            table.extend([0] * (group.pages_for(self.num_tokens + count) - len(table)))
            for number, page_id in zip(numbers, self._pools[group].take(len(numbers)), strict=True):
                table[number] = page_id

    def _wanted(self, group: PageGroup, count: int) -> range:
        total = self.num_tokens + count
        first = len(self.tables[group])
        if not group.read_by_own_step:
            first = max(first, self._oldest_needed(group, total) // group.page_tokens)
        return range(first, max(first, group.pages_for(total)))

    @staticmethod
    def _oldest_needed(group: PageGroup, num_tokens: int) -> int:
        if group.retain_tokens is None:
            return 0
        return max(0, num_tokens - group.retain_tokens - ROLLBACK_TOKENS)

    def advance(self, count: int) -> None:
        """Counts the step's tokens in, and frees pages that no later step can read."""
        self.num_tokens += count
        self._most_tokens = max(self._most_tokens, self.num_tokens)
        for group, table in self.tables.items():
            stop = self._oldest_needed(group, self.num_tokens) // group.page_tokens
            self._release(group, range(min(stop, len(table))))

    def truncate(self, num_tokens: int) -> None:
        """Takes back the newest positions. Raises ValueError further back than ROLLBACK_TOKENS from the most
        it ever had.
        """
        fewest = max(0, self._most_tokens - ROLLBACK_TOKENS)
        if not fewest <= num_tokens <= self.num_tokens:
            raise ValueError(
                f"a sequence of {self.num_tokens} tokens cannot be cut to {num_tokens}: at most "
                f"{ROLLBACK_TOKENS} of the newest can be taken back, here down to {fewest}"
            )
        self.num_tokens = num_tokens
        for group, table in self.tables.items():
            keep = group.pages_for(num_tokens)
            self._release(group, range(keep, len(table)))
            del table[keep:]

    def close(self) -> None:
        """Gives every page back."""
        for group, table in self.tables.items():
            self._release(group, range(len(table)))
            table.clear()
        self.num_tokens = self._most_tokens = 0

    def _release(self, group: PageGroup, numbers: range) -> None:
        table = self.tables[group]
        held = [number for number in numbers if table[number] != 0]
        self._pools[group].give_back(table[number] for number in held)
        for number in held:
            table[number] = 0


def make_pools(plan: PoolPlan) -> dict[PageGroup, PagePool]:
    """One pool per group of the plan."""
    return {group: PagePool(group, pages) for group, pages in plan.pages.items()}

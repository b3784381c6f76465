"""What every step-level operator is told about its tokens: whose they are, where they stand, which pages hold
them.

Legend: T packed new tokens, B sequences, P logical pages. Page 0 of every pool is reserved and never holds
data. Rows of a paged cache are counted in int64 everywhere: page 29,077 and byte offsets past 2^31 are
ordinary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


class Plan:
    """What an implementation computes once per step; opaque to the model, which only hands it on."""


@dataclass(frozen=True)
class TokenBatch:
    """New tokens of B sequences, packed one sequence after the other."""

    starts: tuple[int, ...]
    """Position of each sequence's first new token: the number of tokens it had before."""
    counts: tuple[int, ...]
    """New tokens of each sequence, at least 1."""
    device: torch.device
    scratch: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    """What the plans of one step derive alike and share, by a name of the planner's own."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.counts)

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens of each sequence including the new ones."""
        return tuple(start + count for start, count in zip(self.starts, self.counts, strict=True))

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """(first packed token, new tokens, start position) of each sequence."""
        rows, first = [], 0
        for start, count in zip(self.starts, self.counts, strict=True):
            rows.append((first, count, start))
            first += count
        return rows

    @cached_property
    def positions_T(self) -> Tensor:
        """Absolute position of each token, int64."""
        parts = [torch.arange(start, start + count) for _, count, start in self.spans]
        return torch.cat([torch.empty(0, dtype=torch.int64), *parts]).to(self.device)

    @cached_property
    def sequence_T(self) -> Tensor:
        """Index of each token's sequence, int64."""
        counts = torch.tensor(self.counts, dtype=torch.int64)
        return torch.repeat_interleave(torch.arange(len(self.counts)), counts).to(self.device)

    @cached_property
    def query_starts(self) -> Tensor:
        """Cumulative new tokens with a leading 0, int32 [B + 1]."""
        counts = torch.tensor((0, *self.counts), dtype=torch.int32)
        return counts.cumsum(0, dtype=torch.int32).to(self.device)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each sequence including the new ones, int32 [B]."""
        return torch.tensor(self.ends, dtype=torch.int32, device=self.device)


def rows_of(table_BP: Tensor, sequence_N: Tensor, position_N: Tensor, *, per_page: int) -> Tensor:
    """Physical rows of logical positions: table[sequence, position // per_page] * per_page + position %
    per_page.
    """
    pages = table_BP[sequence_N, torch.div(position_N, per_page, rounding_mode="floor")]
    return pages * per_page + position_N % per_page

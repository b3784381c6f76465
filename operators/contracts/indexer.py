"""The lightning indexer: which compressed entries each query attends to.

Legend: T tokens, H indexer heads, D indexer head size, K entries kept, N entries visible.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ascend_v4.operators.contract import BITWISE, CACHES, FLOATS, INT64, Spec, operator
from ascend_v4.operators.contracts.batch import Plan, TokenBatch, rows_of
from ascend_v4.operators.contracts.quantize import IndexFormat, quantize_index

SCORE_ELEMENTS = 1 << 24
"""Scores of all heads held at a time; longer prefills go through in slices of queries."""


def plan_index(
    batch: TokenBatch,
    *,
    ratio: int,
    topk: int,
    key_table: Tensor,
    keys_per_page: int,
    num_heads: int,
    head_dim: int,
) -> Plan:
    """The reference needs nothing ahead of time; vendor kernels divide their work here."""
    return Plan()


@operator(
    source="reference/model.md 2.6; ascend-operators.md 8",
    tolerance=BITWISE,
    plan=plan_index,
)
def select_entries(
    q_THD: Annotated[Tensor, Spec("T H D", FLOATS)],
    weights_TH: Annotated[Tensor, Spec("T H", FLOATS)],
    *,
    key_cache_CSD: Annotated[Tensor, Spec("C S W", CACHES)],
    key_table_BP: Annotated[Tensor, Spec("B P", INT64)],
    batch: TokenBatch,
    plan: Plan,
    ratio: int,
    topk: int,
    format: IndexFormat,
) -> Annotated[Tensor | None, Spec("T K", (torch.int32,))]:
    """The `topk` best visible entries of each token: entry numbers of its own sequence, best first, then -1.

    q is rotated by rope and not yet quantised; keys in the cache are. A token at position p sees floor((p +
    1) / ratio) entries. score = sum over heads of weight * relu(q . k), every step rounded to q's dtype as
    the release does. Equal scores: lowest entry first. None stands for "all visible entries", where no token
    sees more than `topk`.
    """
    q_THD = quantize_index.reference(q_THD.flatten(0, 1), format=format).view_as(q_THD)
    selected = torch.full((q_THD.shape[0], topk), -1, dtype=torch.int32, device=q_THD.device)
    flat = key_cache_CSD.view(-1, key_cache_CSD.shape[-1])
    for index, (first, count, start) in enumerate(batch.spans):
        visible = (start + count) // ratio
        if visible == 0:
            continue
        entries = torch.arange(visible, device=q_THD.device)
        rows = rows_of(
            key_table_BP, torch.full_like(entries, index), entries, per_page=key_cache_CSD.shape[1]
        )
        keys_ND = flat[rows]
        step = max(1, SCORE_ELEMENTS // (q_THD.shape[1] * visible))
        for low in range(first, first + count, step):
            high = min(low + step, first + count)
            scores = index_scores(q_THD[low:high], weights_TH[low:high], keys_ND)
            seen = (batch.positions_T[low:high, None] + 1) // ratio
            best = best_entries(scores.masked_fill(entries >= seen, -torch.inf), topk=topk)
            columns = torch.arange(best.shape[1], device=q_THD.device)
            selected[low:high, : best.shape[1]] = torch.where(columns < seen, best, -1).to(torch.int32)
    return selected


def index_scores(q_THD: Tensor, weights_TH: Tensor, keys_ND: Tensor) -> Tensor:
    """Scores [T, N] in q's dtype, rounded after the product, after the weighting and after the sum."""
    dtype = q_THD.dtype
    products = torch.matmul(q_THD.float(), keys_ND.float().t()).to(dtype)
    weighted = products.relu_().mul_(weights_TH.unsqueeze(-1))
    return weighted.float().sum(1).to(dtype)


def best_entries(scores_TN: Tensor, *, topk: int) -> Tensor:
    """Entry numbers by descending score, at most `topk`; equal scores keep the lowest entry first."""
    return scores_TN.sort(dim=-1, descending=True, stable=True).indices[:, :topk]

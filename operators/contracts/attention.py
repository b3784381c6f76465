"""Sparse attention over shared key-values: a sliding window, plus compressed entries, plus a sink per head.

Legend: T packed tokens, H query heads, D head size, W window rows, N compressed entries, K selected entries,
C pages, S rows per page, W elements of a stored row (D unless an implementation stores rows its own way),
B sequences, P logical pages. Keys and values are the same rows; one head serves all queries.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ascend_v4.errors import ContractError
from ascend_v4.operators.contract import CACHES, FLOAT32, FLOATS, INT64, Spec, Tolerance, operator
from ascend_v4.operators.contracts.batch import Plan, TokenBatch, rows_of

QUERIES_AT_A_TIME = 64


def plan_attention(
    batch: TokenBatch,
    *,
    ratio: int,
    window_tokens: int,
    window_table: Tensor,
    window_page_tokens: int,
    compressed_table: Tensor | None,
    entries_per_page: int,
    num_heads: int,
    head_dim: int,
    topk: int,
) -> Plan:
    """The reference needs nothing ahead of time; others put a step's row numbers, masks or metadata here.

    topk is the number of entries selected for each token, 0 where all visible ones are used.
    """
    return Plan()


@operator(
    source="reference/model.md 2.4 steps 3 and 4; ascend-operators.md 9 and 19.4",
    tolerance=Tolerance(16, "probabilities rounded to the query's dtype, float32 sums in any order"),
    plan=plan_attention,
)
def sparse_attention(
    q_THD: Annotated[Tensor, Spec("T H D", FLOATS)],
    window_cache_CSD: Annotated[Tensor, Spec("C S W", CACHES)],
    *,
    window_table_BP: Annotated[Tensor, Spec("B P", INT64)],
    compressed_cache_CSD: Annotated[Tensor | None, Spec("E L W", CACHES)],
    compressed_table_BP: Annotated[Tensor | None, Spec("B X", INT64)],
    selected_TK: Annotated[Tensor | None, Spec("T K", (torch.int32,))],
    sinks_H: Annotated[Tensor, Spec("H", FLOAT32)],
    batch: TokenBatch,
    plan: Plan,
    ratio: int,
    window_tokens: int,
    scale: float,
    sink_in_peak: bool,
) -> Annotated[Tensor, Spec("T H D", FLOATS)]:
    """Attention output before the inverse rotation, in q's dtype.

    A query at position p sees window rows max(0, p - window_tokens + 1) .. p and, of the floor((p + 1) /
    ratio) visible compressed entries, the first min(K, visible) of its row in `selected`, or all where
    `selected` is None. Those must be distinct entry numbers below the visible count; the reference raises
    ContractError for a number that is not visible, faster implementations do not look. Scores are float32;
    unnormalised probabilities are rounded to q's dtype before they multiply the values, not in the
    denominator, to which exp(sink) is added. They are exp(score - peak), the peak being the largest score of
    the token.

    sink_in_peak: the sink takes part in the peak, as on the chips, whose running maximum starts there. That
    moves the rounding and nothing else.
    """
    out_THD = torch.empty_like(q_THD)
    window = window_cache_CSD.view(-1, window_cache_CSD.shape[-1])
    for index, (first, count, _) in enumerate(batch.spans):
        for low in range(first, first + count, QUERIES_AT_A_TIME):
            high = min(low + QUERIES_AT_A_TIME, first + count)
            positions = batch.positions_T[low:high, None]
            seen = positions - torch.arange(window_tokens - 1, -1, -1, device=q_THD.device)
            sequence = torch.full_like(seen, index)
            rows = rows_of(window_table_BP, sequence, seen.clamp_min(0), per_page=window_cache_CSD.shape[1])
            kv, valid = window[rows], seen >= 0
            if compressed_cache_CSD is not None and compressed_table_BP is not None:
                chosen = None if selected_TK is None else selected_TK[low:high]
                entries, entry_valid = visible_entries(positions, chosen, ratio=ratio, first_token=low)
                sequence = torch.full_like(entries, index)
                entry_rows = rows_of(
                    compressed_table_BP, sequence, entries, per_page=compressed_cache_CSD.shape[1]
                )
                flat = compressed_cache_CSD.view(-1, compressed_cache_CSD.shape[-1])
                kv = torch.cat((kv, flat[entry_rows]), dim=1)
                valid = torch.cat((valid, entry_valid), dim=1)
            out_THD[low:high] = attend(
                q_THD[low:high], kv, valid, sinks_H, scale=scale, sink_in_peak=sink_in_peak
            )
    return out_THD


def visible_entries(
    positions_T1: Tensor, selected_TK: Tensor | None, *, ratio: int, first_token: int = 0
) -> tuple[Tensor, Tensor]:
    """Entry numbers (int64) and which of them count.

    Raises ContractError for a selected entry that is not visible; it counts tokens from `first_token`.
    """
    visible = (positions_T1 + 1) // ratio
    if selected_TK is None:
        entries = torch.arange(int(visible.max()), device=positions_T1.device).expand(len(positions_T1), -1)
        valid = entries < visible
    else:
        columns = torch.arange(selected_TK.shape[1], device=positions_T1.device)
        valid = columns < visible
        entries = selected_TK.long()
        wrong = valid & ((entries < 0) | (entries >= visible))
        if bool(wrong.any()):
            token, column = wrong.nonzero()[0].tolist()
            raise ContractError(
                f"selected entry {entries[token, column].item()} of token {first_token + token}, "
                f"column {column}: {visible[token].item()} entries are visible to it"
            )
    return torch.where(valid, entries, 0), valid


def attend(
    q_THD: Tensor, kv_TND: Tensor, valid_TN: Tensor, sinks_H: Tensor, *, scale: float, sink_in_peak: bool
) -> Tensor:
    """Softmax attention of each token over its own rows, with the sink in the denominator."""
    # rows that do not count may be anything, NaN included: 0 times NaN would spoil the sum
    values = kv_TND.float().masked_fill(~valid_TN.unsqueeze(-1), 0.0)
    scores = torch.einsum("thd,tnd->thn", q_THD.float(), values) * scale
    scores = scores.masked_fill(~valid_TN.unsqueeze(1), -torch.inf)
    peak = scores.amax(-1, keepdim=True)
    if sink_in_peak:
        peak = torch.maximum(peak, sinks_H[:, None])
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True) + torch.exp(sinks_H[:, None] - peak)
    rounded = weights.to(q_THD.dtype).float()
    return (torch.einsum("thn,tnd->thd", rounded, values) / total).to(q_THD.dtype)

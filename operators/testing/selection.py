"""Judging an indexer whose scores are rounded otherwise: by the scores of what it chose, not by its numbers.

Legend: T tokens, K entries kept, N entries visible, H heads, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ascend_v4.operators.contract import Tolerance
from ascend_v4.operators.contracts.batch import rows_of
from ascend_v4.operators.contracts.quantize import quantize_index


def require_good_choice(selected_TK: Tensor, arguments: Mapping[str, Any], tolerance: Tolerance) -> None:
    """Holds a selection to the reference's scores, computed without any rounding.

    arguments are those of the reference. Each token must get as many distinct visible entries as it may, then
    -1; no entry may be left out, or stand behind another, whose score is better by more than the tolerance:
    steps of the query's dtype, of the token's largest sum of magnitudes.
    Raises AssertionError with the token and what is wrong.
    """
    selected_TK = selected_TK.detach().cpu()
    assert selected_TK.dtype is torch.int32, selected_TK.dtype
    batch, ratio, topk = arguments["batch"], arguments["ratio"], arguments["topk"]
    assert selected_TK.shape == (batch.num_tokens, topk), tuple(selected_TK.shape)
    step = max(tolerance.steps, 1.0) * torch.finfo(arguments["q_THD"].dtype).eps
    for index, (first, count, start) in enumerate(batch.spans):
        scores_TN, sizes_TN = _scores(arguments, index, first, count, (start + count) // ratio)
        for offset in range(count):
            visible = (start + offset + 1) // ratio
            kept = min(topk, visible)
            row, label = selected_TK[first + offset], f"token {first + offset}"
            chosen = row[:kept].long()
            assert bool((row[kept:] == -1).all()), f"{label}: {row[kept:].tolist()} after {kept} entries"
            assert bool(((chosen >= 0) & (chosen < visible)).all()), (
                f"{label}: {chosen.tolist()} of {visible}"
            )
            assert len(set(chosen.tolist())) == kept, f"{label}: an entry twice in {chosen.tolist()}"
            if kept:
                band = step * sizes_TN[offset, :visible].max().item()
                _require_best(scores_TN[offset, :visible], chosen, band=band, label=label)


def _require_best(scores_N: Tensor, chosen_K: Tensor, *, band: float, label: str) -> None:
    own = scores_N[chosen_K]
    left_out = torch.ones(len(scores_N), dtype=torch.bool)
    left_out[chosen_K] = False
    if bool(left_out.any()):
        missed = (scores_N[left_out].max() - own.min()).item()
        assert missed <= band, f"{label}: an entry better by {missed:.3g} was left out, allowed {band:.3g}"
    if len(own) > 1:
        behind = (own[1:] - own[:-1]).max().item()
        assert behind <= band, f"{label}: an entry better by {behind:.3g} stands behind, allowed {band:.3g}"


def _scores(
    arguments: Mapping[str, Any], sequence: int, first: int, count: int, visible: int
) -> tuple[Tensor, Tensor]:
    """Scores [T, N] of a sequence's new tokens, float64, and the sums of their terms' magnitudes."""
    q_THD = arguments["q_THD"][first : first + count]
    rounded = quantize_index.reference(q_THD.flatten(0, 1), format=arguments["format"]).view_as(q_THD)
    cache = arguments["key_cache_CSD"]
    entries = torch.arange(visible)
    rows = rows_of(
        arguments["key_table_BP"], torch.full_like(entries, sequence), entries, per_page=cache.shape[1]
    )
    keys_ND = cache.view(-1, cache.shape[-1])[rows].double()
    products_THN = torch.einsum("thd,nd->thn", rounded.double(), keys_ND).relu()
    weights_TH1 = arguments["weights_TH"][first : first + count].double().unsqueeze(-1)
    terms_THN = products_THN * weights_TH1
    return terms_THN.sum(1), terms_THN.abs().sum(1)

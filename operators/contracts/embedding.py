"""The first layer: token ids to rows of a table. Legend: T tokens, V vocabulary, D hidden."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional

from ascend_v4.operators.contract import BITWISE, FLOATS, INT64, Spec, operator


@operator(source="reference/model.md 2.2", tolerance=BITWISE)
def embed_tokens(
    token_ids_T: Annotated[Tensor, Spec("T", INT64)],
    table_VD: Annotated[Tensor, Spec("V D", FLOATS)],
    *,
    dtype: torch.dtype,
) -> Annotated[Tensor, Spec("T D", FLOATS)]:
    """Rows of the table in the model's dtype. Every id is one of the vocabulary; nothing checks it here."""
    return functional.embedding(token_ids_T, table_VD).to(dtype)

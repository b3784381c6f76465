"""Token embeddings: no vendor has an operator for them. Legend: T tokens, V vocabulary, D hidden."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ascend_v4.operators.contract import implements
from ascend_v4.operators.contracts.embedding import embed_tokens
from ascend_v4.operators.npu.constants import ATEN


@implements(embed_tokens, backend="npu", provider=ATEN, capturable=True)
def embed(token_ids_T: Tensor, table_VD: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Rows of the table."""
    return functional.embedding(token_ids_T, table_VD).to(dtype)

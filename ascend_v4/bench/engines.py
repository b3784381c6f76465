"""The engines a benchmark compares, behind one small protocol: prefill a prompt, then decode token by
token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ascend_v4.engine.protocol import Chunk
from ascend_v4.engine.runner import build_runner


class Engine(Protocol):
    """One contestant. `prefill` starts a new sequence, `decode` extends it."""

    name: str

    def prefill(self, token_ids: list[int]) -> Tensor:
        """Logits [vocab] after the prompt."""
        ...

    def decode(self, token_id: int) -> Tensor:
        """Logits [vocab] after one more token."""
        ...


class OwnEngine:
    """This project's runner."""

    def __init__(self, checkpoint: Path, *, numerics: str, max_tokens: int) -> None:
        self.name = f"ascend-v4 {numerics}"
        self._runner = build_runner(
            checkpoint,
            numerics=numerics,
            max_sequence_tokens=max_tokens,
            cache_tokens=max_tokens,
            max_sequences=1,
        )
        self._reserve = max_tokens
        self._sequence = self._runner.open_sequence(max_tokens)

    def prefill(self, token_ids: list[int]) -> Tensor:
        """Logits after the prompt, in a fresh sequence."""
        self._runner.close_sequence(self._sequence)
        self._sequence = self._runner.open_sequence(self._reserve)
        return self._runner.forward([Chunk(self._sequence, token_ids)])[0]

    def decode(self, token_id: int) -> Tensor:
        """Logits after one more token."""
        return self._runner.forward([Chunk(self._sequence, [token_id])])[0]


class PeerEngine:
    """transformers' DeepseekV4ForCausalLM in float32, with its own cache."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - transformers is untyped
        self.name = "transformers float32"
        self._model = model
        self._cache: Any = None

    def prefill(self, token_ids: list[int]) -> Tensor:
        """Logits after the prompt; only the last position goes through the head."""
        self._cache = None
        return self._run(token_ids)

    def decode(self, token_id: int) -> Tensor:
        """Logits after one more token."""
        return self._run([token_id])

    def _run(self, token_ids: list[int]) -> Tensor:
        with torch.inference_mode():
            out = self._model(
                torch.tensor([token_ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
        self._cache = out.past_key_values
        logits: Tensor = out.logits[0, -1]
        return logits

"""The next token of one request, from its row of logits. V is the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_v4.engine.requests import SampledToken, SamplingParams
from ascend_v4.errors import RequestError


class Sampler:
    """Chooses the tokens of one request.

    Its random numbers are its own and one is drawn per token, so the same request with the same seed gives
    the same tokens whatever else is in the batch.
    """

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._generator = torch.Generator()
        self._generator.manual_seed(params.seed)

    def sample(self, logits_V: Tensor) -> SampledToken:
        """The next token. Raises RequestError when a logit is not finite: nothing can be chosen then."""
        logits_V = logits_V.detach().to(device="cpu", dtype=torch.float64)
        num_bad = int((~torch.isfinite(logits_V)).sum())
        if num_bad:
            raise RequestError(
                f"{num_bad} of {logits_V.numel()} logits are not finite, so no token can be chosen. "
                "The checkpoint or its numerics are broken; try --numerics exact."
            )
        params = self._params
        if params.temperature == 0.0 or params.top_p == 0.0:
            token_id = _first_of_most_probable(logits_V)
        else:
            token_id = self._draw(logits_V)
        if params.num_top_logprobs is None:
            return SampledToken(token_id)
        logprobs_V = torch.log_softmax(logits_V, dim=-1)
        return SampledToken(
            token_id, float(logprobs_V[token_id]), _most_probable(logprobs_V, params.num_top_logprobs)
        )

    def _draw(self, logits_V: Tensor) -> int:
        # The maximum goes first so that a tiny temperature gives -inf and zeros, never inf - inf.
        weights_V = torch.exp((logits_V - logits_V.max()) / self._params.temperature)
        point = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        if self._params.top_p >= 1.0:
            return _token_at(point, torch.cumsum(weights_V, dim=-1))
        sorted_V, ids_V = torch.sort(weights_V, descending=True, stable=True)
        reached_V = torch.cumsum(sorted_V, dim=-1)
        before_V = reached_V - sorted_V
        num_kept = max(1, int((before_V < self._params.top_p * reached_V[-1]).sum()))
        return int(ids_V[_token_at(point, reached_V[:num_kept])])


def _first_of_most_probable(logits_V: Tensor) -> int:
    return int(torch.nonzero(logits_V == logits_V.max())[0])


def _most_probable(logprobs_V: Tensor, num_wanted: int) -> tuple[tuple[int, float], ...]:
    num_wanted = min(num_wanted, logprobs_V.numel())
    if num_wanted == 0:
        return ()
    # topk says nothing about the order of equals; a stable sort of all that reach its last value puts low ids
    # first.
    last = torch.topk(logprobs_V, num_wanted).values[-1]
    ids_K = torch.nonzero(logprobs_V >= last).flatten()
    order_K = torch.argsort(logprobs_V[ids_K], descending=True, stable=True)[:num_wanted]
    return tuple((int(ids_K[index]), float(logprobs_V[ids_K[index]])) for index in order_K)


def _token_at(point: float, reached_K: Tensor) -> int:
    """Index whose share of the running sum covers `point` in [0, 1); never one of weight zero."""
    index = int(torch.searchsorted(reached_K, point * reached_K[-1], right=True))
    # Rounding can put point * total at the total itself.
    return min(index, int(torch.searchsorted(reached_K, reached_K[-1])))

"""The next token of every row: greedy, or drawn with the row's own generator.

A row draws as `generate` does for a single prompt after `torch.manual_seed(seed)`: the same
warpers, and the same stream of random numbers. So a reply does not depend on what else is decoded,
and `qsl steer --seed` writes the same text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

__all__ = ["Chooser", "Logprob", "logprobs"]


@dataclass(frozen=True)
class Logprob:
    """One token with its log probability, and the most probable ones in its place."""

    token: int
    value: float
    top: tuple[tuple[int, float], ...]


class Chooser:
    """Draws the tokens of one row. A greedy row, whose temperature is 0, needs none."""

    def __init__(self, temperature: float, top_p: float, seed: int, device: torch.device) -> None:
        self._warpers = transformers.LogitsProcessorList()
        self._generator = torch.Generator(device).manual_seed(seed)
        if temperature != 1:
            self._warpers.append(transformers.TemperatureLogitsWarper(float(temperature)))
        if top_p < 1:
            self._warpers.append(transformers.TopPLogitsWarper(top_p, min_tokens_to_keep=1))

    def choose(self, logits: Tensor) -> int:
        """float32 `[vocabulary] -> token`."""
        scores = self._warpers(None, logits[None])
        shares = torch.nn.functional.softmax(scores, dim=-1)
        return int(torch.multinomial(shares, 1, generator=self._generator))


def logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[Logprob]:
    """float32 `[n, vocabulary]` and the n tokens that were taken there."""
    scores = logits.log_softmax(-1)
    own = scores.gather(1, torch.tensor(tokens, device=logits.device)[:, None]).squeeze(1).tolist()
    best: list[tuple[tuple[int, float], ...]] = [()] * len(tokens)
    if top:
        values, ids = scores.topk(top)
        best = [
            tuple(zip(row, map(_finite, at), strict=True))
            for row, at in zip(ids.tolist(), values.tolist(), strict=True)
        ]
    return [Logprob(*row) for row in zip(tokens, map(_finite, own), best, strict=True)]


def _finite(value: float) -> float:
    """JSON has no infinity."""
    return max(value, -9999.0) if not math.isnan(value) else -9999.0

"""What requests will cost, before the first of them is sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import regex

from qwen_scope_lens.writers.answers import CHARACTERS_PER_TOKEN
from qwen_scope_lens.writers.generator import Generator, Request
from qwen_scope_lens.writers.ledger import Prices

__all__ = ["Price", "estimated_tokens", "price_of"]

_DENSE = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]")
"""Scripts whose characters are about a token each."""
ESTIMATED = f"at {CHARACTERS_PER_TOKEN} characters per token, 1 of Chinese, Japanese and Korean"


@dataclass(frozen=True)
class Price:
    """How many requests with how many tokens, and the money at the prices that were given."""

    requests: int
    prompt_tokens: int
    answer_tokens: int  # at most: where each answer is as long as it may be
    counted: str  # how the tokens of the prompts were counted
    cost: float | None  # at most; None where no price was given
    kept: int = 0  # further requests whose answers the ledger has, which cost nothing

    def __str__(self) -> str:
        money = "no price was given" if self.cost is None else f"at most {self.cost:.4f}"
        kept = f"; {self.kept:,} more are answered already" if self.kept else ""
        return (
            f"price: {self.requests:,} requests, about {self.prompt_tokens:,} tokens in"
            f" ({self.counted}), at most {self.answer_tokens:,} out: {money}{kept}"
        )


def price_of(
    requests: Sequence[Request],
    prices: Prices | None = None,
    generator: Generator | None = None,
    kept: int = 0,
) -> Price:
    """The price of requests that will be sent.

    A local generator counts with its tokenizer; for others tokens are estimated from characters.
    """
    prices = prices or Prices()
    own: Callable[[str], int] | None = getattr(generator, "count_tokens", None)
    count = own or estimated_tokens
    prompt = sum(count(content) for request in requests for _, content in request.messages)
    answers = sum(request.sampling.max_tokens for request in requests)
    cost = (prices.prompt * prompt + prices.completion * answers) / 1e6
    return Price(
        len(requests),
        prompt,
        answers,
        "by the model's tokenizer" if own else ESTIMATED,
        cost if prices.prompt or prices.completion else None,
        kept,
    )


def estimated_tokens(text: str) -> int:
    """Tokens of a text for which there is no tokenizer."""
    dense = len(_DENSE.findall(text))
    return dense - (dense - len(text)) // CHARACTERS_PER_TOKEN

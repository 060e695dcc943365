"""Options of `qsl synth` that say which generator writes, and what it may cost."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.cli.options import count, not_negative, remark

if TYPE_CHECKING:
    from qwen_scope_lens.writers.ledger import Prices
    from qwen_scope_lens.writers.price import Price
    from qwen_scope_lens.writers.roles import Roles


def add_generator_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("endpoints", "for generators of the form openai:URL#MODEL")
    group.add_argument("--model-name", default="", help="instead of #MODEL")
    group.add_argument(
        "--key-variable",
        default="OPENAI_API_KEY",
        help="the environment variable with the key, which is written nowhere (%(default)s)",
    )
    group.add_argument("--concurrency", type=count, default=8, help="calls at a time (%(default)s)")
    group.add_argument("--timeout", type=float, default=120.0, help="seconds (%(default)g)")
    group.add_argument("--tries", type=count, default=6, help="of one call (%(default)s)")
    group.add_argument(
        "--backoff",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="before the second try, doubled each time (%(default)g)",
    )
    group.add_argument("--requests-per-minute", type=float)
    group.add_argument("--tokens-per-minute", type=float)
    group.add_argument(
        "--body", type=_mapping, default={}, metavar="JSON", help="further fields of every request"
    )
    cost = parser.add_argument_group(
        "cost",
        "counted in a ledger that no answer is paid for twice; it knows a model by the name after #"
        " and not by its URL, so two models need two names",
    )
    cost.add_argument("--price-prompt", type=float, default=0.0, help="per million tokens")
    cost.add_argument("--price-completion", type=float, default=0.0, help="per million tokens")
    cost.add_argument(
        "--price",
        type=_price,
        metavar="IN,OUT",
        help="both, such as 0.15,0.60; then the price in money is said before the first call",
    )
    cost.add_argument(
        "--yes",
        action="store_true",
        help="do not ask before the first call; without a terminal nobody is asked",
    )
    cost.add_argument("--max-cost", type=float, help="start no call once this is reached")
    cost.add_argument(
        "--max-tokens", type=count, help="the same for tokens, of prompts and answers"
    )


def prices(arguments: argparse.Namespace) -> Prices:
    from qwen_scope_lens.writers.ledger import Prices

    prompt, completion = arguments.price or (arguments.price_prompt, arguments.price_completion)
    return Prices(
        prompt,
        completion,
        arguments.max_cost,
        arguments.max_tokens,
    )


def agreed(arguments: argparse.Namespace, price: Price) -> bool:
    """Say what will be asked and what it may cost; at a terminal, ask whether to go on."""
    remark(str(price))
    if not price.requests or arguments.yes or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    print("Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().casefold() in ("y", "yes"):
        return True
    remark("nothing was asked; --yes goes on without this question")
    return False


def endpoint_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of an `Endpoint`."""
    names = (
        "key_variable",
        "concurrency",
        "timeout",
        "tries",
        "backoff",
        "requests_per_minute",
        "tokens_per_minute",
        "body",
    )
    return {name: getattr(arguments, name) for name in names}


def roles(
    arguments: argparse.Namespace,
    load: Callable[[str], Any] | None = None,
    typical: Mapping[FeatureRef, float] | None = None,
    saes: Any = None,
) -> Roles:
    from qwen_scope_lens.writers.roles import Roles

    return Roles(
        load or _load,
        arguments.model_name,
        typical=typical or {},
        saes=saes,
        endpoint=endpoint_settings(arguments),
        **({"strength": arguments.strength} if "strength" in arguments else {}),
    )


def _load(name: str) -> Any:
    from qwen_scope_lens.models.open import open_model

    return open_model(name)


def _price(text: str) -> tuple[float, float]:
    """`0.15,0.60` -> (0.15, 0.6)"""
    parts = text.split(",")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(
            f"{text!r:.60}: expected two prices per million tokens, of prompts and of answers, such"
            " as 0.15,0.60"
        )
    return not_negative(parts[0]), not_negative(parts[1])


def _mapping(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: expected an object, such as {{'top_k': 20}}")
    return content

"""Options of `qsl synth` that say which generator writes, and what it may cost."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.cli.options import count

if TYPE_CHECKING:
    from qwen_scope_lens.writers.ledger import Prices
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
    cost = parser.add_argument_group("cost", "counted in a ledger that no answer is paid for twice")
    cost.add_argument("--price-prompt", type=float, default=0.0, help="per million tokens")
    cost.add_argument("--price-completion", type=float, default=0.0, help="per million tokens")
    cost.add_argument("--max-cost", type=float, help="start no call once this is reached")
    cost.add_argument(
        "--max-tokens", type=count, help="the same for tokens, of prompts and answers"
    )


def prices(arguments: argparse.Namespace) -> Prices:
    from qwen_scope_lens.writers.ledger import Prices

    return Prices(
        arguments.price_prompt,
        arguments.price_completion,
        arguments.max_cost,
        arguments.max_tokens,
    )


def roles(
    arguments: argparse.Namespace,
    load: Callable[[str], Any],
    typical: Mapping[FeatureRef, float] | None = None,
    saes: Any = None,
) -> Roles:
    from qwen_scope_lens.writers.roles import Roles

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
    return Roles(
        load,
        arguments.model_name,
        typical=typical or {},
        saes=saes,
        endpoint={name: getattr(arguments, name) for name in names},
        **({"strength": arguments.strength} if "strength" in arguments else {}),
    )


def _mapping(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: expected an object, such as {{'top_k': 20}}")
    return content

"""`--causal`: options of the verbs that find features, and the test of their best ones."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import count

if TYPE_CHECKING:
    from qwen_scope_lens.address import FeatureRef
    from qwen_scope_lens.steering.causal import Causes

__all__ = ["SHOWN", "add_causal", "run_causal"]

DOSES = "0.1,0.2,0.4"
SHOWN = 8
"""How many documents of each side stand for a concept."""


def add_causal(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("do they cause it?")
    group.add_argument(
        "--causal",
        type=count,
        nargs="?",
        const=3,
        metavar="N",
        help="add the best N features (3) while the model writes, beside random directions, the"
        " prompt that asks, and the mean difference of the examples",
    )
    group.add_argument(
        "--measure",
        action=Input,
        check=_measure,
        help="what the concept is in a text: class=NAME or regex=PATTERN; default: how much the"
        " examples make the text more likely",
    )
    group.add_argument("--ask", help='the instruction, such as "Write in French."')
    group.add_argument(
        "--prompts",
        type=Path,
        action=Input,
        check=inputs.corpus,
        help="default: six beginnings of sentences",
    )
    group.add_argument(
        "--doses",
        default=DOSES,
        action=Input,
        check=_doses,
        help="parts of the residual's length (%(default)s)",
    )
    group.add_argument("--new-tokens", type=count, default=24, help="per prompt (%(default)s)")


def _measure(text: str, _: argparse.Namespace) -> None:
    from qwen_scope_lens.steering.doses import Measure

    Measure.parse(text)


def _doses(text: str, _: argparse.Namespace) -> None:
    from qwen_scope_lens.errors import BadPlan
    from qwen_scope_lens.steering.doses import parse_strengths

    if not any(parse_strengths(text)):
        raise BadPlan(f"--doses {text:.60}: the only dose is 0, which is unsteered")


def run_causal(
    arguments: argparse.Namespace,
    model: Any,
    refs: Sequence[FeatureRef],
    *,
    words: str = "",
    examples: Iterable[str] = (),
    against: Iterable[str] = (),
    prompts: Sequence[Any] = (),
    enable_thinking: bool | None = None,
) -> Causes:
    """Test the first `--causal` features. Without examples the words stand for the concept."""
    from tqdm import tqdm

    from qwen_scope_lens.concepts.concept import CARRIERS, FILLERS, neutral_texts
    from qwen_scope_lens.steering.arms import Examples
    from qwen_scope_lens.steering.causal import PROMPTS, causes
    from qwen_scope_lens.steering.doses import parse_strengths
    from qwen_scope_lens.steering.generate import Sampling
    from qwen_scope_lens.stores.corpus import read_corpus

    positive, negative = tuple(examples), tuple(against)
    if not positive:
        positive = tuple(carrier.format(words) for carrier in CARRIERS)
        negative = tuple(carrier.format(other) for other in FILLERS for carrier in CARRIERS)
    prompts = prompts or PROMPTS
    if arguments.prompts:
        prompts = [document.content for document in read_corpus(arguments.prompts)]
    with tqdm(unit="dose", leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        return causes(
            model,
            refs[: arguments.causal],
            arguments.measure,
            examples=Examples(positive, negative or neutral_texts()),
            ask=arguments.ask or (f"Write about {words}." if words else None),
            prompts=prompts,
            doses=parse_strengths(arguments.doses),
            sampling=Sampling(new_tokens=arguments.new_tokens),
            enable_thinking=enable_thinking,
            progress=progress,
            allow_other_model=getattr(arguments, "allow_other_model", False),
        )

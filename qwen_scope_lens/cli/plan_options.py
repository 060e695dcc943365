"""Options of the verbs that steer: a model, a plan, a calibration, how texts are generated."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.cli import inputs, options
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import count, from_zero, not_negative, remark, share

if TYPE_CHECKING:
    from qwen_scope_lens.address import LayerRef
    from qwen_scope_lens.catalog import Group
    from qwen_scope_lens.steering.generate import Sampling
    from qwen_scope_lens.steering.plan import Plan
    from qwen_scope_lens.steering.typical import Calibration

__all__ = [
    "add_allowance",
    "add_calibration",
    "add_model",
    "add_plan",
    "add_sampling",
    "allow_negative_values",
    "as_prompt",
    "calibrated",
    "load",
    "model_of",
    "notices",
    "plan_of",
    "read_prompts",
    "sampling_of",
    "thinking",
]


def add_model(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser, dtype=True)
    add_allowance(parser)


def add_allowance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-other-model",
        action="store_true",
        help="run also a model that is known to be another than the SAEs were trained on",
    )


def add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--edit",
        action=Input,
        repeated=True,
        check=inputs.edit,
        default=[],
        metavar="REF:OP[:STRENGTH][@WHERE]",
        help="such as G/20/6159:add:+2typical@generation; again for more",
    )
    parser.add_argument(
        "--plan",
        type=Path,
        action=Input,
        check=inputs.plan,
        help="a file with edits, from `qsl plan` or --save-plan",
    )
    add_calibration(parser)


def add_calibration(parser: options.Parser) -> None:
    parser.add_argument(
        "--calibration",
        type=Path,
        action=Input,
        check=inputs.calibration,
        help="from `qsl calibrate`; for strengths in typical",
    )


def add_sampling(parser: argparse.ArgumentParser, new_tokens: int) -> None:
    parser.add_argument("--new-tokens", type=count, default=new_tokens, help="default: %(default)s")
    parser.add_argument("--temperature", type=not_negative, default=0.0, help="default: 0, greedy")
    parser.add_argument("--top-p", type=share, default=1.0, help="default: %(default)s")
    parser.add_argument("--seed", type=from_zero, default=0)
    parser.add_argument("--chat", action="store_true", help="send each prompt as a user's message")
    parser.add_argument(
        "--thinking", action="store_true", help="with --chat: let the model think first"
    )


def allow_negative_values(parser: argparse.ArgumentParser) -> None:
    """Let `--strengths -8:8:1` be a value: argparse knows only plain negative numbers."""
    parser._negative_number_matcher = re.compile(r"^-[\d.][\d.,:eE+-]*$")


def plan_of(arguments: argparse.Namespace) -> Plan:
    from qwen_scope_lens.errors import BadPlan
    from qwen_scope_lens.steering.plan import Edit, Plan

    edits = [Edit.parse(text) for text in arguments.edit]
    if arguments.plan is not None:
        edits += Plan.load(arguments.plan).edits
    if not edits:
        raise BadPlan("there is nothing to steer: give --edit REF:OP[:STRENGTH], or --plan FILE")
    return calibrated(Plan(edits), arguments)


def calibrated(plan: Plan, arguments: argparse.Namespace) -> Plan:
    from qwen_scope_lens.steering.typical import Calibration

    if arguments.calibration is None:
        for edit in plan.edits:
            _ = edit.value  # raises where a typical activation is missing
        return plan
    found: Calibration = Calibration.load(arguments.calibration)
    return plan.calibrated(found)


def load(arguments: argparse.Namespace, saes: Iterable[LayerRef]) -> Any:
    """The model that was named, else the one that all the SAEs belong to."""
    saes = list(saes)
    groups = dict.fromkeys(sae.row for sae in saes)
    name = model_of(arguments, groups)
    if getattr(arguments, "sae_folder", None) is None:
        inputs.sae_files(saes)

    import torch
    import transformers

    from qwen_scope_lens.models.backbone import another_model, check_name
    from qwen_scope_lens.models.open import open_model
    from qwen_scope_lens.saes.load import check_dtype

    transformers.utils.logging.disable_progress_bar()
    remarks(name, groups, arguments.allow_other_model)
    dtype = getattr(torch, check_dtype(arguments.dtype)) if arguments.dtype else None
    model = open_model(name, dtype=dtype, device=arguments.device)
    for group in groups:
        if not arguments.allow_other_model and (known := another_model(model, group)):
            check_name(name, group, known)
    return model


def model_of(arguments: argparse.Namespace, groups: Iterable[Group]) -> str:
    """The name of the model that `load` will load; raises where the SAEs belong to several."""
    from qwen_scope_lens.errors import WrongModel

    names = list(dict.fromkeys(group.backbone.model_id for group in groups))
    if arguments.model is None and len(names) > 1:
        raise WrongModel(
            f"these SAEs belong to different models, {' and '.join(names)}: name SAEs of one,"
            " or say with --model which model is to run"
        )
    return str(arguments.model or names[0])


def remarks(model: str, groups: Iterable[Group], allow_other_model: bool) -> None:
    """Say so where the SAEs were trained on another model than the one that is named.

    Raises WrongModel where the name alone shows it, else prints a note.
    """
    from qwen_scope_lens.models.backbone import check_name
    from qwen_scope_lens.stores.facts import other_model

    for group in groups:
        if not allow_other_model:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the note says it
                check_name(model, group)
        if note := other_model(model, group):
            remark(f"Note: {note}\n")


def notices(saes: Iterable[LayerRef]) -> None:
    """Print the caution of each group's model card, once."""
    for notice in dict.fromkeys(sae.row.notice for sae in saes):
        remark(f"Note: {notice}\n")


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    from qwen_scope_lens.errors import BadPlan
    from qwen_scope_lens.steering.generate import Sampling

    try:
        return Sampling(
            arguments.new_tokens, arguments.temperature, arguments.top_p, arguments.seed
        )
    except ValueError as error:
        raise BadPlan(str(error)) from error


def read_prompts(arguments: argparse.Namespace, path: Path) -> list[Any]:
    """The documents of a corpus file, as prompts."""
    from qwen_scope_lens.errors import BadCorpus
    from qwen_scope_lens.stores.corpus import read_corpus

    found = [as_prompt(arguments, document.content) for document in read_corpus(path)]
    if not found:
        raise BadCorpus(f"{path} has no prompt")
    return found


def thinking(arguments: argparse.Namespace, prompts: Iterable[Any]) -> bool:
    """Whether chats are to think. --thinking is refused where no prompt is a chat."""
    from qwen_scope_lens.errors import BadPlan

    if arguments.thinking and all(isinstance(prompt, str) for prompt in prompts):
        raise BadPlan("--thinking is for chats, and no prompt is one: give --chat too")
    return bool(arguments.thinking)


def as_prompt(arguments: argparse.Namespace, content: Any) -> Any:
    if arguments.chat and isinstance(content, str):
        return [{"role": "user", "content": content}]
    return content

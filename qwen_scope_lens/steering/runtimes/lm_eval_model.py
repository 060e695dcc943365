"""A steered model for lm-eval, so that standard benchmarks can measure what a plan costs.

lm-eval's own `steered` type has one feature per layer, and its clamp is a projection. This type is
lm-eval's Hugging Face model with an active plan of this package. A request that is scored in one
pass counts as prompt as a whole; tokens that the model generates count as generation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from qwen_scope_lens.catalog import bundled_model
from qwen_scope_lens.errors import PlanNeverFired
from qwen_scope_lens.extras import require
from qwen_scope_lens.steering.hooks import steer
from qwen_scope_lens.steering.plan import Plan

__all__ = ["NAME", "evaluate", "steered_lm"]

NAME = "qsl-steered"


@functools.cache
def steered_lm() -> Any:
    """The class, registered with lm-eval as `qsl-steered`.

    `steered_lm()(pretrained="Qwen/Qwen3-8B-Base", plan="plan.json", batch_size=8)`: a plan, its
    file, or None for the model as it is; everything else is lm-eval's `HFLM`.
    """
    base = require("lm_eval.models.huggingface", "lm-eval").HFLM
    register = require("lm_eval.api.registry", "lm-eval").register_model

    class SteeredLM(base):  # type: ignore[misc, valid-type]
        """HFLM with a plan active from the start until `close()`."""

        def __init__(
            self,
            pretrained: Any,
            plan: Plan | str | Path | None,
            *,
            allow_other_model: bool = False,
            **options: Any,
        ) -> None:
            if isinstance(pretrained, str):
                pretrained = str(bundled_model(pretrained) or pretrained)
            super().__init__(pretrained=pretrained, **options)
            self.plan = Plan.load(plan) if isinstance(plan, (str, Path)) else plan
            self.report = None
            self._steering = ExitStack()
            if self.plan is not None:
                self.report = self._steering.enter_context(
                    steer(
                        self.model,
                        self.plan,
                        tokenizer=self.tokenizer,
                        must_fire=False,
                        allow_other_model=allow_other_model,
                    )
                )

        def release(self) -> None:
            """Take the plan off the model."""
            self._steering.close()

        def close(self) -> None:
            """Take the plan off the model, and raise if it never acted."""
            self.release()
            if self.report is not None and not self.report.fired:
                raise PlanNeverFired(f"the plan never fired in this evaluation\n{self.report}")

    return register(NAME)(SteeredLM)


def evaluate(
    model: Any,
    plan: Plan | None,
    tasks: Sequence[str],
    *,
    tokenizer: Any = None,
    batch_size: int = 8,
    device: str | None = None,
    include_path: Path | None = None,
    allow_other_model: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Run lm-eval's `simple_evaluate` under a plan; `include_path` has tasks of your own."""
    harness = require("lm_eval", "lm-eval")
    lm = steered_lm()(
        pretrained=model,
        plan=plan,
        tokenizer=tokenizer,
        batch_size=batch_size,
        device=device or "cpu",
        allow_other_model=allow_other_model,
    )
    try:
        found: dict[str, Any] = harness.simple_evaluate(
            model=lm,
            tasks=list(tasks),
            task_manager=_tasks(tasks, include_path),
            **options,
        )
    except BaseException:
        lm.release()
        raise
    lm.close()
    return found


def _tasks(tasks: Sequence[str], folder: Path | None) -> Any:
    """lm-eval's index of tasks; only the folder is read where it has all tasks, which is quick."""
    manager = require("lm_eval.tasks", "lm-eval").TaskManager
    if folder is None:
        return manager()
    own = manager(include_path=str(folder), include_defaults=False)
    return own if set(tasks) <= set(own.all_tasks) else manager(include_path=str(folder))

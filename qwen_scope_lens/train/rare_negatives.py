"""Rare negatives: one rollout of every GRPO group is written under a plan that makes it go wrong.

Endless repetition is so rare in a model's own rollouts that a reward against it hardly ever has
anything to say. A plan that amplifies a repetition feature supplies the example; TRL's GRPOTrainer
scores it with the others. Rewards, batches, checkpoints and the objective are TRL's.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from qwen_scope_lens.errors import BadPlan, WrongModel
from qwen_scope_lens.extras import require
from qwen_scope_lens.models.backbone import check_backbone
from qwen_scope_lens.steering.hooks import steer
from qwen_scope_lens.steering.plan import Edit, Plan
from qwen_scope_lens.train.checkpoints import WholeCheckpoints
from qwen_scope_lens.train.metrics import find_repeats

require("trl", "train")

from trl import GRPOConfig, GRPOTrainer  # noqa: E402  (after a clear error where it is missing)

__all__ = ["RareNegativeGRPOConfig", "RareNegativeGRPOTrainer"]


@dataclass
class RareNegativeGRPOConfig(GRPOConfig):
    """GRPOConfig with DAPO's objective, without its dynamic sampling (TRL has none).

    What the paper leaves open is set here to values of DAPO or of our own, each to be changed.

    Args:
        steered_per_group: rollouts of each group that are written under the plan; the paper: one.
        behaviour: the policy in the denominator of a steered rollout's importance ratio.
            "unsteered" is the policy before the update, as for the other rollouts. "steered" is
            the policy that wrote it. By default unsteered: a steered rollout is likelier under
            the plan than without, so with the true behaviour policy its ratio starts far below
            1 - epsilon, where the clipped objective of a negative advantage has no gradient, and
            the example that was made on purpose would teach nothing.
        allow_other_model: train a model of which the plan's features are not known to be.
    """

    steered_per_group: int = field(default=1)
    behaviour: Literal["unsteered", "steered"] = field(default="unsteered")
    loss_type: str = field(default="dapo")
    epsilon: float = field(default=0.2)
    epsilon_high: float | None = field(default=0.28)
    beta: float = field(default=0.0)
    allow_other_model: bool = field(default=False)
    report_to: Any = field(default="none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.behaviour not in ("unsteered", "steered"):
            raise ValueError(f"behaviour {self.behaviour!r}: expected 'unsteered' or 'steered'")
        if not 0 <= self.steered_per_group < self.num_generations:
            raise ValueError(
                f"steered_per_group {self.steered_per_group}: expected less than num_generations"
                f" ({self.num_generations}), so that the group has rollouts of the model's own"
            )


class RareNegativeGRPOTrainer(WholeCheckpoints, GRPOTrainer):
    """`GRPOTrainer(..., plan=Plan([...]))`: the last rollouts of each group are steered."""

    _tag_names = ("trl", "grpo", "rare-negatives")

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: RareNegativeGRPOConfig,
        *,
        plan: Plan,
        **rest: Any,
    ) -> None:
        if not isinstance(args, RareNegativeGRPOConfig):
            raise WrongModel(f"args is a {type(args).__name__}: expected a RareNegativeGRPOConfig")
        if not isinstance(plan, Plan):
            raise BadPlan(f"plan is a {type(plan).__name__}: expected a Plan")
        _refuse_bypasses(args, rest)
        if args.behaviour == "steered" and any(e.where.positions is not None for e in plan.edits):
            raise BadPlan(
                "behaviour='steered' needs edits without positions: which token of the completed"
                " text they meant while it was written is not known afterwards"
            )
        self.plan = plan
        if not isinstance(model, str):  # before the data set is read
            _check_model(model, args, plan)
        super().__init__(model, reward_funcs, args, **rest)
        _check_model(self.model, args, plan)

    def _steered_rows(self, count: int) -> list[bool]:
        """Which of this process's rows are written under the plan: the last of each group.

        TRL repeats a prompt `num_generations` times in a row and hands each process a contiguous
        part of that table.
        """
        group = self.num_generations
        start = self.accelerator.process_index * count
        return [
            (start + row) % group >= group - self.args.steered_per_group for row in range(count)
        ]

    def _generate_single_turn(self, prompt_ids: Any, *rest: Any, **named: Any) -> Any:
        if not self.model.training:
            return super()._generate_single_turn(prompt_ids, *rest, **named)
        rows = self._steered_rows(len(prompt_ids))
        with self._steered([self.plan if steered else None for steered in rows]) as report:
            found = super()._generate_single_turn(prompt_ids, *rest, **named)
        # Also by a process that steers no row of its own: the others wait for its figures.
        self._log_rollouts(found[0], rows, report is not None and report.fired)
        return found

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self.model.training and self.args.behaviour == "steered":
            output["old_per_token_logps"] = self._behaviour_logprobs(output)
        return output

    @torch.no_grad()
    def _behaviour_logprobs(self, output: dict[str, Any]) -> torch.Tensor:
        """Log-probabilities under whatever wrote each rollout. `[rows, completion]`"""
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        keep = output["completion_ids"].shape[1]
        size = self.args.per_device_train_batch_size
        found = output.get("old_per_token_logps")
        if found is None:
            found, _, _ = self._get_per_token_logps_and_entropies(self.model, ids, mask, keep, size)
        found = found.clone()
        steered = torch.tensor(self._steered_rows(len(ids))).nonzero()[:, 0]
        for rows in steered.split(size):
            rows = rows.to(ids.device)
            lengths = output["prompt_mask"][rows].sum(dim=1).tolist()
            plans = [_in_hindsight(self.plan, length) for length in lengths]
            with self._steered(plans):
                found[rows], _, _ = self._get_per_token_logps_and_entropies(
                    self.model, ids[rows], mask[rows], keep, size
                )
        return found

    def _steered(self, plans: Sequence[Plan | None]) -> Any:
        model = self.accelerator.unwrap_model(self.model)
        if not any(plans):
            return nullcontext()
        return steer(
            model,
            plans,
            tokenizer=self._tokenizer,
            must_fire=False,
            allow_other_model=self.args.allow_other_model,
        )

    def _log_rollouts(self, completions: Any, rows: Sequence[bool], fired: bool) -> None:
        """How often each kind of rollout ends in a loop, and whether the plan did anything."""
        table = [
            [float(find_repeats(ids) is not None), float(steered), float(fired)]
            for ids, steered in zip(completions, rows, strict=True)
        ]
        found = self.accelerator.gather(torch.tensor(table, device=self.accelerator.device))
        steered, metrics = found[:, 1] > 0, self._metrics["train"]
        metrics["rollouts/own_repeat_ratio"].append(found[~steered, 0].mean().item())
        if bool(steered.any()):
            metrics["rollouts/steered_repeat_ratio"].append(found[steered, 0].mean().item())
            metrics["rollouts/plan_fired"].append(found[steered, 2].mean().item())


def _check_model(model: Any, args: RareNegativeGRPOConfig, plan: Plan) -> None:
    rows = [edit.ref.sae.row for edit in plan.edits]
    for row in {row.short: row for row in rows}.values():
        check_backbone(model, row, allow_other_model=args.allow_other_model)


def _in_hindsight(plan: Plan, prompt: int) -> Plan:
    """The plan as it acted while a text was written, for one pass over the finished text."""

    def placed(edit: Edit) -> Edit:
        where = edit.where
        start = prompt if where.phase == "generation" else int(where.skip_first)
        end = prompt if where.phase == "prompt" else None
        return replace(edit, where=replace(where, phase="both", positions=((start, end),)))

    return Plan([placed(edit) for edit in plan.edits])


def _refuse_bypasses(args: RareNegativeGRPOConfig, rest: dict[str, Any]) -> None:
    """Refuse what generates outside the hooks, and what would hide the negative again."""
    engines = {
        "use_vllm=True": args.use_vllm,
        "use_transformers_continuous_batching=True": getattr(
            args, "use_transformers_continuous_batching", False
        ),
        "rollout_func": rest.get("rollout_func"),
        "tools": rest.get("tools"),
        "environment_factory": rest.get("environment_factory"),
    }
    for name, used in engines.items():
        if used:
            raise WrongModel(
                f"{name}: rollouts would be generated where the plan's hooks do not act, so none"
                " would be steered. Leave it out: TRL then generates with the model itself"
            )
    if args.mask_truncated_completions:
        raise WrongModel(
            "mask_truncated_completions=True drops every completion that reaches the length limit,"
            " which an endless repetition does: the negatives would not count. Set it to False"
        )

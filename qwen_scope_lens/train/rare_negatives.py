"""Rare negatives: one rollout of each GRPO group is steered into the behaviour to unlearn.

Endless repetition is rare in a model's own rollouts, so a reward against it seldom has an effect. A
plan that amplifies a repetition feature supplies examples, which TRL's GRPOTrainer scores with the
other rollouts. TRL handles rewards, batches, checkpoints and the objective.
"""

from __future__ import annotations

import math
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

from transformers import GenerationConfig  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402  (after a clear error where it is missing)

__all__ = ["RareNegativeGRPOConfig", "RareNegativeGRPOTrainer"]


@dataclass
class RareNegativeGRPOConfig(GRPOConfig):
    """GRPOConfig with DAPO's objective, without dynamic sampling, which TRL does not have.

    Settings that the paper does not give have values from DAPO or our own, and all can be changed.

    Args:
        steered_per_group: rollouts of each group that are steered by the plan. Paper: one.
        behaviour: the policy in the denominator of a steered rollout's importance ratio.
            "unsteered", the default, is the policy before the update, as for the other rollouts.
            "steered" is the policy that wrote the rollout. A steered rollout is more likely with
            the plan than without, so with "steered" its ratio starts far below 1 - epsilon, where
            the clipped objective of a negative advantage has no gradient, and the example would
            teach nothing.
        allow_other_model: train a model that may not be the one the plan's features belong to.
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
                f" ({self.num_generations}), so that each group also has unsteered rollouts"
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
                "behaviour='steered' needs edits without positions, because the tokens to which"
                " positions referred while the text was written are not known afterwards"
            )
        self.plan = plan
        if not isinstance(model, str):  # before the dataset is read
            _check_model(model, args, plan)
        super().__init__(model, reward_funcs, args, **rest)
        _check_model(self.model, args, plan)
        if self.use_vllm:  # TRL prepares the model's own generation only without vLLM
            self._prepare_own_generation()

    def steered_rows(self, count: int) -> list[bool]:
        """Which rows of this process are steered: the last ones of each group.

        TRL repeats each prompt `num_generations` times in a row, and each process gets a contiguous
        part of the rows.
        """
        group = self.num_generations
        start = self.accelerator.process_index * count
        return [
            (start + row) % group >= group - self.args.steered_per_group for row in range(count)
        ]

    def _generate_single_turn(self, prompt_ids: Any, *rest: Any, **named: Any) -> Any:
        if not self.model.training:
            return super()._generate_single_turn(prompt_ids, *rest, **named)
        rows = self.steered_rows(len(prompt_ids))
        plans = [self.plan if steered else None for steered in rows]
        if self.use_vllm:
            found = super()._generate_single_turn(prompt_ids, *rest, **named)
            report = self._write_steered_rows(prompt_ids, plans, found)
        else:
            with self._steered(plans) as report:
                found = super()._generate_single_turn(prompt_ids, *rest, **named)
        # A process without steered rows logs as well, because the others wait for its figures.
        self._log_rollouts(found[0], rows, report is not None and report.fired)
        return found

    def _write_steered_rows(
        self, prompt_ids: Any, plans: Sequence[Plan | None], found: tuple[Any, Any]
    ) -> Any:
        """Write the steered rows again with the model itself, in place of what vLLM wrote.

        vLLM gives log-probabilities of what it sampled, and TRL corrects for the difference of both
        engines. These rows have none, which TRL reads as "not known": no correction.
        """
        completions, logprobs = found
        if len(plans) % self.num_generations:
            raise WrongModel(
                f"use_vllm=True with {len(plans)} rollouts per process: expected a multiple of"
                f" num_generations ({self.num_generations}), so that every process steers as many"
            )
        steered = [row for row, plan in enumerate(plans) if plan is not None]
        if not steered:
            return None
        self.use_vllm = False
        try:
            with self._steered([self.plan] * len(steered)) as report:
                own = [prompt_ids[row] for row in steered]
                written, _ = super()._generate_single_turn(own, None, {}, 1)
        finally:
            self.use_vllm = True
        for row, ids in zip(steered, written, strict=True):
            completions[row], logprobs[row] = ids, [math.nan] * len(ids)
        return report

    def _prepare_own_generation(self) -> None:
        """The sampling settings of the run, for TRL's generation with the model itself."""
        tokens = {
            f"{kind}_token_id": getattr(self._tokenizer, f"{kind}_token_id")
            for kind in ("pad", "bos")
        }
        sampling = {
            name: getattr(self, name)
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        }
        self.generation_kwargs = {
            "max_new_tokens": self.max_completion_length,
            "do_sample": True,
            "eos_token_id": self.eos_token_ids,
            **tokens,
            **sampling,
        }
        self.generation_config = GenerationConfig(**self.generation_kwargs, disable_compile=True)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self.model.training and self.args.behaviour == "steered":
            output["old_per_token_logps"] = self.behaviour_logprobs(output)
        return output

    @torch.no_grad()
    def behaviour_logprobs(self, output: dict[str, Any]) -> torch.Tensor:
        """Log-probabilities under the policy that wrote each rollout. `-> [rows, completion]`"""
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        keep = output["completion_ids"].shape[1]
        size = self.args.per_device_train_batch_size
        found = output.get("old_per_token_logps")
        if found is None:
            found, _, _ = self._get_per_token_logps_and_entropies(self.model, ids, mask, keep, size)
        found = found.clone()
        steered = torch.tensor(self.steered_rows(len(ids))).nonzero()[:, 0]
        for rows in steered.split(size):
            rows = rows.to(ids.device)
            lengths = output["prompt_mask"][rows].sum(dim=1).tolist()
            plans = [in_hindsight(self.plan, length) for length in lengths]
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
        """Log how often each kind of rollout ends in a loop, and whether the plan fired."""
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


def in_hindsight(plan: Plan, prompt: int) -> Plan:
    """The plan for one pass over a finished text, acting as it did while the text was written."""

    def placed(edit: Edit) -> Edit:
        where = edit.where
        start = prompt if where.phase == "generation" else int(where.skip_first)
        end = prompt if where.phase == "prompt" else None
        return replace(edit, where=replace(where, phase="both", positions=((start, end),)))

    return Plan([placed(edit) for edit in plan.edits])


def _refuse_bypasses(args: RareNegativeGRPOConfig, rest: dict[str, Any]) -> None:
    """Refuse settings that generate without the plan's hooks, or that hide the negatives."""
    engines = {
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
                f"{name}: rollouts would be generated without the plan's hooks, so none of them"
                " would be steered. Leave it out, so that TRL generates with the model itself"
            )
    if args.use_vllm and args.generation_kwargs is not None:
        raise WrongModel(
            "use_vllm=True with generation_kwargs: they are vLLM's, and steered rollouts come"
            " from the model itself, so the two would be sampled differently. Leave one out"
        )
    if args.mask_truncated_completions:
        raise WrongModel(
            "mask_truncated_completions=True ignores completions that reach the length limit, as"
            " endless repetitions do, so the negatives would not count. Set it to False"
        )

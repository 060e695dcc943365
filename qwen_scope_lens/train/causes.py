"""Screen which features make a model loop, by amplifying them on prompts.

A feature whose activation rises over a repetition need not cause it. Each candidate is added to the
residual while the model continues prompts. It is kept if the model then ends in a loop more often
than with random directions of the same norm. Candidates are best found in loops that the model
wrote itself (`own_loops`), because those are the loops that it should unlearn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import TooLittleData
from qwen_scope_lens.models.architecture import Model
from qwen_scope_lens.models.backbone import check_backbone
from qwen_scope_lens.steering.generate import Continuation, Sampling, generate
from qwen_scope_lens.steering.plan import Edit, Plan
from qwen_scope_lens.steering.where import Where
from qwen_scope_lens.train.metrics import Share, find_repeats, share

__all__ = ["Cause", "Causes", "amplified", "own_loops", "screen_causes"]

LOOP_SAMPLING = Sampling(64, 0.7, 1.0, 0)


@dataclass(frozen=True)
class Cause:
    """The repeat ratio while one candidate is amplified."""

    ref: FeatureRef
    ratio: Share
    above: float  # the ratio minus the mean over random directions, on the same prompts
    low: float  # lower limit of `above`, corrected for the number of candidates
    kept: bool


@dataclass(frozen=True)
class Causes:
    """All candidates, the strongest cause first, and the ratios that they are compared with."""

    untouched: Share
    controls: tuple[Share, ...]  # one per random direction
    candidates: tuple[Cause, ...]

    @property
    def kept(self) -> tuple[FeatureRef, ...]:
        return tuple(cause.ref for cause in self.candidates if cause.kept)

    def __str__(self) -> str:
        chance = [control.value for control in self.controls]
        head = f"{'feature':36} {'repeat ratio':>22} {'above random':>13} {'at least':>9}"
        rows = [
            f"{c.ref!s:36} {c.ratio.interval!s:>22} {c.above:+13.3f} {c.low:+9.3f}"
            f"{'  kept' if c.kept else ''}"
            for c in self.candidates
        ]
        foot = (
            f"untouched {self.untouched.interval}; {len(chance)} random directions"
            f" {min(chance):.3f} to {max(chance):.3f}"
        )
        return "\n".join([head, *rows, foot])


def amplified(refs: Sequence[FeatureRef], strength: float) -> Plan:
    """A plan that adds each feature to every generated token, at `strength` times its norm."""
    return Plan([Edit(ref, "add", strength, "norm", Where("generation")) for ref in refs])


def own_loops(
    model: Model,
    prompts: Sequence[str],
    *,
    samples: int = 1,
    tokenizer: Any = None,
    sampling: Sampling = LOOP_SAMPLING,
    batch: int = 32,
) -> list[tuple[str, Continuation]]:
    """The prompts that the model continues with a loop, each with its continuation."""
    asked = [prompt for prompt in prompts for _ in range(samples)]
    found = generate(model, asked, tokenizer=tokenizer, sampling=sampling, batch=batch)
    return [
        (prompt, reply)
        for prompt, reply in zip(asked, found, strict=True)
        if find_repeats(reply.ids) is not None
    ]


def screen_causes(
    model: Model,
    candidates: Sequence[FeatureRef],
    prompts: Sequence[str],
    *,
    strength: float = 0.3,
    samples: int = 2,
    controls: int = 8,
    level: float = 0.05,
    tokenizer: Any = None,
    sampling: Sampling = LOOP_SAMPLING,
    batch: int = 32,
    allow_other_model: bool = False,
) -> Causes:
    """Amplify every candidate, and `controls` random directions, on the same prompts.

    A candidate is kept if two conditions hold. Its repeat ratio is above that of every random
    direction. And the lower limit of its paired difference from their mean is above zero, by a
    bootstrap over prompts at `level` divided by the number of candidates. The random directions are
    in the layers of the candidates. Confirm the kept candidates on other prompts.
    """
    if len(prompts) < 2 or not candidates or controls < 1 or samples < 1:
        raise TooLittleData(
            f"{len(prompts)} prompts, {len(candidates)} candidates, {controls} random directions,"
            f" {samples} samples: a screening needs two prompts and one of each of the others"
        )
    for row in {ref.sae.row.short: ref.sae.row for ref in candidates}.values():
        check_backbone(model, row, allow_other_model=allow_other_model)
    asked = [prompt for prompt in prompts for _ in range(samples)]

    def loops(plan: Plan | None, control: int | None = None) -> np.ndarray:
        found = generate(
            model,
            asked,
            plan,
            tokenizer=tokenizer,
            sampling=sampling,
            batch=batch,
            control=control,
            must_fire=False,
            allow_other_model=allow_other_model,
        )
        return np.array([find_repeats(reply.ids) is not None for reply in found])

    layers = sorted({ref.layer for ref in candidates})
    in_layer = {ref.layer: ref for ref in candidates}
    groups = [number for number in range(len(prompts)) for _ in range(samples)]
    untouched = loops(None)
    chance = [
        loops(amplified([in_layer[layers[number % len(layers)]]], strength), control=number)
        for number in range(controls)
    ]
    middle = np.mean(chance, axis=0).reshape(len(prompts), samples).mean(axis=1)
    highest = max(float(flags.mean()) for flags in chance)
    picks = np.random.default_rng(sampling.seed).integers(len(prompts), size=(4000, len(prompts)))
    causes = []
    for ref in dict.fromkeys(candidates):
        flags = loops(amplified([ref], strength))
        above = flags.reshape(len(prompts), samples).mean(axis=1) - middle
        low = float(np.quantile(above[picks].mean(axis=1), level / len(candidates)))
        kept = low > 0 and float(flags.mean()) > highest
        causes.append(Cause(ref, share(flags.tolist(), groups), float(above.mean()), low, kept))
    causes.sort(key=lambda cause: (not cause.kept, -cause.ratio.value, cause.ref))
    return Causes(
        share(untouched.tolist(), groups),
        tuple(share(flags.tolist(), groups) for flags in chance),
        tuple(causes),
    )

"""Whether a feature makes a model loop: amplified on prompts, against random directions.

A feature that rises over a repetition need not cause it. Every candidate is added to the residual
while the model continues prompts; those that make it end in a loop more often than random
directions of the same length do are kept. The loops that candidates are found in are best the
model's own (`own_loops`), since those are the ones that it should unlearn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import TooLittleData
from qwen_scope_lens.models.backbone import check_backbone
from qwen_scope_lens.steering.generate import Continuation, Sampling, generate
from qwen_scope_lens.steering.plan import Edit, Plan
from qwen_scope_lens.steering.where import Where
from qwen_scope_lens.train.metrics import Share, find_repeats, share

__all__ = ["Cause", "Causes", "amplified", "own_loops", "screen_causes"]

LOOP_SAMPLING = Sampling(64, 0.7, 1.0, 0)


@dataclass(frozen=True)
class Cause:
    """What one candidate does to the repeat ratio."""

    ref: FeatureRef
    ratio: Share
    above: float  # the ratio less the mean of the random directions, on the same prompts
    low: float  # lower limit of that difference, corrected for the number of candidates
    kept: bool


@dataclass(frozen=True)
class Causes:
    """All candidates, the strongest cause first, and what they are compared with."""

    untouched: Share
    controls: tuple[Share, ...]  # one of each random direction
    candidates: tuple[Cause, ...]

    @property
    def kept(self) -> tuple[FeatureRef, ...]:
        return tuple(cause.ref for cause in self.candidates if cause.kept)

    def __str__(self) -> str:
        chance = [control.value for control in self.controls]
        head = f"{'feature':36} {'repeat ratio':>22} {'above random':>13} {'at least':>9}"
        rows = [
            f"{c.ref!s:36} {_interval(c.ratio):>22} {c.above:+13.3f} {c.low:+9.3f}"
            f"{'  kept' if c.kept else ''}"
            for c in self.candidates
        ]
        foot = (
            f"untouched {_interval(self.untouched)}; {len(chance)} random directions"
            f" {min(chance):.3f} to {max(chance):.3f}"
        )
        return "\n".join([head, *rows, foot])


def amplified(refs: Sequence[FeatureRef], strength: float) -> Plan:
    """Add each feature to every generated token, `strength` times as long as its residual."""
    return Plan([Edit(ref, "add", strength, "norm", Where("generation")) for ref in refs])


def own_loops(
    model: Any,
    prompts: Sequence[str],
    *,
    samples: int = 1,
    tokenizer: Any = None,
    sampling: Sampling = LOOP_SAMPLING,
    batch: int = 32,
) -> list[tuple[str, Continuation]]:
    """Prompts and the model's own continuations of them that end in a loop."""
    asked = [prompt for prompt in prompts for _ in range(samples)]
    found = generate(model, asked, tokenizer=tokenizer, sampling=sampling, batch=batch)
    return [
        (prompt, reply)
        for prompt, reply in zip(asked, found, strict=True)
        if find_repeats(reply.ids) is not None
    ]


def screen_causes(
    model: Any,
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
    """Amplify every candidate on the same prompts, and as many random directions as `controls`.

    A candidate is kept when its repeat ratio lies above that of every random direction, and above
    their mean by more than the prompts' chance: the lower limit of the paired difference, from a
    bootstrap over prompts at `level` divided by the number of candidates, is above zero. Random
    directions lie in the layers of the candidates. Confirm what is kept on other prompts.
    """
    if len(prompts) < 2 or not candidates or controls < 1 or samples < 1:
        raise TooLittleData(
            f"{len(prompts)} prompts, {len(candidates)} candidates, {controls} random directions,"
            f" {samples} samples: a screening needs two prompts and one each of the others"
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


def _interval(ratio: Share) -> str:
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"

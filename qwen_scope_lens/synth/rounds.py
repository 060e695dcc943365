"""Rounds: which feature is written for next, and which examples of it are still wanted.

A round of a feature is a vanilla prompt and its adversarial rewrites (equation 21 of the Qwen-Scope
report), each of which is a candidate. Once a vanilla prompt is kept, later rounds rewrite that
prompt until enough rewrites are kept, too. `pipeline.py` writes the candidates.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import BadPlan
from qwen_scope_lens.synth.reader import VANILLA, Candidate, Stage
from qwen_scope_lens.synth.recipe import Recipe
from qwen_scope_lens.synth.targets import Target, TargetSet
from qwen_scope_lens.writers.templates import Template, Templates

__all__ = ["Progress", "Rounds"]


@dataclass
class Progress:
    """What has been done for one feature."""

    target: Target
    place: int  # among the wanted ones
    attempts: int = 0
    kept: Counter[bool] = field(default_factory=Counter)  # by whether they are rewrites
    base: Candidate | None = None  # the first vanilla prompt that was kept
    pair: tuple[str, str] | None = None  # x+ and x-


class Rounds:
    """The wanted features of a run and the progress of each. `plan` says what comes next."""

    def __init__(self, targets: TargetSet, recipe: Recipe, templates: Templates) -> None:
        self._recipe, self._templates = recipe, templates
        self.progress = {target.ref: Progress(target, i) for i, target in enumerate(targets.wanted)}
        if recipe.kind_from == "feature" and len(recipe.kinds) > 1:
            _check_kinds(targets, recipe)

    def wanted(self, one: Progress, rewrite: bool) -> int:
        """How many examples are still to be kept: vanilla ones, or rewrites."""
        each = self._recipe.variants if rewrite else 1
        return max(0, each * self._recipe.per_feature - one.kept[rewrite])

    def waits(self, one: Progress) -> bool:
        some = self.wanted(one, False) or self.wanted(one, True)
        return bool(some) and one.attempts < self._recipe.attempts

    @property
    def open(self) -> bool:
        """Whether some feature lacks examples and has attempts left."""
        return any(self.waits(one) for one in self.progress.values())

    def plan(self, number: int, size: int, left: int | None = None) -> list[Candidate]:
        """The next wave of about `size` candidates, numbered from `number`.

        Features with the fewest attempts come first, then the order in which they are wanted
        counts. A round is planned as a whole. Where only `left` candidates may still be written,
        the last round loses rewrites, and a pair that would stay incomplete is not begun.
        """
        waiting = [one for one in self.progress.values() if self.waits(one)]
        waiting.sort(key=lambda one: (one.attempts, one.place))
        wave: list[Candidate] = []
        for one in waiting if size > 0 else []:
            some = self._round(one, number + len(wave))
            if wave and len(wave) + len(some) > size:
                break
            if left is not None and len(some) > left:
                if self._recipe.candidates > 1:
                    break
                some = some[:left]
            wave += some
            one.attempts += 1
        return wave

    def template(self, kind: str, stage: Stage) -> Template:
        base = self._recipe.template
        if stage == "again":
            return self._templates[f"{base}_pair"]
        special = f"{base}_{kind}"
        return self._templates[special if special in self._templates else base]

    def _round(self, one: Progress, number: int) -> list[Candidate]:
        """Vanilla prompts, each followed by its rewrites, or rewrites of the kept one."""
        recipe, found = self._recipe, list[Candidate]()
        stage: Stage = "one" if not recipe.pairs else "again" if one.pair else "pair"
        variants = 0 if stage == "pair" else recipe.variants
        kept = one.base if not self.wanted(one, False) else None
        for sample in range(recipe.candidates):
            base = kept
            if base is None:
                kind = self._kind(one)
                base = self._candidate(one, number + len(found), kind, VANILLA, stage, sample)
                found.append(base)
            if not self.wanted(one, True):
                continue
            styles = list(self._templates.styles)
            for variant in range(variants):
                turn = one.place + one.attempts + variant
                style = styles[turn % len(styles)]
                rewrite = self._candidate(
                    one, number + len(found), base.kind, style, stage, sample, variant + 1
                )
                rewrite.base = base
                found.append(rewrite)
        return found

    def _kind(self, one: Progress) -> str:
        kinds = self._recipe.kinds
        if self._recipe.kind_from == "feature" and len(kinds) > 1:
            return one.target.kind
        return kinds[(one.place + one.attempts) % len(kinds)]

    def _candidate(
        self,
        one: Progress,
        number: int,
        kind: str,
        style: str,
        stage: Stage,
        sample: int,
        variant: int = 0,
    ) -> Candidate:
        numbers = (one.attempts, sample, *((variant,) if variant else ()))
        seed = _seed(self._recipe.seed, one.target.ref, *numbers)
        template = self.template(kind, stage).name if style == VANILLA else "adversarial"
        return Candidate(
            number, one.target.ref, kind, style, stage, one.attempts, sample, seed, template
        )


def _check_kinds(targets: TargetSet, recipe: Recipe) -> None:
    """Replies follow the risk category of a feature, so that has to be known."""
    expected = f"expected one of {', '.join(recipe.kinds)} for each"
    advice = (
        "say it with `qsl synth targets --judge`, `--harmful REGEX` or `--kind KIND`, or give"
        " --kind-from turns, so that the kinds take turns whatever a feature expresses"
    )
    unknown = [target.ref for target in targets.wanted if not target.kind]
    if unknown:
        raise BadPlan(
            f"{len(unknown)} of {len(targets.wanted)} wanted features have no risk category, such"
            f" as {unknown[0]}: {expected}. {advice}"
        )
    for target in targets.wanted:
        if target.kind not in recipe.kinds:
            raise BadPlan(f"{target.ref} is of kind {target.kind!r}: {expected}. {advice}")


def _seed(seed: int, ref: FeatureRef, *numbers: int) -> int:
    """A seed of 31 bits for one candidate, from the seed of the recipe."""
    text = " ".join(map(str, (seed, ref, *numbers)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1


def strongest_first(wave: Sequence[Candidate], rounds: Rounds) -> list[Candidate]:
    """The candidates in the order of wanted features, the strongest of each feature first."""
    place = {ref: one.place for ref, one in rounds.progress.items()}
    return sorted(wave, key=lambda one: (place[one.ref], -(one.activation or 0)))

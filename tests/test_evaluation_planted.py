"""Worlds with planted skills: what the paper's section 4 finds where it is true, and not elsewhere.

Every item asks for one skill, every skill has features of its own, and 26 models differ in their
skills. A benchmark of few skills is redundant, two benchmarks of the same skills overlap. Whether
that shows in the scores depends on the models: in the *specific* world skills vary alone, in the
*general* one a single ability stands behind all of them. All figures are the package's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from qwen_scope_lens.bench import (
    Footprint,
    agreement,
    footprint,
    overlap_matrix,
    redundancy,
    similarity,
    spearman,
)
from qwen_scope_lens.bench.footprint import saturated
from qwen_scope_lens.bench.overlap import overlaps

BENCHMARKS, MODELS, ITEMS, DOMAINS, SKILLS = 17, 26, 120, 6, 8
D_SAE, OF_A_SKILL, OF_AN_ITEM, COMMON = 3000, 24, 12, 6
WORLDS, NARROW = 6, 60


@dataclass(frozen=True)
class World:
    """Footprints, every model's result on every item, and the scores of a broad control."""

    footprints: list[Footprint]
    results: list[np.ndarray]  # [models, items] each
    control: np.ndarray  # [models]


def world(seed: int, general: float = 0.0, at_floor: int = 0, d_sae: int = D_SAE) -> World:
    """`general` is the share of ability that all skills have in common; at `at_floor` benchmarks
    all models guess; `d_sae` is the width of the dictionary."""
    rng = np.random.default_rng(seed)
    n_skills = DOMAINS * SKILLS
    features = [
        rng.choice(np.arange(COMMON, d_sae), min(OF_A_SKILL, d_sae - COMMON), replace=False)
        for _ in range(n_skills)
    ]
    own, shared = rng.normal(size=(MODELS, n_skills)), rng.normal(size=(MODELS, 1))
    ability = np.sqrt(general) * shared + np.sqrt(1 - general) * own

    def answered(skills: np.ndarray) -> np.ndarray:
        easy = ability[:, skills] - rng.normal(size=len(skills))
        return (rng.random(easy.shape) < 1 / (1 + np.exp(-1.5 * easy))).astype(float)

    breadth = rng.permutation(np.geomspace(1, 24, BENCHMARKS).round().astype(int))
    floor = set(rng.permutation(BENCHMARKS)[:at_floor].tolist())
    footprints, results = [], []
    for b in range(BENCHMARKS):
        # The skills of its own domain first, then those of the next ones.
        near = (np.arange(n_skills) + b % DOMAINS * SKILLS) % n_skills
        skills = rng.permutation(near[: max(SKILLS, breadth[b])])[: breadth[b]]
        asked = skills[rng.integers(0, len(skills), ITEMS)]
        right = answered(asked)
        results.append((rng.random(right.shape) < 0.25).astype(float) if b in floor else right)
        fires = np.zeros((ITEMS, d_sae), dtype=bool)
        for item, skill in enumerate(asked):
            fires[item, rng.choice(features[skill], OF_AN_ITEM, replace=False)] = True
        fires[:, :COMMON] |= rng.random((ITEMS, COMMON)) < 0.5
        footprints.append(footprint(f"b{b}", fires, sae="planted/w/0"))
    everything = rng.integers(0, n_skills, 1000)
    return World(footprints, results, answered(everything).mean(1))


def r_and_r_hat(found: World) -> float:
    """Spearman of equation 6 and equation 9 over the benchmarks."""
    r = [
        agreement(f.name, results, permutations=6, draws=1).r.value
        for f, results in zip(found.footprints, found.results, strict=True)
    ]
    r_hat = [redundancy(f, draws=1).r_hat.value for f in found.footprints]
    return spearman(np.array(r), np.array(r_hat))


def overlap_and_scores(found: World) -> float:
    """Spearman of equation 11 and equation 12 over the pairs."""
    names = [f.name for f in found.footprints]
    scores = np.stack([results.mean(1) for results in found.results], axis=1)
    pairs = np.triu_indices(len(names), 1)
    partly = similarity(scores, names, found.control)
    return spearman(overlap_matrix(found.footprints, smallest=True)[pairs], partly[pairs])


def figures(
    general: float = 0.0, at_floor: int = 0, d_sae: int = D_SAE
) -> tuple[list[float], list[float]]:
    """Both figures in every world of a kind."""
    found = [world(seed, general, at_floor, d_sae) for seed in range(WORLDS)]
    return [r_and_r_hat(one) for one in found], [overlap_and_scores(one) for one in found]


def means(general: float = 0.0, at_floor: int = 0, d_sae: int = D_SAE) -> tuple[float, float]:
    ranks, overlap = figures(general, at_floor, d_sae)
    return float(np.mean(ranks)), float(np.mean(overlap))


@pytest.fixture(scope="module")
def specific() -> tuple[float, float]:
    """Both figures where skills vary alone."""
    return means()


def test_where_skills_are_specific_both_findings_hold(specific: tuple[float, float]) -> None:
    assert specific[0] > 0.6
    assert specific[1] > 0.3


def test_one_general_ability_leaves_nothing_to_find() -> None:
    """Every benchmark measures the same, so what it asks for is not seen in the scores."""
    ranks, overlap = means(general=1.0)
    assert abs(ranks) < 0.2
    assert abs(overlap) < 0.2


def test_benchmarks_at_floor_hide_what_is_there(specific: tuple[float, float]) -> None:
    """Nothing is wrong with the footprints: half of the R are noise."""
    ranks, overlap = means(at_floor=9)
    assert ranks < specific[0] - 0.3
    assert overlap < specific[1] - 0.15


def test_a_saturated_dictionary_hides_what_is_there(specific: tuple[float, float]) -> None:
    """Every benchmark uses most of the dictionary, and the package says so."""
    warned = saturated(world(0, d_sae=NARROW).footprints)
    assert len(warned) > BENCHMARKS / 2
    assert "of the dictionary's 60 features" in warned[0]
    assert saturated(world(0).footprints) == []
    ranks, overlap = means(d_sae=NARROW)
    assert overlap < specific[1] - 0.2
    assert ranks < specific[0]


def test_overlap_by_chance_is_the_others_share_of_the_dictionary() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(60):
        a, b = (
            footprint(name, rng.random((20, 200)) < rate, sae="planted/w/0")
            for name, rate in (("a", 0.02), ("b", 0.08))
        )
        there = overlaps([a, b], draws=2)[0]
        found.append((there.overlap.value, there.chance))
    values, chance = np.mean(found, axis=0)
    assert values == pytest.approx(chance, abs=0.03)

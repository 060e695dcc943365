"""Section 4 of the paper in planted worlds: what its method can find, and what hides it.

    python benchmarks/planted_redundancy.py > benchmarks/results/planted_redundancy.txt

The worlds of tests/test_evaluation_planted.py: 17 benchmarks of 120 items, 26 models, six worlds of
each kind. Figures are Spearman correlations by the package's own functions.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from _measure import cpu_name

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from test_evaluation_planted import NARROW, figures, world

KINDS = {
    "skills vary alone": {},
    "half the variance is one general ability": {"general": 0.5},
    "one general ability": {"general": 1.0},
    "skills vary alone, 9 of 17 at floor": {"at_floor": 9},
    f"skills vary alone, {NARROW} features": {"d_sae": NARROW},
}


def main() -> None:
    print(f"Planted benchmarks. {cpu_name()}\n")
    print(f"{'':42}{'R and R-hat':26}{'overlap_min and scores,':26}share of the")
    print(f"{'world':42}{'mean (least, most)':26}{'control taken out':26}dictionary used")
    for name, how in KINDS.items():
        share = np.mean([f.share for f in world(0, **how).footprints])
        cells = [
            f"{np.mean(found):.2f} ({min(found):.2f}, {max(found):.2f})" for found in figures(**how)
        ]
        print(f"{name:42}{cells[0]:26}{cells[1]:26}{share:.2f}")


if __name__ == "__main__":
    main()

"""What `qsl reproduce run toxicity` found, in full, from the folder that it filled.

    python benchmarks/real_toxicity.py FOLDER [--name "WHAT THE MODEL IS"]

Only figures are printed, and none of the texts.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

from _measure import Printed, cpu_name

STAGES = ("texts", "features", "rules", "across", "efficiency")


def cell(value: dict[str, float]) -> str:
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", default="the model")
    parser.add_argument("--out", type=Path, help="also write what is printed into this file")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for stage in STAGES:
        content = json.loads((options.folder / "stages" / f"{stage}.json").read_text("utf-8"))
        found[stage] = content["result"]
    say = Printed()
    model = found["features"]["model"]
    say(f"{options.name}; layers {found['features']['layers']}; {cpu_name()}, {date.today()}")
    say(f"{found['features']['tokens']:,} tokens, model read as {model['dtype']}")
    for language, counts in found["texts"]["counts"].items():
        say(f"  {language}: " + "; ".join(f"{name}: {n}" for name, n in sorted(counts.items())))
    rules, across, less = found["rules"], found["across"], found["efficiency"]
    say("\nF1 on test texts, mean over languages, layers chosen on discovery texts:")
    for name, by_k in rules["chosen"].items():
        for k, value in by_k.items():
            say(f"  OR of {k}, {name}: {cell(value)}")
    for m, value in rules["several layers"].items():
        say(f"  OR, one feature of each of {m} layers: {cell(value)}")
    for name, value in rules["baselines"].items():
        say(f"  {name}: {cell(value)}")
    say(f"\nFitted on {across['from']} only (K of the rule: transfer_k), F1 by language:")
    for name, by_language in across["chosen"].items():
        shown = ", ".join(f"{language} {cell(v)}" for language, v in by_language.items())
        say(f"  {name}: {shown}")
    say("\nF1 with less discovery data, mean over languages, range over draws as share of full:")
    for share, row in less["shares"].items():
        say(f"  the rule, best layer, {share}: {row['f1']:.3f}; of full {cell(row['of full'])}")
    for name, row in less["baselines"].items():
        say(f"  {name}: {row['f1']:.3f}, with all {row['all']:.3f}; of full {cell(row['of full'])}")
    if options.out is not None:
        say.save(options.out)


if __name__ == "__main__":
    main()

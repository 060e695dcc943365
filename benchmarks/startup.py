"""CPU seconds until a verb can begin: what it imports before its first line of real work.

    python benchmarks/startup.py > benchmarks/results/startup.txt

Each in a fresh process with a warm disk, Python's own start included. The verbs of the second part
make an SAE or a model, so they need SAELens, which brings TransformerLens and transformers along.
"""

from __future__ import annotations

import subprocess
import sys
import time

from _measure import commit, cpu_name, today

READERS = {
    "list, show, --help of all": "cli",
    "store sql": "stores.sql",
    "store info": "stores.inspect",
    "store merge": "stores.merge",
    "stats": "features.statistics",
    "rank": "features.rank",
    "label": "labels.packs",
    "discover": "concepts.discover",
    "bench": "bench.analysis",
    "classify, of a store": "classify.estimator",
    "compare match": "compare.match",
    "convert": "converters.saelens_folder",
    "extract, checking the corpus": "stores.extract",
}
MODELS = {
    "torch alone": "torch",
    "SAELens alone": "sae_lens",
    "read": "features.read",
    "steer": "steering.generate qwen_scope_lens.models.load qwen_scope_lens.saes.sae",
    "serve": "serve.run",
}
PROGRAM = """
import sys, time, importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
print(time.process_time())
"""


def seconds(modules: str) -> float:
    names = [modules] if modules in ("torch", "sae_lens") else f"qwen_scope_lens.{modules}".split()
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *names]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    started = time.strftime("%H:%M")
    print(f"{today()} {started}, commit {commit()}; {cpu_name()}; CPU seconds")
    for part in (READERS, MODELS):
        print()
        for verb, modules in part.items():
            print(f"{seconds(modules):6.2f}  {verb}", flush=True)


if __name__ == "__main__":
    main()

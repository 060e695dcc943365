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
    "steer": "steering.generate models.load saes.sae",
    "serve": "serve.run",
    "verify": "saes.load saes.verify",
    "verify, of a model": "models.load models.verify",
    "find": "concepts.find stores.store",
    "graph": "graphs.attribution graphs.pruning",
}
LIMIT = 120.0  # seconds by the clock for one process
PROGRAM = """
import sys, time, importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
spent = time.process_time()
named = "transformer_lens datasets wandb sklearn pandas duckdb trl".split()
print(spent, *[name for name in named if name in sys.modules])
"""


def seconds(modules: str) -> tuple[float, str]:
    """CPU seconds, and which of the large packages were imported."""
    ours = modules not in ("torch", "sae_lens")
    names = [f"qwen_scope_lens.{name}" if ours else name for name in modules.split()]
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *names]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT)
    spent, *packages = done.stdout.splitlines()[-1].split()
    return float(spent), " ".join(packages)


def main() -> None:
    started = time.strftime("%H:%M")
    print(f"{today()} {started}, commit {commit()}; {cpu_name()}; CPU seconds")
    for part in (READERS, MODELS):
        print()
        for verb, modules in part.items():
            try:
                spent, packages = seconds(modules)
                print(f"{spent:6.2f}  {verb:28}  {packages}".rstrip(), flush=True)
            except subprocess.TimeoutExpired:
                print(f"   over {LIMIT:.0f} s by the clock  {verb}", flush=True)


if __name__ == "__main__":
    main()

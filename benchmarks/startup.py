"""CPU seconds from the start of a verb to its first line of real work.

    python benchmarks/startup.py > benchmarks/results/startup.txt
    python benchmarks/startup.py --beside OTHER_CHECKOUT      # a second column, its figures

Each verb runs as a user runs it, in a fresh process with a warm disk, on the toy model and files of
`qsl mini`, until its first line of real work, which ends it: the first pass through the model, the
first codes that are read from a store, the last step before a server listens. A verb that only
reads a small file runs to its end. Python's own start is counted, and so is the reading of the toy
model's weights. Behind the figures are the large packages that had been imported by then.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from _measure import commit, cpu_name, today

SAE = "mini-qwen3/w1k-l0-16/6"
EDIT = f"{SAE}/423:add:40"
WORDED = ("label", "store", "bench", "classify", "train", "synth", "compare", "dash", "lens")
FORWARD = "torch.nn.modules.module:"
CODES = "qwen_scope_lens.stores.shard_reader:Shard.packed"
COSINES = "qwen_scope_lens.features.nearest:nearest_by_cosine"
EFFECTS = "qwen_scope_lens.features.token_effects:token_effects"
LISTENS = "qwen_scope_lens.serve.run:serve"
END = ""

PREPARED = (
    "mini texts",
    "extract texts/corpus.jsonl --sae mini-qwen3/w1k-l0-16 --layers 6,7 --out store",
    "bench extract texts/sums.jsonl texts/capitals.jsonl --sae mini-qwen3/w1k-l0-16 --layers 6"
    " --out bench",
    "rank store --label lang --positive zh --out zh.json",
    "train languages store --targets zh,ru --out language_features.json",
)
VERBS = {
    "files and stores": {
        "list": END,
        f"show {SAE.rpartition('/')[0]}": END,
        "label list texts/labels.jsonl": END,
        "store info store": END,
        "store sql store 'select count(*) from features'": END,
        "plan zh.json --edit ablate --top 3": END,
        "stats store --layers 6": CODES,
        "rank store --label lang --positive zh": CODES,
        "discover store --label lang --positive zh --out found": CODES,
        "bench overlap bench": CODES,
        "classify report store --label chinese --out report.html": CODES,
        "train languages store --targets zh,ru --out languages.json": CODES,
        "synth targets store --reference store --out targets.json": CODES,
    },
    "SAEs, and no model": {
        f"export --edit {EDIT} --out vectors.safetensors": END,
        f"compare match {SAE} mini-qwen3/w1k-l0-16/5 --out match.parquet": COSINES,
        f"calibrate {SAE} --store store --out layer6.json": CODES,
        "dash build store --layers 6 --out site": EFFECTS,
    },
    "a model that runs": {
        "extract texts/new.jsonl --sae mini-qwen3/w1k-l0-16 --layers 6 --out new": FORWARD,
        "read 'The kernel reads a file.'": FORWARD,
        f"verify {SAE} --model mini-qwen3": FORWARD,
        f"steer 'The kernel' --edit {EDIT}": FORWARD,
        f"sweep texts/prompts.txt --edit {SAE}/423:add --strengths 0:600:200 --measure class=han"
        " --out dose": FORWARD,
        f"calibrate {SAE}/423 --texts texts/corpus.jsonl --out typical.json": FORWARD,
        f"blame {SAE} --prompt 'How?' --class han --reply 'Use 安装程序 and restart.'": FORWARD,
        "find Chinese --examples texts/chinese.txt --layers 6": FORWARD,
        "graph 'The package manager is a tool' --sae mini-qwen3/w1k-l0-16 --out graph": FORWARD,
        "classify fit texts/corpus.jsonl --label chinese --out clf.json --store fitted"
        " --model mini-qwen3 --sae mini-qwen3/w1k-l0-16 --layers 6": FORWARD,
        "train repetition loops texts/prompts.jsonl --model mini-qwen3 --out own.jsonl": FORWARD,
        "mcp": "mcp.server.mcpserver:MCPServer.run",
        "serve --port 0": LISTENS,
        "demo": FORWARD,
    },
    "what other packages bring": {
        "lens fit mini-qwen3 texts/corpus.jsonl --texts 4 --out lens.pt": FORWARD,
        "train sasft texts/sasft.yaml": FORWARD,
    },
}
IMPORTS = {
    "torch": "torch",
    "torch, and transformers' Qwen3 model": "torch; from transformers import Qwen3ForCausalLM",
    "SAELens": "sae_lens",
}
LIMIT = 300.0  # seconds by the clock for one process
PROGRAM = """
import importlib.abc, importlib.machinery, os, shlex, sys, time
answer, place, words = int(sys.argv[1]), sys.argv[2], shlex.split(sys.argv[3])
wanted, _, name = place.partition(":")
large = "torch transformers sae_lens transformer_lens sklearn pandas duckdb triton trl datasets"

def reached(*arguments, **options):
    spent = time.process_time()
    found = [package for package in large.split() if package in sys.modules]
    os.write(answer, " ".join([f"{spent:.3f}", *found]).encode())
    os._exit(0)

def watch(module):
    if wanted.startswith("torch."):
        def forward(one, inputs):
            if type(one).__module__.startswith("transformers.models."):
                reached()
        module.register_module_forward_pre_hook(forward)
    else:
        holder, _, attribute = name.rpartition(".")
        setattr(getattr(module, holder) if holder else module, attribute, reached)

class Watched(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname != wanted:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            watch(module)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Watched())
from qwen_scope_lens.cli import main
code = main(words)
if code or place:
    os._exit(code or 9)
reached()
"""


class NotReached(Exception):
    """A verb ended before its first line of real work."""


def run(place: str, words: str, folder: Path, package: Path | None) -> tuple[float, list[str]]:
    """CPU seconds of a verb to a place, and the large packages that it has imported there."""
    environment = dict(os.environ)
    if package is not None:
        environment["PYTHONPATH"] = str(package)
    read, write = os.pipe()
    with tempfile.TemporaryFile() as said:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, str(write), place, words],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            pass_fds=[write],
            timeout=LIMIT,
            cwd=folder,
            env=environment,
        )
        os.close(write)
        with os.fdopen(read) as answer:
            found = answer.read().split()
        if not found:
            said.seek(0)
            tail = said.read().decode(errors="replace")[-600:]
            raise NotReached(f"qsl {words}: exit {done.returncode}\n{tail}")
    return float(found[0]), found[1:]


@contextmanager
def prepared(package: Path | None) -> Iterator[Path]:
    """A folder with texts, stores and a ranking, made by the package."""
    with tempfile.TemporaryDirectory() as made:
        for words in PREPARED:
            run(END, words, Path(made), package)
        yield Path(made)


def imported(what: str) -> float:
    program = f"import time, {what}\nprint(time.process_time())"
    command = [sys.executable, "-W", "ignore", "-c", program]
    return min(
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(2)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--beside", type=Path, help="another checkout of this project")
    parser.add_argument("--only", help="verbs that begin with this")
    parser.add_argument("--turns", type=int, default=2, help="the smallest figure of these counts")
    options = parser.parse_args()
    started = time.strftime("%H:%M")
    print(f"{today()} {started}, commit {commit()}; {cpu_name()}; CPU seconds\n", flush=True)
    for name, what in IMPORTS.items():
        print(f"{imported(what):6.2f}  import of {name}", flush=True)
    checkouts = [None, *([options.beside.resolve()] if options.beside else [])]
    if options.beside:
        print("\nfirst figure: this checkout; second: the other one, measured in turns")
    ours = []
    with ExitStack() as stack:
        folders = {one: stack.enter_context(prepared(one)) for one in checkouts}
        for section, rows in VERBS.items():
            print(f"\n{section}", flush=True)
            for words, place in rows.items():
                if options.only and not words.startswith(options.only):
                    continue
                try:
                    turns = [
                        [run(place, words, folders[p], p) for p in checkouts]
                        for _ in range(options.turns)
                    ]
                except NotReached as error:
                    print(error, flush=True)
                    continue
                best = [min(turn) for turn in zip(*turns, strict=True)]
                figures = "".join(f"{spent:6.2f}" for spent, _ in best)
                verb, word, *_ = [*words.split(), ""]
                name = f"{verb} {word}" if verb in WORDED else verb
                print(f"{figures}  {name:18}  {', '.join(best[0][1])}".rstrip(), flush=True)
                ours.append(best[0][0])
    print(f"\n{sum(spent <= 2 for spent in ours)} of {len(ours)} within 2 s")


if __name__ == "__main__":
    main()

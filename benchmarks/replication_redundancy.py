"""The paper's section 4 at mini scale: do footprints tell which benchmarks are redundant?

    python benchmarks/replication_redundancy.py

Two dozen small benchmarks (`_panel_suite.py`) are read by mini-qwen3 through its SAEs, and answered
by a panel of 20 checkpoints (`benchmarks/data/panel`), item by item. Then R-hat against R, and
overlap against similarity of scores, whatever they say, with intervals and the obvious rivals: the
number of items, and the same formulas on the prompts' tokens instead of features. What was computed
lies in --work and is used again while models and items stay the same. Writes
results/replication_redundancy.txt.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import cpu_name
from _panel_suite import Item, build_suite
from scipy.sparse import csr_matrix
from transformers import AutoTokenizer

from qwen_scope_lens.bench import (
    Footprint,
    Suite,
    agreement,
    correlate,
    correlate_pairs,
    extract_suite,
    footprint,
    missed,
    overlap_matrix,
    partial_rank,
    rank_check,
    redundancy,
    redundancy_at,
    similarity,
    spearman,
)
from qwen_scope_lens.files import file_sha256
from qwen_scope_lens.mini import model_path, sae_folder
from qwen_scope_lens.stores import Document
from tools.mini.panel import load_checkpoint

HERE = Path(__file__).parent
PANEL = HERE / "data" / "panel"
RESULT = HERE / "results" / "replication_redundancy.txt"
MODEL, GROUP = "mini-qwen3", "mini-qwen3/w1k-l0-16"
LAYER = 6
BATCH = 128
SPREAD = 0.05
"""Standard deviation of the panel's accuracies from which it tells the models apart at all."""

Suites = dict[str, list[Item]]


@torch.no_grad()
def answered(model: Any, items: Sequence[Item], tokenizer: Any) -> np.ndarray:
    """1 where the right next token beats the wrong ones, and its probability. `[2, items]`"""
    rows = tokenizer([item.prompt for item in items], add_special_tokens=False)["input_ids"]
    order = sorted(range(len(items)), key=lambda n: len(rows[n]))
    head = model.get_output_embeddings().weight
    found = np.zeros((2, len(items)), dtype=np.float32)
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        lengths = torch.tensor([len(rows[n]) for n in part])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.zeros(mask.shape, dtype=torch.long)
        ids[mask] = torch.tensor([token for n in part for token in rows[n]])
        hidden = model.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        for row, n in enumerate(part):
            logits = head[list(items[n].options)] @ hidden[row, lengths[row] - 1]
            found[:, n] = bool(logits[0] > logits[1:].max()), float(logits.softmax(0)[0])
    return found


Results = dict[str, np.ndarray]
"""Benchmark -> [models, items]"""


def panel_results(suites: Suites, tokenizer: Any, work: Path) -> tuple[list[str], Results, Results]:
    """Every checkpoint on every item: correct or not, and the right option's probability.

    Items that several benchmarks have are answered once; what is in the cache is not run again.
    """
    items = list({item.prompt: item for part in suites.values() for item in part}.values())
    print(f"{len(items):,} different items", file=sys.stderr)
    digest = hashlib.sha256(repr(items).encode()).hexdigest()[:12]
    names = [row["name"] for row in json.loads((PANEL / "index.json").read_text("utf-8"))]
    rows = []
    for name in names:
        stamp = file_sha256(PANEL / f"{name}.safetensors")[:12]
        path = work / "panel" / f"{name}-{stamp}-{digest}.npy"
        if not path.is_file():
            model = load_checkpoint(PANEL, name)
            model.set_attn_implementation("eager")  # quicker for rows this short
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial.npy")
            np.save(partial, answered(model, items, tokenizer))
            partial.rename(path)
            print(name, file=sys.stderr, flush=True)
        rows.append(np.load(path))
    table, at = np.stack(rows), {item.prompt: i for i, item in enumerate(items)}
    numbers = {name: [at[item.prompt] for item in part] for name, part in suites.items()}
    correct, probable = ({n: table[:, kind, i] for n, i in numbers.items()} for kind in (0, 1))
    return names, correct, probable


def read_suite(suites: Suites, work: Path) -> Suite:
    """The benchmarks through mini-qwen3 and all its SAEs, by the package's own way."""
    parts = [
        file_sha256(path)
        for path in (
            model_path(MODEL) / "model.safetensors",
            *sorted(sae_folder(MODEL).glob("*.pt")),
        )
    ]
    stamp = hashlib.sha256((repr(suites) + repr(parts)).encode()).hexdigest()[:12]
    documents = {
        name: [Document(str(i), item.prompt, None, {}) for i, item in enumerate(items)]
        for name, items in suites.items()
    }
    return extract_suite(
        documents,
        MODEL,
        GROUP,
        "all",
        work / f"stores-{stamp}",
        say=lambda line: print(line, file=sys.stderr),
        progress=False,
    )


def token_footprints(suites: Suites, tokenizer: Any) -> list[Footprint]:
    """The rival without a model: which tokens the prompts hold."""
    found = []
    for name, items in suites.items():
        rows = tokenizer([item.prompt for item in items], add_special_tokens=False)["input_ids"]
        starts = np.cumsum([0, *map(len, rows)])
        cells = (np.ones(starts[-1]), np.concatenate(rows), starts)
        matrix = csr_matrix(cells, shape=(len(rows), len(tokenizer)))
        found.append(footprint(name, matrix, sae="tokens", position="any"))
    return found


def equal_overlap(footprints: Sequence[Footprint], size: int) -> np.ndarray:
    """Expected min-normalised overlap between `size` random items of each benchmark."""
    has = np.stack([1 - missed(len(f), f.counts, np.array([size]))[:, 0] for f in footprints])
    total = has.sum(1)
    table: np.ndarray = has @ has.T / np.minimum(total[:, None], total[None, :])
    return table


def shared_items(suites: Suites, names: Sequence[str]) -> np.ndarray:
    """Which pairs hold common items, so that their results are equal by construction."""
    prompts = [{item.prompt for item in suites[name]} for name in names]
    return np.array([[bool(a & b) for b in prompts] for a in prompts])


def r_at(results: np.ndarray, size: int, name: str, draws: int = 20) -> float:
    """R of random parts of `size` items, as if the benchmark had no more."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        part = results[:, rng.choice(results.shape[1], size, replace=False)]
        if np.ptp(part.mean(1)) > 0:
            found.append(agreement(name, part, permutations=20, draws=1).r.value)
    return float(np.mean(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/replication_redundancy"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    lines: list[str] = []

    def say(line: str = "") -> None:
        lines.append(line)
        print(line, flush=True)

    tokenizer = AutoTokenizer.from_pretrained(str(model_path(MODEL)))
    suites, control = build_suite(tokenizer)
    models, results, probable = panel_results(
        {**suites, "control": control}, tokenizer, arguments.work
    )
    suite = read_suite(suites, arguments.work)
    names = list(suites)
    say(f"Benchmark redundancy and similarity at mini scale. {cpu_name()}")
    say(f"{len(names)} benchmarks, {len(models)} checkpoints; {GROUP}/{LAYER} at the prompt's last")
    say("token. Brackets: 95%, over items (table) or over benchmarks (correlations).")
    footprints = [suite[name].footprint(LAYER) for name in names]
    tokens = token_footprints(suites, tokenizer)
    redundancy_part(names, footprints, suite, tokens, results, probable, say)
    shared = shared_items(suites, names)
    similarity_part(names, footprints, suite, tokens, results, probable, shared, say)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{time.monotonic() - began:.0f} s, written to {RESULT}", file=sys.stderr)


def redundancy_part(
    names: Sequence[str],
    footprints: Sequence[Footprint],
    suite: Suite,
    tokens: Sequence[Footprint],
    results: Results,
    probable: Results,
    say: Callable[..., None],
) -> None:
    rows = [redundancy(f) for f in footprints]
    truths = [agreement(name, results[name]) for name in names]
    size = min(len(f) for f in footprints)
    equal_r = [r_at(results[name], size, name) for name in names]
    say(f"\n## Redundancy (R and R-hat; the last two columns for {size} random items of each)\n")
    say(
        f"{'benchmark':20} {'items':>5} {'|F|':>4}  {'accuracy':11}  {'R':20}  {'R-hat':22}"
        f"  {'R':>5}  {'R-hat':>5}"
    )
    equal_hat = [redundancy_at(f, size) for f in footprints]
    for row, truth, r, hat in zip(rows, truths, equal_r, equal_hat, strict=True):
        low, high = truth.accuracy
        say(
            f"{row.name:20} {row.n_items:5} {row.n_features:4}  {low:.2f} - {high:.2f}"
            f"  {truth.r!s:20}  {row.r_hat!s:22}  {r:5.3f}  {hat:5.3f}"
        )
    check = rank_check(rows, truths)
    r = np.array([truth.r.value for truth in truths])
    log_hat = np.log([row.r_hat.value for row in rows])
    sizes = np.log([row.n_items for row in rows])
    spread = np.array([results[name].mean(1).std() for name in names])
    hats = np.array([row.r_hat.value for row in rows])
    apart = np.flatnonzero(spread >= SPREAD)
    soft = [agreement(name, probable[name], permutations=30, draws=1).r.value for name in names]
    tokens_check = rank_check([redundancy(f, draws=1) for f in tokens], truths)
    at_equal = correlate(np.array(equal_r), np.array(equal_hat))[1]

    def line(what: str, figure: object, note: str = "") -> None:
        say(f"{what:46}{figure!s:24}{note}".rstrip())

    say()
    line("Spearman of R and R-hat", check.spearman, "paper, 17 benchmarks: 0.85")
    line("Pearson of R and log R-hat", correlate(r, log_hat)[0], "off the paper's figure: 0.78")
    line("Spearman, number of items held fixed", check.given_size)
    line("Spearman of R and the number of items", f"{check.by_size:.3f}", "no model needed")
    line("Spearman of R-hat and the same", f"{spearman(log_hat, sizes):.3f}")
    line(f"Spearman at {size} items each", at_equal)
    line("Spearman of R and the accuracies' spread", f"{spearman(r, spread):.3f}", "over the panel")
    line("Spearman of R-hat and the same", f"{spearman(hats, spread):.3f}")
    line("Spearman of R and R-hat, spread held fixed", partial_rank(r, hats, spread))
    if len(apart) >= 5:
        some, hat, n = r[apart], hats[apart], sizes[apart]
        few, few_hat = np.array(equal_r)[apart], np.array(equal_hat)[apart]
        line(f"Only the {len(apart)} with a spread of {SPREAD} or more", correlate(some, hat)[1])
        line("  number of items held fixed", partial_rank(some, hat, n))
        line("  R and the number of items", f"{spearman(some, n):.3f}")
        line(f"  at {size} items each", correlate(few, few_hat)[1])
    line("R from probabilities instead of 0/1", correlate(np.array(soft), hats)[1])
    line("  the same, number of items held fixed", partial_rank(np.array(soft), hats, sizes))
    line("R-hat from tokens instead of features", tokens_check.spearman)
    line("  the same, number of items held fixed", tokens_check.given_size)
    say("\nBy layer: Spearman of R and R-hat; the same with the number of items held fixed")
    for layer in suite.layers:
        there = [redundancy(suite[name].footprint(layer), draws=1) for name in names]
        one = rank_check(there, truths)
        line(f"  layer {layer}", one.spearman, str(one.given_size))
    anywhere = [redundancy(suite[name].footprint(LAYER, "any"), draws=1) for name in names]
    one = rank_check(anywhere, truths)
    line(f"  layer {LAYER}, any token of the prompt", one.spearman, str(one.given_size))


def similarity_part(
    names: Sequence[str],
    footprints: Sequence[Footprint],
    suite: Suite,
    tokens: Sequence[Footprint],
    results: Results,
    probable: Results,
    shared: np.ndarray,
    say: Callable[..., None],
) -> None:
    scores = np.stack([results[name].mean(1) for name in names], axis=1)
    raw = similarity(scores, names)
    partial = similarity(scores, names, results["control"].mean(1))
    softly = np.stack([probable[name].mean(1) for name in names], axis=1)
    soft = similarity(softly, names, probable["control"].mean(1))
    size = min(len(f) for f in footprints)
    apart = ~shared
    tells = scores.std(0) >= SPREAD
    telling = apart & tells[:, None] & tells[None, :]
    say("\n## Overlap (min-normalised) against similarity of the panel's scores, over pairs\n")
    say(f"{'':68}  {'Pearson':22}  {'Spearman':22}  p (shuffled)")

    def compare(what: str, overlap: np.ndarray, truth: np.ndarray, keep: np.ndarray | None) -> None:
        found = correlate_pairs(overlap, truth, keep)
        say(f"{what:68}  {found.pearson!s:22}  {found.spearman!s:22}  {found.p_value:.4f}")

    overlap = overlap_matrix(footprints, smallest=True)
    equal = equal_overlap(footprints, size)
    for title, truth in (
        ("raw", raw),
        ("control taken out", partial),
        ("from probabilities, control out", soft),
    ):
        compare(f"{title}, all {len(names) * (len(names) - 1) // 2} pairs", overlap, truth, None)
        pairs = int(np.triu(apart, 1).sum())
        compare(f"{title}, {pairs} pairs without common items", overlap, truth, apart)
        pairs = int(np.triu(telling, 1).sum())
        compare(f"{title}, {pairs} of them that tell models apart", overlap, truth, telling)
        compare(f"{title}, {size} items each, none common", equal, truth, apart)
        compare(
            f"{title}, tokens, {size} items each, none common",
            equal_overlap(tokens, size),
            truth,
            apart,
        )
    say("(paper, 28 pairs: raw 0.684 / 0.607, MMLU taken out 0.755 / 0.713)")
    say("By layer, control taken out, none common:")
    for layer in suite.layers:
        there = overlap_matrix([suite[name].footprint(layer) for name in names], smallest=True)
        compare(f"  layer {layer}", there, partial, apart)
    there = overlap_matrix([suite[name].footprint(LAYER, "any") for name in names], smallest=True)
    compare(f"  layer {LAYER}, any token of the prompt", there, partial, apart)


if __name__ == "__main__":
    main()

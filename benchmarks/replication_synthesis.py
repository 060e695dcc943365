"""Feature-driven synthesis at mini scale: does it cover what is missing, and does that help?

The seed data is English prose; the domain is everything else that the mini was trained on (seven
languages, code, requests, sums). Targets are the features of domain documents ("anchor"); missing
are those that no seed document has. Then, at one budget of texts of equal length:

- few-shot: the mini continues a passage of the missing feature; kept if the feature fires
- steered: it continues openings of domain documents while the feature is amplified; kept likewise
- random: it continues openings of random domain documents, nothing is chosen
- random passages: the prompts of few-shot with passages of another feature each: the control
- natural: other documents of the domain

Coverage is measured on the texts alone, by the unsteered model. Afterwards the mini is trained
briefly on half seed data, half texts of each kind, and its loss is measured on domain documents
that no step has seen, where missing features fire and elsewhere.

    python benchmarks/replication_synthesis.py > benchmarks/results/replication_synthesis.txt
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _measure import cpu_name

import qwen_scope_lens as qsl
from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.features import pool
from qwen_scope_lens.mini import heldout
from qwen_scope_lens.models import unwrap
from qwen_scope_lens.stores import extract
from qwen_scope_lens.synth import TEXT, Reader, Recipe, Synthesis, TargetSet, curve, find_targets
from qwen_scope_lens.writers import Ledger, Local, Push, Request, Templates

MODEL, GROUP, LAYER = "mini-qwen3", "mini-qwen3/w1k-l0-16", 6
TOKENS = 48  # of every text, natural or generated
ANCHOR, TEST = 500, 400  # documents; what is left is the pool of natural data
QUANTILE = 0.9  # of all activations in the anchor data: the threshold delta
LEAST_DOCUMENTS = 3  # of the anchor data on which a target exceeds it
STRENGTH = 8.0
LEARNING_RATE, STEPS, BATCH = 3e-4, 60, 16
POINTS = (10, 20, 50, 100, 200, 400)
DOMAINS = (
    "prose",
    "code",
    "tone",
    "request",
    "switching",
    "knowledge",
    "spelling",
    "chat",
    "arithmetic",
    "translation",
)


@dataclass(frozen=True)
class Arm:
    """What one way of getting texts gave, in the order in which it was paid for."""

    texts: list[str]  # what is kept
    fires: list[set[FeatureRef]]  # of each text that was written; empty for a rejected one
    anyway: list[set[FeatureRef]]  # the same, had nothing been rejected
    note: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--budget", type=int, default=POINTS[-1])
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    started = time.process_time()
    model = qsl.load_model(MODEL)
    ref = LayerRef.parse(f"{GROUP}/{LAYER}")
    reader = Reader(model, {ref: qsl.load_sae(ref)}, max_tokens=TOKENS)
    print(__doc__.split("\n\n    python")[0], end="\n\n")
    print(f"{MODEL}, {ref}, {TOKENS} tokens a text, {cpu_name()}")
    print(f"seeds: {arguments.seeds}, texts: {arguments.budget}, steps: {arguments.steps}\n")
    written: dict[str, list[np.ndarray[Any, Any]]] = {}
    kept: dict[str, list[np.ndarray[Any, Any]]] = {}
    losses: dict[str, list[tuple[float, float]]] = {}
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            texts = _split(seed)
            targets = _targets(model, texts, Path(folder))
            if seed == 0:
                print(targets, end="\n\n")
            arms = _arms(model, reader, targets, texts, Path(folder), arguments.budget, seed)
        missing = [target.ref for target in targets.missing]
        for name, arm in arms.items():
            written.setdefault(name, []).append(curve(missing, arm.fires))
            if arm.anyway != arm.fires:
                every = written.setdefault(f"{name}, all", [])
                every.append(curve(missing, arm.anyway))
            kept.setdefault(name, []).append(curve(missing, [one for one in arm.fires if one]))
            print(f"seed {seed}, {name}: {len(arm.texts)} texts{arm.note}", flush=True)
        found = _train_all(model, texts, arms, missing, targets.threshold, seed, arguments.steps)
        for name, loss in found.items():
            losses.setdefault(name, []).append(loss)
    print("\nShare of the missing features that the texts activate, by the number of texts written")
    _print_curves(written, arguments.budget)
    print("\nThe same by the number of texts kept (no more than were kept: a dash)")
    _print_curves(kept, arguments.budget)
    _print_losses(losses, arguments.steps)
    print(f"\n(measured in {time.process_time() - started:.0f} s of CPU time)")


def _split(seed: int) -> dict[str, list[str]]:
    docs = [record for record in heldout() if record["domain"] in DOMAINS]
    own = [r["text"] for r in docs if r["lang"] == "en" and r["domain"] == "prose"]
    rest = [r["text"] for r in docs if not (r["lang"] == "en" and r["domain"] == "prose")]
    random.Random(seed).shuffle(rest)
    return {
        "seed": own,
        "anchor": rest[:ANCHOR],
        "test": rest[ANCHOR : ANCHOR + TEST],
        "pool": rest[ANCHOR + TEST :],
    }


def _targets(model: Any, texts: dict[str, list[str]], folder: Path) -> TargetSet:
    stores = {
        name: extract(
            texts[name],
            model=model,
            group=GROUP,
            layers=[LAYER],
            out=folder / name,
            max_tokens=TOKENS,
            progress=False,
        )
        for name in ("seed", "anchor")
    }
    threshold = float(np.quantile(pool(stores["anchor"], LAYER).data, QUANTILE))
    return find_targets(
        stores["seed"],
        stores["anchor"],
        threshold=round(threshold, 1),
        least_documents=LEAST_DOCUMENTS,
    )


def _arms(
    model: Any,
    reader: Reader,
    targets: TargetSet,
    texts: dict[str, list[str]],
    folder: Path,
    budget: int,
    seed: int,
) -> dict[str, Arm]:
    rng = random.Random(seed)
    recipe = replace(
        TEXT,
        threshold=targets.threshold,
        count_others=True,
        attempts=8,
        prompt_tokens=TOKENS,
        seed=seed,
        examples_shown=1,
    )
    typical = {target.ref: target.typical for target in targets.targets}
    plain = Local(model, MODEL, batch=32)
    steered = Local(model, MODEL, batch=32, push=Push(STRENGTH, typical))
    passages = [passage for target in targets.missing for passage in target.examples]
    shuffled = replace(
        targets,
        targets=tuple(
            replace(t, examples=tuple(rng.sample(passages, len(t.examples))))
            for t in targets.targets
        ),
    )
    arms = {}
    for name, given, writer, how in (
        ("few-shot", targets, plain, recipe),
        ("steered", targets, steered, recipe.for_steering()),
    ):
        arms[name] = _feature_driven(folder / name, given, how, writer, reader, budget)
    arms["random"] = _undirected(
        folder / "random", targets, recipe.for_steering(), plain, reader, budget
    )
    arms["random passages"] = _undirected(
        folder / "passages", shuffled, recipe, plain, reader, budget
    )
    natural = [_cut(model, text) for text in texts["pool"][:budget]]
    found = _fires(reader, natural, targets)
    arms["natural"] = Arm(natural, found, found)
    return arms


def _feature_driven(
    folder: Path, targets: TargetSet, recipe: Recipe, writer: Local, reader: Reader, budget: int
) -> Arm:
    with Ledger.open(folder) as ledger:
        run = Synthesis(targets, recipe, writer, reader, ledger, Templates()).run(budget)
    fires = [set(one.fires) if one.outcome == "kept" else set() for one in run.candidates]
    hit = np.mean(
        [one.activation is not None and one.activation > recipe.threshold for one in run.candidates]
    )
    note = f" kept of {len(run.candidates)}, own feature fires in {hit:.1%}"
    anyway = [set(one.fires) for one in run.candidates]
    return Arm([one.prompt for one in run.kept], fires, anyway, note)


def _undirected(
    folder: Path, targets: TargetSet, recipe: Recipe, writer: Local, reader: Reader, budget: int
) -> Arm:
    """The same prompts and the same number of texts, nothing chosen and nothing rejected."""
    with Ledger.open(folder) as ledger:
        template = Templates()[recipe.template]
        requests = []
        for i in range(budget):
            target = targets.missing[i % len(targets.missing)]
            values = {
                "examples": "\n\n".join(target.examples[: recipe.examples_shown])
                .replace("<<", "")
                .replace(">>", ""),
                "opening": targets.openings[i % len(targets.openings)],
            }
            messages = template.fill(**values, task="", language="", description="")
            requests.append(
                Request(messages, "prompt", recipe.seed * budget + i, recipe.sampling(), raw=True)
            )
        found = [one.text.strip() for one in ledger.ask(writer, requests) if one]
    texts = [text for text in found if text]
    fires = _fires(reader, texts, targets) + [set()] * (budget - len(texts))
    return Arm(texts, fires, fires, f", {budget - len(texts)} empty")


def _fires(reader: Reader, texts: list[str], targets: TargetSet) -> list[set[FeatureRef]]:
    values = reader.read_features(texts, targets.refs)
    return [{ref for ref, v in one.items() if v > targets.threshold} for one in values]


def _cut(model: Any, text: str) -> str:
    ids = model.tokenizer(text, add_special_tokens=False).input_ids[:TOKENS]
    return str(model.tokenizer.decode(ids)).rstrip("�")


def _train_all(
    model: Any,
    texts: dict[str, list[str]],
    arms: dict[str, Arm],
    missing: list[FeatureRef],
    threshold: float,
    seed: int,
    steps: int,
) -> dict[str, tuple[float, float]]:
    """Loss (where missing features fire, elsewhere) of the mini, untouched and trained."""
    read = qsl.capture(model, texts["test"], [LAYER], max_tokens=TOKENS, truncate=True)
    sae = qsl.load_sae(f"{GROUP}/{LAYER}")
    dense = sae.encode_sparse(read.residuals[LAYER]).to_dense()[:, [r.feature for r in missing]]
    fires = (dense > threshold).any(dim=1) & read.keep(LAYER)
    masks = [fires[read.doc_rows() == i] for i in range(len(read))]
    test = [read.doc(i).token_ids for i in range(len(read))]
    inner = unwrap(model)
    found = {"untrained": _loss(inner, test, masks)}
    for name, some in {"seed data only": [], **{n: arm.texts for n, arm in arms.items()}}.items():
        trained = _train(inner, model.tokenizer, texts["seed"], some, seed, steps)
        found[name] = _loss(trained, test, masks)
    return found


def _train(
    inner: Any, tokenizer: Any, seed_texts: list[str], more: list[str], seed: int, steps: int
) -> Any:
    """A copy, trained for some steps on batches of half seed data, half `more`."""
    rng = random.Random(seed)
    network = copy.deepcopy(inner).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for _ in range(steps):
        batch = rng.choices(seed_texts, k=BATCH // 2) + rng.choices(
            more or seed_texts, k=BATCH // 2
        )
        rows = tokenizer(
            batch,
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=TOKENS,
            padding_side="right",
        )
        labels = rows.input_ids.masked_fill(rows.attention_mask == 0, -100)
        loss = network(
            input_ids=rows.input_ids, attention_mask=rows.attention_mask, labels=labels
        ).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network.eval()


@torch.no_grad()
def _loss(network: Any, test: list[Any], masks: list[Any]) -> tuple[float, float]:
    """Mean loss of the token after each position, by whether a missing feature fires there."""
    sums = {True: [0.0, 0], False: [0.0, 0]}
    for start in range(0, len(test), 32):
        rows = test[start : start + 32]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
        logits = network(input_ids=ids, attention_mask=real).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
        ).reshape(ids[:, 1:].shape)
        for row, mask, values in zip(rows, masks[start : start + 32], loss, strict=True):
            for where in (True, False):
                chosen = values[: len(row) - 1][mask[:-1] == where]
                sums[where][0] += float(chosen.sum())
                sums[where][1] += len(chosen)
    return tuple(total / max(1, count) for total, count in sums.values())  # type: ignore[return-value]


def _print_curves(curves: dict[str, list[np.ndarray[Any, Any]]], budget: int) -> None:
    points = [point for point in POINTS if point <= budget]
    print(f"{'':18}" + "".join(f"{point:>9}" for point in points))
    for name, runs in curves.items():
        least = min(len(run) - 1 for run in runs)
        cells = [f"{np.mean([run[p] for run in runs]):.1%}" if p <= least else "-" for p in points]
        print(f"{name:18}" + "".join(f"{cell:>9}" for cell in cells))


def _print_losses(losses: dict[str, list[tuple[float, float]]], steps: int) -> None:
    base = np.array(losses["untrained"])
    print(
        f"\nLoss on unseen domain documents after {steps} steps (learning rate {LEARNING_RATE:g}),"
    )
    print("where a missing feature fires and elsewhere; change against the untrained mini (nats)")
    print(f"{'':18}{'fires':>9}{'change':>9}{'elsewhere':>11}{'change':>9}  change by seed")
    for name, runs in losses.items():
        values = np.array(runs)
        change = values - base
        by_seed = " ".join(f"{one:+.3f}" for one in change[:, 0])
        print(
            f"{name:18}{values[:, 0].mean():>9.3f}{change[:, 0].mean():>+9.3f}"
            f"{values[:, 1].mean():>11.3f}{change[:, 1].mean():>+9.3f}  {by_seed}"
        )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()

"""Print the quality of the shipped mini models and SAEs, and what their features mean.

Needs the corpus of `make mini` (built when it is not there). Everything is measured on documents
of held-out pages or on generated documents that training did not see; n-gram baselines and the
choice of features use the training split. `--card` also writes the tables into the model card.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoTokenizer

from qwen_scope_lens.mini import MINI_HOME, MODELS, model_path, sae_folder
from qwen_scope_lens.saes import ScopeSAE
from tools.mini import corpus, durations
from tools.mini.activations import load_model
from tools.mini.data import CONTEXT, END, token_rows
from tools.mini.meaning import SEVERAL, Rule, best_rule, firing_shares, several
from tools.mini.model import held_out_loss
from tools.mini.quality import baselines, by_group, layer_figures, load_saes
from tools.mini.sources import LANGUAGES
from tools.mini.specs import SPECS
from tools.mini.tokenizer import VOCAB_SIZE
from tools.mini.tones import TONES

Split = tuple[list[dict[str, Any]], list[list[int]]]
ANYWHERE = (0.0,)
HELD_ROWS = 120
"""Documents of each kind that held-out losses are measured on."""
RULE_HEAD = "| layer / feature | threshold | discovery F1 | held-out F1 | precision | recall |"
RULE_LINE = "|---|---|---|---|---|---|"


def select(split: Split, keep: Callable[[dict[str, Any]], bool], most: int, seed: int = 0) -> Split:
    """At most `most` documents that `keep` accepts, drawn with a fixed seed."""
    numbers = [n for n, record in enumerate(split[0]) if keep(record)]
    random.Random(seed).shuffle(numbers)
    numbers = numbers[:most]
    return [split[0][n] for n in numbers], [split[1][n] for n in numbers]


def rule_cells(rule: Rule) -> str:
    return (
        f"{rule.layer} / {rule.feature} | {rule.threshold:.2f} | {rule.found:.3f}"
        f" | **{rule.f1:.3f}** | {rule.precision:.3f} | {rule.recall:.3f} |"
    )


def loss_table(
    model: Any, held: dict[str, list[list[int]]], grams: dict[str, Any], say: Callable[[str], None]
) -> None:
    say("\n### Held-out loss, nats per token\n")
    say("| text | tokens | unigram | bigram | model | below bigram |")
    say("|---|---|---|---|---|---|")
    for group, rows in held.items():
        one, two = grams[group]
        loss = held_out_loss(model, rows)
        tokens = sum(len(row) - 1 for row in rows)
        say(f"| {group} | {tokens} | {one:.3f} | {two:.3f} | **{loss:.3f}** | {two - loss:+.3f} |")


def sae_table(model: Any, saes: list[ScopeSAE], test: Split, say: Callable[[str], None]) -> None:
    say("\n### SAEs on held-out text, first tokens left out\n")
    say("| layer | FVU | L0 | silent features | loss | spliced | zeroed | recovered | random SAE |")
    say("|---|---|---|---|---|---|---|---|---|")
    rows = select(test, lambda record: True, 1500)[1]
    for one in layer_figures(model, saes, rows, rows[:220]):
        say(
            f"| {one.layer} | **{one.fvu:.3f}** | {one.l0:.1f} | {one.dead:.1%} | {one.clean:.3f}"
            f" | {one.spliced:.3f} | {one.zeroed:.3f} | **{one.recovered:.3f}** | {one.floor:.3f} |"
        )
    tokens = sum(len(row) - 1 for row in rows)
    say(f"\n{tokens} tokens of all kinds of text; silent: fires on none of them.")
    say("Random SAE: what as many random directions with the same k recover; the floor to compare.")


def language_table(
    model: Any, saes: list[ScopeSAE], train: Split, test: Split, say: Callable[[str], None]
) -> None:
    def sample(split: Split, most: int) -> tuple[list[str], list[list[int]]]:
        langs: list[str] = []
        rows: list[list[int]] = []
        for lang in LANGUAGES:
            part = select(split, lambda r, g=lang: r["domain"] == "prose" and r["lang"] == g, most)
            langs += [lang] * len(part[1])
            rows += part[1]
        return langs, rows

    known, known_rows = sample(train, 150)
    held, held_rows = sample(test, 250)
    shares = firing_shares(model, saes, known_rows)
    held_shares = firing_shares(model, saes, held_rows)
    for title, thresholds in (
        ("share of tokens above a threshold", None),
        ("fires anywhere (threshold 0)", ANYWHERE),
    ):
        say(f"\n### One feature for each language, against the other seven: {title}\n")
        say(f"| language | documents {RULE_HEAD}\n|---|---{RULE_LINE}")
        for lang in LANGUAGES:
            truth = torch.tensor([name == lang for name in known])
            held_truth = torch.tensor([name == lang for name in held])
            options = {} if thresholds is None else {"thresholds": thresholds}
            rule = best_rule(shares, truth, held_shares, held_truth, **options)
            say(f"| {lang} | {int(held_truth.sum())} of {len(held)} | {rule_cells(rule)}")


def contrast_table(
    model: Any,
    saes: list[ScopeSAE],
    train: Split,
    test: Split,
    tokens: Any,
    say: Callable[[str], None],
) -> None:
    say("\n### One feature for each contrast, and several (chosen on discovery documents)\n")
    say(f"| contrast | documents | F1 of always yes {RULE_HEAD} {SEVERAL} features, held-out F1 |")
    say(f"|---|---|---{RULE_LINE}---|")
    end = tokens.convert_tokens_to_ids(END)

    def questions(part: Split) -> Split:
        rows = [[*tokens(r["extra"]["question"])["input_ids"][: CONTEXT - 1], end] for r in part[0]]
        return part[0], rows

    def line(
        name: str,
        keep: Callable[[dict[str, Any]], bool],
        yes: Callable[[dict[str, Any]], bool],
        change: Callable[[Split], Split] = lambda part: part,
        sizes: Sequence[int] = (700, 500),
    ) -> None:
        known, held = change(select(train, keep, sizes[0])), change(select(test, keep, sizes[1]))
        shares = tuple(firing_shares(model, saes, part[1]) for part in (known, held))
        truth = tuple(torch.tensor([yes(record) for record in part[0]]) for part in (known, held))
        rule = best_rule(shares[0], truth[0], shares[1], truth[1])
        together = several(shares[0], truth[0], shares[1], truth[1])
        count = sum(yes(record) for record in held[0])
        always = 2 * count / (count + len(held[0]))
        cells = f"{rule_cells(rule)} **{together:.3f}** |"
        say(f"| {name} | {count} of {len(held[0])} | {always:.3f} | {cells}")

    def of(domain: str) -> Callable[[dict[str, Any]], bool]:
        return lambda record: record["domain"] == domain

    def labelled(*labels: str) -> Callable[[dict[str, Any]], bool]:
        return lambda record: record["label"] in labels

    line("rude (all six languages)", of("tone"), labelled("rude"))
    for lang in TONES:
        line(
            f"rude, {lang}",
            lambda r, g=lang: r["domain"] == "tone" and r["lang"] == g,
            labelled("rude"),
            sizes=(400, 200),
        )
    line("harmful request (question alone)", of("request"), labelled("harmful"), questions)
    line("reply switches language", of("switching"), labelled("zh", "ru", "ko"))
    line("text loops", of("repetition"), labelled("loop"))
    line(
        "code, against prose",
        lambda r: r["domain"] in ("code", "prose"),
        lambda r: bool(r["domain"] == "code"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", default=None)
    parser.add_argument("--card", action="store_true")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--models", nargs="*", default=MODELS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    work = corpus.work_folder(arguments.work)
    if not (work / "corpus" / "test.jsonl").is_file():
        corpus.build(work)
    lines: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    tokens = AutoTokenizer.from_pretrained(model_path(arguments.models[0]))  # one for all
    train, test = (token_rows(work, split, tokens) for split in ("train", "test"))
    held = by_group(test, HELD_ROWS)
    grams = baselines(train, held, VOCAB_SIZE)
    for name in arguments.models:
        started = time.monotonic()
        model = load_model(model_path(name)).cpu()
        facts = json.loads((sae_folder(name) / "config.json").read_text())
        saes = load_saes(name)
        size = sum(parameter.numel() for parameter in model.parameters())
        say(
            f"\n## {name}: {size / 1e6:.2f}M parameters, {facts['num_layers']} layers, d_model"
            f" {facts['d_model']}; SAEs d_sae {facts['d_sae']}, k {facts['k']}"
        )
        once = sum(map(len, train[1]))
        say(
            f"\nTrained on {SPECS[name].tokens / 1e6:.1f} million tokens; the training split has"
            f" {once / 1e6:.2f} million in {len(train[1])} rows."
        )
        loss_table(model, held, grams, say)
        sae_table(model, saes, test, say)
        language_table(model, saes, train, test, say)
        contrast_table(model, saes, train, test, tokens, say)
        say(f"\n(measured in {time.monotonic() - started:.0f} s)")
    for line in durations.table(work):
        say(line)
    if arguments.card:
        write_card(lines)


def write_card(lines: list[str]) -> None:
    """Replace the tables between the model card's two markers."""
    path = MINI_HOME / "README.md"
    before, rest = path.read_text("utf-8").split("<!-- figures -->")
    after = rest.split("<!-- /figures -->")[1]
    tables = re.sub(r"(?m)^##", "###", "\n".join(lines)).strip()
    text = f"{before}<!-- figures -->\n{tables}\n<!-- /figures -->{after}"
    path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()

"""The tour that `qsl demo` gives on the toy model, offline, in a minute.

It uses only the public interface, so it can be read as an example: verify, read, extract, rank,
steer, measure benchmarks, look. The site is all that it leaves behind.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

import qwen_scope_lens as qsl
from qwen_scope_lens.bench.coverage import redundancy
from qwen_scope_lens.bench.footprint import Footprint, footprint
from qwen_scope_lens.bench.overlap import overlap_matrix
from qwen_scope_lens.features.pool import pool
from qwen_scope_lens.features.rank import rank
from qwen_scope_lens.features.ranking import RankedFeature
from qwen_scope_lens.mini import heldout
from qwen_scope_lens.site.build import Sources, build_site
from qwen_scope_lens.steering.calibrate import calibrate_from_store
from qwen_scope_lens.steering.generate import Sampling, generate
from qwen_scope_lens.steering.text_quality import share_of_class

__all__ = ["LAYER", "STRENGTHS", "run"]

MODEL, GROUP, LAYER = "mini-qwen3", "mini-qwen3/w1k-l0-16", 7
LANGUAGES = {
    "zh": "Chinese",
    "ja": "Japanese",
    "ko": "Korean",
    "ru": "Russian",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "en": "English",
}
SCRIPTS = {"zh": "han", "ko": "hangul", "ru": "cyrillic"}  # token classes of a plan
SENTENCES = (
    "The package manager installs programs and their documentation.",
    "Die Paketverwaltung installiert Programme und ihre Dokumentation.",
    "软件包管理器安装程序及其文档。",
    "def install(package):\n    return manager.install(package)",
)
BENCHMARKS = ("arithmetic", "knowledge", "spelling", "translation", "code", "request")
"""Kinds of held-out texts that stand for small benchmarks."""

TEXTS_EACH = 20  # per language; twice as many per benchmark
FEATURES_STEERED = 3
STRENGTHS = {"suppressed": -1.0, "as it is": 0.0, "amplified": 2.5}  # of the typical activation
PROMPTS = {"zh": "安装程序", "ko": "설치 프로그램", "ru": "Программа установки"}
ENGLISH_PROMPT = "The package manager is a tool that"
NEW_TOKENS = 32


def run(language: str = "zh", out: Path = Path("qsl-demo")) -> None:
    """Print the tour: `language` (zh, ko or ru) is found and steered; `out` gets the site."""
    started = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning)
    group = qsl.find_group(GROUP)
    print(
        "Qwen-Scope Lens on a toy: a Qwen3 of 8 layers that this project trained, and its SAEs.\n\n"
        f"{group.short}: layers 0-{group.layers[-1]}, d_model {group.d_model},"
        f" {group.d_sae} features, {group.k} active per token.\n"
    )
    with _step(f"load the model and the SAE of layer {LAYER}"):
        model = qsl.models.open_model(MODEL)
        sae = qsl.saes.open_sae(f"{GROUP}/{LAYER}")
    with _step("verify that they belong together"):
        check = qsl.verify_model(model, sae)
    _indent(str(check.verification))
    with _step("read four texts"):
        rows = [_strongest(model, sae, text) for text in SENTENCES]
    for text, row in zip(SENTENCES, rows, strict=True):
        _indent(f"{text.splitlines()[0][:60]}\n    {row}")
    with tempfile.TemporaryDirectory() as folder:
        documents = list(_documents())
        with _step(f"extract the features of {len(documents)} texts into a store"):
            store = qsl.extract(
                documents,
                model=model,
                group=GROUP,
                layers=[LAYER],
                out=Path(folder) / "store",
                max_tokens=96,
                progress=False,
            )
        _indent(f"{store.n_tokens:,} tokens, {store.n_nonzero(LAYER):,} activations")
        _language(model, store, language)
        _benchmarks(store)
        with _step("build a page for every feature"):
            build_site(Sources(store, (LAYER,)), out)
    _indent(f"open {out}/index.html")
    print(
        f"\nDone in {time.perf_counter() - started:.0f} s. The same with a real model:\n"
        "    qsl verify qwen3-8b-base/w64k-l0-50/20 --model Qwen/Qwen3-8B-Base\n"
        "    qsl extract texts.jsonl --model Qwen/Qwen3-8B-Base --sae qwen3-8b-base/w64k-l0-50"
        " --layers 20 --out store/\n"
        "    qsl rank store/ --label lang --positive zh"
    )


def _documents() -> Iterator[dict[str, str]]:
    """Held-out texts of 8 languages, and of the kinds that stand for benchmarks."""
    for language in LANGUAGES:
        for record in list(heldout("prose", language))[:TEXTS_EACH]:
            yield {"text": record["text"], "lang": language, "kind": "prose"}
    for kind in BENCHMARKS:
        for record in list(heldout(kind))[: 2 * TEXTS_EACH]:
            yield {"text": record["text"], "lang": record["lang"], "kind": kind}


def _strongest(model: Any, sae: qsl.saes.LayerSAE, text: str) -> str:
    """The features with the largest activation in a text, and the token where."""
    read = qsl.capture(model, [text], [LAYER])
    keep = read.keep(LAYER)
    codes = sae.encode_sparse(read.residuals[LAYER][keep])
    best = codes.to_dense().max(dim=0)
    spans = read.char_spans[0] or ()
    tokens = [text[a:b] for (a, b), kept in zip(spans, keep, strict=True) if kept]
    features = best.values.topk(4).indices.tolist()
    return ", ".join(f"{f} on {tokens[int(best.indices[f])]!r}" for f in features)


def _language(model: Any, store: qsl.FeatureStore, language: str) -> None:
    """Find the features of a language, and generate with them suppressed and amplified."""
    name, prose = LANGUAGES[language], store.labels("kind") == "prose"
    spoken = store.labels("lang") == language
    with _step(f"find the features of {name}, against {len(LANGUAGES) - 1} other languages"):
        ranking = rank(
            store, prose & spoken, prose & ~spoken, layers=LAYER, pool="mean", by="effect"
        )
    best = ranking.rows[:FEATURES_STEERED]
    for row in best:
        _indent(
            f"{row.ref:30} fires in {row.rate_positive:4.0%} of {name} texts and"
            f" {row.rate_negative:4.0%} of others; AUROC {row.auroc:.3f}, held out"
            f" {row.held_out_auroc:.3f}"
        )
    _indent(f"control: with shuffled languages no feature reaches {ranking.shuffled.ceiling:.3f}")
    with _step(f"generate with these {len(best)} features suppressed and amplified"):
        table = _steer(model, store, best, language)
    _indent(table)


def _steer(
    model: Any, store: qsl.FeatureStore, best: Sequence[RankedFeature], language: str
) -> str:
    """The share of the language's letters in what is generated, with a random control."""
    typical = calibrate_from_store(store, [row.ref for row in best])
    lines = []
    for prompt in (ENGLISH_PROMPT, PROMPTS[language]):
        lines.append(f"{prompt} ...")
        for kind, control in (("the features", None), ("control: random", 0)):
            for label, strength in STRENGTHS.items():
                if strength == 0 and control is not None:
                    continue
                edits = [
                    qsl.Edit(qsl.FeatureRef.parse(row.ref), "add", strength, unit="typical")
                    for row in best
                ]
                (found,) = generate(
                    model,
                    [prompt],
                    qsl.Plan(edits).calibrated(typical),
                    sampling=Sampling(NEW_TOKENS),
                    control=control,
                )
                share = share_of_class(found.text, SCRIPTS[language])
                shown = " ".join(found.text.split())[:44]
                lines.append(f"    {kind:16} {label:11} {share:4.0%} {language}   {shown}")
    return "\n".join(lines)


def _benchmarks(store: qsl.FeatureStore) -> None:
    """How redundant small benchmarks are, and what each covers of the others."""
    with _step(f"measure {len(BENCHMARKS)} small benchmarks by the features they touch"):
        labels = store.labels("kind")
        found: list[Footprint] = []
        for kind in BENCHMARKS:
            items = pool(store, LAYER, how="last", docs=(labels == kind).nonzero()[0])
            found.append(footprint(kind, items, sae=f"{GROUP}/{LAYER}"))
        rows = [redundancy(each, draws=50) for each in found]
        overlaps = overlap_matrix(found)
    head = " ".join(f"{name[:7]:>8}" for name in BENCHMARKS)
    _indent(f"{'':12} items features redundancy   share of its features that .. touches too")
    _indent(f"{'':12} {'':27} {head}")
    for row, shares in zip(rows, overlaps, strict=True):
        cells = " ".join(f"{share:8.0%}" for share in shares)
        _indent(
            f"{row.name:12} {row.n_items:5} {row.n_features:8} {row.r_hat.value:10.2f}   {cells}"
        )


@contextmanager
def _step(what: str) -> Iterator[None]:
    print(f"* {what} ...", end=" ", flush=True)
    started = time.perf_counter()
    yield
    print(f"{time.perf_counter() - started:.1f} s", flush=True)


def _indent(text: str) -> None:
    print("    " + text.replace("\n", "\n    "))

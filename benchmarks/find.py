"""Does `qsl find` put the right feature first, and how long do it and `qsl label import` take?

    python benchmarks/find.py --only minis,speed,import --out benchmarks/results/find.txt
    QWEN_SCOPE_HOME=WORK/release python benchmarks/find.py --only real --model MODEL \
        --name "WHAT IT IS" --sae local/SAE-... --layers 4,10,14,20 \
        --lens lens.pt --data DATA --work WORK/verbs

Languages, code and arithmetic. `find` gets the name of the concept in English and five texts; it is
scored on other, labelled texts, as `qsl rank` would (AUROC of the mean activation per text, over
all texts of the concept against those of all others). The right feature is the best one by AUROC,
then effect; a feature counts as as good if its AUROC is at most 0.01 lower. Many features of
neighbouring layers tell a language equally well, so the second count is the fairer one.

The store of the real model is that of `real_verbs.py`, with texts of code and arithmetic beside it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import Printed, cpu_name, peak_extra, peak_in_fresh_process
from scipy.sparse import vstack

import qwen_scope_lens as qsl
from qwen_scope_lens.catalog import bundled_model, find_group
from qwen_scope_lens.concepts.concept import Column, Concept
from qwen_scope_lens.concepts.evidence import Floats, lifts, read_groups, readout, says, shares
from qwen_scope_lens.concepts.find import PAIRS, find
from qwen_scope_lens.concepts.fusion import combined
from qwen_scope_lens.features import pool
from qwen_scope_lens.features.contrast import contrast
from qwen_scope_lens.labels.exports import exports_in, labels_of
from qwen_scope_lens.labels.search import bm25
from qwen_scope_lens.mini import heldout, model_path
from qwen_scope_lens.models.jacobian import Lens, read_lens
from qwen_scope_lens.models.lens_fit import LensQuality, quality_table
from qwen_scope_lens.models.residuals import Capture
from qwen_scope_lens.models.tokenize import find_tokenizer
from qwen_scope_lens.models.unembedding import Unembedding, read_unembedding
from qwen_scope_lens.tables import Table

NAMES = {
    "am": "Amharic",
    "ar": "Arabic",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "hi": "Hindi",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "pt": "Portuguese",
    "ru": "Russian",
    "th": "Thai",
    "tt": "Tatar",
    "uk": "Ukrainian",
    "vi": "Vietnamese",
    "zh": "Chinese",
    "code": "Python code",
    "arithmetic": "arithmetic",
}
EXAMPLES, CHARACTERS = 5, 160
AS_GOOD = 0.01
HOW: dict[str, tuple[tuple[Column, str], ...]] = {
    "name and five texts": (("examples", "exact"), ("words", "exact"), ("says", "lens")),
    "... by the logit lens": (("examples", "exact"), ("words", "exact"), ("says", "logit")),
    "... --quick": (("examples", "quick"), ("words", "quick"), ("says", "lens")),
    "five texts only": (("examples", "exact"),),
    "five texts only, --quick": (("examples", "quick"),),
    "name only": (("words", "exact"), ("says", "lens")),
    "name only, by the logit lens": (("words", "exact"), ("says", "logit")),
    "what features say, lens": (("says", "lens"),),
    "what features say, logit lens": (("says", "logit"),),
}
"""What `find` goes by, each column in one of the ways in which it can be had."""
D_SAE, D_MODEL, K, LAYERS = 65_536, 4096, 50, 36


def main() -> None:
    options = _options()
    if options.peak:
        print(peak_extra(lambda: import_once(Path(options.peak))))
        return
    say = Printed()
    torch.set_num_threads(1)
    about = f"; the real model is {options.name}" if options.name else ""
    say(f"{cpu_name()}, one thread{about}; {date.today().isoformat()}\n")
    for section in options.only.split(","):
        say(f"## {section}\n")
        {"minis": minis, "real": real, "speed": speed, "import": importing}[section](options, say)
        say()
    if options.out:
        say.save(options.out)


# --- the right feature ---------------------------------------------------------------------------


def minis(options: argparse.Namespace, say: Printed) -> None:
    for name in ("mini-qwen3", "mini-qwen3.5"):
        group = f"{name}/w1k-l0-16"
        texts: dict[str, list[str]] = {}
        for row in heldout():
            concept = row["lang"] if row["domain"] == "prose" else row["domain"]
            if concept in NAMES:
                texts.setdefault(concept, []).append(row["text"])
        with tempfile.TemporaryDirectory() as folder:
            rows = [
                {"text": text[:300], "concept": concept}
                for concept, some in texts.items()
                for text in some[EXAMPLES:]
            ]
            store = qsl.extract(
                rows, model=name, group=group, layers=range(8), out=folder, progress=False
            )
            lens = read_lens(model_path(name) / "jacobian_lens.pt")
            said = store.labels("concept").tolist()
            _score(say, name, group, store.layers, texts, [store], said, lens)


def real(options: argparse.Namespace, say: Printed) -> None:
    model = qsl.load_model(options.model, dtype=torch.bfloat16)
    layers = [int(layer) for layer in options.layers.split(",")]

    def rows(name: str) -> Iterator[dict[str, Any]]:
        with gzip.open(options.data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            yield from map(json.loads, file)

    how = {"model": model, "group": options.sae, "layers": layers, "progress": False}
    declaration = list(rows("parallel/udhr"))
    languages = qsl.extract(declaration, out=options.work / "declaration", max_tokens=96, **how)
    texts: dict[str, list[str]] = {}
    for row in declaration:
        texts.setdefault(row["lang"], []).append(row["text"])
    texts["code"] = [row["code"] for row in list(rows("benchmarks/mbpp"))[:35]]
    texts["arithmetic"] = [
        re.sub(r"<<.*?>>", "", row["answer"]) for row in list(rows("benchmarks/gsm8k-test"))[:35]
    ]
    others = [
        {"text": text, "concept": concept}
        for concept in ("code", "arithmetic")
        for text in texts[concept][EXAMPLES:]
    ]
    beside = qsl.extract(others, out=options.work / "code", max_tokens=96, **how)
    said = [*languages.labels("lang").tolist(), *beside.labels("concept").tolist()]
    used = {text for some in texts.values() for text in some[:EXAMPLES]}
    said = [
        "" if text in used else concept
        for text, concept in zip(
            (t for s in (languages, beside) for t in s.documents(["text"])["text"].to_pylist()),
            said,
            strict=True,
        )
    ]
    lens = read_lens(options.lens)
    say(f"lens: {lens.card['texts']} texts, {lens.card['tokens']} tokens\n")
    say(quality_table([LensQuality(**row) for row in lens.card["held_out"]]).text() + "\n")
    _score(say, model, options.sae, layers, texts, [languages, beside], said, lens)


def _score(
    say: Printed,
    model: Any,
    group: str,
    layers: Any,
    texts: dict[str, list[str]],
    stores: list[qsl.FeatureStore],
    concepts: list[str],
    lens: Lens,
) -> None:
    """Print the shares for one model. Documents whose concept is empty take no part."""
    layers = list(layers)
    use = np.flatnonzero([bool(concept) for concept in concepts])
    pooled = {
        n: vstack([pool(store, n, how="mean") for store in stores]).tocsr()[use] for n in layers
    }
    labels = np.array(concepts)[use]
    d_sae = find_group(group).d_sae
    auroc, winner = {}, {}
    for concept in texts:
        found = [contrast(pooled[n], labels == concept) for n in layers]
        auroc[concept] = np.concatenate([one.auroc for one in found])
        effect = np.nan_to_num(np.concatenate([one.effect for one in found]), posinf=1e9)
        winner[concept] = int(np.lexsort((-effect, -auroc[concept]))[0])
    sources = _Evidence(model, group, layers, lens)
    rows, details = [], []
    marks: dict[str, list[tuple[bool, ...]]] = {title: [] for title in HOW}
    for number, (concept, some) in enumerate(texts.items()):
        have = sources.of(NAMES[concept], [text[:CHARACTERS] for text in some[:EXAMPLES]])
        if number == 0:  # what is put together here is what `find` says
            answer = find(
                NAMES[concept],
                group,
                examples=[text[:CHARACTERS] for text in some[:EXAMPLES]],
                model=model,
                layers=layers,
                lens=lens,
                top=5,
                promoted=0,
                exact=True,
            )
            theirs = [layers.index(ref.layer) * d_sae + ref.feature for ref in answer.refs]
            assert theirs == _best(have, "name and five texts")
        for title in HOW:
            at = _best(have, title)
            own, best = auroc[concept], winner[concept]
            good = [own[place] >= own[best] - AS_GOOD for place in at]
            marks[title].append((at[0] == best, best in at, good[0], any(good)))
            if title == "name and five texts":
                right = f"{layers[best // d_sae]}/{best % d_sae}"
                first = f"{layers[at[0] // d_sae]}/{at[0] % d_sae}"
                details.append((NAMES[concept], right, own[best], first, own[at[0]], max(own[at])))
    rows = [(title, *np.mean(some, axis=0)) for title, some in marks.items()]
    shown = model if isinstance(model, str) else "the real model"
    say(f"{shown}: {len(texts)} concepts, {len(layers) * d_sae:,} features, {len(use)} texts\n")
    columns = ["find gets", "right first", "in five", "as good first", "as good in five"]
    say(Table.of(columns, rows, formats=dict.fromkeys(columns[1:], ".0%")).text())
    say()
    columns = ["concept", "right", "AUROC", "found first", "its AUROC", "best of five"]
    say(Table.of(columns, [(*row[:2], *map(_plain, row[2:])) for row in details]).text() + "\n")


def _best(have: dict[tuple[Column, str], Floats], title: str) -> list[int]:
    score, _ = combined({column: have[column, how] for column, how in HOW[title]})
    order = np.argsort(-score, kind="stable")[:5]
    return [int(place) for place in order if score[place] > 0]


class _Evidence:
    """Every column in every way, for one concept after the other.

    What does not depend on the concept is read once, so that the real model can be asked.
    """

    def __init__(self, model: Any, group: str, layers: list[int], lens: Lens) -> None:
        self.model = qsl.load_model(model) if isinstance(model, str) else model
        self.layers, self.lens = layers, lens
        self.saes = [qsl.load_sae(f"{group}/{layer}") for layer in layers]
        self.tokenizer = find_tokenizer(self.model)
        self.end = read_unembedding(self.model)
        self.fixed = self._read(Concept("x", ("x",)), ("neutral", "fillers"))
        pairs = zip(self.saes, layers, strict=True)
        self.shares = [shares(sae, layer, *self.fixed).share for sae, layer in pairs]

    def _read(self, concept: Concept, groups: tuple[str, ...]) -> tuple[list[Capture], list[str]]:
        return read_groups(self.model, concept, self.layers, self.tokenizer, groups)

    def of(self, name: str, examples: list[str]) -> dict[tuple[Column, str], Floats]:
        concept = Concept(name, tuple(examples))
        mine = self._read(concept, ("words", "examples"))
        found: dict[tuple[Column, str], list[Floats]] = {}
        wanted = readout(concept, self.tokenizer, self.end)
        # `lifts` takes texts in the order of their numbers: those of a second reading come after.
        both = [*mine[1], *self.fixed[1]]
        moved = [
            replace(one, doc_ids=tuple(doc + len(mine[1]) for doc in one.doc_ids))
            for one in self.fixed[0]
        ]
        columns: tuple[Column, ...] = ("examples", "words")
        for number, (sae, layer) in enumerate(zip(self.saes, self.layers, strict=True)):
            share = shares(sae, layer, *mine).share | self.shares[number]
            pairs = [PAIRS[column] for column in columns]
            quick = lifts(sae, layer, [*mine[0], *moved], both, pairs)
            for column, lifted in zip(columns, quick, strict=True):
                one, other = PAIRS[column]
                found.setdefault((column, "exact"), []).append(share[one] - share[other])
                found.setdefault((column, "quick"), []).append(lifted)
            for how, lens in (("lens", self.lens), ("logit", None)):
                said = says(sae, layer, wanted, self.end, lens)
                found.setdefault(("says", how), []).append(said)
        return {key: np.concatenate(parts) for key, parts in found.items()}


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else float(value)


# --- time ----------------------------------------------------------------------------------------


def speed(options: argparse.Namespace, say: Printed) -> None:
    """One synthetic layer of the size of Qwen3-8B's, under the names of 36: all pages are warm."""
    with tempfile.TemporaryDirectory() as home:
        os.environ["QWEN_SCOPE_HOME"] = home
        folder = Path(home) / "wide"
        folder.mkdir()
        rng = torch.Generator().manual_seed(0)
        enc = torch.randn(D_SAE, D_MODEL, generator=rng) / D_MODEL**0.5
        tensors = {
            "W_enc": enc,
            "W_dec": torch.nn.functional.normalize(enc, dim=1).T.contiguous(),
            "b_enc": torch.zeros(D_SAE),
            "b_dec": torch.zeros(D_MODEL),
        }
        torch.save(tensors, folder / "layer0.sae.pt")
        del tensors, enc
        for layer in range(1, LAYERS):
            os.link(folder / "layer0.sae.pt", folder / f"layer{layer}.sae.pt")
        sizes = {"num_layers": LAYERS, "d_model": D_MODEL, "d_sae": D_SAE, "k": K}
        (folder / "config.json").write_text(
            json.dumps({"model_type": "topk_sae", "base_model": "wide", **sizes})
        )
        end = Unembedding(torch.randn(6000, D_MODEL, generator=rng), torch.ones(D_MODEL), 1e-6)
        tokenizer = find_tokenizer(qsl.load_model(bundled_model("mini-qwen3"), up_to_layer=0))
        concept = Concept("polite refusals")
        wanted = readout(concept, tokenizer, end)
        groups = [group for group, _ in concept.texts()]
        rows = []
        for threads in dict.fromkeys((1, options.threads)):
            torch.set_num_threads(threads)
            for warm in (False, True):
                start, cpu = time.perf_counter(), time.process_time()
                for layer in range(LAYERS):
                    says(qsl.load_sae(f"local/wide/{layer}"), layer, wanted, end)
                if warm:
                    took = time.perf_counter() - start, time.process_time() - cpu
                    rows.append((f"says, 36 layers, threads {threads}", *took))
        captures = _texts(len(groups), tokens=8)
        pairs = [("words", "fillers")]
        for warm in (False, True):
            start, cpu = time.perf_counter(), time.process_time()
            for layer in range(LAYERS):
                lifts(qsl.load_sae(f"local/wide/{layer}"), 0, [captures], groups, pairs)
            if warm:
                took = time.perf_counter() - start, time.process_time() - cpu
                rows.append((f"words, {LAYERS} layers, mean residuals (--quick)", *took))
        start, cpu = time.perf_counter(), time.process_time()
        shares(qsl.load_sae("local/wide/0"), 0, [captures], groups)
        took = time.perf_counter() - start, time.process_time() - cpu
        rows.append((f"words, 1 layer, {captures.n_tokens} tokens (--exact)", *took))
        pack = qsl.LabelPack(
            qsl.Label(qsl.LayerRef("qwen3-8b-base/w64k-l0-50", 20).feature(n), _sentence(n))
            for n in range(D_SAE)
        )
        start, cpu = time.perf_counter(), time.process_time()
        found = bm25(pack, "polite refusals")
        took = time.perf_counter() - start, time.process_time() - cpu
        rows.append((f"labels, {D_SAE:,} of one layer ({len(found)} match)", *took))
        del os.environ["QWEN_SCOPE_HOME"]
    torch.set_num_threads(1)
    say(f"{D_SAE:,} features x {D_MODEL} dimensions, float32, files in the page cache\n")
    say(Table.of(["evidence", "seconds", "CPU seconds"], rows, formats={}).text())


def _texts(count: int, tokens: int) -> Capture:
    """Random residuals of some short texts."""
    n = count * tokens
    x = torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(1))
    first = torch.arange(n) % tokens == 0
    return Capture(
        layers=(0,),
        residuals={0: x},
        norms={0: x.norm(dim=-1)},
        extreme={0: torch.zeros(n, dtype=torch.bool)},
        first=first,
        token_ids=torch.zeros(n, dtype=torch.long),
        offsets=torch.arange(count + 1) * tokens,
        doc_ids=tuple(range(count)),
        texts=(None,) * count,
        char_spans=(None,) * count,
        truncated=(False,) * count,
    )


# --- import --------------------------------------------------------------------------------------


def importing(options: argparse.Namespace, say: Printed) -> None:
    """A synthetic export of 65,536 features: reading, sampling and writing, without the model."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "qwen3-8b-base" / "20-qwenscope-res-64k"
        _write_export(place)
        size = sum(path.stat().st_size for path in place.rglob("*.gz"))
        start, cpu = time.perf_counter(), time.process_time()
        labels, passages = import_once(place)
        took = time.perf_counter() - start, time.process_time() - cpu
        peak = peak_in_fresh_process(__file__, str(place))
    say(
        f"{labels:,} labels in 512 batches, {passages} passages drawn; {size / 1e6:,.0f} MB"
        f" gzipped: {took[0]:.1f} s ({took[1]:.1f} CPU seconds), {peak / 1e6:,.0f} MB at the peak"
    )


def import_once(place: Path) -> tuple[int, int]:
    [export] = exports_in(place)
    passages = export.passages(2, 32)
    pack = labels_of(export, export.candidates[0])
    with tempfile.TemporaryDirectory() as folder:
        pack.write(Path(folder) / "labels.jsonl")
    return len(pack), len(passages)


def _write_export(place: Path) -> None:
    where = {"modelId": "qwen3-8b-base", "layer": "20-qwenscope-res-64k"}
    rng = np.random.default_rng(0)
    for kind in ("explanations", "activations"):
        (place / kind).mkdir(parents=True)
    for batch in range(D_SAE // 128):
        explanations, activations = [], []
        for index in range(batch * 128, (batch + 1) * 128):
            row = {"index": str(index), **where}
            embedding = [round(float(x), 5) for x in rng.standard_normal(256)]
            explanations.append(
                {**row, "id": f"e{index}", "description": _sentence(index), "embedding": embedding}
            )
            for _ in range(10 if batch % 32 == 0 else 1):
                values = np.where(rng.random(128) < 0.05, rng.random(128), 0.0)
                values[64] = 1.5
                tokens = [f" word{n}" for n in range(128)]
                activations.append({**row, "tokens": tokens, "values": values.tolist()})
        for kind, rows in (("explanations", explanations), ("activations", activations)):
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
            (place / kind / f"batch-{batch}.jsonl.gz").write_bytes(gzip.compress(data, 1))


def _sentence(number: int) -> str:
    words = ("polite", "answer", "refusal", "number", "name", "city", "code", "verb", "sum", "law")
    return " ".join(words[int(digit)] for digit in f"{number:05d}") + f" of kind {number}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="minis,speed,import")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--name", default="")
    parser.add_argument("--sae")
    parser.add_argument("--layers", default="")
    parser.add_argument("--lens", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak")
    return parser.parse_args()


if __name__ == "__main__":
    main()

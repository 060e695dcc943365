"""A feature store of two billion non-zeros: how large it is, how it is built, how it answers.

    python benchmarks/store_scale.py build --folder WORK
    python benchmarks/store_scale.py measure --folder WORK --out benchmarks/results/store-scale.txt

A planted store, written by the store's own writer: 40 million positions, k = 50 of 65,536 features
of one layer. The share of a feature falls as a power of its rank, times a factor of its own, so a
few fire on a tenth of all positions and many on a handful. Features come in bursts, because a
document has some of its own. Documents are from 5 to 1,024 tokens long, with a label `lang` whose
values have features of their own. `build` can be stopped and goes on where it was; it stops by
itself before less than `--least-free` GB are free.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from _measure import Printed, cpu_name

import qwen_scope_lens as qsl
from qwen_scope_lens.features import rank
from qwen_scope_lens.features.statistics import statistics
from qwen_scope_lens.files import file_sha256
from qwen_scope_lens.stores import (
    CodedDocument,
    CorpusFacts,
    FeatureStore,
    Manifest,
    ModelFacts,
    SAEFacts,
    Settings,
    TokenizerFacts,
    merge,
    pack,
    write_shard,
)
from qwen_scope_lens.stores.codec import Packed
from qwen_scope_lens.stores.inspect import check
from qwen_scope_lens.stores.shard_files import FIRING, damage, firing_of, shard_folder
from qwen_scope_lens.version import versions

GROUP, LAYER, K, D_SAE, D_MODEL = "qwen3-8b-base/w64k-l0-50", 20, 50, 65536, 4096
MEAN_TOKENS, LONGEST, BATCH = 250, 1024, 4096
LANGUAGES = {"en": 0.60, "zh": 0.25, "de": 0.10, "am": 0.0495, "tt": 0.0005}
OWN = 4  # features that fire on every tenth token of a language's documents only
WORDS = 5000


class Planted:
    """The documents of each shard, drawn from the shard's own seed."""

    def __init__(self, n_docs: int, shard_docs: int) -> None:
        rng = np.random.default_rng(0)
        rank_of = np.arange(D_SAE)
        share = np.exp(rng.normal(0, 1.5, D_SAE)) / (300.0 + rank_of) ** 1.8
        feature = rng.permutation(D_SAE)
        # One feature is drawn from each of K parts, so that those of a token differ.
        self._parts = [feature[rank_of % K == part] for part in range(K)]
        self._ends = [np.cumsum(share[rank_of % K == part]) for part in range(K)]
        self.own = {
            name: feature[9000 + 50 * i :][: OWN * K : K] for i, name in enumerate(LANGUAGES)
        }
        lengths = rng.integers(1, 9, WORDS)
        self._words = [f"{'abcdefgh'[:n]}{i:04d} "[-n - 1 :] for i, n in enumerate(lengths)]
        corpus = CorpusFacts("planted", n_docs, "0" * 64, shard_docs=shard_docs, labels=("lang",))
        self.manifest = Manifest(
            model=ModelFacts("planted/model", None, "float32", D_MODEL, "0" * 64),
            tokenizer=TokenizerFacts("planted", WORDS, "0" * 64),
            saes={LAYER: SAEFacts(f"{GROUP}/{LAYER}", D_SAE, K, "0" * 64)},
            settings=Settings(),
            labels={"lang": "str"},
            corpora=(corpus,),
            versions=versions(),
        )

    def documents(self, shard: int) -> list[CodedDocument]:
        rng = np.random.default_rng([1, shard])
        first, end = self.manifest.corpora[0].span(shard)
        lengths = rng.lognormal(np.log(MEAN_TOKENS) - 0.32, 0.8, end - first)
        lengths = lengths.astype(np.int64).clip(5, LONGEST)
        languages = rng.choice(list(LANGUAGES), size=len(lengths), p=list(LANGUAGES.values()))
        packed = self._codes(rng, lengths, languages)
        word = (WORDS * rng.random(int(lengths.sum())) ** 3).astype(np.int64)
        coded, start = [], 0
        for i, (n, language) in enumerate(zip(lengths.tolist(), languages.tolist(), strict=True)):
            tokens = [self._words[w] for w in word[start : start + n].tolist()]
            ends = np.cumsum([len(token) for token in tokens])
            coded.append(
                CodedDocument(
                    key=str(first + i),
                    text="".join(tokens),
                    labels={"lang": language},
                    token_ids=word[start : start + n],
                    tokens=tokens,
                    spans=np.stack([ends - [len(token) for token in tokens], ends], axis=1),
                    truncated=n == LONGEST,
                    codes={LAYER: packed.rows(start, start + n)},
                    extreme={LAYER: np.arange(n) == 0},
                )
            )
            start += n
        return coded

    def _codes(
        self, rng: np.random.Generator, lengths: np.ndarray, languages: np.ndarray
    ) -> Packed:
        doc = np.repeat(np.arange(len(lengths)), lengths)
        n = len(doc)
        index = np.empty((n, K), np.int64)
        for part, (features, ends) in enumerate(zip(self._parts, self._ends, strict=True)):
            drawn, burst = (
                features[np.searchsorted(ends, rng.random(m) * ends[-1]).clip(0, len(ends) - 1)]
                for m in (n, len(lengths))
            )
            index[:, part] = np.where(rng.random(n) < 0.2, burst[doc], drawn)
        for name, features in self.own.items():
            here = (languages == name)[doc] & (rng.random(n) < 0.1)
            index[here, :OWN] = features
        values = np.exp(rng.standard_normal((n, K), np.float32) + 0.5)
        starts = np.cumsum(lengths) - lengths
        values[starts, :4] = [3e5, 2e5, 9e4, 7e4]  # sink tokens, beyond float16
        order = np.argsort(-values, axis=1)
        values, index = (np.take_along_axis(array, order, 1) for array in (values, index))
        codes = qsl.SparseCodes(torch.from_numpy(values), torch.from_numpy(index).int(), D_SAE)
        return Packed.cat([pack(codes[i : i + BATCH]) for i in range(0, n, BATCH)])


def build(options: argparse.Namespace) -> None:
    """Write the store and two halves of a small job; what each shard took is kept beside it."""
    docs = options.positions // MEAN_TOKENS
    _write(options, options.folder / "store", docs, lambda shard: True)
    for half in range(2):
        mine = range(half, 16, 2).__contains__
        _write(options, options.folder / f"half{half}", 16 * options.shard_docs, mine)


def _write(
    options: argparse.Namespace, folder: Path, docs: int, mine: Callable[[int], bool]
) -> None:
    planted = Planted(docs, options.shard_docs)
    folder.mkdir(parents=True, exist_ok=True)
    planted.manifest.write(folder)
    for shard in filter(mine, range(planted.manifest.n_shards)):
        place = shard_folder(folder, shard)
        if place.is_dir() and damage(place, checksums=False) is None:
            _with_firing(place)
            continue
        if shutil.disk_usage(folder).free < options.least_free * 1e9:
            print(f"{folder}: {shard} shards, and less than {options.least_free} GB are free")
            return
        start = time.process_time()
        documents = planted.documents(shard)
        drawn = time.process_time()
        write_shard(folder, shard, planted.manifest, documents)
        done = time.process_time()
        tokens = sum(len(document.token_ids) for document in documents)
        with (options.folder / "build.jsonl").open("a") as file:
            row = {"tokens": tokens, "draw": drawn - start, "write": done - drawn}
            file.write(json.dumps(row) + "\n")
        if shard % 8 == 0:
            print(
                f"{folder.name} {shard}: drawn {drawn - start:.1f} s, written {done - drawn:.1f} s",
                flush=True,
            )


class Clock:
    """Prints the CPU seconds of the process (all threads) and those of the clock for each case."""

    def __init__(self, say: Printed) -> None:
        self.say = say

    def __call__(
        self, name: str, case: Callable[[], Any], about: Callable[[Any], str] = str
    ) -> Any:
        cpu, clock = time.process_time(), time.perf_counter()
        found = case()
        cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
        self.say(f"{cpu:10.3f} s CPU {clock:9.2f} s  {name}{about(found)}")
        return found


def measure(options: argparse.Namespace) -> None:
    say = Printed()
    time_of = Clock(say)
    facts = versions("duckdb")
    say(f"{cpu_name()}, busy; {date.today().isoformat()}; commit {_commit()}; {_packages(facts)}")
    store = time_of("open the store", lambda: FeatureStore.open(options.folder / "store"), _nothing)
    _sizes(store, options.folder, say)
    time_of("open it again", lambda: FeatureStore.open(store.path), _nothing)

    def hits(feature: int) -> Callable[[], Any]:
        return lambda: store.by_feature((LAYER, feature))

    def n(found: Sequence[Any]) -> str:
        return f": {len(found):,} rows"

    time_of("how often every feature fires (firing.npy)", lambda: store.hit_counts(LAYER), n)
    count = "select feature, count(*) n from features group by 1 order by n desc"
    table = time_of("the same in SQL", lambda: store.sql(count), n)
    feature, times = table["feature"].to_numpy(), table["n"].to_numpy()
    common, middling = int(feature[0]), int(feature[len(feature) // 2])
    rare = int(feature[np.searchsorted(-times, -60)]) if times[-1] <= 60 else int(feature[-1])
    absent = int(np.setdiff1d(np.arange(D_SAE), feature, assume_unique=True)[:1].sum())
    chosen = {"rare": rare, "middling": middling, "common": common, "absent": absent}
    time_of("the first question about a feature (reads the footers)", hits(rare), n)
    for name, number in chosen.items():
        time_of(f"one {name} feature", hits(number), n)
    for name in ("rare", "middling"):
        found = store.by_feature((LAYER, chosen[name]))
        time_of(f"  which of its tokens are kept ({name})", lambda f=found: f.keep, n)

    def found(problems: list[str]) -> str:
        return f": {sum('is missing' not in each for each in problems)} problems"

    def top_texts(number: int) -> list[str]:
        found = store.by_feature((LAYER, number))
        best = np.argpartition(-found.value, min(20, len(found) - 1))[:20]
        return ["".join(store.by_token(int(doc)).tokens) for doc in found.doc[best]]

    for name in ("rare", "common"):
        time_of(f"the 20 strongest texts of the {name} one", lambda m=name: top_texts(chosen[m]), n)

    def both(few: int, many: int) -> np.ndarray:
        hits = [store.by_feature((LAYER, each)) for each in (few, many)]
        some, all_ = (found.doc << 32 | found.position for found in hits)  # ascending
        return some[all_[np.searchsorted(all_, some).clip(0, len(all_) - 1)] == some]

    time_of("tokens of two features (middling and common)", lambda: both(middling, common), n)
    where = f"select * from features where layer = {LAYER} and feature = "
    for name in ("rare", "middling"):
        query = f"{where}{chosen[name]}"
        time_of(f"SQL: one {name} feature", lambda q=query: store.sql(q), n)
    docs = np.random.default_rng(0).integers(0, store.n_docs, 100)
    time_of("100 random tokens", lambda: store.codes_at(LAYER, docs, np.zeros(100, int)), n)
    time_of("one document", lambda: store.by_token(int(docs[0])), n)
    part = range(min(4 * options.shard_docs, store.n_docs))
    time_of(
        "statistics of 4 shards (linear in the tokens)",
        lambda: statistics(store, LAYER, docs=part),
        lambda found: f": {found.n_tokens:,} tokens",
    )
    time_of(
        "rank by a label, tt against am",
        lambda: rank(store, "tt", "am", label="lang", layers=LAYER, top=10),
        lambda found: f": {sum(found.documents.values()):,} documents, {found.found} features",
    )
    say(f"peak memory so far: {_peak():,} MB")
    time_of("names and sizes of all files", lambda: check(store.path, checksums=False), found)
    time_of(
        "check of 8 shards, checksums and content", lambda: check(options.folder / "half0"), found
    )
    halves = [options.folder / "half0", options.folder / "half1"]
    for out in ("joined", "larger"):
        shutil.rmtree(options.folder / out, ignore_errors=True)
    joined = time_of(
        "merge: two parts of one job, 16 shards",
        lambda: merge(halves, options.folder / "joined"),
        lambda found: f": {found.n_tokens:,} tokens",
    )
    time_of(
        "merge: the same in shards of 4,096 documents",
        lambda: merge([joined.path], options.folder / "larger", shard_docs=4096),
        lambda found: f": {found.n_tokens:,} tokens",
    )
    say(f"peak memory: {_peak():,} MB")
    if options.out:
        say.save(options.out)


def _sizes(store: FeatureStore, folder: Path, say: Printed) -> None:
    nonzero = store.n_nonzero(LAYER)
    say(
        f"\n{store.n_docs:,} documents, {store.n_tokens:,} tokens, {nonzero:,} non-zeros, one"
        f" layer, {len(store.shards)} shards of {store.shards[0].n_docs} documents"
    )
    files = {(s.number, name): f["size"] for s in store.shards for name, f in s.files.items()}
    views = {
        "token-major": lambda name: (
            name.endswith("npy") and name.startswith("layer") and FIRING not in name
        ),
        "feature-major": lambda name: name.startswith("layer") and name.endswith("parquet"),
        "text, tokens, offsets": lambda name: not name.startswith("layer"),
    }
    for view, mine in views.items():
        size = sum(size for (_, name), size in files.items() if mine(name))
        say(
            f"{size / 1e9:10.2f} GB  {size / nonzero:6.3f} bytes per non-zero,"
            f" {size / store.n_tokens:7.2f} per token  {view}"
        )
    footers = [pq.read_metadata(s.features_path(LAYER)) for s in store.shards[:16]]
    footer = sum(meta.serialized_size for meta in footers) * len(store.shards) / len(footers)
    groups = sum(meta.num_row_groups for meta in footers) / len(footers)
    say(
        f"{footer / 1e6:10.1f} MB  the index by feature (Parquet footers), {groups:.0f} row groups"
        f" per shard, {footer / nonzero:.4f} bytes per non-zero"
    )
    firing = sum(size for (_, name), size in files.items() if name.endswith(FIRING))
    each = firing / nonzero
    say(f"{firing / 1e6:10.1f} MB  firing.npy of all shards, {each:.4f} bytes per non-zero")
    facts = sum((s.folder / "shard.json").stat().st_size for s in store.shards)
    say(f"{facts / 1e6:10.2f} MB  shard.json of all shards")
    say(
        f"{len(files) + len(store.shards) + 1:10,} files, {len(store.shards)} folders in shards/,"
        f" at most {max(len(list(s.folder.iterdir())) for s in store.shards[:4])} names in each"
    )
    built = [json.loads(line) for line in (folder / "build.jsonl").read_text().splitlines()]
    tokens, write = (sum(row[name] for row in built) for name in ("tokens", "write"))
    codes = Planted(512, 512)._codes(np.random.default_rng(0), np.full(64, 64), np.full(64, "en"))
    start = time.process_time()
    for _ in range(4):
        pack(codes.unpack())
    packing = (time.process_time() - start) / 4 / len(codes)
    say(
        f"{1e6 * write / tokens:10.1f} s CPU  to write a million positions (sort, compress, hash),"
        f" and {1e6 * packing:.1f} s to round them\n"
    )


def _nothing(found: Any) -> str:
    return ""


def _packages(facts: dict[str, str]) -> str:
    names = ("qwen-scope-lens", "numpy", "pyarrow", "duckdb")
    return ", ".join(f"{name} {facts[name]}" for name in names)


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _with_firing(place: Path) -> None:
    """Add `firing.npy` to a shard of an older version, as the writer would have written it."""
    folder, facts = place / f"layer{LAYER}", json.loads((place / "shard.json").read_text())
    if (name := f"layer{LAYER}/{FIRING}") in facts["files"]:
        return
    feature = pq.read_table(folder / "features.parquet", columns=["feature"])["feature"].to_numpy()
    np.save(folder / FIRING, firing_of(feature))
    size, sha = (folder / FIRING).stat().st_size, file_sha256(folder / FIRING)
    facts["files"][name] = {"size": size, "sha256": sha}
    (place / "shard.json").write_text(json.dumps(facts))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["build", "measure"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--positions", type=int, default=41_400_000)
    parser.add_argument("--shard-docs", type=int, default=512)
    parser.add_argument("--least-free", type=float, default=12, help="GB of the disk")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    {"build": build, "measure": measure}[options.what](options)


if __name__ == "__main__":
    main()

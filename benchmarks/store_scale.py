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
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import qwen_scope_lens as qsl
from qwen_scope_lens.stores import (
    CodedDocument,
    CorpusFacts,
    Manifest,
    ModelFacts,
    SAEFacts,
    Settings,
    TokenizerFacts,
    pack,
    write_shard,
)
from qwen_scope_lens.stores.codec import Packed
from qwen_scope_lens.stores.facts import versions
from qwen_scope_lens.stores.shard_files import damage, shard_folder

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


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["build", "measure"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--positions", type=int, default=41_000_000)
    parser.add_argument("--shard-docs", type=int, default=512)
    parser.add_argument("--least-free", type=float, default=12, help="GB of the disk")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    {"build": build}[options.what](options)


if __name__ == "__main__":
    main()

"""Pages of every feature of a layer in the real shape, from a synthetic store.

    python benchmarks/dashboard.py            # 65,536 features, 1M tokens, Qwen3-8B's width
    python benchmarks/dashboard.py --small    # the same code in a minute

Everything is random but for its shape: d_model 4096, k = 50, a vocabulary of 151,936, features that
fire with Zipf's frequencies. The store is made first and not counted; the rest runs in a fresh
process, whose peak of resident memory includes the weights. Seconds are CPU time of one thread.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from _measure import cpu_name

import qwen_scope_lens as qsl
from qwen_scope_lens.models import Unembedding, Vocabulary
from qwen_scope_lens.site import gather, write_site
from qwen_scope_lens.site import layer as layer_module
from qwen_scope_lens.stores import (
    CodedDocument,
    CorpusFacts,
    FeatureStore,
    Manifest,
    ModelFacts,
    SAEFacts,
    Settings,
    TokenizerFacts,
    pack,
    write_shard,
)

REF, LAYER = "qwen3-8b-base/w64k-l0-50/20", 20
DOC_TOKENS, SHARD_DOCS, K = 256, 512, 50


def make_store(folder: Path, n_tokens: int, d_sae: int, vocabulary: int) -> None:
    """Zipf's features and tokens; a document leans to some features of its own."""
    rng = np.random.default_rng(0)
    n_docs = n_tokens // DOC_TOKENS
    share = 1 / (np.arange(d_sae) + 20.0)
    share = np.cumsum(rng.permutation(share / share.sum()))
    corpus = CorpusFacts("synthetic", n_docs, "0" * 64, shard_docs=SHARD_DOCS, labels=("lang",))
    manifest = Manifest(
        model=ModelFacts("synthetic", None, "float32", 4096, "0" * 64),
        tokenizer=TokenizerFacts("synthetic", vocabulary, "0" * 64),
        saes={LAYER: SAEFacts(REF, d_sae, K, "0" * 64)},
        settings=Settings(),
        labels={"lang": "str"},
        corpora=(corpus,),
        versions={},
    )
    folder.mkdir(parents=True)
    manifest.write(folder)
    for shard in range(manifest.n_shards):
        first, end = corpus.span(shard)
        documents = []
        for doc in range(first, end):
            index = np.searchsorted(share, rng.random((DOC_TOKENS, 2 * K))).clip(0, d_sae - 1)
            dense = {int(i): np.unique(row)[:K] for i, row in enumerate(index)}
            indices = np.zeros((DOC_TOKENS, K), np.int32)
            values = np.zeros((DOC_TOKENS, K), np.float32)
            for i, row in dense.items():
                rng.shuffle(row)
                indices[i, : len(row)] = row
                values[i, : len(row)] = np.sort(rng.gamma(2.0, 4.0, len(row)))[::-1]
            codes = qsl.SparseCodes(torch.from_numpy(values), torch.from_numpy(indices), d_sae)
            ids = (vocabulary * rng.random(DOC_TOKENS) ** 3).astype(np.int64)
            documents.append(
                CodedDocument(
                    key=f"document {doc}",
                    text=None,
                    labels={"lang": f"language {doc % 12}"},
                    token_ids=ids,
                    tokens=[""] * DOC_TOKENS,
                    spans=None,
                    truncated=False,
                    codes={LAYER: pack(codes)},
                    extreme={LAYER: np.zeros(DOC_TOKENS, bool)},
                )
            )
        write_shard(folder, shard, manifest, documents)


class SyntheticTokenizer:
    """Byte-level names as Qwen's tokenizer has them, a third of them not whole characters."""

    backend_tokenizer = SimpleNamespace(decoder="ByteLevel")

    def __init__(self, size: int) -> None:
        self.size = size
        self.added_tokens_decoder: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.size

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"Ġw{i}" if i % 3 else ("ä", "¸", "Ń")[i // 3 % 3] for i in ids]


def synthetic_sae(d_sae: int, d_model: int) -> Any:
    """Only what `gather` looks at. Half precision on disk would change nothing here."""
    rng = torch.Generator().manual_seed(0)
    w = torch.empty(d_sae, d_model)
    for rows in w.split(4096):
        rows.copy_(torch.randn(rows.shape, generator=rng))
    return SimpleNamespace(
        cfg=SimpleNamespace(d_sae=d_sae), W_dec=w, W_enc=w.T, b_enc=torch.zeros(d_sae)
    )


@contextmanager
def timed(name: str, found: dict[str, float]) -> Iterator[None]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on (Linux)
    start = time.process_time()
    yield
    found[name] = found.get(name, 0.0) + time.process_time() - start
    status = Path("/proc/self/status").read_text()
    found[f"{name} peak"] = 1024.0 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]


def measure(store_path: Path, out: Path, d_sae: int, d_model: int, vocabulary: int) -> None:
    torch.set_num_threads(1)
    found: dict[str, float] = {}
    store = FeatureStore.open(store_path)
    weight = torch.empty(vocabulary, d_model, dtype=torch.bfloat16)
    for rows in weight.split(8192):
        rows.copy_(torch.randn(rows.shape))
    end = Unembedding(weight, torch.ones(d_model), 1e-6)
    sae = synthetic_sae(d_sae, d_model)
    for name in ("statistics", "token_effects", "nearest", "break_down"):
        setattr(layer_module, name, _timing(getattr(layer_module, name), name, found))
    with timed("all of gather", found):
        pages = gather(store, LAYER, Vocabulary(SyntheticTokenizer(vocabulary)), end, sae=sae)
    heads = [(f"document {i}", [("lang", f"language {i % 12}")]) for i in range(store.n_docs)]
    with timed("pages and files", found):
        write_site(out, [pages], model="synthetic", made="", documents=heads)
    found["site bytes"] = float(sum(p.stat().st_size for p in out.rglob("*") if p.is_file()))
    found["site files"] = float(sum(p.is_file() for p in out.rglob("*")))
    found["index bytes"] = float(next(out.rglob("index.js")).stat().st_size)
    print(json.dumps(found))


def _timing(work: Any, name: str, found: dict[str, float]) -> Any:
    def wrapped(*values: Any, **options: Any) -> Any:
        with timed(name, found):
            return work(*values, **options)

    return wrapped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--work", type=Path, help="keep the store here")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        store, out, *sizes = arguments.measure
        measure(Path(store), Path(out), *map(int, sizes))
        return
    d_sae, d_model, vocabulary, tokens = (
        (4096, 512, 8192, 50_000) if arguments.small else (65_536, 4096, 151_936, 1_000_000)
    )
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        store = work / f"store-{d_sae}-{tokens}"
        if not store.exists():
            make_store(store, tokens, 65_536 if not arguments.small else d_sae, vocabulary)
        sizes = [str(n) for n in (d_sae, d_model, vocabulary)]
        command = [sys.executable, __file__, "--measure", str(store), str(work / "site"), *sizes]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads(answer.splitlines()[-1])
    print(f"{d_sae:,} features, d_model {d_model:,}, vocabulary {vocabulary:,}, {tokens:,} tokens")
    print(
        f"{cpu_name()}\none thread: seconds of CPU time, and the peak of resident memory with"
        " all weights in it\n"
    )
    rows = {
        "statistics, examples, co-firing": "statistics",
        "promoted and suppressed tokens": "token_effects",
        "nearest directions": "nearest",
        "breakdown by language": "break_down",
        "pages and files": "pages and files",
    }
    for text, key in rows.items():
        print(f"  {text:34} {found[key]:8.1f} s {found[f'{key} peak'] / 1e9:8.2f} GB")
    peak = max(value for name, value in found.items() if name.endswith(" peak"))
    total = found["all of gather"] + found["pages and files"]
    print(f"  {'all':34} {total:8.1f} s {peak / 1e9:8.2f} GB\n")
    print(
        f"site: {found['site files']:,.0f} files, {found['site bytes'] / 1e6:,.0f} MB, of which the"
        f" index {found['index bytes'] / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()

"""Documents to a feature store, against what cannot be avoided and against the usual loop.

    python benchmarks/extract.py > benchmarks/results/extract-cpu.txt
    QWEN_SCOPE_HOME=RELEASE python benchmarks/extract.py --model FOLDER --sae GROUP --layers 10,14 \
        --documents 32 --threads 1 2 > benchmarks/results/real-extract.txt

The floor is a plain HF forward, stopped after the last wanted layer, plus one bare float32 matrix
product with every SAE's encoder, on batches that are tokenised and padded already: nothing is
selected, nothing is written. The usual loop is what users write: a hook on an HF model, a dense
`sae.encode` of SAELens, `nonzero`, and `np.savez` at the end; as it is mostly written (the model is
called whole, logits and all) and with care (the model without its head). Ours is `qsl.extract`:
tokenising, encoding, both views, checksums.

One run of each per round; ratios are medians over rounds, of CPU times of the process and of time
on the wall. Peak memory is what a variant needs beyond the loaded model, whose weights are all read
once before, and beyond loaded code, measured in a fresh process on one thread. It includes the
weights of the SAEs in all variants: both matrices in the loops, as SAELens loads them, the encoders
in the floor, and in ours the pages of the files that are read.
With --model and --sae (a folder and a group of `tools/real`) a real model is measured instead
of the two toys.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens.saes.topk_sae import TopKSAE

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import planted
from _measure import commit, cpu_name, peak_extra, peak_in_fresh_process, shares, today
from tiny_models import make_model, make_tokenizer

import qwen_scope_lens as qsl
from qwen_scope_lens.mini import heldout
from qwen_scope_lens.models import decoder_layers, residuals, unwrap
from qwen_scope_lens.stores import extract, extraction, facts

BATCH = 8  # documents, in the usual loop
TOKENS = 128  # of a document, at most

# Qwen3-0.6B's shape, cut to ten layers; the SAE is random.
MIDDLE = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}
SIZES = {"mini": ("mini-qwen3/w1k-l0-16", [3, 6], 160), "middle": ("local/middle", [5, 7], 16)}

STEPS = (
    (residuals, "_forward", "forward"),
    (extraction, "_encode", "encode"),
    (extraction, "write_shard", "write"),
    (facts, "model_facts", "hash of the model's weights"),
    (facts, "tokenizer_facts", "hash of the tokenizer"),
    (facts, "sae_facts", "hashes of the SAEs"),
)


class Bench:
    """A model, its SAEs and some documents, with the variants to be measured."""

    def __init__(self, size: str, folder: Path, given: argparse.Namespace) -> None:
        self.folder, real, layers = folder, given.model, given.layers
        self.group, self.layers, count = SIZES.get(size, (size, [], given.documents))
        if real is not None:
            self.layers = [int(layer) for layer in layers.split(",")]
            self.model = qsl.load_model(real, dtype=torch.bfloat16)
            self.tokenizer = self.model.tokenizer
        elif size == "mini":
            self.model = qsl.load_model("mini-qwen3")
            self.tokenizer = self.model.tokenizer
        else:
            _write_sae(folder / "home" / "middle", self.layers)
            os.environ["QWEN_SCOPE_HOME"] = str(folder / "home")
            self.tokenizer = _large_tokenizer(MIDDLE["vocab_size"])
            self.model = qsl.load_model(make_model(**MIDDLE), tokenizer=self.tokenizer)
        self.hf = unwrap(self.model)
        with torch.no_grad():  # weights that are pages of a file count as loaded
            self.hf(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
            self.hf.get_input_embeddings().weight.sum()
        self.tokenizer.padding_side = "right"
        self.texts = [record["text"] for record, _ in zip(heldout(), range(count), strict=False)]

    def saelens(self) -> dict[int, TopKSAE]:
        return {n: _plain(qsl.load_sae(f"{self.group}/{n}")) for n in self.layers}

    def batches(self) -> list[Any]:
        options = {"padding": True, "truncation": True, "max_length": TOKENS}
        parts = [self.texts[i : i + BATCH] for i in range(0, len(self.texts), BATCH)]
        return [self.tokenizer(part, return_tensors="pt", **options) for part in parts]

    @torch.no_grad()
    def forward(self, whole: bool, batch: Any, stop: bool = False) -> dict[int, torch.Tensor]:
        found: dict[int, torch.Tensor] = {}

        def hook(layer: int) -> Callable[..., None]:
            def keep(module: Any, args: Any, output: Any) -> None:
                found[layer] = output[0] if isinstance(output, tuple) else output
                if stop and layer == self.layers[-1]:
                    raise StopIteration

            return keep

        modules = decoder_layers(self.hf)
        handles = [modules[n].register_forward_hook(hook(n)) for n in self.layers]
        try:
            (self.hf if whole else self.hf.model)(**batch, use_cache=False)
        except StopIteration:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return found

    def variants(self) -> dict[str, Callable[[], object]]:
        ready, saes = self.batches(), self.saelens()
        weights = {n: (sae.W_enc.T.contiguous(), sae.b_enc) for n, sae in saes.items()}

        @torch.no_grad()
        def floor() -> None:
            for batch in ready:
                residuals = self.forward(False, batch, stop=True)
                for n, x in residuals.items():
                    W, b = weights[n]
                    torch.nn.functional.linear(x[batch["attention_mask"].bool()].float(), W, b)

        @torch.no_grad()
        def usual(whole: bool) -> None:
            rows: dict[int, list[Any]] = {n: [] for n in self.layers}
            for batch in self.batches():
                for n, x in self.forward(whole, batch).items():
                    acts = saes[n].encode(x.float())[batch["attention_mask"].bool()]
                    token, feature = acts.nonzero(as_tuple=True)
                    rows[n].append((token.numpy(), feature.numpy(), acts[token, feature].numpy()))
            for n, parts in rows.items():
                columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
                np.savez(self.folder / f"usual{n}.npz", *columns)

        return {
            "floor": floor,
            "usual loop": lambda: usual(True),
            "usual loop, no head": lambda: usual(False),
            "qsl.extract": self.ours,
        }

    def held(self, variant: str) -> int:
        """The bytes of SAE weights that a variant had in memory before it was measured."""
        shape = qsl.find_group(self.group)
        matrices = {"floor": 1, "qsl.extract": 0}.get(variant, 2)
        return matrices * len(self.layers) * shape.d_sae * shape.d_model * 4

    def ours(self) -> object:
        out = Path(tempfile.mkdtemp(dir=self.folder))
        return extract(
            self.texts,
            model=self.model,
            group=self.group,
            layers=self.layers,
            out=out / "store",
            max_tokens=TOKENS,
            token_budget=BATCH * TOKENS,
            progress=False,
        )


def _write_sae(folder: Path, layers: list[int]) -> None:
    d_model, d_sae = MIDDLE["hidden_size"], 32768
    settings = {"base_model": "a/model", "d_model": d_model, "d_sae": d_sae, "k": 50}
    planted.write_group(folder, range(0), num_layers=MIDDLE["num_hidden_layers"], **settings)
    for n in layers:
        torch.manual_seed(n)
        W = torch.nn.functional.normalize(torch.randn(d_sae, d_model), dim=-1)
        tensors = {"W_enc": W, "W_dec": W.T.contiguous(), "b_enc": torch.zeros(d_sae)}
        torch.save(tensors | {"b_dec": torch.zeros(d_model)}, folder / f"layer{n}.sae.pt")


def _large_tokenizer(size: int) -> Any:
    """Bytes as tokens, in a vocabulary of the real size."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<unused {i}>" for i in range(size - len(tokenizer) - 300)])
    return tokenizer


def _plain(sae: qsl.ScopeSAE) -> TopKSAE:
    """The same weights as SAELens's own class."""
    plain = TopKSAE(sae.cfg)
    plain.load_state_dict({k: v.contiguous() for k, v in sae.state_dict().items()})
    return plain


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    arguments.add_argument("--model", help="a real model's folder, with --sae")
    arguments.add_argument("--sae", help="the group of its SAEs")
    arguments.add_argument("--layers", default="", help="of the real model, such as 10,14")
    arguments.add_argument("--documents", type=int, default=64, help="for a real model")
    arguments.add_argument("--variants", nargs="+", metavar="NAME", help="only these, by name")
    arguments.add_argument("--profile", action="store_true", help="only where our time goes")
    arguments.add_argument("--threads", type=int, nargs="+", default=[1])
    arguments.add_argument("--peak", nargs=2, metavar=("SIZE", "VARIANT"))
    given = arguments.parse_args()
    if given.model:
        given.sizes = [given.sae]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if given.peak:
            bench = Bench(given.peak[0], Path(folder), given)
            variant = bench.variants()[given.peak[1]]
            print(peak_extra(variant) + bench.held(given.peak[1]))
            return
        print(f"{today()}, commit {commit()}; {cpu_name()}; torch {torch.__version__}")
        for size in given.sizes:
            bench = Bench(size, Path(folder), given)
            if given.profile:
                print(f"{len(bench.texts)} documents, qsl.extract: {shares(bench.ours, STEPS)}")
            else:
                report(size, bench, given)


def report(size: str, bench: Bench, given: argparse.Namespace) -> None:
    rounds = given.rounds
    real = []
    if given.model:
        real = ["--model", given.model, "--layers", given.layers]
        real += ["--documents", str(given.documents)]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in bench.batches())
    config = bench.hf.config
    print(
        f"\n{size}: {config.num_hidden_layers} layers, d_model {config.hidden_size}, SAEs of layers"
        f" {bench.layers} ({bench.group}); {len(bench.texts)} documents, {tokens:,} tokens,"
        f" {rounds} rounds"
    )
    variants = bench.variants()
    if given.variants:
        variants = {name: variants[name] for name in given.variants}
    peaks = {
        name: peak_in_fresh_process(__file__, size, name, *real) / 1e6
        for name in variants
        if given.threads[0] == 1
    }
    for threads in given.threads:
        torch.set_num_threads(threads)
        _table(variants, tokens, rounds, threads, peaks)


def _table(
    variants: dict[str, Callable[[], object]],
    tokens: int,
    rounds: int,
    threads: int,
    peaks: dict[str, float],
) -> None:
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    wall: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-1, rounds):
        for name, run in variants.items():
            start, began = time.process_time(), time.perf_counter()
            run()
            if number >= 0:  # a round to warm up
                cpu[name].append(time.process_time() - start)
                wall[name].append(time.perf_counter() - began)

    def ratio(times: dict[str, list[float]], one: str, other: str, width: int) -> str:
        if one not in times or other not in times:
            return f"{'':{width}}"
        pairs = zip(times[one], times[other], strict=True)
        return f"{statistics.median(a / b for a, b in pairs):{width}.2f}"

    print(
        f"\n{f'{threads} threads, CPU time' if threads > 1 else '1 thread, CPU time':24}"
        f"{'tokens/s':>10}{'of floor':>10}{'x usual':>9}{'x no head':>11}{'x no head, wall':>17}"
        f"{'peak MB':>9}"
    )
    for name in variants:
        print(
            f"{name:24}{tokens / statistics.median(cpu[name]):10,.0f}"
            f"{ratio(cpu, name, 'floor', 10)}{ratio(cpu, 'usual loop', name, 9)}"
            f"{ratio(cpu, 'usual loop, no head', name, 11)}"
            f"{ratio(wall, 'usual loop, no head', name, 17)}"
            + (f"{peaks[name]:9.0f}" if name in peaks and threads == 1 else ""),
            flush=True,
        )


if __name__ == "__main__":
    main()

"""What deciding a rule costs: certificates against a full encode, and both against the model.

    python benchmarks/classify.py > benchmarks/results/classify.txt

Residuals of the package's held-out texts (256 documents, 64 tokens) on mini-qwen3, one thread, CPU
time. The rule's features are chosen by how often they fire, because that decides the gain: a
feature that fires on many tokens has many positive pre-activations, and a rule that fires has to be
confirmed. Then the same at a real layer's width, on planted activations: no real SAE is at hand
here, and how many pre-activations are positive is ours to choose, so that part says what the
arithmetic costs and not what a real rule gains. Every case is checked against the full encode.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from _measure import cpu_name, interleaved

from qwen_scope_lens.mini import heldout
from qwen_scope_lens.models import capture, load_model
from qwen_scope_lens.saes import Maxima, Membership, ScopeSAE, ScopeSAEConfig, SparseCodes, load_sae

LAYER = 5
N_DOCS, N_TOKENS = 256, 64
WIDE = {"d_in": 2048, "d_sae": 32768, "k": 50}


def maxima_of(
    codes: SparseCodes, features: list[int], document: torch.Tensor, n_docs: int
) -> torch.Tensor:
    """The document maxima of some features, from a full encode."""
    columns = [(codes.values * (codes.indices == f)).sum(-1) for f in features]
    values = torch.stack(columns, 1)
    out = values.new_zeros((n_docs, len(features)))
    return out.scatter_reduce(0, document[:, None].expand_as(values), values, "amax")


def measure(
    sae: ScopeSAE,
    x: torch.Tensor,
    document: torch.Tensor,
    cases: dict[str, list[int]],
    repeats: int,
    beside: float | None = None,
) -> None:
    """A line a case: CPU time of both ways, and how pairs were settled."""
    n_docs = int(document.max()) + 1
    for name, features in cases.items():
        # As in a long run: the features that fire often are known after the first windows.
        member = Membership(sae, features)
        member.maxima(x, document, n_docs)
        expected = maxima_of(sae.encode_sparse(x), features, document, n_docs)
        member.settled.clear()
        found: Maxima = member.maxima(x, document, n_docs)
        assert torch.equal(found.values, expected), "not what a full encode gives"
        settled = dict(member.settled)
        total = len(x) * len(features)
        encoded = settled.get("encoded", 0) / total
        shares = ", ".join(f"{how} {settled.get(how, 0) / total:.1%}" for how in _HOW[:2])
        ways: dict[str, Callable[[], object]] = {
            "full": lambda f=features: maxima_of(sae.encode_sparse(x), f, document, n_docs),
            "certified": lambda m=member: m.maxima(x, document, n_docs),
        }
        took = interleaved(ways, repeats=repeats)
        fires = float((expected > 0).float().mean())
        full, certified = (1e6 * took[way] / len(x) for way in ("full", "certified"))
        line = (
            f"  {name:34} fires in {fires:4.0%} of documents   full {full:7.1f}   certified"
            f" {certified:7.1f} us/token   {full / certified:5.1f}x   {shares}, full encode"
            f" {encoded:.1%}"
        )
        if beside is not None:
            whole = (beside + took["full"]) / (beside + took["certified"])
            line += f"   with the model {whole:.2f}x"
        print(line, flush=True)


_HOW = ("negative", "outnumbered", "encoded")


def on_the_mini() -> None:
    sae = load_sae(f"mini-qwen3/w1k-l0-16/{LAYER}")
    model = load_model("mini-qwen3", up_to_layer=LAYER)
    texts = [record["text"] for record in heldout()][:: 1735 // N_DOCS][:N_DOCS]
    options = {"max_tokens": N_TOKENS, "truncate": True}
    capture(model, texts[:32], [LAYER], **options)
    start = time.process_time()
    read = capture(model, texts, [LAYER], **options)
    forward = time.process_time() - start
    keep = read.keep(LAYER)
    x, document = read.residuals[LAYER][keep], read.doc_rows()[keep]
    codes = sae.encode_sparse(x)
    often = torch.bincount(codes.indices[codes.active].long(), minlength=sae.cfg.d_sae)
    order = often.argsort(descending=True).tolist()
    alive = [f for f in order if often[f] > 0]
    cases = {
        "1 rare feature": [alive[-len(alive) // 10]],
        "1 feature of middling frequency": [alive[len(alive) // 2]],
        "1 frequent feature": [alive[len(alive) // 20]],
        "2 features of middling frequency": alive[len(alive) // 2 :][:2],
        "10 features of middling frequency": alive[len(alive) // 2 :][:10],
        "32 features, every 32nd": alive[:: max(1, len(alive) // 32)][:32],
    }
    print(
        f"mini-qwen3 layer {LAYER}: {len(x):,} tokens of {len(texts)} documents; the forward to"
        f" this layer takes {1e6 * forward / len(x):.1f} us/token"
    )
    measure(sae, x, document, cases, repeats=5, beside=forward)


def at_full_width() -> None:
    """Rows of unit length, biases that leave about 1% of the pre-activations positive."""
    rng = torch.Generator().manual_seed(0)
    d_in, d_sae, k = WIDE["d_in"], WIDE["d_sae"], WIDE["k"]
    sae = ScopeSAE(ScopeSAEConfig(device="cpu", apply_b_dec_to_input=False, **WIDE))
    with torch.no_grad():
        rows = torch.randn(d_sae, d_in, generator=rng)
        rows /= rows.norm(dim=1, keepdim=True)
        sae.W_enc.copy_(rows.T)
        sae.b_enc.fill_(-1.4)
    n, n_docs = 1024, 32
    weight = torch.arange(1, d_sae + 1).double() ** -0.7  # a few features fire often
    index = torch.multinomial(weight.expand(n, -1), k, generator=rng)
    strength = 2 + 4 * torch.rand(n, k, generator=rng)
    x = torch.nn.functional.embedding_bag(index, rows, mode="sum", per_sample_weights=strength)
    document = torch.arange(n) // (n // n_docs)
    positive = float((x[:64] @ sae.W_enc + sae.b_enc > 0).float().mean())
    print(
        f"\nplanted, {d_in} -> {d_sae}, k {k}: {n:,} tokens; {positive:.1%} of the pre-activations"
        " are positive"
    )
    cases = {
        "1 frequent feature": [3],
        "1 rare feature": [20000],
        "10 features": [*range(500, 510)],
    }
    measure(sae, x, document, cases, repeats=3)


def main() -> None:
    torch.set_num_threads(1)
    print(f"{cpu_name()}, one thread, float32, CPU time\n")
    on_the_mini()
    at_full_width()


if __name__ == "__main__":
    main()

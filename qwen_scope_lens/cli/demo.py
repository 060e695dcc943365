"""A tour, offline, on a layer made on the spot: the true shape of Qwen3-1.7B's, random weights.

Shows what the package does to a file; it needs 1.1 GB in the temporary folder, deleted at the end.
Nothing here has a meaning in language: the weights are noise.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GROUP, LAYER = "qwen3-1.7b-base/w32k-l0-50", 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep", type=Path, help="write the files here, and keep them")


def run(arguments: argparse.Namespace) -> int:
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
        _tour(arguments.keep)
    else:
        with tempfile.TemporaryDirectory(prefix="qwen-scope-demo-") as folder:
            _tour(Path(folder))
    return 0


def _tour(home: Path) -> None:
    import torch
    from sae_lens import SAE

    import qwen_scope_lens as qsl
    from qwen_scope_lens.cli.show import describe
    from qwen_scope_lens.converters.official_to_saelens import convert
    from qwen_scope_lens.saes.verify import measure

    group = qsl.find_group(GROUP)
    print(describe(group), "\n")
    with _step("write a layer in the published layout (random weights)"):
        path = home / group.repo_name / group.file_name(LAYER)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            rng = torch.Generator().manual_seed(0)
            rows = torch.randn(group.d_sae, group.d_model, generator=rng) / group.d_model**0.5
            bias = torch.zeros(group.d_sae), torch.zeros(group.d_model)
            weights = {"W_enc": rows, "W_dec": 2 * rows.T.contiguous(), "b_enc": bias[0]}
            torch.save(weights | {"b_dec": bias[1]}, path)
    os.environ["QWEN_SCOPE_HOME"] = str(home)
    with _step(f'SAE.from_pretrained("{group.release}", "layer{LAYER}")'), qsl.install():
        sae = SAE.from_pretrained(group.release, f"layer{LAYER}")
    print(f"    a {type(sae).__name__} of {group.bytes_per_layer / 1e6:.0f} MB, mapped, not read")
    x = torch.randn(64, group.d_model, generator=torch.Generator().manual_seed(1))
    with _step("encode 64 vectors"), torch.no_grad():
        z = sae.encode(x)
    top = z[0].topk(5)
    print("    the first one's strongest features:", ", ".join(map(str, top.indices.tolist())))
    with _step("verify on these vectors (noise on noise must be refused)"):
        report = measure(sae, x)
    print("    " + str(report).replace("\n", "\n    "))
    assert not report.ok, "noise was accepted"
    with _step("convert to a SAELens folder that loads without this package"):
        (folder,) = convert(group, home, layers=[LAYER], progress=False)
    with _step("SAE.load_from_disk, and compare the weights bit by bit"):
        plain = SAE.load_from_disk(folder)
        assert torch.equal(plain.W_dec, sae.W_dec)
        assert torch.equal(plain.W_enc, sae.W_enc)
    print(f"    equal; a {type(plain).__name__} of SAELens's own")


@contextmanager
def _step(what: str) -> Iterator[None]:
    print(f"* {what} ...", end=" ", flush=True)
    started = time.perf_counter()
    yield
    print(f"{time.perf_counter() - started:.2f} s")

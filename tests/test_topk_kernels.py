"""The Triton kernels against plain PyTorch, in Triton's interpreter, in a fresh process.

`TRITON_INTERPRET` is read when the kernels are defined, and other tests have imported them by now.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

pytestmark = pytest.mark.slow

COMMON = """
import torch
torch.manual_seed(0)
torch.set_num_threads(1)
from qwen_scope_lens.saes.exact import certified
from qwen_scope_lens.saes.exact import kernels
from qwen_scope_lens.saes.exact import topk
from qwen_scope_lens.saes.exact.encoder import Encoder
"""

CANDIDATES = """
# Numbers that bfloat16 holds: the interpreter truncates where a GPU rounds to nearest.
x, rows = (torch.randn(m, 40).bfloat16().float() for m in (70, 300))
bias = torch.randn(300)
for half in (False, True):
    for outliers, weights in ((x[:, :0], rows[:, :0]), (x[:, :3], rows[:, :3])):
        rest = x.clone()
        rest[:, : outliers.shape[1]] = 0  # outliers are multiplied apart
        dense = x @ rows.T + bias
        line = dense.topk(9, dim=1).values[:, -1] - 1e-3
        count, feature, approx = kernels.candidates(
            rest, rows, bias, outliers.contiguous(), weights.contiguous(), line, 12, half
        )
        want = dense >= line[:, None]
        assert torch.equal(count, want.sum(1).int())
        for t in range(70):
            kept = feature[t][feature[t] >= 0].long()
            assert set(kept.tolist()) == set(want[t].nonzero().flatten().tolist())
            torch.testing.assert_close(approx[t, : len(kept)], dense[t, kept], rtol=1e-4, atol=1e-4)
count, feature, _ = kernels.candidates(
    x, rows, bias, x[:, :0], rows[:, :0], torch.full((70,), -1e9), 12, False
)
assert (count == 300).all() and (feature >= 0).all()  # counted in full, stored up to the cap
"""

ENCODE = """
kernels.available = lambda device: True
for mean in (0, 5):
    shift = mean * torch.randn(48)
    rows = torch.randn(512, 48) / 7
    x, bias = torch.randn(33, 48) + shift, 0.1 * torch.randn(512) - rows @ shift
    for dtype in (torch.float32, torch.bfloat16):
        encoder = Encoder(rows.to(dtype), bias.to(dtype))
        want = topk.exact_topk(x.to(dtype), encoder.rows, encoder.bias, 10)
        for precision in (torch.float32, torch.bfloat16):
            values, indices = topk.encode_topk(x.to(dtype), encoder, 10, precision)
            assert torch.equal(indices.sort(1).values, want[1].sort(1).values.int())
            torch.testing.assert_close(values, want[0], rtol=1e-5, atol=1e-5)
        assert encoder.settled["float64"] == 0, encoder.settled
"""

DECODE = """
from qwen_scope_lens.saes.exact.gather import gather_decode
kernels.available = lambda device: True
for dtype in (torch.float32, torch.bfloat16):
    rows = torch.randn(300, 700).to(dtype)
    values, indices = torch.rand(9, 7), torch.randint(0, 300, (9, 7), dtype=torch.int32)
    weight, grads = torch.randn(9, 700), []
    for decode in (gather_decode, lambda v, i, w: (v[..., None] * w[i.long()].float()).sum(1)):
        leaf = values.clone().requires_grad_()
        out = decode(leaf, indices, rows)
        (out.float() * weight).sum().backward()
        grads.append((out.float(), leaf.grad))
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(*grads, rtol=tolerance, atol=tolerance * 20)
assert kernels.decode(values[:0], indices[:0], rows).shape == (0, 700)
"""


def test_in_the_interpreter() -> None:
    script = COMMON + CANDIDATES + ENCODE + DECODE
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

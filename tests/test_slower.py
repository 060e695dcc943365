"""`benchmarks/slower.py`: ratios of two results are matched by name; what got worse is named."""

from __future__ import annotations

from benchmarks.slower import compare

TABLE = """one thread, torch 2.13

d_model 2048, 128 tokens
                          ms  x SAELens  of GEMM  peak MiB
GEMM float32, bare    203.04                1.00
encode certified       76.95       {encode}     0.38        16

Qwen3, 1 x 1024 tokens: {ms} ms
  1.01x [0.92, 1.10]  capture(model)
  {capture}x [0.92, 1.10]  capture(bridge)
235,414 edges/s; 10.8 times as fast
"""
BEFORE = TABLE.format(encode="2.82", capture="1.02", ms=284)


def test_what_got_slower_is_named() -> None:
    assert compare(BEFORE, BEFORE) == ([], 6)
    lines, compared = compare(BEFORE, TABLE.format(encode="2.00", capture="1.53", ms=999))
    assert compared == 6
    assert lines == [
        "1.50 times the cost: Qwen3, 1 x 1024 tokens: ms: capture(bridge)",
        "1.41 times the cost: d_model 2048, 128 tokens: encode certified, x SAELens",
    ]


def test_a_tenth_is_not_slower_and_faster_is_silent() -> None:
    assert compare(BEFORE, TABLE.format(encode="2.60", capture="0.50", ms=1))[0] == []

"""`benchmarks/slower.py`: ratios of two results are matched by name; what got worse is named."""

from __future__ import annotations

from benchmarks.slower import compare, report

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
    assert compare(BEFORE, BEFORE) == ([], 6, 0)
    lines, compared, alone = compare(BEFORE, TABLE.format(encode="2.00", capture="1.53", ms=999))
    assert (compared, alone) == (6, 0)
    assert lines == [
        "1.50 times the cost: Qwen3, 1 x 1024 tokens: ms: capture(bridge)",
        "1.41 times the cost: d_model 2048, 128 tokens: encode certified, x SAELens",
    ]


def test_a_tenth_is_not_slower_and_faster_is_silent() -> None:
    assert compare(BEFORE, TABLE.format(encode="2.60", capture="0.50", ms=1)).slower == []


def test_what_could_not_be_compared_is_named() -> None:
    worse = TABLE.format(encode="2.00", capture="1.02", ms=284)
    pairs = {
        "same.txt": (BEFORE, BEFORE),
        "worse.txt": (BEFORE, worse.replace("bridge", "the bridge")),
        "new.txt": (None, BEFORE),
        "gone.txt": (BEFORE, None),
        "prose.txt": ("3 of 4", "4 of 4"),
        "renamed.txt": ("convert: 1.91x as fast as copying", "copy: 1.91x as fast as copying"),
    }
    lines, slower = report(pairs)
    assert slower
    assert lines == [
        "worse.txt: 5 ratios compared, 2 without a partner, 1 slower",
        "  1.41 times the cost: d_model 2048, 128 tokens: encode certified, x SAELens",
        "6 result files: 5 ratios of 1 files compared, 1 slower by more than 10%;"
        " 6 ratios are of the same measurement",
        "  not measured again (1): same.txt",
        "  only after (1): new.txt",
        "  only before (1): gone.txt",
        "  without a ratio of one run (1): prose.txt",
        "  the ratios have other names (1): renamed.txt",
    ]
    lines, slower = report({"faster.txt": (worse, BEFORE)})
    assert not slower
    assert "6 ratios of 1 files compared, none slower by more than 10%" in lines[-1]
    assert "says nothing about speed" in report({"same.txt": (BEFORE, BEFORE)})[0][0]

"""The tool that runs upstream's suites: what it unpacks, and what it calls a failure."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest

from tools.upstream import suites as upstream_suites
from tools.upstream.tables import KNOWN_BENCHMARKS, SUITES


def pack(path: Path, *members: tuple[str, bytes | str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            if isinstance(content, str):
                entry.type, entry.linkname = tarfile.SYMTYPE, content
                archive.addfile(entry)
            else:
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return path


def test_only_plain_test_files_are_unpacked(tmp_path: Path) -> None:
    archive = pack(
        tmp_path / "x-1.tar.gz",
        ("x-1/tests/unit/test_a.py", b"a"),
        ("x-1/x/module.py", b"no"),
        ("x-1/tests/../../out.py", b"no"),
        ("/x-1/tests/test_b.py", b"no"),
        ("x-1/tests/link.py", "/etc/passwd"),
        ("x-1/setup.py", b"no"),
    )
    root = upstream_suites.unpack(archive)
    assert root is not None
    files = [p.relative_to(root).as_posix() for p in root.rglob("*") if not p.is_dir()]
    assert files == ["tests/unit/test_a.py"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["files", "x-1.tar.gz"]


def test_a_distribution_without_tests_says_so(tmp_path: Path) -> None:
    assert upstream_suites.unpack(pack(tmp_path / "y-1.tar.gz", ("y-1/y.py", b""))) is None


def test_too_large_a_suite_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_suites, "MOST_BYTES", 3)
    archive = pack(tmp_path / "z-1.tar.gz", ("z-1/tests/a.py", b"1234"))
    with pytest.raises(upstream_suites.CannotFetch, match="larger than 3"):
        upstream_suites.unpack(archive)


def test_what_cannot_be_fetched_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no index\n")

    monkeypatch.setattr(upstream_suites, "BUILD", tmp_path)
    monkeypatch.setattr(subprocess, "run", offline)
    monkeypatch.setattr(sys, "argv", ["upstream_suites.py", "--only", "sae-lens"])
    assert upstream_suites.main() == 2
    assert "not run. sae-lens==" in capsys.readouterr().out


def test_what_is_printed_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"mini-qwen3/thin/one": ["failed", "boom"], "mini-qwen3/thin/two": ["passed", ""]}
    monkeypatch.setattr(upstream_suites, "BUILD", tmp_path)
    monkeypatch.setattr(upstream_suites, "run_benchmarks", lambda: found)
    words = ["suites", "--only", "benchmarks", "--out", str(tmp_path / "out.txt")]
    monkeypatch.setattr(sys, "argv", words)
    assert upstream_suites.main() == 1
    kept = (tmp_path / "out.txt").read_text()
    assert kept == capsys.readouterr().out
    assert kept.startswith("commit ")
    assert f"transformer-lens {version('transformer-lens')}" in kept
    assert "FAILED mini-qwen3/thin/one: boom" in kept


def test_a_failure_counts_unless_it_is_a_known_difference(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = {
        "tests/test_a.py::one": ["passed", ""],
        "tests/test_a.py::two": ["failed", "E boom"],
        "tests/test_a.py::three": ["failed", "E other"],
        "tests/test_a.py::four": ["skipped", "needs a GPU"],
    }
    assert upstream_suites.judge("t", found, {"::three": "we refuse it", "::nine": "gone"}) == 1
    printed = capsys.readouterr().out
    assert "1 failed, 1 known difference, 1 left out, 1 passed" in printed
    assert "FAILED tests/test_a.py::two: E boom" in printed
    assert "known difference: we refuse it" in printed
    assert "left out: needs a GPU" in printed
    assert "no test is named '::nine'" in printed


def test_every_row_gives_its_reason() -> None:
    for table in (KNOWN_BENCHMARKS, *(t for s in SUITES.values() for t in (s.left_out, s.known))):
        assert all(len(reason.split()) >= 4 for reason in table.values())
    for suite in SUITES.values():
        assert all(name.startswith("tests/") for name in suite.modules)

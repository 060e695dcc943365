"""The README, the docs and the help texts: their blocks are read, checked, and some of them run.

`make follow` runs all of them, each page in a fresh process; that takes many minutes.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from subprocess import run

import pytest

import qwen_scope_lens as qsl
from qwen_scope_lens.cli.verbs import VERBS, main
from tools.docs.follow import follow, outputs, row, write_outputs
from tools.docs.pages import Page, commands, help_pages, parser_of, read_page, read_pages
from tools.docs.prose import findings
from tools.docs.reader import Place

ROOT = Path(__file__).parent.parent
PAGES = read_pages(ROOT)
HELPS = help_pages()
WITH_CODE = [page for page in PAGES if page.code]
LANGUAGES = {"", "python", "bash", "output", "yaml", "json"}

ALONE = ("encode.md", "loading.md", "models.md", "steer.md", "store.md", "verify.md")
"""Pages whose Python takes little time, and needs nothing that their shell blocks make."""


def ids(page: Page) -> str:
    return page.name


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_blocks_are_read(page: Page) -> None:
    """No fence is left open, Python parses, and what does not run says what it needs."""
    assert page.path is not None
    fences = re.findall(r"^```(\w*)", page.path.read_text("utf-8"), re.MULTILINE)
    assert len(fences) == 2 * len(page.blocks)
    for block in page.blocks:
        assert block.language in LANGUAGES, block.where
        if block.language == "python":
            ast.parse(block.text)
    for before, after in zip((None, *page.blocks), page.blocks, strict=False):
        if after.language == "output":
            assert before in page.code, f"{after.where} is the output of nothing that runs"
            assert after.text.strip(), after.where
            assert not re.search(r"/(root|home|tmp|work)/", after.text), (
                f"{after.where}: a path here"
            )


@pytest.mark.parametrize("page", WITH_CODE, ids=ids)
def test_a_page_begins_on_the_mini(page: Page) -> None:
    """Its first block that runs names the toy model, or writes the sample files."""
    first = next(block for block in page.code if block.runs)
    toys = r"mini-qwen3|qsl mini texts|qsl serve|qsl reproduce list"
    assert re.search(toys, first.runs), first.where


@pytest.mark.parametrize("page", [*WITH_CODE, *HELPS], ids=ids)
def test_every_command_has_options_that_exist(
    page: Page, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that need a hub or a GPU, too."""
    for block in page.code:
        if block.language != "bash":
            continue
        for words in commands(block.text):
            assert words[0] in VERBS, f"{block.where} shows `qsl {words[0]}`"
            try:
                parser_of(words[0]).parse_args(words[1:])
            except SystemExit:
                pytest.fail(f"{block.where}: qsl {' '.join(words)}\n{capsys.readouterr().err}")


def test_there_is_something_to_check() -> None:
    """Without it, the tests of this file would check nothing."""
    assert {"README.md", "rank.md", "steer.md", "store.md"} <= {page.name for page in WITH_CODE}
    found = [block for page in HELPS for block in page.code]
    assert len(found) > 25
    assert sum(len(commands(block.text)) for block in found) > 80
    assert any(block.needs == "the hub" for block in found)
    script = "ls|qsl list --json # no 'qsl'\nfor x in 1; do qsl show \\\n 'a\nb' 2> f; done"
    assert commands(script) == [["list", "--json"], ["show", "a\nb"]]


@pytest.mark.filterwarnings("ignore:You are loading an SAE using")
@pytest.mark.parametrize("name", ALONE)
def test_python_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one script, without a name that the page does not make."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    try:
        for block in next(page for page in PAGES if page.name == name).code:
            if block.language == "python":
                exec(compile(block.runs, block.where, "exec"), names)
    finally:
        qsl.uninstall()


PAGE = """
```python
import os
folder = os.getcwd()
print("made by Python")
open("file", "w").write("one")
open("serve.py", "w").write('''
import http.server
server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
print(f"http://127.0.0.1:{server.server_port}/file")
server.serve_forever()
''')
```

```output
old
```

```bash
cat file  # the page's own
python serve.py  # until Ctrl-C
# needs a GPU:
exit 1
```

```output
one
```

```python
assert folder == os.getcwd() and __name__ == "__main__"
```

```bash
false | cat
```

```bash
echo never
```
"""


def test_a_page_is_followed_as_by_a_reader(tmp_path: Path) -> None:
    """In order, with one Python; servers are stopped; it ends at the first failure."""
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    page = read_page(path)
    found = follow(page, Place.of(Path(sys.executable), tmp_path / "home"), tmp_path / "folder")
    assert [bool(o.failure) for o in found] == [False, False, False, True], found
    assert "ended with 1" in found[-1].failure
    assert [new for _, new in outputs(page, found)] == ["made by Python\n", "one\n"]
    assert row(page, found)[1:5] == (2, 2, 2, 1)
    write_outputs(page, found)
    assert path.read_text() == PAGE.replace("output\nold", "output\nmade by Python")


def test_the_sample_files_are_what_the_verbs_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qwen_scope_lens.bench import PromptFormat, read_prompts
    from qwen_scope_lens.labels import LabelPack
    from qwen_scope_lens.steering import Plan
    from qwen_scope_lens.stores import read_corpus
    from qwen_scope_lens.train.runs import GRPO, SASFT, read_run

    out = tmp_path / "texts"
    assert main(["mini", "texts", "--out", str(out)]) == 0
    assert str(out / "corpus.jsonl") in capsys.readouterr().out
    languages = [document.labels["lang"] for document in read_corpus(out / "corpus.jsonl")]
    assert {languages.count(language) for language in set(languages)} == {30}
    assert len(set(languages)) == 8
    sums = [prompt.text for prompt in read_prompts(out / "sums.jsonl", PromptFormat())]
    some = [prompt.text for prompt in read_prompts(out / "some-sums.jsonl", PromptFormat())]
    assert sums[0] == "7 - 4 ="
    assert len(set(sums)) == len(sums) > len(some) > 40
    assert set(some) < set(sums)
    assert list(LabelPack.read(out / "labels.jsonl"))
    Plan.load(out / "plan.json")
    for name, keys in (("sasft", SASFT), ("grpo", GRPO)):
        read_run(out / f"{name}.yaml", keys)
    assert main(["mini", "texts", "--out", str(out)]) == 0  # the same again
    (out / "new.jsonl").write_text("mine")
    assert main(["mini", "texts", "--out", str(out)]) == 1
    assert "is not a sample file" in capsys.readouterr().err
    assert (out / "new.jsonl").read_text() == "mine"


@pytest.mark.slow
def test_snippets_pass_the_type_checker(tmp_path: Path) -> None:
    """With the types that users get. The cache is that of `make lint`: the first run is slow."""
    modules = []
    for page in WITH_CODE:
        module = tmp_path / f"page_{page.name.removesuffix('.md').lower()}.py"
        parts = [block.text for block in page.code if block.language == "python"]
        module.write_text("\n".join(["# mypy: allow-redefinition-new", *parts]), "utf-8")
        modules.append(str(module))
    wrong = tmp_path / "page_wrong.py"  # without it, a package of Any would pass, too
    wrong.write_text('import qwen_scope_lens as qsl\nqsl.load_sae(7)\nqsl.Edit(8, "add")\n')
    command = [sys.executable, "-m", "mypy", "--no-pretty", *modules, str(wrong)]
    found = run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    errors = [line for line in found.stdout.splitlines() if ": error: " in line]
    assert all(wrong.name in line for line in errors), found.stdout
    assert len(errors) == 2, found.stdout + found.stderr


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_exist(page: Page) -> None:
    assert page.path is not None
    for target in re.findall(r"\]\(([^)#]+)\)", page.path.read_text("utf-8")):
        if not target.startswith("http"):
            assert (page.path.parent / target).exists(), f"{page.name} links to {target}"


def test_the_first_screen_is_short() -> None:
    """What a user gets, in about twenty lines, with a picture."""
    first = (ROOT / "README.md").read_text().splitlines()[:32]
    assert any(line.startswith("![") for line in first)
    assert any("SAE.from_pretrained" in line for line in first)


def test_prose_is_plain(tmp_path: Path) -> None:
    """No page, docstring or comment has a pattern of the list; and the script finds them."""
    assert not [str(found) for found in findings()]
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("It stores 4 bytes a token, which is no problem.\n")
    (tmp_path / "CONTRIBUTING.md").write_text("There is no such thing.\n")
    assert [found.place for found in findings(tmp_path)] == ["README.md:1", "README.md:1"]

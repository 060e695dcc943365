"""The snippets of docs/models.md run, on a tiny model in place of the real one."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from tiny_models import make_model, make_sae, make_tokenizer

DOC = Path(__file__).parents[1] / "docs" / "models.md"


@pytest.mark.skipif(
    importlib.util.find_spec("qwen_scope_lens.saes.verify") is None, reason="no saes.verify yet"
)
def test_the_snippets_of_the_page(tmp_path: Path) -> None:
    make_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    space = {
        "name": str(tmp_path),
        "sae": make_sae(),
        "corpus": ["text"] * 5,
        "max_fvu": 1e9,
    }
    snippets = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.S)
    assert len(snippets) == 4
    for snippet in snippets:
        exec(snippet, space)

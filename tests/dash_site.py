"""A small site of features for tests, from documents that would like to run as code."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

from feature_stores import GROUP, LAYER

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.labels import Label, LabelPack
from qwen_scope_lens.mini import heldout
from qwen_scope_lens.stores import FeatureStore, extract

ARABIC = "مرحبا بالعالم، هذا برنامج صغير لإدارة الملفات."
HOSTILE = (
    "<script>document.title = 'owned'</script> and </script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)> <svg onload=alert(3)> <a href='javascript:alert(4)'>click</a>",
    "javascript:alert(5) ${7*7} {{7*7}} `${alert(6)}` <!-- --> ]]> \u2028\u2029 '\"); alert(7); //",
    "\u202eright to left override\u202c, \u2066isolates\u2069, \ufeffmarks, \x07bells \x00nothing",
    f"{ARABIC} 👩‍👩‍👧 中文字符 한국어",
)
HOSTILE_LABEL = "<b>bold</b><script>alert(8)</script> \u202e"


def build_small_store(folder: Path) -> FeatureStore:
    """Every language of the minis' held-out texts, and what is hostile."""
    records = [
        r for lang in ("en", "zh", "ja", "ru", "de") for r in list(heldout("prose", lang))[:4]
    ]
    documents = [
        {"key": f"{r['lang']}-{i}", "text": r["text"], "lang": r["lang"], "n": i}
        for i, r in enumerate(records)
    ]
    documents += [
        {"key": f"<i>{i}</i>", "text": text, "lang": "</script><b>"}
        for i, text in enumerate(HOSTILE)
    ]
    return extract(
        documents,
        model="mini-qwen3",
        group=GROUP,
        layers=[2, LAYER],
        out=folder,
        max_tokens=64,
        progress=False,
    )


def small_labels(path: Path, feature: int, hostile: int) -> Path:
    refs = {feature: "a label to search for", hostile: HOSTILE_LABEL}
    return LabelPack(
        Label(FeatureRef(GROUP, LAYER, number), text, 0.75, {"source": "a test"})
        for number, text in refs.items()
    ).write(path)


def read_data(site: Path, name: str) -> Any:
    """The content of a data file, which must be base64 in one call and nothing else."""
    text = (site / "data" / f"{name}.js").read_text("ascii")
    found = re.fullmatch(r'QSL\.deliver\("([\w./-]+)","([A-Za-z0-9+/=]*)"\);\n', text)
    assert found is not None, f"{name} is more than one call"
    assert found[1] == name
    return json.loads(gzip.decompress(base64.b64decode(found[2])))

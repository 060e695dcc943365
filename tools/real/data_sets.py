"""The public data sets as a table of facts: which field of which file is text.

One row per file. `group` names the field whose values are kept on one side of the split: near
copies of one text (the cases of a HateCheck functionality, the translations of an article) would
otherwise stand on both.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen_scope_lens.errors import BadFile

__all__ = ["DATA_SETS", "DataSet", "texts"]


@dataclass(frozen=True)
class DataSet:
    """A gzipped JSON-lines file under the data folder."""

    file: str  # without .jsonl.gz
    field: str  # that holds the text
    kind: str  # what the quotas of the mixture count
    group: str = ""  # the field that the split goes by; empty: the text itself

    def path(self, data: Path) -> Path:
        return data / f"{self.file}.jsonl.gz"


DATA_SETS: tuple[DataSet, ...] = (
    *(
        DataSet(f"toxicity/{lang}-hatecheck", "text", "toxicity", "functionality")
        for lang in ("en", "de", "es", "ar", "hi", "nl", "zh")
    ),
    DataSet("toxicity/en-davidson", "text", "toxicity"),
    DataSet("toxicity/zh-cold-train", "text", "toxicity"),
    DataSet("toxicity/zh-cold-test", "text", "toxicity"),
    DataSet("toxicity/ja-inspection", "text", "toxicity"),
    DataSet("benchmarks/mmlu-pro", "question", "benchmarks"),
    DataSet("benchmarks/mmlu-test", "question", "benchmarks"),
    DataSet("benchmarks/mmlu-dev", "question", "benchmarks"),
    DataSet("benchmarks/gsm8k-test", "question", "benchmarks"),
    DataSet("benchmarks/math-test", "question", "benchmarks"),
    DataSet("benchmarks/humaneval", "prompt", "code"),
    DataSet("benchmarks/mbpp", "code", "code"),
    DataSet("confusion/lcb-prompts", "prompt", "prompts"),
    DataSet("parallel/udhr", "text", "parallel", "article"),
    DataSet("safety/xstest", "prompt", "safety"),
    DataSet("safety/strongreject", "forbidden_prompt", "safety"),
    DataSet("safety/harmbench", "Behavior", "safety"),
)


def texts(row: DataSet, data: Path) -> Iterator[tuple[str, str]]:
    """`(key, text)` of every line: equal keys fall on one side of the split."""
    path, number = row.path(data), 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                number += 1
                record = json.loads(line)
                text = str(record[row.field]).strip()
                key = str(record[row.group]) if row.group else text
                if text:
                    yield f"{row.group}/{key}", text
    except (OSError, ValueError, EOFError) as error:
        raise BadFile(
            f"{path} cannot be read as gzipped JSON lines ({error}): expected the data set's file,"
            " or leave its folder out with --data"
        ) from error
    except KeyError as error:
        raise BadFile(f"{path}, line {number}: there is no field {error}") from error

"""What a run leaves: the kept rows, every candidate with its outcome, and the settings.

`data.jsonl` loads with `datasets`; the folder `data.run/` beside it holds the ledger, all
candidates and the settings that a continued run has to share. Files are rewritten whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_scope_lens.errors import BadFile, StoreMismatch
from qwen_scope_lens.features import corpus
from qwen_scope_lens.files import read_json, whole_file, write_json
from qwen_scope_lens.synthesis.pipeline import Counts, Synthesis
from qwen_scope_lens.synthesis.recipe import Recipe

__all__ = ["amount_of", "check_settings", "read_rows", "read_settings", "run_folder", "save",
           "settings_of"]  # fmt: skip

FORMAT, VERSION, MADE_BY = "qsl-synthesis", 1, "qsl synth run"

MAY_CHANGE = ("attempts", "per_feature", "candidates", "count_others", "variants")
"""Of a recipe: what a continued run may have more or less of; answers that were paid stay good."""


def run_folder(out: Path) -> Path:
    return out.with_name(f"{out.stem}.run")


def settings_of(synthesis: Synthesis, model: str) -> dict[str, Any]:
    """What decides the content of an output, without what only decides how much of it."""
    from qwen_scope_lens import __version__

    recipe = synthesis.recipe.to_dict()
    replier, judge = synthesis.replier, synthesis.judge
    return {
        "targets": synthesis.targets.digest,
        "task": synthesis.targets.task,
        "saes": [str(ref) for ref in synthesis.targets.saes],
        "model": model,
        "reader": synthesis.reader.identity,
        "generator": synthesis.writer.name,
        "replier": replier.name if replier else synthesis.writer.name,
        "judge": judge.name if judge else None,
        "recipe": {key: value for key, value in recipe.items() if key not in MAY_CHANGE},
        "caution": {str(ref): most for ref, most in synthesis.caution.items()},
        "templates": synthesis.templates.sha256,
        "package": __version__,
    }


def amount_of(recipe: Recipe, budget: int, counts: Counts) -> dict[str, Any]:
    """What decides how much is written, and may change when a run is continued."""
    some = recipe.to_dict()
    return {"budget": budget, "budget_counts": counts, **{key: some[key] for key in MAY_CHANGE}}


def check_settings(
    folder: Path, settings: Mapping[str, Any], amount: Mapping[str, Any] | None = None
) -> None:
    """Write them beside a new run; refuse to continue one that was made with others. `amount` is
    that of the last run."""
    path = folder / "settings.json"
    last = {} if amount is None else {"amount": dict(amount)}
    if not path.exists():
        write_json(path, FORMAT, VERSION, {**settings, **last})
        return
    before = read_json(path, FORMAT, VERSION, MADE_BY)
    for name, value in settings.items():
        if name != "package" and before.get(name) != value:
            old, new = _difference(before.get(name), value)
            raise StoreMismatch(
                f"{folder} belongs to a run with another {name} ({old} there, {new} here): choose"
                " another --out, or the same settings to continue it"
            )
    if last and before.get("amount") != last["amount"]:
        write_json(path, FORMAT, VERSION, {**before, **last})


def read_settings(out: Path) -> dict[str, Any] | None:
    """The settings and the last amount of the run that wrote an output; None: not beside it."""
    path = run_folder(out) / "settings.json"
    return read_json(path, FORMAT, VERSION, MADE_BY) if path.exists() else None


def save(synthesis: Synthesis, out: Path) -> None:
    """The kept rows to `out`, every candidate to the run's folder."""
    name = synthesis.writer.name
    rows = [one.to_row(name, synthesis.chat, synthesis.recipe.read) for one in synthesis.candidates]
    kept = [row for row in rows if row["outcome"] == "kept"]
    for path, some in ((out, kept), (run_folder(out) / "candidates.jsonl", rows)):
        with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in some)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of one of these files; an error names the line."""
    rows = []
    for where, row in corpus.read_rows(path):
        found = set(row) if isinstance(row, dict) else set()
        if missing := {"messages", "target", "activation", "verified", "fires", "outcome"} - found:
            raise BadFile(
                f"{where} lacks {', '.join(sorted(missing))}: expected rows as `{MADE_BY}` writes"
                " them"
            )
        rows.append(dict(row))
    return rows


def _difference(before: Any, now: Any) -> tuple[str, str]:
    """The two values, or of two mappings the entries that differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                return f"{key} {str(before.get(key))[:60]}", f"{key} {str(now.get(key))[:60]}"
    return str(before)[:60], str(now)[:60]

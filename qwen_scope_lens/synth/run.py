"""One run from targets to files, for the command line and for scripts.

The output `data.jsonl` loads with `datasets`. The folder `data.run/` beside it holds the ledger,
all candidates, and the settings with which a run can be continued. After every wave the files are
written anew as a whole. `pipeline.py` decides about the candidates.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.errors import BadFile, StoreMismatch
from qwen_scope_lens.files import read_json, whole_file, write_json
from qwen_scope_lens.models.architecture import Model
from qwen_scope_lens.models.residuals import EXTREME_NORM_RATIO
from qwen_scope_lens.saes.layer_sae import LayerSAE
from qwen_scope_lens.stores import corpus
from qwen_scope_lens.stores.reread import StoreReader
from qwen_scope_lens.synth.pipeline import Counts, Synthesis
from qwen_scope_lens.synth.reader import Reader
from qwen_scope_lens.synth.recipe import SCOPE, Recipe
from qwen_scope_lens.synth.targets import TargetSet
from qwen_scope_lens.writers.generator import Generator
from qwen_scope_lens.writers.ledger import Ledger, Prices
from qwen_scope_lens.writers.templates import Templates

__all__ = [
    "amount_of",
    "check_settings",
    "known_texts",
    "made_with",
    "open_reader",
    "read_rows",
    "read_settings",
    "run_folder",
    "save",
    "settings_of",
    "synthesise",
]

FORMAT, VERSION, MADE_BY = "qsl-synthesis", 1, "qsl synth run"

MAY_CHANGE = ("attempts", "per_feature", "candidates", "count_others", "variants")
"""Fields of a recipe that may change when a run is continued: paid answers stay valid."""


def run_folder(out: Path) -> Path:
    return out.with_name(f"{out.stem}.run")


def settings_of(synthesis: Synthesis, model: str) -> dict[str, Any]:
    """The settings that decide what an output contains, without those of its amount."""
    from qwen_scope_lens.version import __version__

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
    """The settings that decide how much is written; they may change in a continued run."""
    some = recipe.to_dict()
    return {"budget": budget, "budget_counts": counts, **{key: some[key] for key in MAY_CHANGE}}


def check_settings(
    folder: Path, settings: Mapping[str, Any], amount: Mapping[str, Any] | None = None
) -> None:
    """Write the settings of a new run, or refuse to continue a run of other settings.

    `amount` replaces the amount of the last run.
    """
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
    """The settings and last amount of the run that wrote an output; None where they are missing."""
    path = run_folder(out) / "settings.json"
    return read_json(path, FORMAT, VERSION, MADE_BY) if path.exists() else None


def save(synthesis: Synthesis, out: Path) -> None:
    """Write the kept rows to `out`, and every candidate to the run's folder."""
    name = synthesis.writer.name
    rows = [one.to_row(name, synthesis.chat, synthesis.recipe.read) for one in synthesis.candidates]
    kept = [row for row in rows if row["outcome"] == "kept"]
    for path, some in ((out, kept), (run_folder(out) / "candidates.jsonl", rows)):
        with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in some)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of an output or of its candidates; an error names the line."""
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
    """The two values; of two mappings the first entry that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                return f"{key} {str(before.get(key))[:60]}", f"{key} {str(now.get(key))[:60]}"
    return str(before)[:60], str(now)[:60]


def synthesise(
    targets: TargetSet,
    out: Path,
    *,
    writer: Generator,
    reader: Reader,
    budget: int,
    counts: Counts = "written",
    recipe: Recipe = SCOPE,
    replier: Generator | None = None,
    judge: Generator | None = None,
    templates: Templates | None = None,
    prices: Prices | None = None,
    caution: Mapping[FeatureRef, float] | None = None,
    known: Sequence[str] = (),
    wave: int = 64,
    model: str = "",
    progress: bool = False,
) -> Synthesis:
    """Write examples for the features that `targets` wants, into `out` and the folder beside it.

    Called again after a stop, a crash or `kill -9`, it continues: what was answered or measured
    before costs nothing. `budget` is the number of candidates, kept or not, or with
    `counts="kept"` the number of kept examples. A continued run may raise the budget, and may
    count the other way. `model` only names the reader's model in the settings.
    """
    from tqdm import tqdm

    folder = run_folder(out)
    with Ledger.open(folder, prices) as ledger:
        run = Synthesis(
            targets,
            recipe,
            writer,
            reader,
            ledger,
            templates or Templates(),
            replier,
            judge,
            caution or {},
            known,
            wave,
        )
        check_settings(folder, settings_of(run, model), amount_of(recipe, budget, counts))
        before = ledger.spent.calls

        def is_new(done: Synthesis) -> bool:
            """Whether the run has ended or has passed the point that an earlier run reached. Before
            that the earlier run is only repeated, and its longer files stay."""
            return bool(done.stopped) or ledger.spent.calls > before

        unit = "candidate" if counts == "written" else "kept example"
        with tqdm(total=budget, unit=unit, desc="synthesis", disable=not progress) as bar:

            def after_wave(done: Synthesis) -> None:
                bar.update(len(done.candidates if counts == "written" else done.kept) - bar.n)
                bar.set_postfix_str(f"{len(done.kept)} kept, cost {ledger.spent.cost:.4f}")
                if is_new(done):
                    save(done, out)

            try:
                run.run(budget, after_wave, counts)
            finally:
                if is_new(run):
                    save(run, out)
    return run


def open_reader(
    targets: TargetSet, model: Model, device: str = "cpu", more: Iterable[FeatureRef] = ()
) -> tuple[Reader, dict[LayerRef, LayerSAE]]:
    """A reader with the SAEs of the targets and of `more` features, and these SAEs."""
    from qwen_scope_lens.saes.load import open_sae

    refs = sorted({*targets.saes, *(ref.sae for ref in more)})
    saes = {ref: open_sae(ref, device=device) for ref in refs}
    ratio = float(targets.provenance.get("extreme_norm_ratio", EXTREME_NORM_RATIO))
    return Reader(model, saes, extreme_norm_ratio=ratio), saes


def made_with(targets: TargetSet) -> StoreReader:
    """The model, layers, dtype and revision with which texts were read when targets were found."""
    made, layers = targets.provenance, tuple(sorted({ref.layer for ref in targets.saes}))
    return StoreReader(
        str(made["model"]), layers, dtype=made.get("dtype"), revision=made.get("revision")
    )


def known_texts(corpus: Path) -> list[str]:
    """The texts of a corpus. The text of a chat is the contents of its messages."""
    from qwen_scope_lens.stores.corpus import read_corpus

    return [
        document.text
        if document.text is not None
        else "\n\n".join(str(message["content"]) for message in document.messages or ())
        for document in read_corpus(corpus)
    ]

"""One run from targets to files: opens the ledger, shows progress, saves whatever was finished.

What happens to a candidate is `pipeline.py`; this is the frame around it, for the command line and
for scripts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.saes.sae import ScopeSAE
from qwen_scope_lens.synthesis.generator import Generator
from qwen_scope_lens.synthesis.ledger import Ledger, Prices
from qwen_scope_lens.synthesis.output import (
    amount_of,
    check_settings,
    run_folder,
    save,
    settings_of,
)
from qwen_scope_lens.synthesis.pipeline import Counts, Synthesis
from qwen_scope_lens.synthesis.reader import Reader
from qwen_scope_lens.synthesis.recipe import SCOPE, Recipe
from qwen_scope_lens.synthesis.targets import TargetSet
from qwen_scope_lens.synthesis.templates import Templates

__all__ = ["known_texts", "open_reader", "synthesise"]


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

    Called again after a stop, a crash or `kill -9` it continues: what was answered and measured
    before costs nothing. `budget` is the number of candidates, kept or not, or with
    `counts="kept"` that of kept examples; both can be raised, and one exchanged for the other, when
    a run is continued. `model` only names the reader's model in the settings.
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
            """Whether it is past the point to which an earlier run came, or at its end: while
            that one is only repeated from the ledger, its longer files stay."""
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
    targets: TargetSet, model: Any, device: str = "cpu", more: Iterable[FeatureRef] = ()
) -> tuple[Reader, dict[LayerRef, ScopeSAE]]:
    """The reader of the SAEs of the targets and of `more` features, and those SAEs."""
    from qwen_scope_lens.saes.load import load_sae

    refs = sorted({*targets.saes, *(ref.sae for ref in more)})
    saes = {ref: load_sae(ref, device=device) for ref in refs}
    return Reader(model, saes), saes


def known_texts(corpus: Path) -> list[str]:
    """The texts of a corpus; of chats the contents of their messages."""
    from qwen_scope_lens.features.corpus import read_corpus

    return [
        document.text
        if document.text is not None
        else "\n\n".join(str(message["content"]) for message in document.messages or ())
        for document in read_corpus(corpus)
    ]

"""Run the stages of a recipe, keep what is finished, and never show what is out of date.

A stage reads settings, sources of data and results of earlier stages through its `Work`, which
writes down everything that was read before the stage goes on. So a stage is *finished* only as long
as all of that is what it was, and its files are there. A killed stage goes on in its folder if it
has read the same so far, and else begins anew.

    FOLDER/stages/STAGE.json    state, what was read, the result, the files
    FOLDER/STAGE/               the stage's own files
    FOLDER/NAME.html            the page, made when every stage is finished
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.catalog import MINI_HOME, bundled_model
from qwen_scope_lens.errors import BadFile, CannotWrite, ScopeError, UnknownName
from qwen_scope_lens.files import (
    exclusive,
    file_sha256,
    open_regular,
    read_json,
    refuse_link,
    whole_file,
    write_json,
)
from qwen_scope_lens.recipes.recipe import KINDS, Recipe
from qwen_scope_lens.saes.locate import local_path
from qwen_scope_lens.tables import plain
from qwen_scope_lens.version import __version__

if TYPE_CHECKING:
    from qwen_scope_lens.models.architecture import Model

__all__ = ["Outcome", "Run", "Stage", "State", "Work", "run", "stages_of", "states"]

FORMAT, VERSION = "qwen-scope-lens/recipe-stage", 1
MADE_BY = "qsl reproduce run"
HASHED = 64 * 2**20
"""Of larger files, the two ends of `END` bytes are hashed, because all weights take minutes."""
END = 2**20


@dataclass(frozen=True)
class Stage:
    """One step of a recipe: a function of the kind's module, which is imported when it runs.

    The function returns what later stages and the page read, as JSON has it.
    """

    name: str
    what: str  # one line for people
    kind: str

    def work(self, work: Work) -> Mapping[str, Any]:
        module = import_module(f"qwen_scope_lens.recipes.{self.kind}")
        result: Mapping[str, Any] = getattr(module, self.name)(work)
        return result


@dataclass(frozen=True)
class State:
    """What is known of a stage in a folder: "finished", "begun", "out of date" or "not begun"."""

    name: str
    state: str
    why: str = ""
    seconds: float | None = None
    result: Mapping[str, Any] | None = None  # of a finished stage


@dataclass(frozen=True)
class Outcome:
    """What a run that is finished has: its page, and what each stage returned."""

    page: Path
    results: Mapping[str, Mapping[str, Any]]  # by stage


@dataclass
class Run:
    """A recipe, its folder, and how it is run. The `options` change no result by intention."""

    recipe: Recipe
    folder: Path
    data: Path | None = None  # a local folder in place of the hub
    model: Model | None = None  # in memory, in place of the recipe's name
    options: Mapping[str, Any] = field(default_factory=dict)  # device, token_budget, sae_memory
    say: Callable[[str], None] = lambda line: None
    loaded: dict[int | None, Any] = field(default_factory=dict)  # models, by their last layer

    def __post_init__(self) -> None:
        if self.data is None and self.recipe.is_smoke:
            self.data = MINI_HOME

    def record(self, stage: str) -> Path:
        return self.folder / "stages" / f"{stage}.json"

    def now(self, what: str, key: str) -> Any:
        """The present value of something that a stage reads; its record holds the former one."""
        if what == "setting":
            return plain(self.recipe.settings.get(key))
        if what == "source":
            return plain(dict(self.recipe.data[key])) if key in self.recipe.data else None
        if what == "place":
            return None if self.data is None else str(self.data.resolve())
        if what == "stage":
            return _read(self.record(key)).get("made") if self.record(key).is_file() else None
        if what == "file":
            return file_facts(Path(key))
        if what == "sae":
            return _sae_facts(key)
        if what == "package":
            return __version__
        raise BadFile(f"{self.folder} was written by another version: {what!r:.40} was read")


class Work:
    """What a stage may read and where it writes. Everything that it reads goes into its record."""

    def __init__(self, run: Run, stage: str, reads: dict[str, Any]) -> None:
        self.run, self.stage, self.reads = run, stage, reads
        self.folder = run.folder / stage
        self.options, self.say, self.is_smoke = run.options, run.say, run.recipe.is_smoke
        self._note("package", "version")

    def __getitem__(self, key: str) -> Any:
        """A setting of the recipe."""
        self._note("setting", key)
        if key not in self.run.recipe.settings:
            raise UnknownName(f"the recipe has no setting {key!r}, and stage {self.stage} reads it")
        if key == "sae":
            for ref in self.run.recipe.saes:
                self._note("sae", ref)
        return self.run.recipe.settings[key]

    @property
    def layers(self) -> list[int]:
        """The layers of the recipe, ascending."""
        _ = self["layers"], self["sae"]
        return self.run.recipe.layers

    def source(self, name: str) -> Mapping[str, Any]:
        """How the recipe describes a source of data."""
        if name not in self.run.recipe.data:
            raise UnknownName(
                f"recipe {self.run.recipe.name} has no source {name!r:.60}: it has"
                f" {', '.join(self.run.recipe.data)}"
            )
        self._note("source", name)
        self._note("place", "data")
        return self.run.recipe.data[name]

    def uses(self, path: Path) -> Path:
        """A file or folder from outside, whose content is part of what the stage read."""
        self._note("file", str(path))
        return path

    def result(self, stage: str) -> Mapping[str, Any]:
        """What an earlier stage returned."""
        self._note("stage", stage)
        found: Mapping[str, Any] = _read(self.run.record(stage))["result"]
        return found

    def path(self, stage: str, name: str = "") -> Path:
        """A file of this stage or an earlier one."""
        if stage != self.stage:
            self.result(stage)
        return self.run.folder / stage / name

    def model(self, up_to_layer: int | None = None) -> Any:
        """The recipe's model, or the one in memory that the run was given."""
        name = self["model"]
        folder = bundled_model(name) or Path(name)
        if folder.is_dir():
            self.uses(folder)
        if self.run.model is not None:
            return self.run.model
        import torch

        from qwen_scope_lens.models.open import open_model

        dtype = self["dtype"]
        if up_to_layer in self.run.loaded:
            return self.run.loaded[up_to_layer]
        self.run.loaded.clear()  # one model in memory at a time
        self.say(f"loading {name}")
        self.run.loaded[up_to_layer] = open_model(
            name,
            dtype=None if dtype is None else getattr(torch, dtype),
            up_to_layer=up_to_layer,
            device=self.options.get("device"),
            revision=self["model_revision"],
        )
        return self.run.loaded[up_to_layer]

    def trained_model(self) -> str:
        """What a training run's file calls the model: its name, or the whole path of its folder.

        A stage that trains calls this first, so that a revision is refused before any work.
        """
        if self["model_revision"] is not None:
            raise BadFile(
                "training runs read a model by name only: download the revision, and pass its"
                " folder with --model"
            )
        name = str(self["model"])
        return str(Path(name).resolve()) if Path(name).is_dir() else name

    def training_run(
        self, name: str, data: Path, trainer: Mapping[str, Any] | None = None, **more: Any
    ) -> Path:
        """Write the file of a training run, which will write into the folder `name` beside it."""
        run = self.path(self.stage, f"{name}.yaml")
        content = {
            "model": self.trained_model(),
            "train": str(data.resolve()),
            **more,
            "trainer": {**self["trainer"], "output_dir": name, **(trainer or {})},
        }
        if self["lora"]:
            content["lora"] = self["lora"]
        with whole_file(run) as path:
            path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return run

    def _note(self, what: str, key: str) -> None:
        if f"{what}:{key}" in self.reads:
            return
        self.reads[f"{what}:{key}"] = self.run.now(what, key)
        write_json(
            self.run.record(self.stage), FORMAT, VERSION, {"state": "begun", "reads": self.reads}
        )


def stages_of(recipe: Recipe) -> tuple[Stage, ...]:
    return tuple(Stage(name, what, recipe.kind) for name, what in KINDS[recipe.kind].items())


def run(
    recipe: Recipe,
    folder: Path,
    *,
    data: Path | None = None,
    model: Model | None = None,
    options: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Do every stage that is not finished, and write the page.

    `data` is a folder with the files that the sources name; without it they come from the hub.
    `model` is a model in memory in place of the recipe's. A killed run goes on when it is called
    again.
    """
    from qwen_scope_lens.recipes.page import make_page

    job = Run(recipe, folder, data, model, options or {}, say)
    page = folder / f"{recipe.name}.html"
    refuse_link(folder / "stages")
    with exclusive(folder):
        for number, stage in enumerate(stages := stages_of(recipe), start=1):
            head = f"[{number}/{len(stages)}] {stage.name}: {stage.what}"
            before = state_of(job, stage)
            if before.state == "finished":
                say(f"{head}: finished before")
                continue
            page.unlink(missing_ok=True)  # what is not computed is not shown
            say(head + (f" ({before.why})" if before.why else ""))
            do_stage(job, stage, before)
        done = [state_of(job, stage) for stage in stages]
        make_page(job, done).save(page)
    return Outcome(page, {state.name: state.result for state in done if state.result is not None})


def states(recipe: Recipe, folder: Path, data: Path | None = None) -> list[State]:
    """What is finished in a folder, what is out of date and why."""
    job = Run(recipe, folder, data)
    known: dict[str, State] = {}
    for stage in stages_of(recipe):
        found = state_of(job, stage)
        if found.state in ("finished", "begun"):
            read = _read(job.record(stage.name))["reads"]
            old = [name for name in known if f"stage:{name}" in read and known[name].result is None]
            if old:
                why = f"reads {', '.join(old)}, to be done again first"
                found = State(stage.name, "out of date", why)
        known[stage.name] = found
    return list(known.values())


def do_stage(job: Run, stage: Stage, before: State) -> None:
    own = job.folder / stage.name
    refuse_link(own)
    if before.state == "not begun" and own.exists():
        raise CannotWrite(f"{own} is there and no recipe made it: choose another --out")
    if before.state == "out of date" and own.exists():
        shutil.rmtree(own)
    own.mkdir(parents=True, exist_ok=True)
    reads: dict[str, Any] = {}
    began = time.monotonic()
    result = plain(dict(stage.work(Work(job, stage.name, reads))))
    files = {
        path.relative_to(own).as_posix(): file_facts(path, times=False)
        for path in sorted(own.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
    content = {
        "state": "finished",
        "reads": reads,
        "result": result,
        "files": files,
        "made": time.time_ns(),  # so that later stages are done again when this one is
        "seconds": round(time.monotonic() - began, 1),
    }
    write_json(job.record(stage.name), FORMAT, VERSION, content)


def state_of(job: Run, stage: Stage) -> State:
    path = job.record(stage.name)
    if not path.is_file():
        return State(stage.name, "not begun")
    found = _read(path)
    changed = [
        name.partition(":")[2] or name
        for name, was in found["reads"].items()
        if job.now(*name.split(":", 1)) != was
    ]
    if changed:
        return State(stage.name, "out of date", f"changed: {', '.join(changed)}")
    if found["state"] != "finished":
        return State(stage.name, "begun", "goes on")
    own = job.folder / stage.name
    for name, facts in found["files"].items():
        if not (own / name).is_file() or file_facts(own / name, times=False) != facts:
            return State(stage.name, "out of date", f"{own / name} is missing or changed")
    return State(stage.name, "finished", "", found["seconds"], found["result"])


def _read(path: Path) -> dict[str, Any]:
    found = read_json(path, FORMAT, VERSION, MADE_BY)
    finished: dict[str, Any] = {"result": dict, "files": dict, "seconds": (int, float), "made": int}
    kinds: dict[str, Any] = {
        "state": str,
        "reads": dict,
        **(finished if found.get("state") == "finished" else {}),
    }
    if wrong := [key for key, kind in kinds.items() if not isinstance(found.get(key), kind)]:
        raise BadFile(f"{path} is damaged ({', '.join(wrong)}): remove it, and run the stage again")
    return found


def file_facts(path: Path, times: bool = True) -> Any:
    """What tells whether a file, or a folder with all in it, is what it was.

    A file of at most `HASHED` bytes is hashed whole. Of a larger one, size and both ends are taken,
    and with `times` both times of change: that of the content can be set back, that of the entry
    cannot. Results go without times, so that a copied folder is not done again.
    """
    if path.is_dir():
        inside = [part.relative_to(path) for part in sorted(path.rglob("*")) if part.is_file()]
        facts = [
            [part.as_posix(), file_facts(path / part, times)]
            for part in inside
            if not any(name.startswith(".") for name in part.parts)
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    if not path.is_file():
        return None
    known = path.stat()
    if known.st_size <= HASHED:
        return file_sha256(path)
    with open_regular(path) as file:
        ends = hashlib.sha256(file.read(END))
        file.seek(-END, os.SEEK_END)
        ends.update(file.read())
    changed = [known.st_mtime_ns, known.st_ctime_ns] if times else []
    return [known.st_size, ends.hexdigest(), *changed]


def _sae_facts(address: str) -> Any:
    """The facts of a layer's local file; None for a file of the hub, whose revision is a setting,
    and for a group that is gone."""
    try:
        path = local_path(LayerRef.parse(address))
    except ScopeError:
        return None
    return None if path is None else file_facts(path)

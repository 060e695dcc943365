"""A recipe: one experiment of the paper as a YAML file that people read, copy and edit.

    name, kind, title, paper    which experiment this is; `kind` names the stages that do it
    settings                    everything that a stage reads; `--set key=value` changes one
    open                        settings for which the paper gives no value, and why ours is ours
    data                        sources: on the hub, and the file in a local folder (`--data`)
    figures                     where our figure stands in the results, the paper's, the tolerance
    estimate                    sizes from which disk, memory and hours are estimated
    smoke                       settings and sources with which the embedded mini runs every stage

This module reads and checks the file. `engine.py` runs it and `page.py` shows the outcome.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from qwen_scope_lens.catalog import find_group
from qwen_scope_lens.errors import BadFile, UnknownName
from qwen_scope_lens.files import load_yaml, read_text
from qwen_scope_lens.recipes.settings import (
    ESTIMATE,
    FIGURE,
    SETTINGS,
    SOURCE,
    WORD,
    check,
    check_all,
)

__all__ = ["KINDS", "Figure", "Recipe", "names", "open_recipe"]

FOLDER = Path(__file__).parent

NAME = r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}"
"""The name of a recipe, which is that of its page in the folder of results."""

KINDS: Mapping[str, Mapping[str, str]] = {
    "bench": {
        "prompts": "items of every benchmark, as prompts",
        "footprints": "features at the last token of every prompt",
        "measure": "R, R-hat, overlap, and the panel's results",
    },
    "steering": {
        "layers": "which layer's feature of this number the texts of the case activate",
        "blame": "where the feature stands among those that the bad reply activates",
        "doses": "effect and cost against strength, beside random directions",
    },
    "toxicity": {
        "texts": "labelled texts of every language, with a fixed split",
        "features": "features of all languages in one store",
        "residuals": "mean residuals of all texts, for a probe beside the rules",
        "rules": "K x layer x language, the layer that is chosen, baselines",
        "across": "transfer from the first language, overlap of best features",
        "efficiency": "less discovery data, macro-averaged over languages",
    },
    "safety": {
        "roles": "who writes, answers and judges, before anything else is done",
        "strata": "features of seed data with equal parts of four types, and of anchor data",
        "targets": "features that matter for safety, and which of them the seed data lacks",
        "synthesis": "vanilla prompts and rewrites for these, and as many that no feature directs",
        "coverage": "targets that are activated, by texts written and by texts kept",
        "train": "one fine-tuning run for each mixture of data",
        "rates": "harmful prompts that are answered, benign ones that are refused",
    },
    "sasft": {
        "table": "features of the target language by monolinguality, and their thresholds",
        "train": "one fine-tuning run for each lambda; 0 is plain fine-tuning",
        "replies": "sampled replies of every arm, and their code-switching ratio",
    },
    "repetition": {
        "loops": "replies of the model itself that end in a loop",
        "rises": "features that rise most over a repetition",
        "causes": "which of them make the model loop, beside random directions",
        "gates": "steered replies loop, replies with a random direction do not",
        "train": "GRPO with rare negatives, and vanilla GRPO",
        "ratios": "repeat ratio on held-out prompts at every checkpoint",
    },
}
"""The stages of each kind. A kind is a module of this room, with one function per stage that takes
a `Work`, and `draw` for the page."""

NEEDED = ("name", "kind", "title", "paper", "settings", "data", "figures", "estimate", "smoke")
ALLOWED = (*NEEDED, "open")


@dataclass(frozen=True)
class Figure:
    """One figure of the paper, and where ours stands: `STAGE.key.key` in the results."""

    name: str
    ours: str
    paper: float | None = None  # None: the paper gives no number, ours is shown alone
    tolerance: float | None = None  # ours: the paper's figures are rounded, and it gives no errors
    above: bool = False  # the paper says "more than"
    note: str = ""


@dataclass(frozen=True)
class Recipe:
    """A recipe as it will run: the file's content with every change that was asked for."""

    name: str
    kind: str
    title: str
    paper: str  # the section, equations and figures that it repeats
    settings: Mapping[str, Any]
    data: Mapping[str, Mapping[str, Any]]
    figures: tuple[Figure, ...]
    estimate: Mapping[str, Any]
    smoke: Mapping[str, Any]
    open: Mapping[str, str] = field(default_factory=dict)
    is_smoke: bool = False
    changed: tuple[tuple[str, Any, Any], ...] = ()  # (key, in the file, now)

    def with_settings(self, changes: Mapping[str, Any]) -> Recipe:
        """The recipe with other values. A key is a setting, or a path such as `data.mmlu.file`.

        `data.NAME` with a mapping is a source, which may be a new one.
        """
        parts = {name: deepcopy(dict(getattr(self, name))) for name in CHANGEABLE}
        known = {".".join(path): where for path, where in _leaves(parts)}
        changed = list(self.changed)
        for key, value in changes.items():
            full = key if key.split(".")[0] in ("data", "estimate") else f"settings.{key}"
            place, last = _place(parts, full.split("."), known)
            if place.get(last) != value:
                changed.append((key, place.get(last), value))
            place[last] = value
        _check_values(self.name, parts["settings"], parts["data"], parts["estimate"])
        return replace(
            self,
            settings=parts["settings"],
            data=parts["data"],
            estimate=parts["estimate"],
            changed=tuple(changed),
        )

    @property
    def layers(self) -> list[int]:
        """The layers of the setting `layers`, `all` or a list, as the group of SAEs has them."""
        group, wanted = find_group(str(self.settings["sae"])), self.settings["layers"]
        if wanted == "all":
            return list(group.layers)
        good = isinstance(wanted, list) and wanted and all(type(n) is int for n in wanted)
        if not good:
            raise BadFile(f"layers is {wanted!r:.60}: expected all, or a list such as [10, 20]")
        return sorted({group.check_layer(layer) for layer in wanted})

    @property
    def saes(self) -> list[str]:
        """The addresses of the SAEs that stages read, such as `qwen3-8b-base/w64k-l0-50/20`."""
        one = self.settings.get("layer")
        layers = {*self.layers, *([one] if type(one) is int else [])}
        return [f"{find_group(str(self.settings['sae'])).short}/{n}" for n in sorted(layers)]

    def for_smoke(self) -> Recipe:
        """The same stages on the embedded mini and its held-out texts."""
        settings = {**self.settings, **self.smoke.get("settings", {})}
        data = dict(self.smoke.get("data", self.data))
        estimate = {**self.estimate, **self.smoke.get("estimate", {})}
        return replace(self, settings=settings, data=data, estimate=estimate, is_smoke=True)


CHANGEABLE = ("settings", "data", "estimate")


def names() -> tuple[str, ...]:
    """The recipes that come with the package, in the order of the paper's sections."""
    found = [(open_recipe(path.stem).paper, path.stem) for path in FOLDER.glob("*.yaml")]
    return tuple(name for _, name in sorted(found))


def open_recipe(name: str | Path) -> Recipe:
    """Read a recipe by its name, or the file of one of your own."""
    path = recipe_file(name)
    import yaml

    try:
        content = load_yaml(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BadFile(f"{path} cannot be read as YAML: {error}") from error
    return _checked(path, content)


def recipe_file(name: str | Path) -> Path:
    """The file of a recipe; raises for a name that is neither shipped nor a file."""
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UnknownName(f"{path} does not exist: `qsl reproduce show NAME --yaml` prints one")
        return path
    shipped = {file.stem: file for file in FOLDER.glob("*.yaml")}
    if str(name) not in shipped:
        near = difflib.get_close_matches(str(name), shipped, n=2, cutoff=0.4)
        hint = f"nearest: {', '.join(near)}; " if near else ""
        raise UnknownName(
            f"no recipe is called {str(name)!r:.60}; {hint}there are {', '.join(sorted(shipped))}."
            " A file of your own ends in .yaml"
        )
    return shipped[str(name)]


def recipe_text(name: str | Path) -> str:
    """The file itself, for people who copy it."""
    return read_text(recipe_file(name))


def _checked(path: Path, content: Any) -> Recipe:
    if not isinstance(content, Mapping):
        raise BadFile(f"{path} holds a {type(content).__name__}: expected {', '.join(NEEDED)}")
    missing = [key for key in NEEDED if key not in content]
    unknown = [str(key) for key in content if key not in ALLOWED]
    if missing or unknown:
        raise BadFile(
            f"{path}: "
            + "; ".join(
                [f"{key} is missing" for key in missing]
                + [f"{key!r:.40} is not a part of a recipe" for key in unknown]
            )
            + f". The parts are {', '.join(ALLOWED)}"
        )
    if not (isinstance(content["name"], str) and re.fullmatch(NAME, content["name"])):
        raise BadFile(
            f"{path}: name {content['name']!r:.80}: expected 1 to 64 letters, digits, - _ and .,"
            " not beginning with a dot, because the page is called so"
        )
    if not isinstance(content["kind"], str) or content["kind"] not in KINDS:
        raise BadFile(f"{path}: kind {content['kind']!r:.40}: expected one of {', '.join(KINDS)}")
    for key in ("title", "paper"):
        check(path, key, content[key], WORD)
    for key in ("settings", "data", "estimate", "smoke", "open"):
        if not isinstance(content.get(key, {}), Mapping):
            raise BadFile(f"{path}: {key} is not a mapping of names to values")
    check_all(path, "open", content.get("open", {}), {})
    smoke = content["smoke"]
    for key, value in smoke.items():
        if key not in CHANGEABLE or not isinstance(value, Mapping):
            raise BadFile(f"{path}: smoke.{key}: expected mappings, {', '.join(CHANGEABLE)}")
    if lost := [key for key in content.get("open", {}) if key not in content["settings"]]:
        raise BadFile(f"{path}: open names {', '.join(lost)}, which settings does not have")
    if lost := [k for k in content["smoke"].get("settings", {}) if k not in content["settings"]]:
        raise BadFile(f"{path}: smoke sets {', '.join(lost)}, which settings does not have")
    if lost := sorted(_settings_of(content["kind"], path) - set(content["settings"])):
        raise BadFile(f"{path}: settings lacks {', '.join(lost)}, which its stages read")
    without: Mapping[str, Any] = {}
    for more in (without, smoke):
        _check_values(
            path,
            {**content["settings"], **more.get("settings", {})},
            more.get("data", content["data"]),
            {**content["estimate"], **more.get("estimate", {})},
        )
    return Recipe(**{**content, "figures": _figures(path, content["figures"])})


def _figures(path: Path, rows: Any) -> tuple[Figure, ...]:
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise BadFile(f"{path}: figures is not a list of mappings")
    try:
        figures = tuple(Figure(**row) for row in rows)
    except TypeError as error:
        parts = ", ".join(part.name for part in fields(Figure))
        raise BadFile(f"{path}: a figure has other parts than {parts} ({error})") from error
    for number, (row, figure) in enumerate(zip(rows, figures, strict=True)):
        check_all(path, f"figures.{number}", row, FIGURE)
        if figure.above and figure.paper is None:
            raise BadFile(f"{path}: figures.{number}: above is true, but paper gives no number")
    return figures


def _check_values(where: Path | str, settings: Mapping[str, Any], data: Any, sizes: Any) -> None:
    """Every setting, source and size against the tables of `settings.py`."""
    check_all(where, "settings", settings, SETTINGS)
    check_all(where, "estimate", sizes, ESTIMATE)
    if not isinstance(data, Mapping):
        raise BadFile(f"{where}: data is {data!r:.40}: expected a mapping of sources")
    _check_sources(where, data)
    for name, source in data.items():
        check_all(where, f"data.{name}", source, SOURCE)
        columns = source.get("columns") or {}
        for key in (*columns, *columns.values(), *(source.get("where") or {})):
            check(where, f"a column of data.{name}", key, WORD)


def _settings_of(kind: str, path: Path) -> set[str]:
    """The settings that every recipe of a kind has, by one that comes with the package."""
    if path.parent == FOLDER:
        return set()
    shipped = (load_yaml(file) for file in sorted(FOLDER.glob("*.yaml")))
    return next((set(one["settings"]) for one in shipped if one["kind"] == kind), set())


def _check_sources(path: Path | str, data: Mapping[str, Any]) -> None:
    for name, source in data.items():
        if not isinstance(source, Mapping) or not set(source) <= set(SOURCE):
            extra = set(source) - set(SOURCE) if isinstance(source, Mapping) else {source}
            raise BadFile(
                f"{path}: source {name} has {', '.join(sorted(map(str, extra)))!r:.80}: expected"
                f" some of {', '.join(SOURCE)}"
            )
        if not {"rows", "hub", "task", "file"} & set(source):
            raise BadFile(f"{path}: source {name} has no rows, hub data set, task or file")


def _leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if not isinstance(value, Mapping):
        return [(path, value)]
    return [(path, value)] + [
        leaf for key, part in value.items() for leaf in _leaves(part, (*path, str(key)))
    ]


def _place(
    parts: dict[str, Any], path: list[str], known: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """The mapping that holds a key, and the key in it; raises for a key that is not there."""
    full = ".".join(path)
    new_source = path[0] == "data" and len(path) == 2
    new_part = path[0] == "data" and len(path) == 3 and path[2] in SOURCE
    if full not in known and not new_source and not (new_part and ".".join(path[:2]) in known):
        near = difflib.get_close_matches(full, known, n=3, cutoff=0.4)
        hint = ", ".join(key.removeprefix("settings.") for key in near)
        raise UnknownName(
            f"the recipe has no setting {full.removeprefix('settings.')!r:.60}"
            + (f"; nearest: {hint}" if hint else "")
            + ". `qsl reproduce show NAME` lists them"
        )
    place: Any = parts
    for key in path[:-1]:
        place = place[key]
    return place, path[-1]

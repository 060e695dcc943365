"""What a verb reads is looked at first: a wrong name or an empty file is refused in under a second.

`add_argument(..., action=Input, check=store)` says what an argument has to be. Once the whole
command line is parsed, and before the verb runs, `check_inputs` calls the checks. None of them
imports torch, SAELens or transformers, which takes many seconds. A check that passes promises
nothing: the verb reads everything again.
"""

from __future__ import annotations

import argparse
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.catalog import bundled_model, find_group
from qwen_scope_lens.errors import (
    BadCorpus,
    BadFile,
    CannotWrite,
    CheckpointMissing,
    LayerOutOfRange,
    NotACheckpoint,
    UnknownName,
)
from qwen_scope_lens.files import is_url, open_regular, read_json

if TYPE_CHECKING:
    from qwen_scope_lens.stores.manifest import Manifest

__all__ = [
    "Input",
    "calibration",
    "check_inputs",
    "corpus",
    "data",
    "device",
    "edit",
    "features",
    "file",
    "file_or_folder",
    "free_port",
    "group",
    "group_layers",
    "labels",
    "lasting",
    "layer_address",
    "layers_in",
    "made_by",
    "model",
    "models",
    "path",
    "plan",
    "refs",
    "refuse_empty_paths",
    "sae_files",
    "sae_folder",
    "site",
    "store",
    "store_or_corpus",
    "store_or_sae",
    "store_sae_or_feature",
    "stored_label",
    "stored_layers",
    "unchecked",
]

DTYPES = ("bfloat16", "float16", "float32")
DEVICES = r"(cpu|cuda|mps|xpu|xla|npu|hpu|mtia|vulkan|privateuseone|meta)(:\d{1,3})?"

Check = Callable[[Any, argparse.Namespace], object]


class Input(argparse.Action):
    """An argument with a check, which is called with its value and all arguments.

    With `repeated=True` the option may be given again, and the check is called for each value.
    """

    def __init__(self, *names: Any, check: Check, repeated: bool = False, **options: Any) -> None:
        super().__init__(*names, **options)
        self.check, self.repeated = check, repeated

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest) or []
        setattr(namespace, self.dest, [*before, values] if self.repeated else values)


def check_inputs(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Call the checks of the verb and of its words, in the order of its `--help`."""
    for action in parser._actions:
        value = getattr(arguments, action.dest, None)
        if isinstance(action, argparse._SubParsersAction):
            check_inputs(action.choices[str(value)], arguments)
        elif isinstance(action, Input) and value is not None:
            each = value if action.repeated or action.nargs in ("*", "+") else [value]
            for one in each:
                action.check(one, arguments)


def refuse_empty_paths(parser: argparse.ArgumentParser) -> None:
    """Let no option of the verb and of its words take '' for the folder that one is in."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                refuse_empty_paths(below)
        elif action.type is Path:
            action.type = path


def path(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not a path: name a file or a folder")
    return Path(text)


# --- files ---------------------------------------------------------------------------------------


def file(path: Path | str, _: argparse.Namespace) -> None:
    """A file that is there and is not empty."""
    place = Path(path).expanduser()
    try:
        with open_regular(place) as opened:
            empty = not opened.read(1)
    except FileNotFoundError as error:
        raise BadFile(f"there is no file {path}") from error
    except IsADirectoryError as error:
        raise BadFile(f"{path} is a folder: expected a file") from error
    if empty:
        raise BadFile(f"{path} is empty")


def file_or_folder(path: Path | str, arguments: argparse.Namespace) -> None:
    """A folder, or a file that is there and is not empty."""
    if not Path(path).expanduser().is_dir():
        file(path, arguments)


def made_by(verb: str, format: str) -> Check:
    """A check for a JSON file that one of our verbs wrote."""

    def check(path: Path, _: argparse.Namespace) -> None:
        read_json(path, format, None, verb)

    return check


def sae_folder(path: str, _: argparse.Namespace) -> None:
    """What SAELens's `save_model` wrote."""
    from qwen_scope_lens.saes.locate import SAE_CFG_FILENAME

    if not (Path(path) / SAE_CFG_FILENAME).is_file():
        raise CheckpointMissing(
            f"{path} has no {SAE_CFG_FILENAME}: expected a folder that SAELens's save_model wrote"
        )


def corpus(path: Path | str, _: argparse.Namespace) -> None:
    """A file with at least one row, a folder, or what may be the name of a dataset on the hub."""
    from qwen_scope_lens.stores.corpus import read_corpus, read_rows

    if read_corpus(path).size is not None and next(read_rows(path), None) is None:
        raise BadCorpus(f"{path} is empty: it has no documents")


def labels(path: Path, _: argparse.Namespace) -> None:
    from qwen_scope_lens.labels.packs import LabelPack

    LabelPack.read(path)


def plan(path: Path, _: argparse.Namespace) -> None:
    from qwen_scope_lens.steering.plan import Plan

    Plan.load(path)


def features(path: Path, _: argparse.Namespace) -> None:
    """A file with addresses of features, best first."""
    from qwen_scope_lens.steering.plan_for import read_features

    read_features(path)


def calibration(path: Path, _: argparse.Namespace) -> None:
    from qwen_scope_lens.steering.typical import Calibration

    Calibration.load(path)


def site(path: Path, _: argparse.Namespace) -> None:
    """What `qsl dash build` wrote."""
    from qwen_scope_lens.site.data_files import require_site

    require_site(path)


# --- stores --------------------------------------------------------------------------------------


def store(path: Path | str, _: argparse.Namespace) -> Manifest:
    from qwen_scope_lens.stores.remote import open_manifest

    return open_manifest(path)


def lasting(place: Path | str, _: argparse.Namespace) -> None:
    """Where a store is written to: a folder, or a URL that is there when the command has ended."""
    if is_url(place):
        from qwen_scope_lens.stores.remote import Remote

        Remote.of(str(place)).refuse_memory()


def data(path: str, arguments: argparse.Namespace) -> None:
    """A feature store with the label, or a corpus and what is needed to extract it."""
    from qwen_scope_lens.stores.corpus import read_corpus
    from qwen_scope_lens.stores.manifest import Manifest, is_stored, model_and_group

    places = (arguments.store, f"{path}.store", arguments.data)
    model_name, group_name = model_and_group(arguments.model, arguments.sae, *places)
    if is_stored(path, model_name, group_name):
        manifest = Manifest.open(Path(path).expanduser())
        for name in (arguments.label, getattr(arguments, "language", None)):
            if name is not None:
                manifest.check_label(name)
        for layer in arguments.layers or ():
            manifest.sae(layer, Path(path))
        return
    corpus(path, arguments)
    if Path(path).is_file():
        read_corpus(path, text=arguments.text).check_label(arguments.label)
    row = find_group(str(group_name))
    for layer in arguments.layers or ():
        row.check_layer(layer)
    model(str(model_name), arguments)


def store_or_sae(name: str, arguments: argparse.Namespace) -> None:
    if Path(name).is_dir():
        store(name, arguments)
    else:
        LayerRef.parse(name)


def store_sae_or_feature(name: str, arguments: argparse.Namespace) -> None:
    """A store, or the address of an SAE or of one of its features."""
    if feature_of(name) is None:
        store_or_sae(name, arguments)


def feature_of(name: str) -> FeatureRef | None:
    """The feature at an address; None for the address of an SAE, a folder, or anything else."""
    if Path(name).is_dir():
        return None
    try:
        LayerRef.parse(name)
    except (UnknownName, LayerOutOfRange):
        try:
            LayerRef.parse(name.rpartition("/")[0])
        except (UnknownName, LayerOutOfRange):
            return None
        return FeatureRef.parse(name)
    return None


def store_or_corpus(path: str, arguments: argparse.Namespace) -> None:
    from qwen_scope_lens.stores.manifest import Manifest

    if not Manifest.exists(Path(path)):
        corpus(path, arguments)


def unchecked(_: Any, __: argparse.Namespace) -> None:
    """For an argument that the check of another one looks at."""


def layers_in(*names: str) -> Check:
    """A check for layers: every store that one of these arguments names has them."""

    def check(layers: Sequence[int] | int, arguments: argparse.Namespace) -> None:
        for folder in (getattr(arguments, name) for name in names):
            manifest = store(folder, arguments)
            for layer in [layers] if isinstance(layers, int) else layers:
                manifest.sae(layer, folder)

    return check


stored_layers = layers_in("store")


def stored_label(name: str, arguments: argparse.Namespace) -> None:
    store(arguments.store, arguments).check_label(name)


# --- SAEs and models -----------------------------------------------------------------------------


def group(name: str, _: argparse.Namespace) -> None:
    find_group(name)


def group_layers(layers: Sequence[int], arguments: argparse.Namespace) -> None:
    """Layers of the group that `--sae` names."""
    row = find_group(arguments.sae)
    for layer in layers:
        row.check_layer(layer)


def layer_address(text: str, _: argparse.Namespace) -> None:
    LayerRef.parse(text)


def refs(text: str, _: argparse.Namespace) -> None:
    """The address of a feature, or of an SAE."""
    from qwen_scope_lens.steering.typical import split_refs

    split_refs([text])


def edit(text: str, _: argparse.Namespace) -> None:
    from qwen_scope_lens.steering.plan import Edit

    Edit.parse(text)


def model(name: str | Path, _: argparse.Namespace) -> None:
    """A folder with a model, or what may be a name on the hub."""
    from qwen_scope_lens.models.checkpoint import may_be_on_hub

    place = Path(name).expanduser()
    if bundled_model(str(name)) is not None:
        return
    if place.is_dir():
        if not any(place.glob("*config.json")):
            raise NotACheckpoint(
                f"{name} is not a model that transformers can open: expected a hub name, or a"
                " folder with the config.json of a Qwen model"
            )
    elif not may_be_on_hub(str(name)):
        raise CheckpointMissing(
            f"{name} is not a folder: expected a model's folder, or a hub name such as"
            " Qwen/Qwen3-8B"
        )


def models(names: str, arguments: argparse.Namespace) -> None:
    """Models, joined by commas; a folder may hold an adapter, which the extra `train` merges."""
    from qwen_scope_lens.extras import check

    for name in filter(None, map(str.strip, names.split(","))):
        model(name, arguments)
        if (Path(name) / "adapter_config.json").is_file():
            check("peft", "train")


def device(name: str, _: argparse.Namespace) -> None:
    if not re.fullmatch(DEVICES, name):
        raise UnknownName(
            f"device {name!r:.60} cannot be used here: expected cpu, or cuda, cuda:1, ... on a"
            " machine with GPUs"
        )


def sae_files(saes: Iterable[LayerRef], folder: Path | None = None) -> None:
    """Raise where the files of SAEs are not here and cannot be fetched either."""
    from qwen_scope_lens.hub import out_of_reach
    from qwen_scope_lens.saes.locate import local_path, locate

    for sae in saes:
        if folder is not None or (local_path(sae) is None and out_of_reach()):
            locate(sae, folder)


# --- everything else -----------------------------------------------------------------------------


def free_port(host: str, port: int) -> None:
    """Raise where another program listens, before a model is loaded and an address printed."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise CannotWrite(
            f"port {port} of {host} cannot be used ({error.strerror}): another program listens"
            " there. Choose another with --port"
        ) from error

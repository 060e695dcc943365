"""Loading, feature directions and conversion, against SAELens's own loader in the same run.

    python benchmarks/loading.py    # writes about 8 GB to a temporary folder, and deletes it
    python benchmarks/loading.py --conversion > benchmarks/results/conversion.txt

One synthetic layer of the size of Qwen3-8B's (65536 x 4096, float32, 2.15 GB). Times are wall-clock
medians of interleaved runs with a warm page cache; memory is the peak of resident memory beyond
what the process held before, each in a fresh process.

`--conversion` measures conversion alone, beside the parts that no converter can do without: both
hashes, and reading and writing every byte once. Here CPU time counts as well, because on a busy
machine the two threads of a conversion share one core.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from _measure import commit, cpu_name, interleaved, peak_extra, peak_in_fresh_process, today

from qwen_scope_lens.files import file_sha256

GROUP = "qwen3-8b-base/w64k-l0-50"
RELEASE = "qwen-scope-3-8b-base-w64k-l50"
REPO = "SAE-Res-Qwen3-8B-Base-W64K-L0_50"
FEATURES = [6159, 36398, 0, 65535, 1, 4096, 12345, 23456, 34567, 45678]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--conversion", action="store_true", help="only conversion, and its parts")
    parser.add_argument("--folder", type=Path, help="where to put the temporary files")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.peak:
        case, folder = arguments.peak
        print(peak_extra(_cases(Path(folder))[case]))
        return
    folder = Path(tempfile.mkdtemp(dir=arguments.folder, prefix="qwen-scope-loading-"))
    try:
        _write_layer(folder / "published" / REPO / "layer20.sae.pt")
        (_conversion if arguments.conversion else _report)(folder, arguments.repeats)
    finally:
        shutil.rmtree(folder)


def _write_layer(path: Path) -> None:
    path.parent.mkdir(parents=True)
    rng = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (65536, 4096), "W_dec": (4096, 65536), "b_enc": (65536,), "b_dec": (4096,)}
    torch.save({name: torch.randn(s, generator=rng) for name, s in shapes.items()}, path)


def _cases(folder: Path) -> dict[str, Callable[[], object]]:
    """Each imports what it needs before it is measured."""
    import sae_lens.loading.pretrained_sae_loaders as upstream
    from sae_lens import SAE
    from safetensors.torch import save_file

    import qwen_scope_lens as qsl
    from qwen_scope_lens.address import LayerRef
    from qwen_scope_lens.converters import official_to_saelens
    from qwen_scope_lens.converters.saelens_folder import write_safetensors
    from qwen_scope_lens.saes import extents, locate, open_layer

    published, converted = folder / "published", folder / "converted"
    source = published / REPO / "layer20.sae.pt"
    scratch = folder / "scratch"

    def saelens_load() -> object:
        """SAELens's own code; only its download is answered with the local path."""
        with mock.patch.object(upstream, "hf_hub_download", return_value=str(source)):
            return SAE.from_pretrained(RELEASE, "layer20")

    def load(home: Path) -> qsl.ScopeSAE:
        os.environ["QWEN_SCOPE_HOME"] = str(home)
        with qsl.install():
            sae = SAE.from_pretrained(RELEASE, "layer20")
        assert isinstance(sae, qsl.ScopeSAE)
        return sae

    def directions(home: Path) -> torch.Tensor:
        os.environ["QWEN_SCOPE_HOME"] = str(home)
        return qsl.load_directions(f"{GROUP}/20", FEATURES)

    def transpose_and_save() -> None:
        """What one would write by hand."""
        weights = torch.load(source, weights_only=True)
        scratch.mkdir(exist_ok=True)
        turned = {n: w.T.contiguous() if w.ndim == 2 else w for n, w in weights.items()}
        save_file(turned, scratch / "sae_weights.safetensors")
        _sync(scratch / "sae_weights.safetensors")
        shutil.rmtree(scratch)

    def convert() -> None:
        official_to_saelens.convert(
            GROUP, scratch, layers=[20], folder=source.parent, overwrite=True, progress=False
        )
        shutil.rmtree(scratch)

    def copy_alone() -> None:
        """What `convert` does, without hashing the source and the result."""
        scratch.mkdir(exist_ok=True)
        file = locate(LayerRef.parse(f"{GROUP}/20"), folder=source.parent)
        target = scratch / "sae_weights.safetensors"
        nothing = lambda count: None  # noqa: E731
        write_safetensors(target, source, open_layer(file), torch.float32, nothing, nothing)
        shutil.rmtree(scratch)

    load_ours = {"published": lambda: load(published), "converted": lambda: load(converted)}
    extents(source, ["W_dec"])  # imports what only the first call pays for
    cases: dict[str, Callable[[], object]] = {
        "SAELens load": saelens_load,
        "load, published .pt": load_ours["published"],
        "load, converted": load_ours["converted"],
        "10 directions, published .pt": lambda: directions(published),
        "10 directions, converted": lambda: directions(converted),
        "load + transpose + save": transpose_and_save,
        "convert": convert,
        "convert, without its hashes": copy_alone,
    }
    if (converted / REPO).exists():
        sae = load(converted)
        cases["10 directions, SAE already loaded"] = lambda: sae.direction(FEATURES)
    return cases


def _sync(path: Path) -> None:
    """Both sides must reach the disk: ours does before it gives a file its name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _conversion(folder: Path, repeats: int) -> None:
    source = folder / "published" / REPO / "layer20.sae.pt"
    copied = folder / "copied"

    def copy_in_order() -> None:
        buffer = memoryview(bytearray(2**24))
        with source.open("rb", buffering=0) as read, copied.open("wb", buffering=0) as write:
            while count := read.readinto(buffer):
                write.write(buffer[:count])
            os.fsync(write.fileno())
        copied.unlink()

    def hash_both() -> None:
        file_sha256(source)
        file_sha256(source)  # the result is as large

    all_cases = _cases(folder)
    names = ("load + transpose + save", "convert", "convert, without its hashes")
    cases = {name: all_cases[name] for name in names}
    cases |= {"both hashes alone": hash_both, "a copy in order": copy_in_order}
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for number in range(-1, repeats):
        for name, case in cases.items():
            start, began = time.process_time(), time.perf_counter()
            case()
            if number >= 0:  # a round to warm up
                took[name].append((time.perf_counter() - began, time.process_time() - start))
    print(f"{today()}, commit {commit()}; {cpu_name()}; torch {torch.__version__}")
    print(f"one layer of 65536 x 4096 float32, 2.15 GB; medians of {repeats} interleaved rounds\n")
    print(f"{'':30}{'wall, s':>9}{'CPU, s':>9}{'times as fast, wall':>21}{'CPU':>7}")
    for name, times in took.items():
        wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
        pairs = list(zip(took["load + transpose + save"], times, strict=True))
        ratios = [statistics.median(a[i] / b[i] for a, b in pairs) for i in (0, 1)]
        print(f"{name:30}{wall:9.2f}{cpu:9.2f}{ratios[0]:21.2f}{ratios[1]:7.2f}")
    fast = [a[0] / b[0] for a, b in zip(took[names[0]], took["convert"], strict=True)]
    print(f"\nconvert, wall, in single rounds: {', '.join(f'{ratio:.2f}' for ratio in fast)}")


def _report(folder: Path, repeats: int) -> None:
    from qwen_scope_lens.converters import official_to_saelens

    source = folder / "published" / REPO
    official_to_saelens.convert(
        GROUP, folder / "converted", layers=[20], folder=source, progress=False
    )
    cases = _cases(folder)
    heavy = (
        "SAELens load",
        "load + transpose + save",
        "convert",
        "convert, without its hashes",
    )
    quick = {name: case for name, case in cases.items() if name not in heavy}
    times = interleaved(quick, repeats=9, clock=time.perf_counter)
    times |= interleaved({n: cases[n] for n in heavy}, repeats, 0.0, time.perf_counter)
    print(f"{cpu_name()}, torch {torch.__version__}, one layer of 65536 x 4096 float32, 2.15 GB\n")
    print(f"{'':36} {'time':>11} {'peak memory':>14}")
    for name in cases:
        peak = peak_in_fresh_process(__file__, name, str(folder))
        print(f"{name:36} {times[name] * 1e3:8.1f} ms {peak / 2**20:10.1f} MiB", flush=True)
    load = times["SAELens load"] / times["load, published .pt"]
    convert = times["load + transpose + save"] / times["convert"]
    print(f"\nload, published .pt: 1/{load:.0f} of SAELens's time")
    print(f"convert: {convert:.2f}x as fast as load + transpose + save, hashes included")
    alone = times["load + transpose + save"] / times["convert, without its hashes"]
    print(f"convert: {alone:.2f}x as fast without hashing the source and the result")


if __name__ == "__main__":
    sys.exit(main())

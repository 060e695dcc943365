"""The version number of the package, which everything else takes from here, and those of others."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__", "versions"]

__version__ = "0.1.0"

PACKAGES = (
    "qwen-scope-lens",
    "torch",
    "transformers",
    "tokenizers",
    "sae-lens",
    "numpy",
    "pyarrow",
)


def versions(*more: str) -> dict[str, str]:
    """The versions of the packages that every artefact names, and of `more` packages."""
    found = {}
    for package in (*PACKAGES, *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = __version__ if package == "qwen-scope-lens" else "unknown"
    return found

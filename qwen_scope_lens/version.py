"""The one version number of the package: everything else asks here."""

__all__ = ["__version__"]

__version__ = "0.1.0"

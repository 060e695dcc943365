"""The version number of the package. Everything else takes it from here."""

__all__ = ["__version__"]

__version__ = "0.1.0"

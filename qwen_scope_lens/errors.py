"""The named errors of the project.

Every message says what was expected, what was found and the way out. `ScopeError` is the common
ancestor: the command line prints one as a single line. Where Python has a built-in meaning for the
failure (a missing file, a bad value) the error is that too, so existing `except` clauses work.
"""

from __future__ import annotations

__all__ = [
    "BadCorpus",
    "BadFile",
    "BadPlan",
    "BadQuery",
    "BadText",
    "CannotWrite",
    "CheckpointError",
    "CheckpointMissing",
    "GeneratorFailed",
    "HubUnreachable",
    "LayerOutOfRange",
    "MissingExtra",
    "NotACheckpoint",
    "NotFinite",
    "PlanBypassed",
    "PlanNeverFired",
    "ScopeError",
    "StoreDamaged",
    "StoreMismatch",
    "TooLittleData",
    "TruncatedCheckpoint",
    "UnknownHook",
    "UnknownName",
    "UnsafeCheckpoint",
    "UnsupportedSAE",
    "UnsupportedSAELens",
    "VerificationFailed",
    "WrongKeys",
    "WrongModel",
    "WrongSettings",
    "WrongShape",
    "WrongState",
    "WrongTokenizer",
]


class ScopeError(Exception):
    """Anything this package refuses to do, with the way out in the message."""


class UnknownName(ScopeError, ValueError):
    """A group, release, address or device that is not known here."""


class LayerOutOfRange(ScopeError, ValueError):
    """A layer or feature number that the named group does not have."""


class CheckpointError(ScopeError):
    """A checkpoint file cannot be used as it stands."""


class CheckpointMissing(CheckpointError, FileNotFoundError):
    """No file where the checkpoint should be."""


class NotACheckpoint(CheckpointError, ValueError):
    """The file is something else than a checkpoint of a known format."""


class TruncatedCheckpoint(CheckpointError, ValueError):
    """The file ends too early: an interrupted download or copy."""


class UnsafeCheckpoint(CheckpointError, ValueError):
    """The file is a pickle that would run code. It is never executed."""


class WrongKeys(CheckpointError, ValueError):
    """The checkpoint lacks a tensor, or has one too many."""


class WrongShape(CheckpointError, ValueError):
    """A tensor's shape, orientation or dtype does not belong to the named group."""


class NotFinite(CheckpointError, ValueError):
    """NaN or infinity where a finite number is needed."""


class WrongSettings(CheckpointError, ValueError):
    """k, width or depth in `config.json` or the folder name disagree with the catalog."""


class HubUnreachable(ScopeError, ConnectionError):
    """The hub did not answer and the file is in no local place."""


class CannotWrite(ScopeError, OSError):
    """The target cannot be written: permissions, a full disk, or another writer at work."""


class UnsupportedSAE(ScopeError, ValueError):
    """An SAE whose arithmetic the wanted file format cannot express."""


class UnsupportedSAELens(ScopeError, RuntimeError):
    """The installed sae-lens lacks an extension point that this package needs."""


class VerificationFailed(ScopeError):
    """The SAE does not reconstruct these activations, or another convention fits better."""


class WrongModel(ScopeError, ValueError):
    """A model of another family or width, or a way of using one that would give wrong values."""


class WrongState(ScopeError, RuntimeError):
    """A state dict that lacks tensors of the model, or has some that the model does not know."""


class WrongTokenizer(ScopeError, ValueError):
    """No tokenizer, or one that does not belong to the model."""


class UnknownHook(ScopeError, KeyError):
    """A hook name that the model does not have, or that this run would never reach."""

    def __str__(self) -> str:  # KeyError would print the quoted repr
        return str(self.args[0]) if self.args else ""


class BadText(ScopeError, ValueError):
    """An empty text, one longer than the context, or something that is no text."""


class BadCorpus(ScopeError, ValueError):
    """A corpus file or one of its rows cannot be read as documents with labels."""


class BadFile(ScopeError, ValueError):
    """A file that a user gave is of another format or version, damaged, or lacks a field."""


class BadPlan(ScopeError, ValueError):
    """An edit that cannot be done: unknown operation, missing strength, a feature elsewhere."""


class BadQuery(ScopeError, ValueError):
    """SQL that DuckDB does not understand, or that would do more than read."""


class GeneratorFailed(ScopeError, RuntimeError):
    """A text generator refused, timed out or answered nonsense more often than allowed."""


class MissingExtra(ScopeError, ImportError):
    """An optional package is not installed."""


class PlanBypassed(ScopeError, RuntimeError):
    """A plan was active and the model ran where its hooks were not called."""


class PlanNeverFired(ScopeError, RuntimeError):
    """A plan was active and no edit of it ever touched a residual."""


class StoreDamaged(ScopeError, ValueError):
    """A feature store lacks files, or they do not fit together."""


class StoreMismatch(ScopeError, ValueError):
    """Stores, rules or plans that were made with another SAE, layer, model or tokenizer."""


class TooLittleData(ScopeError, ValueError):
    """Too few samples, classes or features for the question that was asked."""

"""The named errors of the project.

Every message says what was expected, what was found, and what to do. `ScopeError` is the base class
of all; the command line prints such an error without a traceback. Where Python has a built-in error
for the failure (a missing file, a bad value), ours is a subclass of it too, so that existing
`except` clauses work.
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
    "EngineFailed",
    "GeneratorFailed",
    "HubUnreachable",
    "LayerOutOfRange",
    "MissingExtra",
    "NotACheckpoint",
    "NotFinite",
    "OutsideFolders",
    "PlanBypassed",
    "PlanNeverFired",
    "ScopeError",
    "StorageUnreachable",
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
    """The base class: something that this package refuses to do. The message says what to do."""


class UnknownName(ScopeError, ValueError):
    """The name of a group, release, address or device is not known."""


class LayerOutOfRange(ScopeError, ValueError):
    """The named group does not have this layer or feature."""


class CheckpointError(ScopeError):
    """A checkpoint file cannot be used as it is."""


class CheckpointMissing(CheckpointError, FileNotFoundError):
    """There is no file where the checkpoint should be."""


class NotACheckpoint(CheckpointError, ValueError):
    """The file is not a checkpoint in a known format."""


class TruncatedCheckpoint(CheckpointError, ValueError):
    """The file ends too early, as after an interrupted download or copy."""


class UnsafeCheckpoint(CheckpointError, ValueError):
    """The file is a pickle that would run code. It is never executed."""


class WrongKeys(CheckpointError, ValueError):
    """The checkpoint lacks a tensor, or has one that does not belong there."""


class WrongShape(CheckpointError, ValueError):
    """A tensor's shape, orientation or dtype does not fit the named group."""


class NotFinite(CheckpointError, ValueError):
    """There is NaN or infinity where a finite number is needed."""


class WrongSettings(CheckpointError, ValueError):
    """`config.json` or the folder's name contradicts the catalog (k, width, depth, model)."""


class HubUnreachable(ScopeError, ConnectionError):
    """The hub did not answer, and no local folder has the file."""


class CannotWrite(ScopeError, OSError):
    """The target cannot be written: permissions, a full disk, or another writer at work."""


class UnsupportedSAE(ScopeError, ValueError):
    """This package, or the wanted file format, cannot express the arithmetic of the SAE."""


class UnsupportedSAELens(ScopeError, RuntimeError):
    """The installed sae-lens lacks an extension point that this package needs."""


class VerificationFailed(ScopeError):
    """The SAE does not reconstruct these activations, or another convention reconstructs better."""


class WrongModel(ScopeError, ValueError):
    """The model has another family or width, or this way of using it would give wrong values."""


class WrongState(ScopeError, RuntimeError):
    """A state dict lacks tensors of the model, or has some that the model does not have."""


class WrongTokenizer(ScopeError, ValueError):
    """There is no tokenizer, or it does not belong to the model."""


class UnknownHook(ScopeError, KeyError):
    """The model does not have a hook of this name, or this run would never reach it."""

    def __str__(self) -> str:  # KeyError would print the quoted repr
        return str(self.args[0]) if self.args else ""


class BadText(ScopeError, ValueError):
    """A text is empty, longer than the context, or not a text at all."""


class BadCorpus(ScopeError, ValueError):
    """A corpus file or one of its rows cannot be read as documents with labels."""


class BadFile(ScopeError, ValueError):
    """A given file has another format or version, is damaged, or lacks a field."""


class BadPlan(ScopeError, ValueError):
    """An edit cannot be done. The operation is unknown, the strength is missing, or the feature
    belongs to another SAE, for example."""


class BadQuery(ScopeError, ValueError):
    """DuckDB does not understand this SQL, or it would do more than read."""


class GeneratorFailed(ScopeError, RuntimeError):
    """A text generator refused, timed out or gave unusable answers more often than allowed."""


class EngineFailed(ScopeError, RuntimeError):
    """The engine behind the server is gone, does not start, or answers what nobody can use."""


class MissingExtra(ScopeError, ImportError):
    """An optional package is not installed."""


class OutsideFolders(ScopeError, ValueError):
    """A path leads out of the folders that may be read, or to nothing in them."""


class PlanBypassed(ScopeError, RuntimeError):
    """A plan was active, but the model ran in a way that did not call its hooks."""


class PlanNeverFired(ScopeError, RuntimeError):
    """A plan was active, but none of its edits ever changed a residual."""


class StorageUnreachable(ScopeError, OSError):
    """A place at a URL (`s3://...`) did not answer, is not there, or refused what was asked."""


class StoreDamaged(ScopeError, ValueError):
    """A feature store lacks files, or its files do not fit together."""


class StoreMismatch(ScopeError, ValueError):
    """A store, rule or plan was made with another SAE, layer, model or tokenizer."""


class TooLittleData(ScopeError, ValueError):
    """There are too few samples, classes or features for this question."""

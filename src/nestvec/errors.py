"""Every error nestvec raises, on one page.

::

    NestvecError
    ├── DataError (ValueError)            the values: NaN, Inf, zero rows, ragged, empty, ids
    │   └── DimensionError                a size that does not exist here
    ├── SpaceError (ValueError)           a Space that is unknown, incomplete or wrongly declared
    │   └── SpaceMismatchError            two spaces were about to be compared
    ├── PlanError (ValueError)            a stage, cascade or plan that cannot be run or read
    ├── FileFormatError (ValueError)      a file that is truncated, damaged or foreign
    ├── StorageError (OSError)            the disk said no: full, read-only, missing
    ├── ModelError (ValueError)           a model folder, hub id or checksum that is not right
    ├── TrainingError (RuntimeError)      a training that went wrong or is not the one in its folder
    └── MissingExtraError (ImportError)   an optional dependency is not installed

Each also derives from the built-in error a caller would guess, so ``except ValueError`` works.
A message says what was given, what it met, what would fit and what to do next.
"""

from __future__ import annotations


class NestvecError(Exception):
    """The root of all errors that nestvec raises on purpose."""


class DataError(NestvecError, ValueError):
    """The values cannot be used: NaN, Inf, zero rows, ragged, empty, duplicate ids."""


class DimensionError(DataError):
    """A size was asked for that these embeddings do not have."""


class SpaceError(NestvecError, ValueError):
    """A Space is unknown, incomplete or wrongly declared."""


class SpaceMismatchError(SpaceError):
    """Vectors of two different spaces were about to be compared."""


class PlanError(NestvecError, ValueError):
    """A stage, cascade or plan cannot be read or cannot be run on this gallery."""


class FileFormatError(NestvecError, ValueError):
    """A file is truncated, damaged, or not what its name says."""


class StorageError(NestvecError, OSError):
    """The file system refused: full, read-only, or nothing there."""


class ModelError(NestvecError, ValueError):
    """A model cannot be loaded: not a model folder, unknown id, wrong checksum."""


class TrainingError(NestvecError, RuntimeError):
    """A training cannot go on: its loss is no number, or its folder holds another one."""


class MissingExtraError(NestvecError, ImportError):
    """An optional dependency is missing; the message says what to type."""

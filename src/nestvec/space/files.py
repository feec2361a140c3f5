"""Vectors on disk, with the stamp of their Space inside: `save` and `load`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from nestvec import _checks
from nestvec._atomic import written_beside
from nestvec.errors import (
    DataError,
    FileFormatError,
    NestvecError,
    SpaceError,
    SpaceMismatchError,
    StorageError,
)
from nestvec.space import _formats
from nestvec.space.embeddings import Embeddings
from nestvec.space.space import Space

#: The endings that `save` can write.
STAMPED = tuple(_formats.WRITERS)


def save(embeddings: Embeddings, path: str | os.PathLike[str]) -> Path:
    """Write vectors, ids and stamp; the ending of ``path`` chooses the format.

    The file (``.lance``: the folder) is written beside its place, synced and renamed, so a reader
    sees the old one or the new one, never half of one.

    Parameters
    ----------
    embeddings
        ``array`` is written as float32, ``ids`` as int64 or UTF-8 text.
    path
        ``.safetensors`` and ``.npz`` need nothing more; ``.parquet``, ``.arrow`` (Arrow IPC, also
        called Feather) and ``.lance`` need ``nestvec[index]``.

    Returns
    -------
    Path
        Where it now stands.

    Raises
    ------
    FileFormatError
        If the ending is not one that can carry a stamp.
    StorageError
        If the disk refuses (full, read-only), or a folder stands at ``path`` with anything in it
        but a Lance dataset's parts; what stood at ``path`` is untouched.
    """
    path = Path(path)
    write = _formats.WRITERS.get(path.suffix.lower())
    if write is None:
        raise FileFormatError(
            f"cannot save to {path}: {_ending(path)} carries no stamp. "
            f"Choose one of {', '.join(STAMPED)}."
        )
    stamp = json.dumps(embeddings.space.to_dict(), sort_keys=True)
    ids = embeddings.ids
    if not embeddings.has_ids and np.array_equal(ids, np.arange(len(ids))):
        ids = None  # whoever reads it numbers the rows alike, and knows that they had none
    with written_beside(path, ours=parts_of(path)) as scratch:
        write(scratch, embeddings.array, ids, stamp)
    return path


def parts_of(path: Path) -> tuple[str, ...]:
    """Return the names that a folder `save` wrote at ``path`` may hold; none if it is a file."""
    return _formats.FOLDERS.get(path.suffix.lower(), ())


def load(path: str | os.PathLike[str], *, space: Space | str | None = None) -> Embeddings:
    """Read vectors with their stamp, or stamp a plain file by what you say.

    Parameters
    ----------
    path
        A file that `save` wrote, or a plain ``.npy``, ``.npz``, ``.safetensors``, ``.parquet``,
        ``.arrow``, ``.feather``, ``.lance``, ``.jsonl``, ``.jsonl.gz`` or ``.csv``. Plain files
        hold one matrix, or a column ``vector`` or ``embedding`` (JSONL: a key; CSV: every column
        but the id), and ids in ``id``, ``_id`` or ``ids`` if they have any.
    space
        For a plain file: the Space, or just the model's name, which declares one of the dim found
        (L2-normalised if every row has length 1). For a stamped file it is not needed; if given, it
        has to agree.

    Returns
    -------
    Embeddings
        ``array`` (n, dim) float32; row numbers as ids where the file has none.

    Raises
    ------
    SpaceError
        If the file carries no stamp and ``space`` is not given.
    SpaceMismatchError
        If the stamp and ``space`` contradict each other.
    FileFormatError
        If the file is truncated, damaged, or not what its ending says.
    StorageError
        If there is no such file, or it may not be read.
    DataError
        If the values cannot be used (NaN, Inf, zero rows, ragged, duplicate ids), or the space
        has unit rows and these are not; the message names file and row.
    """
    path = Path(path)
    raw = _read(path)
    try:
        if raw.stamp is not None:
            found = _stamped(raw.stamp)
            _check_agrees(found, space)
        elif space is None:
            raise SpaceError(
                "it carries no stamp, so nothing says which model its vectors come from. "
                "Say it: in Python space='the-model-name' (or nestvec.Space.declared(name, dim=...)"
                "), on the command line --model-name NAME."
            )
        elif isinstance(space, str):
            matrix = _checks.as_matrix(raw.array)
            unit = _checks.row_off_unit(matrix) is None
            found = Space.declared(
                space, dim=matrix.shape[1], normalisation="l2" if unit else "none"
            )
        else:
            found = space
        return Embeddings(raw.array, found, raw.ids)
    except NestvecError as error:
        raise type(error)(f"{path}: {error}") from error


def _read(path: Path) -> _formats.Raw:
    """Read a file by its ending; every complaint of a library becomes one of ours."""
    read = _formats.reader_of(path.name)
    if read is None:
        raise FileFormatError(
            f"cannot read {path}: {_ending(path)} is not a format for vectors. "
            f"It reads {', '.join(_formats.READERS)}."
        )
    try:
        if path.is_file() and path.stat().st_size == 0:
            raise FileFormatError("it is empty (0 bytes)")
        if not path.exists():
            raise StorageError(f"cannot read {path}: there is no such file.")
        return read(path)
    except StorageError:
        raise
    except PermissionError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}.") from error
    except (ImportError, AttributeError, NameError):  # ours, not the file's
        raise
    except DataError as error:
        raise type(error)(f"{path}: {error}") from error
    except Exception as error:  # each library has errors of its own, some of them undocumented
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        if "pickle" in reason or "Python objects" in reason:  # numpy's guess about foreign bytes
            reason = "it holds no plain array (and nestvec never unpickles)"
        raise FileFormatError(
            f"cannot read {path}: {reason}. It is truncated, damaged, or not a {_ending(path)} "
            f"file; write it again from its source."
        ) from error


def _ending(path: Path) -> str:
    return f"the ending {path.suffix!r}" if not path.suffix else path.suffix


def _stamped(stamp: str) -> Space:
    try:
        values = json.loads(stamp)
    except ValueError as error:
        raise FileFormatError(f"its stamp is not JSON ({error}); the file is damaged.") from error
    if not isinstance(values, dict):
        raise FileFormatError("its stamp is not a JSON object; the file is damaged.")
    return Space.from_dict(values)


def _check_agrees(stamped: Space, said: Space | str | None) -> None:
    if isinstance(said, Space):
        stamped.check_same(said)
    elif said is not None and said not in (stamped.model, stamped.fingerprint):
        raise SpaceMismatchError(
            f"its stamp says {stamped.label}, not {said!r}. Leave out the name to trust the stamp."
        )

"""Lines of text files, compressed or not, with one error for what is damaged or missing."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from nestvec.errors import FileFormatError, StorageError


def lines_of(path: Path) -> Iterator[str]:
    """Yield the lines of a file; bytes that are not UTF-8 are replaced."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", errors="replace") as file:
            yield from file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        reason = str(error).rstrip(".")
        raise FileFormatError(
            f"cannot read {path}: it is truncated or damaged ({reason})."
        ) from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}.") from error

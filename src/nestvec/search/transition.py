"""The folder of an upgrade that is under way: what it says of itself.

::

    docs.nest/upgrade/
      upgrade.json    this file is the upgrade: it appears with all the rest, and goes first
      bridge/         the map that takes vectors of the new Space to the old one
      new/            an index of the new Space, of the rows that have new vectors
      lock            held by who backfills, finishes or rolls back
      backfill.json   how fast the last backfill was

A row of ``new/`` is true while the record of the old index has the row ``of_row`` with the version
of last update ``of_version``: so an upsert or a delete there needs no second write here. Rows of
the old index without a true row here are pending.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nestvec import __version__
from nestvec._atomic import sync_folder
from nestvec._extras import require
from nestvec.errors import FileFormatError, SpaceError
from nestvec.search.store import Store
from nestvec.space import Space

pa = require("pyarrow", extra="index", why="an index")

FOLDER = "upgrade"
STATE = f"{FOLDER}/upgrade.json"
NEW, BRIDGE, LOCK = "new", "bridge", "lock"
FORMAT = 1
#: What an index has in its folder, beside its stamp and its lock.
INDEX_FILES = ("record", "checksums", "derived", "readers", "desk", "plan.json")

#: The columns of ``new/`` beside id and vector; ``bridged`` rows were written with new vectors, so
#: that their old ones are what the bridge made of those.
KEYS = pa.schema([("of_row", pa.int64()), ("of_version", pa.int64()), ("bridged", pa.bool_())])


@dataclass(frozen=True)
class Calibration:
    """What a cosine of a bridged query with an old vector would be between new vectors.

    ``slope * cosine + offset``, fitted by least squares on ``n`` pairs of a query and one of its
    nearest rows; ``correlation`` between the two, and the ``error`` that is left (rms).
    """

    slope: float
    offset: float
    correlation: float
    error: float
    n: int


@dataclass(frozen=True)
class State:
    """What ``upgrade.json`` says.

    ``home`` is the folder of the index that is being left, ``column`` what is embedded of a row.
    """

    home: str
    space: Space
    calibration: Calibration
    begun: str
    column: str | None

    def save(self, file: Path) -> None:
        """Write the file; whoever calls this makes it durable."""
        text = {
            "format": FORMAT,
            "written_by": f"nestvec {__version__}",
            "home": self.home,
            "begun": self.begun,
            "column": self.column,
            "calibration": asdict(self.calibration),
            "space": self.space.to_dict(),
        }
        file.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: Path) -> State:
        """Read the file; raises `FileNotFoundError`, or `FileFormatError` if it is damaged."""
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if found["format"] > FORMAT:
                raise FileFormatError(
                    f"{file} was written by a newer nestvec ({found.get('written_by')}). "
                    f"Type: pip install --upgrade nestvec"
                )
            return cls(
                home=found["home"],
                space=Space.from_dict(found["space"]),
                calibration=Calibration(**found["calibration"]),
                begun=found["begun"],
                column=found["column"],
            )
        except (ValueError, KeyError, TypeError, SpaceError) as error:
            if isinstance(error, FileFormatError):
                raise
            raise FileFormatError(
                f"{file} is damaged ({type(error).__name__}: {error}). Restore it from a backup, "
                f"or remove {file.parent}, which takes the upgrade back; the index is whole."
            ) from error


def tidy(store: Store) -> bool:
    """Remove what finished, taken back or killed upgrades left; the store's writer lock is held.

    Tells whether something of a finished upgrade was there: its last step is this.
    """
    root, home = store.root, store.path
    folder = root / FOLDER
    state = State.load(root / STATE) if (root / STATE).is_file() else None
    under_way = state is not None and state.home == home_name(store)
    left = []
    if home != root:
        left = [root / name for name in (*INDEX_FILES, "lock") if (root / name).exists()]
    old = [path for path in root.glob("home-*") if path != home]
    scratch = [path for name in (".home-*", f".{FOLDER}.*") for path in root.glob(name)]
    if not under_way and folder.is_dir():
        (root / STATE).unlink(missing_ok=True)
        sync_folder(folder)
        old.append(folder)
    for path in (*left, *old, *scratch):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return bool(left) or (state is not None and not under_way)


def home_name(store: Store) -> str:
    """Return where an index lives, as `State.home` has it."""
    return "." if store.path == store.root else store.path.name

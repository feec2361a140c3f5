"""The folder of an upgrade that is under way: what it says of itself.

::

    docs.nest/upgrade/
      upgrade.json         this file is the upgrade: it appears with all the rest, and goes first
      bridge/              the map that takes vectors of the new Space to the old one
      sample.safetensors   rows that both models have seen, for the scale of scores
      new/                 an index of the new Space, of the rows that have new vectors
      lock                 held by who backfills, finishes or rolls back
      backfill.json        how fast the last backfill was
      made.json            at which version of the old index vectors from a file were first given
      written-VERSION.npz  ids that this version of the old index has through the bridge, while
                           their new vectors are being written

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

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from nestvec import __version__, _checks
from nestvec._atomic import sync_folder
from nestvec._extras import require
from nestvec.errors import FileFormatError, SpaceError
from nestvec.search.store import Store
from nestvec.search.store.layout import STAMP
from nestvec.search.structures.codes import unit_prefixes
from nestvec.space import Space

pa = require("pyarrow", extra="index", why="an index")

FOLDER = "upgrade"
STATE = f"{FOLDER}/upgrade.json"
NEW, LOCK = "new", "lock"
FORMAT = 1
_NEAREST = 20
_NONE = np.empty(0, np.int64)
_QUERIES_AT_ONCE = 1024
#: What an index has in its folder, beside its stamp and its lock.
INDEX_FILES = ("record", "checksums", "derived", "readers", "desk", "plan.json")

#: The columns of ``new/`` beside id and vector; ``bridged`` rows were written with new vectors, so
#: that their old ones are what the bridge made of those.
KEYS = pa.schema([("of_row", pa.int64()), ("of_version", pa.int64()), ("bridged", pa.bool_())])


def bridge_names(fit: int) -> tuple[str, str]:
    """Return what a bridge and its yardstick are called in the folder: those of `start` are 0."""
    return (
        ("bridge", "sample.safetensors")
        if not fit
        else (f"bridge-{fit}", f"sample-{fit}.safetensors")
    )


def half_written(version: int | str) -> str:
    """Return the name of the file that says what a version of the old index waits for."""
    return f"written-{version}.npz"


@dataclass(frozen=True)
class Calibration:
    """How scores of a bridged query and the new model's own are alike, near the best ones.

    From the best on, new scores fall ``slope`` times as fast. ``correlation`` of the two within the
    rows nearest to a query, and the ``error`` that is left (rms), over ``n`` pairs. ``slopes`` has
    (dim, slope) for each size that a plan of the old index may end at.
    """

    slope: float
    correlation: float
    error: float
    n: int
    slopes: tuple[tuple[int, float], ...] = ()

    def slope_at(self, dim: int) -> float:
        """Return the slope for cosines of prefixes."""
        return dict(self.slopes).get(dim, self.slope)


class Yardstick:
    """Rows that both models have seen: they say what a score of either is worth, query by query.

    Parameters
    ----------
    new, old : (n, dim_new), (n, dim_old) float32
        Of length 1.
    learned : (n_learned,) int64
        Row ids of the old index that the bridge was fitted on, as far as that is known.
    """

    def __init__(
        self,
        new: NDArray[np.float32],
        old: NDArray[np.float32],
        learned: NDArray[np.int64] = _NONE,
    ) -> None:
        self.new, self.old, self.learned = new, old, learned
        self._prefixes = {old.shape[1]: old}

    def old_at(self, dim: int) -> NDArray[np.float32]:
        """Return the old rows cut to ``dim``, of length 1 again, (n, dim)."""
        if dim not in self._prefixes:
            self._prefixes[dim] = unit_prefixes(self.old, dim)
        return self._prefixes[dim]

    def offsets(
        self, asked: NDArray[np.float32], bridged: NDArray[np.float32], slope: float, dim: int
    ) -> NDArray[np.float32]:
        """Return what to add to ``slope`` times a bridged cosine at ``dim``, (n_queries, 1)."""
        found = np.empty((len(asked), 1), np.float32)
        for start in range(0, len(asked), _QUERIES_AT_ONCE):
            some = slice(start, start + _QUERIES_AT_ONCE)
            here = nearest(_checks.normalise(asked[some]) @ self.new.T)
            there = nearest(unit_prefixes(bridged[some], dim) @ self.old_at(dim).T)
            found[some, 0] = here.mean(axis=1) - slope * there.mean(axis=1)
        return found

    def save(self, file: Path) -> None:
        """Write the rows; whoever calls this makes it durable."""
        save_file({"new": self.new, "old": self.old, "learned": self.learned}, file)

    @classmethod
    def load(cls, file: Path) -> Yardstick:
        """Read what `save` wrote; raises `FileFormatError`."""
        try:
            return cls(**load_file(file))
        except (OSError, SafetensorError, TypeError) as error:
            raise FileFormatError(
                f"{file} cannot be read ({error}). Restore it from a backup, or remove "
                f"{file.parent}, which takes the upgrade back; the index is whole."
            ) from error


def nearest(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the best 20 scores of each query, sorted: as many as answers are looked at."""
    n = min(_NEAREST, scores.shape[1] - 1)  # one of them may be the query itself
    return -np.sort(np.partition(-scores, n - 1, axis=1)[:, :n], axis=1)


@dataclass(frozen=True)
class State:
    """What ``upgrade.json`` says.

    ``home`` is the folder of the index that is being left, ``column`` what is embedded of a row,
    ``fit`` which bridge is in use (`bridge_names`), ``pairs`` how many it was learned from, or
    another that was no better.
    """

    home: str
    space: Space
    calibration: Calibration
    begun: str
    column: str | None
    pairs: int
    fit: int = 0

    def save(self, file: Path) -> None:
        """Write the file; whoever calls this makes it durable."""
        text = {
            "format": FORMAT,
            "written_by": f"nestvec {__version__}",
            "home": self.home,
            "begun": self.begun,
            "column": self.column,
            "pairs": self.pairs,
            "fit": self.fit,
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
                calibration=_calibration(found["calibration"]),
                begun=found["begun"],
                column=found["column"],
                pairs=found["pairs"],
                fit=found["fit"],
            )
        except (ValueError, KeyError, TypeError, SpaceError) as error:
            if isinstance(error, FileFormatError):
                raise
            raise FileFormatError(
                f"{file} is damaged ({type(error).__name__}: {error}). Restore it from a backup, "
                f"or remove {file.parent}, which takes the upgrade back; the index is whole."
            ) from error


def _calibration(found: dict[str, Any]) -> Calibration:
    slopes = tuple((int(dim), float(slope)) for dim, slope in found.get("slopes", ()))
    return Calibration(**{**found, "slopes": slopes})


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
    names = (".home-*", f".{FOLDER}.*", f".{STAMP}.*")
    scratch = [path for name in names for path in root.glob(name)]
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

"""What every encoder does around its model: sort by length, batch, show progress, resume."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nestvec import _checks
from nestvec._atomic import make_way, written_beside
from nestvec._progress import progress
from nestvec.errors import DataError, FileFormatError, StorageError
from nestvec.space import Embeddings, Space, files

Role = Literal["document", "query"]
Items = Sequence[Any] | NDArray[Any]  # checked: they have a length and are read one by one
PLURAL = {"document": "documents", "query": "queries"}

_CHUNK_BATCHES = 16  # batches kept together on disk; what an interruption can cost
_SHOW_FROM = 512  # items from which progress is shown if nobody said


@dataclass(frozen=True)
class EncodeReport:
    """What the last `Encoder.encode` did.

    ``n`` items (``unit`` says what: texts, images), of which ``n_cut`` were longer than
    ``max_length`` tokens (prompt and special tokens included) and lost their end, ``n_resumed``
    were read from an earlier run, in ``seconds``. ``n_cut`` is None where nothing was encoded.
    """

    n: int
    n_cut: int | None
    max_length: int | None
    n_resumed: int
    seconds: float
    unit: str = "texts"

    def __str__(self) -> str:
        text = f"{self.n:,} {self.unit} in {self.seconds:.1f} s"
        if self.n_resumed:
            text += f", {self.n_resumed:,} of them from an earlier run"
        if self.max_length and self.n_cut is not None:
            text += f"; {self.n_cut:,} were longer than {self.max_length} tokens and were cut there"
        return text


class Encoder(ABC):
    """Raw items in, Embeddings out. Subclasses say how a batch becomes vectors.

    Items are texts, unless the subclass says what else (``_unit``), what is wrong with them
    (``_checked``) and what is in them (``_content``).

    Attributes
    ----------
    space : Space
        Where the vectors live.
    source : str
        Where the model came from, for people.
    report : EncodeReport
        What the last ``encode`` did.
    """

    source: str
    batch_size: int
    report = EncodeReport(0, 0, None, 0, 0.0)
    _unit = "texts"

    @property
    @abstractmethod
    def space(self) -> Space: ...

    def _look_again(self) -> None:
        """Bring ``space`` up to date, if the model may have changed."""
        return

    def _check_role(self, role: Role, /) -> None:
        """Raise `ModelError` if the model is not made for a role."""
        return

    @abstractmethod
    def _vectors(self, items: list[Any], role: Role, /) -> ArrayLike:
        """Return one row an item, before normalisation."""

    @abstractmethod
    def _lengths(self, items: Items, role: Role, /) -> tuple[NDArray[np.int64], int | None]:
        """Return the length of each item and the length at which it is cut (None: nowhere)."""

    def _checked(self, items: Any, ids: Any, /) -> Items:
        """Return the items to be read one by one, or raise `DataError` for one that will not do."""
        return _checked_texts(items, ids)

    def _content(self, item: Any, /) -> bytes:
        """Return what decides an item's vector."""
        return item.encode()

    def encode(
        self,
        items: Any,
        *,
        role: Role = "document",
        ids: Any = None,
        resume: str | os.PathLike[str] | None = None,
        show_progress: bool | None = None,
    ) -> Embeddings:
        """Encode texts, longest first, or whatever else this encoder takes.

        Parameters
        ----------
        items
            Of texts, each with something in it; the model's prompt for ``role`` is put before each.
        role
            ``"document"`` for what is stored, ``"query"`` for what is asked. Both live in one
            Space.
        ids : (n,) int or str, optional
            Row numbers if not given.
        resume
            A folder where finished chunks (16 batches each) are kept, so that the same call after
            an interruption goes on where it stopped. It is yours to remove; `encode_to` does.
        show_progress
            A bar on a terminal and plain lines elsewhere, on stderr. None shows it from 512 items.

        Returns
        -------
        Embeddings
            ``array`` (n, dim) float32, in the order of ``items``. `report` then tells how many
            texts were cut.

        Raises
        ------
        DataError
            If there is no item, a text has no content or holds a lone surrogate, ids do not fit,
            or ``resume`` holds the chunks of something else.
        """
        if role not in ("document", "query"):
            raise DataError(f"role {role!r} is neither 'document' nor 'query'.")
        self._check_role(role)
        items = self._checked(items, ids)
        if ids is not None:
            ids = _checks.as_ids(ids, len(items))
        start = time.monotonic()
        self._look_again()
        space = self.space
        show = len(items) >= _SHOW_FROM if show_progress is None else show_progress
        lengths, limit = self._lengths(items, role)
        order = np.argsort(-lengths, kind="stable")
        store = None
        if resume is not None:
            differs = f"{self._unit}, model, role or batch size"
            store = Chunks(Path(resume), self._key(items, role), "encoding", differs)
        vectors = np.empty((len(items), space.size), dtype=np.float32)
        n_resumed = 0
        label = f"encoding {PLURAL[role]}"
        with progress(label, len(items), show=show, unit=self._unit) as advance:
            for number, rows in enumerate(_split(order, self.batch_size * _CHUNK_BATCHES)):
                found = store.read(number, (len(rows), space.size)) if store else None
                if found is None:
                    done = []
                    for batch in _split(rows, self.batch_size):
                        done.append(self._checked_vectors([items[i] for i in batch], role, batch))
                        advance(len(batch))
                    found = np.concatenate(done)
                    if store:
                        store.write(number, found)
                else:
                    n_resumed += len(rows)
                    advance(len(rows))
                vectors[rows] = found
        n_cut = 0 if limit is None else int((lengths > limit).sum())
        seconds = time.monotonic() - start
        self.report = EncodeReport(len(items), n_cut, limit, n_resumed, seconds, self._unit)
        if show:
            sys.stderr.write(f"{PLURAL[role]}: {self.report}\n")
        return Embeddings(vectors, space, ids)

    def encode_to(
        self,
        path: str | os.PathLike[str],
        items: Any,
        *,
        reuse: bool = False,
        **options: Any,
    ) -> Embeddings:
        """Encode into a stamped file; after an interruption the same call goes on.

        Finished chunks wait in ``<path>.partial/``, which is removed once the file stands. The
        options are those of `encode`, without ``resume``. With ``reuse``, a file that this made
        before of the same items, ids, model and role is read instead; ``<path>.key`` remembers.
        Raises what `encode` and `Embeddings.save` raise, before the work where it can be known.
        """
        path = Path(path)
        if path.suffix.lower() not in files.STAMPED:  # said before the work, not after it
            raise FileFormatError(
                f"cannot save to {path}: choose one of {', '.join(files.STAMPED)}."
            )
        make_way(path, files.parts_of(path))
        items = self._checked(items, options.get("ids"))
        partial, known = (path.with_name(f"{path.name}.{end}") for end in ("partial", "key"))
        self._look_again()
        key = self._key(items, options.get("role", "document"))
        if reuse and path.exists() and known.is_file() and known.read_text() == key:
            found = Embeddings.load(path, space=self.space)
            ids = np.arange(len(items)) if options.get("ids") is None else options["ids"]
            if np.array_equal(found.ids, _checks.as_ids(ids, len(items))):
                n = len(items)
                self.report = EncodeReport(n, None, None, n, 0.0, self._unit)
                if options.get("show_progress"):
                    sys.stderr.write(f"{path}: the same {n:,} {self._unit}, read again\n")
                return found
        try:
            known.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot remove {known}: {error.strerror or error}.") from error
        embeddings = self.encode(items, resume=partial, **options)
        embeddings.save(path)
        if reuse:
            with written_beside(known) as scratch:
                scratch.write_text(key)
        shutil.rmtree(partial, ignore_errors=True)
        return embeddings

    def _checked_vectors(
        self, items: list[Any], role: Role, rows: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        space = self.space
        name = f"what the model returned for the batch of row {rows[0]}"
        matrix = _checks.as_matrix(self._vectors(items, role), name=name, dim=space.size)
        if len(matrix) != len(items):
            raise DataError(f"{name}: {len(matrix)} vectors for {len(items)} {self._unit}.")
        return _checks.normalise(matrix, name=name) if space.has_unit_rows else matrix

    def _key(self, items: Items, role: Role) -> str:
        """Hash everything that decides what a chunk holds."""
        digest = hashlib.sha256(f"{self.space.space_id} {role} {self.batch_size}".encode())
        for item in items:
            content = self._content(item)
            digest.update(b"%d:" % len(content))
            digest.update(content)
        return digest.hexdigest()


class Chunks:
    """Finished chunks of one job, (n, dim) float32 each, in a folder that is the job's alone.

    ``key`` is a hash of all that decides what they hold; ``job`` and ``differs`` say to whom meets
    another job's folder what it is and what may be other.
    """

    def __init__(self, folder: Path, key: str, job: str, differs: str) -> None:
        self.folder = folder
        about = folder / "about.json"
        if about.is_file():
            try:
                same = json.loads(about.read_text(encoding="utf-8"))["key"] == key
            except (ValueError, KeyError, TypeError):
                same = False
            if not same:
                raise DataError(
                    f"{folder} holds the chunks of another {job} (other {differs}). Remove that "
                    f"folder to start anew, or name another one."
                )
        elif folder.exists() and (
            not folder.is_dir()
            or any(not p.name.startswith(".") for p in folder.iterdir())  # .x: a killed writer's
        ):
            raise DataError(f"{folder} is not a folder of chunks to resume from; name another one.")
        else:
            with written_beside(about) as scratch:
                scratch.write_text(json.dumps({"key": key}), encoding="utf-8")

    def read(self, number: int, shape: tuple[int, int]) -> NDArray[np.float32] | None:
        try:
            found = np.load(self._path(number), allow_pickle=False)
        except (OSError, ValueError, EOFError):  # not there yet, or damaged: encode it again
            return None
        return found if found.shape == shape and found.dtype == np.float32 else None

    def write(self, number: int, vectors: NDArray[np.float32]) -> None:
        with written_beside(self._path(number)) as scratch:
            np.save(scratch, vectors)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npy"


def _split(rows: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    return (rows[i : i + size] for i in range(0, len(rows), size))


def _checked_texts(texts: Iterable[str], ids: Any) -> list[str]:
    if isinstance(texts, (str, bytes)):
        raise DataError("texts: one string given where a list of texts is expected; pass [text].")
    found = list(texts)
    if not found:
        raise DataError("texts: empty; at least one text is needed.")
    for row, text in enumerate(found):
        if not isinstance(text, str):
            wrong = f"is a {type(text).__name__}, so there is nothing to embed. Drop it."
        elif not text.strip():
            wrong = "has no content, so there is nothing to embed. Drop it."
        elif not _checks.is_unicode(text):
            wrong = (
                "holds half of a character (a lone surrogate), which no tokenizer reads. "
                "Replace it: text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
            )
        else:
            continue
        raise DataError(f"texts: row {row}{id_of(ids, row)} {wrong}")
    return found


def id_of(ids: Any, row: int) -> str:
    """Return " (id 'x')" for messages, or nothing where no ids were given."""
    return "" if ids is None or row >= len(ids) else f" (id {np.asarray(ids)[row].item()!r})"

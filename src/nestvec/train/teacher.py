"""A teacher's scores of text pairs: asked once, kept, gone on with after an interruption."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec import _checks
from nestvec._extras import require
from nestvec._progress import progress
from nestvec.corpus.examples import Examples
from nestvec.encoders._quiet import quiet
from nestvec.encoders.base import Chunks
from nestvec.encoders.fingerprint import fingerprint
from nestvec.errors import DataError, ModelError

Teacher = Callable[[Sequence[str], Sequence[str]], Any]

_SHOW_FROM = 512  # pairs from which progress is shown if nobody said


class CrossEncoderTeacher:
    """A sentence-transformers ``CrossEncoder`` as a teacher: ``teacher(first, second)`` -> (n,).

    Parameters
    ----------
    model
        A ``CrossEncoder`` of one label, or a hub id or folder of one.
    raw
        Return the logits. By default what the model's own activation makes of them, which for one
        label is the sigmoid unless its config says otherwise: scores between 0 and 1.
    batch_size
        Pairs in a forward pass.
    device
        As torch names it; None takes an accelerator if there is one.

    Attributes
    ----------
    name : str
        A hash of the weights, and whether the scores are raw: what a cache of scores is kept under.

    Raises
    ------
    ModelError
        If it cannot be loaded, or gives more than one number a pair.
    """

    def __init__(
        self,
        model: Any,
        *,
        raw: bool = False,
        batch_size: int = 64,
        device: str | None = None,
    ) -> None:
        module = require("sentence_transformers", extra="train", why="a cross-encoder teacher")
        if isinstance(model, (str, os.PathLike)):
            try:
                with quiet():
                    model = module.CrossEncoder(os.fspath(model), device=device)
            except Exception as error:
                reason = (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")
                raise ModelError(f"cannot load a cross-encoder from {model}: {reason}.") from error
        if model.num_labels != 1:
            raise ModelError(
                f"the teacher gives {model.num_labels} numbers a pair, and a score is one: take a "
                f"cross-encoder with num_labels=1, or any function of two lists of texts."
            )
        self.model, self.raw, self.batch_size = model, raw, batch_size
        self.name = f"{fingerprint(model)}{' raw' if raw else ''}"

    def __call__(self, first: Sequence[str], second: Sequence[str]) -> NDArray[np.float32]:
        """Return the score of each pair."""
        import torch

        return self.model.predict(
            list(zip(first, second, strict=True)),
            batch_size=self.batch_size,
            show_progress_bar=False,
            activation_fn=torch.nn.Identity() if self.raw else None,
        )


def score_pairs(
    teacher: Teacher,
    first: Sequence[str],
    second: Sequence[str],
    *,
    cache: str | os.PathLike[str] | None = None,
    name: str | None = None,
    chunk_size: int = 4096,
    show_progress: bool | None = None,
) -> Examples:
    """Ask a teacher for the score of each pair of texts; return scored pairs.

    They are `Examples` for `train_text` with `ScoreDistillation`, or with its usual loss, which
    looks at the order of the scores alone.

    Parameters
    ----------
    teacher
        `CrossEncoderTeacher`, or any function of two lists of texts that returns a number for each
        pair, higher for closer.
    first, second
        Pair i is ``first[i]``, ``second[i]``.
    cache
        A folder for finished chunks: the same call after an interruption goes on, and a later one
        reads them. It is yours to remove.
    name
        What tells this teacher from others in the cache; `CrossEncoderTeacher` knows its own.
    chunk_size
        Pairs asked at once: what an interruption can cost.
    show_progress
        On stderr; None shows it from 512 pairs.

    Raises
    ------
    DataError
        If the texts do not fit, the teacher returns anything but one finite number a pair, or the
        cache holds something else.
    """
    texts = tuple(_checked(side, what) for side, what in ((first, "first"), (second, "second")))
    n = len(texts[0])
    if len(texts[1]) != n:
        raise DataError(f"{n} first texts and {len(texts[1])} second ones are no pairs.")
    name = name or getattr(teacher, "name", None)
    store = None
    if cache is not None:
        if not name:
            raise DataError("a function needs name=, so that its scores are told from others'.")
        key = f"{name} {chunk_size} {Examples('pairs', texts).fingerprint()}"
        digest = hashlib.sha256(key.encode()).hexdigest()
        store = Chunks(Path(cache), digest, "scoring", "pairs, teacher or chunk size")
    scores = np.empty(n, np.float32)
    show = n >= _SHOW_FROM if show_progress is None else show_progress
    with progress("scoring", n, show=show, unit="pairs") as advance:
        for number, start in enumerate(range(0, n, chunk_size)):
            part = slice(start, min(start + chunk_size, n))
            size = part.stop - start
            found = store.read(number, (size, 1)) if store else None
            if found is None:
                found = _asked(teacher, texts[0][part], texts[1][part], start)
                if store:
                    store.write(number, found)
            scores[part] = found[:, 0]
            advance(size)
    return Examples("scored", texts, scores)


def _checked(texts: Sequence[str], what: str) -> list[str]:
    if isinstance(texts, (str, bytes)):
        raise DataError(f"{what}: one string given where a list of texts is expected.")
    found = list(texts)
    for row, text in enumerate(found):
        if not isinstance(text, str) or not text.strip() or not _checks.is_unicode(text):
            raise DataError(f"{what}: row {row} has no text that can be scored ({text!r}).")
    if not found:
        raise DataError(f"{what}: empty; at least one pair is needed.")
    return found


def _asked(
    teacher: Teacher, first: list[str], second: list[str], start: int
) -> NDArray[np.float32]:
    scores = np.asarray(teacher(first, second))
    if scores.shape != (len(first),) or scores.dtype.kind not in "fiu":
        raise DataError(
            f"the teacher returned shape {scores.shape} of {scores.dtype} for {len(first)} pairs: "
            f"one number a pair is needed."
        )
    wrong = np.flatnonzero(~np.isfinite(scores))
    if len(wrong):
        raise DataError(
            f"the teacher's score of pair {start + int(wrong[0])} is {scores[wrong[0]]}. Drop the "
            f"pair, or look at the teacher."
        )
    return scores.astype(np.float32)[:, None]

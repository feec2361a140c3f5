"""Examples to a file that `read_examples`, and every other trainer, reads."""

from __future__ import annotations

import json
import os
from pathlib import Path

from nestvec._atomic import written_beside
from nestvec.corpus.examples import Examples, Kind
from nestvec.errors import FileFormatError

_NAMES: dict[Kind, tuple[str, ...]] = {
    "pairs": ("anchor", "positive"),
    "triplets": ("anchor", "positive", "negative"),
    "scored": ("sentence1", "sentence2"),
    "labelled": ("text",),
}


def write_examples(examples: Examples, path: str | os.PathLike[str]) -> Path:
    """Write examples to a ``.jsonl`` file, a row a line, under the usual names of their columns.

    Written beside and renamed: there is never half a file.

    Raises
    ------
    FileFormatError
        If the path does not end in ``.jsonl``.
    StorageError
        If the disk refuses.
    """
    path = Path(path)
    check_examples_path(path)
    names = _NAMES[examples.kind]
    with written_beside(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        for row, texts in enumerate(zip(*examples.texts, strict=True)):
            line: dict[str, str | float] = dict(zip(names, texts, strict=True))
            if examples.targets is not None and examples.kind == "scored":
                line["score"] = float(examples.targets[row])
            elif examples.targets is not None:
                line["label"] = examples.label_names[int(examples.targets[row])]
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return path


def check_examples_path(path: Path) -> None:
    """Raise `FileFormatError` for a file that examples are not written to, before any work."""
    if path.suffix != ".jsonl":
        raise FileFormatError(f"cannot write examples to {path}: name a file ending in .jsonl.")

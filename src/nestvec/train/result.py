"""What a training leaves: a folder, its sizes, what each was worth, the log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from nestvec._atomic import written_beside
from nestvec.errors import ModelError
from nestvec.train.heads import NestedClassifier
from nestvec.train.run import Run

CLASSIFIER = "classifier.safetensors"


@dataclass(frozen=True)
class Trained:
    """What a training left.

    Attributes
    ----------
    folder
        The model: for ``SentenceTransformer(folder)``, `nestvec.TextEncoder`,
        `nestvec.ImageEncoder`.
    dims
        The sizes it was trained for.
    metrics
        ``"spearman@64"`` -> value on the validation data, at the end; empty without any.
    records
        The log: step, loss, learning rate, validation.
    layers
        The layers it was trained for, () if it is the last alone; their metrics are called
        ``"spearman@3x64"``, the last layer's ``"spearman@64"``.
    """

    folder: Path
    dims: tuple[int, ...]
    metrics: dict[str, float]
    records: list[dict[str, Any]]
    layers: tuple[int, ...] = ()

    @classmethod
    def of(cls, run: Run, dims: tuple[int, ...], layers: tuple[int, ...] = ()) -> Trained:
        """Return what stands in a folder."""
        return cls(run.folder, dims, last_metrics(run), run.records(), layers)


def last_metrics(run: Run) -> dict[str, float]:
    """Return the newest validation in the log."""
    for record in reversed(run.records()):
        found = {k.removeprefix("eval_"): v for k, v in record.items() if k.startswith("eval_")}
        if found:
            return found
    return {}


def save_classifier(folder: Path, head: NestedClassifier, label_names: Sequence[str]) -> None:
    """Write the heads that were trained with an encoder, and what their classes are called."""
    state = {name: value.cpu().contiguous() for name, value in head.state_dict().items()}
    about = {
        "dims": json.dumps(head.dims),
        "tied": json.dumps(head.tied),
        "normalise": json.dumps(head.normalise),
        "label_names": json.dumps(list(label_names)),
    }
    with written_beside(folder / CLASSIFIER) as scratch:
        save_file(state, scratch, about)


def load_classifier(folder: Path | str) -> tuple[NestedClassifier, tuple[str, ...]]:
    """Return the heads of a trained folder and the names of their classes.

    Raises
    ------
    ModelError
        If the folder has none, or they are damaged.
    """
    path = Path(folder) / CLASSIFIER
    if not path.is_file():
        raise ModelError(f"{folder} has no {CLASSIFIER}: it was not trained on labels.")
    try:
        with safe_open(path, framework="pt") as file:
            about = {key: json.loads(value) for key, value in file.metadata().items()}
            state = {name: file.get_tensor(name) for name in file.keys()}
        names = tuple(about["label_names"])
        head = NestedClassifier(
            about["dims"], len(names), tied=about["tied"], normalise=about["normalise"]
        )
        head.load_state_dict(state)
    except Exception as error:  # safetensors has an error class of its own
        raise ModelError(f"{path} is damaged: {str(error).splitlines()[0]}.") from error
    return head.eval(), names

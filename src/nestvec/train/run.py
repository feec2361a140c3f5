"""One training in one folder: what was asked, how far it came, what is left of it.

::

    OUTPUT/training.json     what was asked, and "finished" once the model stands
    OUTPUT/log.jsonl         a record a line: step, loss, learning rate, validation at every size
    OUTPUT/checkpoints/      while it runs; the last two
    OUTPUT/...               the model, written at the end
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from torch import nn

from nestvec._atomic import make_way, written_beside
from nestvec.errors import StorageError, TrainingError
from nestvec.train.settings import is_first_process

ABOUT, LOG, CHECKPOINTS = "training.json", "log.jsonl", "checkpoints"
_COMPLETE = "complete"  # in a checkpoint that was written to its end


class Run:
    """A folder that belongs to one training.

    Parameters
    ----------
    folder
        New, empty, or left by the same training.
    asked
        All that decides the result, as JSON: settings, sizes, hashes of model and data.
    fresh
        Forget an earlier training in ``folder``.

    Raises
    ------
    TrainingError
        If ``folder`` holds a training that was asked for something else; the message names what.
    StorageError
        If ``folder`` holds anything that no training made.
    """

    def __init__(self, folder: Path, asked: dict[str, Any], *, fresh: bool = False) -> None:
        self.folder = folder
        self.asked = json.loads(json.dumps(asked, default=list))
        self.checkpoints = folder / CHECKPOINTS
        about = folder / ABOUT
        before: dict[str, Any] | None = None
        if about.is_file():
            try:
                before = json.loads(about.read_text(encoding="utf-8"))
                assert isinstance(before, dict)
            except (ValueError, AssertionError) as error:
                raise TrainingError(
                    f"{about} is damaged. Remove {folder} to start anew, or name another folder."
                ) from error
        self.finished = False
        if not is_first_process():
            self.finished = before is not None and not fresh and before.get("finished", False)
            return
        if before is None:
            make_way(about)
            if folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir()):
                raise StorageError(
                    f"cannot train into {folder}: it holds something that no training made. Name "
                    f"another folder."
                )
        elif fresh or not (before.get("finished") or self.last_checkpoint()):
            shutil.rmtree(folder)  # without a checkpoint there is nothing in it to lose
            before = None
        elif differ := _differences(before.get("asked", {}), self.asked):
            raise TrainingError(
                f"{folder} holds a training of another configuration: {'; '.join(differ)}. Ask for "
                f"the same to go on with it, name another folder, or start anew with fresh=True."
            )
        elif before.get("finished"):
            self.finished = True
            sys.stderr.write(f"{folder}: trained already\n")
        if before is None:
            self._write(finished=False)

    def last_checkpoint(self) -> Path | None:
        """Return the newest checkpoint that is whole."""
        found = [p for p in self.checkpoints.glob("checkpoint-*") if _is_whole(p)]
        return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)

    def mark_complete(self, step: int) -> None:
        """Say that the checkpoint of a step was written to its end, and how long its files are."""
        folder = self.checkpoints / f"checkpoint-{step}"
        sizes = _sizes(folder)
        with written_beside(folder / _COMPLETE) as scratch:
            scratch.write_text(json.dumps(sizes))

    def drop_torn(self) -> None:
        """Remove checkpoints that a kill or a full disk cut short."""
        for folder in self.checkpoints.glob("checkpoint-*"):
            if not _is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)

    def keep_log_until(self, step: int) -> None:
        """Drop log records of steps that will be done again."""
        path = self.folder / LOG
        if path.is_file():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= step]
            with written_beside(path) as scratch:
                scratch.write_text("".join(f"{line}\n" for line in kept))

    def log(self, record: dict[str, Any]) -> None:
        """Append a record to the log."""
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """Return the log."""
        path = self.folder / LOG
        return [json.loads(x) for x in path.read_text().splitlines()] if path.is_file() else []

    def finish(self, **found: Any) -> None:
        """Say that the model stands, and remove the checkpoints."""
        self._write(finished=True, **found)
        self.finished = True
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _write(self, **found: Any) -> None:
        with written_beside(self.folder / ABOUT) as scratch:
            text = json.dumps({"asked": self.asked, **found}, indent=2)
            scratch.write_text(text + "\n", encoding="utf-8")


def described(objective: Any) -> str:
    """Return an objective in words that are the same in the next process."""
    if isinstance(objective, nn.Module):
        return repr(objective)
    return f"{objective.__module__}.{objective.__qualname__}"


def _sizes(folder: Path) -> dict[str, int]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != _COMPLETE)
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in files}


def _is_whole(checkpoint: Path) -> bool:
    try:
        said = json.loads((checkpoint / _COMPLETE).read_text())
    except (OSError, ValueError):
        return False
    return said == _sizes(checkpoint)


def _differences(before: dict[str, Any], now: dict[str, Any], at: str = "") -> list[str]:
    found = []
    for key in sorted({*before, *now}):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{at}{key}.")
        elif a != b:
            found.append(f"{at}{key} was {a!r}, now {b!r}")
    return found


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line that a kill cut short
        return 1 << 62

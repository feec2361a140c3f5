"""The plan that an index keeps: read again only when its file has changed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from nestvec._atomic import written_beside
from nestvec.errors import DataError, FileFormatError, PlanError
from nestvec.search import planner
from nestvec.search.cascade import Plan

NAME = "plan.json"


class StoredPlan:
    """A file with a plan and what is known about it, like the certificate of what was tested.

    ``folder`` is where it lies, ``index`` the path that messages name.
    """

    def __init__(self, folder: Path, index: Path) -> None:
        self.folder, self.index = folder, index
        self._path = str(folder / NAME)  # asked for at each search, which a Path makes slower
        self._known: tuple[Any, Plan | None, dict[str, Any]] = (None, None, {})

    def read(self) -> tuple[Plan | None, dict[str, Any]]:
        """Return the plan, if there is one, and what is known about it."""
        try:
            there = os.stat(self._path)  # noqa: PTH116
        except FileNotFoundError:
            return None, {}
        stamp = there.st_ino, there.st_mtime_ns, there.st_size
        seen, plan, about = self._known
        if seen != stamp:
            try:
                about = json.loads((self.folder / NAME).read_text("utf-8"))
                plan = Plan.parse(about["plan"])
            except FileNotFoundError:
                return None, {}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise FileFormatError(
                    f"{self._path} cannot be read ({error}). Remove it, or plan again."
                ) from error
            self._known = stamp, plan, about
        return plan, about

    def write(self, plan: Plan, about: dict[str, Any]) -> None:
        """Put a plan in the place of the one that is there; the caller holds the writers' lock."""
        self.tidy()
        text = json.dumps({"plan": str(plan), **about}, indent=1) + "\n"
        with written_beside(self.folder / NAME) as scratch:
            scratch.write_text(text, "utf-8")

    def tidy(self) -> None:
        """Remove what a writer that was killed left; the caller holds the writers' lock."""
        for folder in self.folder.glob(f".{NAME}.*"):
            shutil.rmtree(folder, ignore_errors=True)

    def remove(self) -> None:
        (self.folder / NAME).unlink(missing_ok=True)

    def proven(self, recall: float, k: int | None) -> Plan:
        """Return the cheapest plan that was certified for a recall, or raise `PlanError`."""
        if not 0 < recall <= 1:
            raise DataError(f"recall {recall} is a share: above 0, at most 1.")
        _, stored = self.read()
        plan = planner.proven(stored, recall)
        if plan is not None and k in (None, stored["k"]):
            return plan
        asked = "" if k in (None, 10) else f", k={k}"
        if plan is not None:
            said = f"recall@{stored['k']} was certified, and {k} answers are asked for"
        elif bounds := [one["lower"] for one in stored.get("tested", ())]:
            said = f"no stored plan was certified for recall {recall:g}, only up to {bounds[0]:.4f}"
        else:
            said = f"no plan is stored that was certified for recall {recall:g}"
        raise PlanError(
            f"{self.index}: {said}. Certify one: index.plan(recall={recall:g}{asked}), or nestvec "
            f"plan {self.index} --recall {recall:g}{asked.replace(', k=', ' -k ')}."
        )

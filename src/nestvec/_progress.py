"""Progress: a bar on a terminal, plain lines elsewhere, nothing when it is not wanted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_EVERY_S = 5.0  # seconds between plain lines


@contextmanager
def progress(
    label: str, total: int, *, show: bool = True, unit: str = ""
) -> Iterator[Callable[[int], None]]:
    """Yield ``advance(n)``; everything is written to stderr, so stdout stays for results."""
    if not show:
        yield lambda n: None
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bars:
            task = bars.add_task(label, total=total)
            yield lambda n: bars.update(task, advance=n)
        return
    start = last = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if done >= total or now - last >= _EVERY_S:
            last = now
            seconds = f"{now - start:.0f} s"
            sys.stderr.write(f"{label}: {done:,}/{total:,} {unit} ({seconds})\n")
            sys.stderr.flush()

    yield advance

"""Fill the tables and numbers of README.md and docs/*.md from benchmarks/results/*.json.

A place to fill is a pair of markers; what stands between them is replaced::

    <!-- table: adaptor; dataset=scifact; metric=nDCG@10; rows=method; columns=dim -->
    <!-- end -->

    recall is <!-- number: cascade; dataset=npl; method=full; show=recall --> <!-- end --> there

``rows`` (one key or more, with commas) makes the lines. Then either ``columns``, one key whose
values become columns, with ``show`` (default ``value``) in the cells; or ``show`` alone, a column
each. ``key=value`` keeps the rows that have it (``a|b``: a or b; ``a*``: what begins with a);
``interval=yes`` puts low and high behind the value. A cell that more than one row would fill is an
error: nothing is averaged in silence.

``python benchmarks/readme.py`` writes, ``--check`` only says what is out of date.
"""

from __future__ import annotations

import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import _frame

Row = dict[str, Any]

MARKED = re.compile(
    r"(?P<start><!-- (?P<kind>table|number): (?P<spec>.*?) -->)(?P<old>.*?)<!-- end -->", re.DOTALL
)
SPECIAL = ("rows", "columns", "show", "interval")
ABSENT = "-"


def main(arguments: list[str]) -> int:
    """Fill every page; with ``--check``, name those that would change."""
    stale = []
    for page in [_frame.ROOT / "README.md", *sorted((_frame.ROOT / "docs").rglob("*.md"))]:
        old = page.read_text(encoding="utf-8")
        new = MARKED.sub(lambda found, page=page: filled(found, page), old)
        if new != old:
            stale.append(page.relative_to(_frame.ROOT).as_posix())
            if "--check" not in arguments:
                page.write_text(new, encoding="utf-8")
    if stale and "--check" in arguments:
        print(f"out of date: {', '.join(stale)}. Type: make readme", file=sys.stderr)
        return 1
    print(f"filled: {', '.join(stale)}" if stale else "all tables are as the result files say")
    return 0


def filled(found: re.Match[str], page: Path) -> str:
    """Return one marked place with its table or number."""
    name, *settings = [part.strip() for part in found["spec"].split(";")]
    options = dict(setting.split("=", 1) for setting in settings)
    try:
        if found["kind"] == "number":
            text = number(rows_of(name, options), options)
        else:
            text = f"\n{table(rows_of(name, options), options)}\n\n{source(name, page)}\n"
    except FileNotFoundError:
        text = " not measured yet " if found["kind"] == "number" else "\n*Not measured yet.*\n"
    except (KeyError, ValueError) as error:
        raise SystemExit(f"{page.name}: <!-- {found['spec']} -->: {error}") from error
    return f"{found['start']}{text}<!-- end -->"


def rows_of(name: str, options: dict[str, str]) -> list[Row]:
    """Return the rows of a result file that have the values asked for."""
    wanted = {k: v.split("|") for k, v in options.items() if k not in SPECIAL}
    if unknown := set(wanted) - _frame.KEYS:
        raise ValueError(f"no result file has a key {sorted(unknown)}")
    rows = [
        row
        for row in _frame.read(name)["rows"]
        if all(any(fnmatchcase(str(row.get(k)), v) for v in vs) for k, vs in wanted.items())
    ]
    if not rows:
        raise ValueError("no row fits")
    return rows


def number(rows: list[Row], options: dict[str, str]) -> str:
    """Return the one number that ``show`` names."""
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} rows fit where one number is asked for{differing(rows)}")
    return cell(rows[0], options.get("show", "value"), options)


def table(rows: list[Row], options: dict[str, str]) -> str:
    """Return a Markdown table, lines and columns in the order of the result file."""
    keys = options["rows"].split(",")
    show = options.get("show", "value").split(",")
    across = options.get("columns")
    if across and len(show) > 1:
        raise ValueError("with columns, show names one key")
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault(tuple(cell(row, key, {}) for key in keys), {})
        if across:
            cells = {cell(row, across, {}): cell(row, show[0], options)}
        else:
            cells = {key: cell(row, key, options) for key in show}
        if twice := set(line) & set(cells):
            raise ValueError(f"more than one row for column {sorted(twice)}{differing(rows)}")
        line.update(cells)
    columns = list(dict.fromkeys(c for line in lines.values() for c in line))
    if across and all(c.isdigit() for c in columns):
        columns.sort(key=int)
    head = [*map(title, keys), *(columns if across else map(title, columns))]
    body = [[*line, *(cells.get(c, ABSENT) for c in columns)] for line, cells in lines.items()]
    rule = [*["---"] * len(keys), *["---:"] * len(columns)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])


def differing(rows: list[Row]) -> str:
    """Return in which keys the rows differ, for a message."""
    keys = [
        k
        for k in rows[0]
        if k not in ("value", "low", "high") and len({str(r.get(k)) for r in rows}) > 1
    ]
    return f"; the rows differ in {', '.join(keys)}" if keys else ""


def cell(row: Row, key: str, options: dict[str, str]) -> str:
    """Return one value as people read it, with its unit where the key has one."""
    value = row.get(key)
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value.replace("|", "\\|")
    if key.endswith("_bytes"):
        return size(value)
    if key == "value" and options.get("interval") == "yes" and "low" in row:
        return f"{plain(value)} ({plain(row['low'])} to {plain(row['high'])})"
    return f"{plain(value)}x" if key == "ratio" else plain(value)


def plain(value: float) -> str:
    """Return a number: integers with separators, small ones with three digits behind the point."""
    if (float(value).is_integer() and abs(value) >= 2) or isinstance(value, int):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.0f}"
    return (
        f"{value:.3f}"
        if abs(value) < 2
        else f"{value:,.3g}"
        if abs(value) < 100
        else f"{value:,.0f}"
    )


def size(value: float) -> str:
    """Return bytes in decimal units.

    >>> size(1_536), size(1_250_000_000)
    ('1.54 kB', '1.25 GB')
    """
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def title(key: str) -> str:
    """Return a key as the head of a column."""
    return {
        "rss_bytes": "memory",
        "bytes_per_vector": "bytes per vector",
        "ratio_to": "beside",
    }.get(key, key.replace("_", " "))


def source(name: str, page: Path) -> str:
    """Return where the numbers come from; a link where the page lies beside the results."""
    file = f"benchmarks/results/{name}.json"
    shown = f"[`{file}`]({file})" if page.parent == _frame.ROOT else f"`{file}`"
    meta = _frame.read(name)["meta"]
    arguments = ""
    if "of" not in meta:  # of one run: rows of several are all made again without arguments
        arguments = meta["command"].partition(" ")[2]
    more = f' ARGS="{arguments}"' if arguments else ""
    return f"From {shown}, made by `make bench NAME={name}{more}`."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

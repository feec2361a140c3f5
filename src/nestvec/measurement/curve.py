"""The result of a measurement: tidy rows, a table, a verdict, files."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestvec._atomic import written_beside
from nestvec.errors import DataError, FileFormatError

if TYPE_CHECKING:
    from rich.table import Table

#: Keys of a row, in the order of the CSV file.
KEYS: tuple[str, ...] = (
    "dataset",
    "method",
    "dim",
    "layer",
    "precision",
    "metric",
    "value",
    "low",
    "high",
    "difference",
    "difference_low",
    "difference_high",
    "n",
    "seed",
    "bytes_per_vector",
    "macs_per_query",
    "note",
)

#: Items (queries, test rows, pairs) below which nothing holds: a bootstrap of a few of them draws
#: the same few again, and its interval is far too narrow.
MIN_ITEMS = 30

_FORMAT = "nestvec curve 1"


@dataclass
class Curve:
    """Quality, bytes and cost of every method at every size; made by `nestvec.measure`.

    Attributes
    ----------
    rows
        One measurement each, a dict with the keys `KEYS`; docs/measure.md says what each means.
    meta
        ``dataset``, ``task``, ``metric`` (the primary one), ``metrics``, ``dims`` (with the full
        size), ``layers`` (all that were measured, rising, if they were), ``deployable`` (methods
        that the verdict is about: truncation and the maps that were measured), ``n_gallery``,
        ``n_resamples``, ``seed``, ``versions``.
    notes
        What is not in the table and why, in sentences.
    spectrum
        Method -> eigenvalues of the gallery's uncentred second moment, falling, as shares of 1.
    """

    rows: list[dict[str, Any]]
    meta: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    spectrum: dict[str, list[float]] = field(default_factory=dict)

    @property
    def full_dim(self) -> int:
        """Size of the vectors that were measured."""
        return self.meta["dims"][-1]

    def get(
        self,
        method: str,
        dim: int | None = None,
        metric: str | None = None,
        *,
        layer: int | None = None,
        precision: str | None = None,
        bytes_per_vector: int | None = None,
    ) -> dict[str, Any]:
        """Return the one row that fits; the primary metric and float32 first, if not said.

        ``layer`` is None, or the number of the last, for the whole encoder.

        Raises
        ------
        DataError
            If no row fits, or several do; the message names what there is.
        """
        of_method = [
            r
            for r in self.rows
            if r["method"] == method
            and r["metric"] == (metric or self.meta["metric"])
            and r["layer"] == self._layer(layer)
        ]
        asked = {"dim": dim, "precision": precision, "bytes_per_vector": bytes_per_vector}
        wanted = {key: value for key, value in asked.items() if value is not None}
        found = [r for r in of_method if all(r[k] == v for k, v in wanted.items())]
        if precision is None and len(found) > 1:
            found = [r for r in found if r["precision"] == "float32"] or found
        if len(found) == 1:
            return found[0]
        if not of_method:
            methods = ", ".join(dict.fromkeys(r["method"] for r in self.rows))
            raise DataError(
                f"no row of method {method!r} and metric {metric or self.meta['metric']!r}. "
                f"Methods: {methods}. Metrics: {', '.join(self.meta['metrics'])}."
            )
        there = "; ".join(f"{r['dim']} dims, {r['bytes_per_vector']} bytes" for r in of_method)
        raise DataError(f"{len(found)} rows of {method!r} fit {wanted}. It has: {there}.")

    def select(
        self, metric: str | None = None, *, layer: int | None = None
    ) -> list[dict[str, Any]]:
        """Return the rows of one metric and layer: the primary one and the last, if not said."""
        wanted = metric or self.meta["metric"], self._layer(layer)
        return [r for r in self.rows if (r["metric"], r["layer"]) == wanted]

    def _layer(self, layer: int | None) -> int | None:
        """Return how rows write a layer: None for the last."""
        return None if layer in (None, *self.meta.get("layers", ())[-1:]) else layer

    def holds(self, row: Mapping[str, Any], *, tolerance: float = 0.05) -> bool:
        """Say whether a row keeps the quality of the full size.

        It does if even the lower end of the 95% interval of its paired difference to full size
        is no loss beyond ``tolerance`` times the full value of the row's own metric. Nothing holds
        where there is no evidence: fewer than `MIN_ITEMS` items, a full value that is not
        positive (distortion, of which less is better, is 0 there), or a cutoff k of the metric
        with no more than k + 1 vectors stored, which finds nearly all of them at any size.
        """
        low = row["difference_low"]
        if low is None or self._no_evidence(row["metric"]):
            return False
        return low >= -tolerance * self.get("full", metric=row["metric"])["value"]

    def _no_evidence(self, metric: str) -> str:
        """Say why nothing can hold in this metric; empty if something can."""
        full, stored = self.get("full", metric=metric), self.meta["n_gallery"]
        if full["n"] < MIN_ITEMS:
            return f"too few items, {metric} was scored on {full['n']} and {MIN_ITEMS} are needed"
        cutoff = metric.rpartition("@")[2]
        if cutoff.isdecimal() and int(cutoff) >= stored - 1:
            return f"too few items, {metric} among {stored} vectors is nearly all of them"
        value = full["value"] or 0.0
        if value <= 0:
            return f"{metric} is {value:.3f} at the full size, so there is nothing to hold"
        return ""

    def cut(self, *, tolerance: float = 0.05) -> dict[str, Any] | None:
        """Return the smallest float32 cut that `holds`, or None.

        Of truncation and the maps that were measured, not of the baselines; at equal size, the
        one with the higher value.
        """
        holding = [r for r in self._cuts() if self.holds(r, tolerance=tolerance)]
        return min(holding, key=lambda r: (r["dim"], -r["value"]), default=None)

    def _cuts(self) -> list[dict[str, Any]]:
        return [
            r
            for r in self.select()
            if r["method"] in self.meta["deployable"]
            and r["precision"] == "float32"
            and r["dim"] < self.full_dim
        ]

    def verdict(self, *, tolerance: float = 0.05) -> str:
        """Say in one sentence what size to cut to, and what it costs; see `holds` for the rule."""
        full, metric, cuts = self.get("full"), self.meta["metric"], self._cuts()
        if not cuts:
            return f"no cut was measured: {metric} {full['value']:.3f} at {self.full_dim} dims."
        if nothing := self._no_evidence(metric):
            return f"keep all {self.full_dim} dims: {nothing}"
        best = self.cut(tolerance=tolerance)
        if best:
            how = "" if best["method"] == "truncation" else f" with {best['method']}"
            return (
                f"cut to {best['dim']}{how}: {_times(self.full_dim / best['dim'])} smaller, "
                f"{metric} {best['value']:.3f} of {full['value']:.3f}"
            )
        near = max(cuts, key=lambda r: (r["difference_low"], r["dim"]))
        how = "" if near["method"] == "truncation" else f" with {near['method']}"
        return (
            f"keep all {self.full_dim} dims: no cut surely holds {metric} within "
            f"{tolerance:.0%}; the nearest, {near['dim']}{how}, has {near['value']:.3f} of "
            f"{full['value']:.3f} (difference {near['difference']:+.3f}, 95% interval "
            f"{near['difference_low']:+.3f} to {near['difference_high']:+.3f})"
        )

    def grid(self, metric: str | None = None) -> list[tuple[str, str, dict[int, dict[str, Any]]]]:
        """Return lines ``(method, bytes, {size: row})``: one metric, a column a size.

        ``bytes`` says how many a vector takes at size d. Product quantisation stands at the
        smallest size whose int8 prefix has at least its bytes, csr at the size whose float32
        prefix has its bytes; BM25 and its fusion at the full size.
        """
        dims = self.meta["dims"]
        lines: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
        for row in self.select(metric):
            if row["method"] == "product_quantisation":
                size = min(d for d in dims if d >= row["bytes_per_vector"])
            elif row["method"] == "csr":
                size = row["bytes_per_vector"] // 4
            else:
                size = row["dim"] or self.full_dim
            key = ("truncation" if row["method"] == "full" else row["method"], _bytes_of(row))
            lines.setdefault(key, {})[size] = row
        return [(method, size, cells) for (method, size), cells in lines.items()]

    def table(self, metric: str | None = None, *, tolerance: float = 0.05) -> Table:
        """Return a rich Table of one metric: a line a method, a column a size, bold if it holds."""
        from rich.table import Table
        from rich.text import Text

        metric = metric or self.meta["metric"]
        about = " on ".join(t for t in (metric, self.meta["dataset"]) if t)
        primary = metric == self.meta["metric"]
        caption = f"bold: surely within {tolerance:.0%} of the full size" if primary else None
        table = Table(title=about, caption=caption, title_justify="left", caption_justify="left")
        table.add_column("method", no_wrap=True)
        table.add_column("bytes", no_wrap=True)
        dims = self.meta["dims"]
        for dim in dims:
            table.add_column(str(dim), justify="right", no_wrap=True)
        for method, size, cells in self.grid(metric):
            texts = [
                Text(
                    f"{cells[dim]['value']:.3f}",
                    style="bold" if primary and self.holds(cells[dim], tolerance=tolerance) else "",
                )
                if dim in cells
                else Text("")
                for dim in dims
            ]
            table.add_row(method, size, *texts)
        return table

    def layer_grid(self, metric: str | None = None) -> list[tuple[int, dict[int, dict[str, Any]]]]:
        """Return lines ``(layer, {size: row})``, plain prefixes of every layer that was measured.

        An encoder that is left after layer l of N runs l / N of its layers; what is stored and
        compared afterwards costs what its size costs, at any layer.
        """
        lines = []
        for layer in self.meta.get("layers", ()):
            rows = self.select(metric, layer=layer)
            cells = {r["dim"]: r for r in rows if r["method"] in ("full", "truncation")}
            lines.append((layer, cells))
        return lines

    def layer_table(self, metric: str | None = None, *, tolerance: float = 0.05) -> Table:
        """Return a rich Table: a line a layer with its share of the encoder, a column a size."""
        from rich.table import Table
        from rich.text import Text

        metric = metric or self.meta["metric"]
        about = " on ".join(t for t in (metric, self.meta["dataset"]) if t)
        table = Table(title=f"{about}, by layer", title_justify="left")
        table.add_column("layer", no_wrap=True)
        table.add_column("encoder", no_wrap=True)
        dims = self.meta["dims"]
        for dim in dims:
            table.add_column(str(dim), justify="right", no_wrap=True)
        lines = self.layer_grid(metric)
        for layer, cells in lines:
            texts = [
                Text(
                    f"{cells[dim]['value']:.3f}" if dim in cells else "",
                    style="bold"
                    if dim in cells and self.holds(cells[dim], tolerance=tolerance)
                    else "",
                )
                for dim in dims
            ]
            table.add_row(str(layer), f"{layer}/{lines[-1][0]}", *texts)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values; `from_json` reads it back."""
        return {
            "format": _FORMAT,
            "meta": self.meta,
            "rows": self.rows,
            "notes": self.notes,
            "spectrum": self.spectrum,
        }

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write everything to one JSON file; `from_json` reads it back."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        with written_beside(path) as scratch:
            scratch.write_text(text, encoding="utf-8")
        return Path(path)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Curve:
        """Read a curve that `to_json` wrote; anything else is a `FileFormatError`."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            if found["format"] != _FORMAT:
                raise FileFormatError(
                    f"{path} says {found['format']!r}; this nestvec reads {_FORMAT!r}."
                )
            return cls(found["rows"], found["meta"], found["notes"], found["spectrum"])
        except (OSError, UnicodeDecodeError) as error:
            raise FileFormatError(f"{path} cannot be read as a curve: {error}.") from error
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise FileFormatError(
                f"{path} is not a curve ({error!r}). Write one with Curve.to_json."
            ) from error

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write the rows to a CSV file, one measurement a line; empty is unknown."""
        with written_beside(path) as scratch, scratch.open("w", encoding="utf-8", newline="") as f:
            writer = csv.DictWriter(f, KEYS)
            writer.writeheader()
            writer.writerows(self.rows)
        return Path(path)

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        sections: Sequence[tuple[str, str]] = (),
        tolerance: float = 0.05,
    ) -> Path:
        """Write one HTML file that opens offline: verdict, plot, table, spectrum.

        ``sections`` are further (title, text) pairs, shown in order below the table. Text that
        knows how to be HTML (``markupsafe.Markup``) is inserted as it is, plain text is escaped.
        """
        from nestvec.measurement import report

        html = report.render(self, sections=sections, tolerance=tolerance)
        with written_beside(path) as scratch:
            scratch.write_text(html, encoding="utf-8")
        return Path(path)


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if abs(ratio - round(ratio)) < 0.05 else f"{ratio:.1f}x"


def _bytes_of(row: Mapping[str, Any]) -> str:
    if row["bytes_per_vector"] is None:
        return "words"
    if row["method"] == "product_quantisation":
        return "≤ d"
    return {"int8": "d", "binary": "d/8"}.get(row["precision"], "4 d")

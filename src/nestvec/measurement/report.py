"""One HTML file that opens offline: verdict, quality against bytes, every size, spectrum."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from nestvec._extras import require

if TYPE_CHECKING:
    from nestvec.measurement.curve import Curve

# Okabe and Ito's palette without its yellow: told apart by the colour-blind, on light and dark.
_COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"),
    *("#7f7f7f", "#8a6fbf", "#a0522d", "#6b8e23", "#c71585"),
)
_MARKERS = "osD^vPX"
_LINES = {"int8": "--", "binary": ":"}  # of a map's codes, in the map's own colour


def render(
    curve: Curve, *, sections: Sequence[tuple[str, str]] = (), tolerance: float = 0.05
) -> str:
    """Return the report as one HTML page that asks nothing of the network."""
    jinja2 = require("jinja2", extra="measure", why="the HTML report")
    markupsafe = require("markupsafe", extra="measure", why="the HTML report")
    source = (files("nestvec.measurement") / "report.html.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    full = curve.get("full")
    return page.from_string(source).render(
        curve=curve,
        meta=curve.meta,
        full=full,
        verdict=curve.verdict(tolerance=tolerance),
        tolerance=tolerance,
        plot=markupsafe.Markup(_quality_against_bytes(curve)),
        spectrum=markupsafe.Markup(_spectrum(curve)) if curve.spectrum else None,
        layers=curve.layer_grid(),
        grids=[(metric, curve.grid(metric)) for metric in curve.meta["metrics"]],
        holds=lambda row: curve.holds(row, tolerance=tolerance),
        sections=sections,
    )


def _figure(height: float) -> tuple[Any, Any]:
    """Return a figure and its axes, drawn without a display and without touching pyplot."""
    require("matplotlib", extra="measure", why="the HTML report")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#808080", alpha=0.2, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any, about: str) -> str:
    """Return the figure as an ``<svg>`` element whose text stays text and follows the page."""
    from matplotlib import rc_context

    # What matplotlib draws in black becomes the colour of the page's text, light or dark.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": about, "font.family": "sans-serif"}):
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    return svg.replace("<svg", f'<svg role="img" aria-label="{about}"', 1)


def _quality_against_bytes(curve: Curve) -> str:
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in curve.select():
        codes = row["precision"] if row["precision"] in _LINES else ""
        if row["method"] != "full":
            key = (row["method"], "" if codes == row["method"] else codes)
            lines.setdefault(key, []).append(row)
    full = curve.get("full")
    if ("truncation", "") in lines:
        lines["truncation", ""].append(full)
    methods = list(dict.fromkeys(method for method, _ in lines))
    figure, axes = _figure(5.2)
    axes.axhline(full["value"], color="#808080", linewidth=1, linestyle="--")
    for place, ((method, codes), rows) in enumerate(lines.items()):
        at = methods.index(method)
        name = f"{method}, {codes}" if codes else method
        colour = _COLOURS[at % len(_COLOURS)]
        value = [r["value"] for r in rows]
        if rows[0]["bytes_per_vector"] is None:
            dots = (0, (1, 2 if method == "bm25" else 4))
            axes.axhline(value[0], color=colour, linewidth=1.4, linestyle=dots, label=name)
            continue
        shift = 1.015 ** (place - len(lines) / 2)  # so that bars at equal bytes stand side by side
        bars = [[r["value"] - r["low"] for r in rows], [r["high"] - r["value"] for r in rows]]
        axes.errorbar(
            [r["bytes_per_vector"] * shift for r in rows],
            value,
            yerr=bars,
            color=colour,
            marker=_MARKERS[at % len(_MARKERS)],
            markersize=4.5,
            linewidth=1.4,
            linestyle=_LINES.get(codes, "-"),
            elinewidth=0.8,
            capsize=1.5,
            label=name,
        )
    axes.set_xscale("log", base=2)
    ticks = sorted({2**p for p in range(0, 20)} | {full["bytes_per_vector"]})
    used = [r["bytes_per_vector"] for r in curve.select() if r["bytes_per_vector"]]
    ticks = [t for t in ticks if min(used) <= t <= max(used)]
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("bytes per vector")
    axes.set_ylabel(curve.meta["metric"])
    axes.legend(frameon=False, fontsize=8.5, loc="best")
    return _svg(figure, f"{curve.meta['metric']} against bytes per vector")


def _spectrum(curve: Curve) -> str:
    figure, axes = _figure(3.4)
    for at, (name, shares) in enumerate(curve.spectrum.items()):
        axes.plot(range(1, len(shares) + 1), shares, color=_COLOURS[at], linewidth=1.6, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    largest = max(shares[0] for shares in curve.spectrum.values())
    axes.set_ylim(bottom=largest * 1e-6)  # below are directions that the vectors do not use
    ticks = [d for d in (1, 2, 4, 8, *curve.meta["dims"])]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("eigenvalue, largest first")
    axes.set_ylabel("share of energy")
    if len(curve.spectrum) > 1:
        axes.legend(frameon=False, fontsize=8.5)
    return _svg(figure, "spectrum of the gallery")

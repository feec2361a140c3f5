"""Draw README's plot from the result files: what a multiply-add buys on SciFact.

python benchmarks/plot.py
"""

from __future__ import annotations

import _frame
from matplotlib import rc_context
from matplotlib.figure import Figure

LINES = {
    "truncation": ("plain truncation", "#7f7f7f", "o"),
    "principal_rotation": ("principal rotation", "#56b4e9", "s"),
    "adaptor_unsupervised": ("adaptor, no labels", "#0072b2", "D"),
    "adaptor_supervised": ("adaptor, training queries", "#d55e00", "^"),
}


def main() -> None:
    rows = [
        row
        for row in _frame.read("adaptor")["rows"]
        if row["dataset"] == "scifact" and row["metric"] == "nDCG@10"
    ]
    full = next(row for row in rows if row["method"] == "full")
    figure = Figure(figsize=(7.6, 3.9), layout="constrained")
    axes = figure.subplots()
    axes.axhline(full["value"], color="#7f7f7f", linewidth=1, linestyle="--")
    for method, (label, colour, marker) in LINES.items():
        line = [r for r in rows if r["method"] == method and r["precision"] == "float32"]
        line += [full] if method in ("truncation", "principal_rotation") else []
        value = [r["value"] for r in line]
        bars = [[r["value"] - r["low"] for r in line], [r["high"] - r["value"] for r in line]]
        axes.errorbar(
            [r["macs_per_query"] for r in line],
            value,
            yerr=bars,
            label=label,
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.6,
            elinewidth=0.7,
            capsize=2,
        )
    for row in _frame.read("cascade")["rows"]:
        if row["dataset"] == "scifact" and row["method"] == "cascade:64@100 > 384@10":
            if row["note"].startswith("adaptor_unsupervised"):
                axes.plot(row["macs_per_query"], row["value"], "*", color="#009e73", markersize=14)
                axes.annotate(
                    "cascade 64@100 > 384@10",
                    (row["macs_per_query"], row["value"]),
                    (9, -15),
                    textcoords="offset points",
                    ha="left",
                    color="#009e73",
                )
    axes.set_xscale("log", base=2)
    ticks = sorted({r["macs_per_query"] for r in rows if r["method"] == "truncation"})
    ticks.append(full["macs_per_query"])
    sizes = [round(t / full["macs_per_query"] * full["dim"]) for t in ticks]
    axes.set_xticks(ticks, [f"{t / 1e6:.2f}M\n{d} dims" for t, d in zip(ticks, sizes, strict=True)])
    axes.minorticks_off()
    axes.set_xlabel("multiply-adds per query")
    axes.set_ylabel("nDCG@10, SciFact test")
    axes.grid(True, color="#808080", alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    out = _frame.ROOT / "docs/assets/quality.svg"
    out.parent.mkdir(exist_ok=True)
    with rc_context({"svg.hashsalt": "nestvec"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    print(out.relative_to(_frame.ROOT))


if __name__ == "__main__":
    main()

"""Draw a profile: Figures 9 and 10 of McDanel et al. 2022."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .convolutions import FORWARD, INPUT_GRADIENT, PRODUCTS, WEIGHT_GRADIENT
from .profile import STOCK, Row, totals_ms

COLORS = {FORWARD: "#9aa5b1", INPUT_GRADIENT: "#e07a2f", WEIGHT_GRADIENT: "#4c6a92"}


def draw(report: Row) -> Figure:
    """Draw both figures, from what `profile.describe` returns."""
    width = max(8, 2 + 0.3 * len(report["layers"]))
    figure = Figure(figsize=(width, 9), dpi=100, layout="constrained")
    figure.suptitle(report["title"], x=0.01, ha="left", fontsize=11)
    top, bottom = figure.subplots(2)
    draw_layers(top, report["layers"])
    draw_estimates(bottom, report)
    return figure


def draw_layers(axes: Axes, layers: Sequence[Row]) -> None:
    """Draw Figure 9: a bar for each layer, of its three products."""
    base = [0.0] * len(layers)
    whole = totals_ms(layers)
    for product in PRODUCTS:
        heights = [row[f"{product}_ms"] for row in layers]
        share = whole[product] / sum(whole.values())
        label = f"{product.replace('_', ' ')}, {share:.1%}"
        axes.bar(range(len(layers)), heights, 0.8, base, color=COLORS[product], label=label)
        base = [below + height for below, height in zip(base, heights, strict=True)]
    axes.set_xticks(range(len(layers)), [row["layer"] for row in layers], rotation=90, fontsize=8)
    axes.set_ylabel("ms")
    axes.set_title("time of every convolution", loc="left", fontsize=10)
    _finish(axes, "y")


def draw_estimates(axes: Axes, report: Row) -> None:
    """Draw Figure 10: the estimate for each n:m, and steps that were measured."""
    estimates, steps = report["estimates"], report["steps"]
    key = "step_ms" if steps else "convolutions_ms"
    stock = steps[STOCK]["ms"] if steps else sum(totals_ms(report["layers"]).values())
    names = ["dense", *(f"{row['n']}:{row['m']}" for row in estimates)]
    values = [stock, *(row[key] for row in estimates)]
    axes.bar(names, values, 0.6, color="#d7dce2", label="estimate")
    for i, (name, step) in enumerate(steps.items()):
        axes.errorbar(
            "dense" if name == STOCK else name,
            step["ms"],
            [[step["ms"] - step["low_ms"]], [step["high_ms"] - step["ms"]]],
            fmt="o",
            color="#e07a2f",
            capsize=4,
            label=None if i else "measured: median and quartiles",
        )
    axes.set_ylabel("ms")
    what = "a training step" if steps else "all convolutions"
    axes.set_title(f"{what}: pruned products at n/m of their time", loc="left", fontsize=10)
    _finish(axes, "y")


def _finish(axes: Axes, grid: Any) -> None:
    axes.grid(axis=grid, alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # Above what is drawn, of which the tallest may be anywhere.
    axes.margins(y=0.25)
    axes.legend(frameon=False, ncols=3, loc="upper right", fontsize=9)

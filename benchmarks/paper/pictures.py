"""Draw the paper's figures from the rows of an experiment."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..harness.report import Row
from .experiment import (
    Setting,
    accuracies,
    half_interval,
    less_dense,
    mean,
    paper_less_dense,
    runs_of,
)


def draw_accuracies(rows: Sequence[Row], settings: Sequence[Setting], title: str) -> Figure:
    """Draw a line for each setting with runs: accuracies, and their differences from dense."""
    settings = [setting for setting in settings if runs_of(rows, setting)]
    figure, (left, right) = make_figure(2, title, max(4.5, 1.5 + 0.27 * len(settings)))
    for place, setting in enumerate(settings):
        own = list(accuracies(rows, setting).values())
        _draw_seeds(left, place, own, setting.paper)
        if setting.config:
            paper = paper_less_dense(settings, setting)
            _draw_seeds(right, place, less_dense(rows, setting), paper)
    right.axvline(0, color="0.5", linestyle=":")
    right.set_ylim(left.get_ylim())
    for axes in (left, right):
        axes.set_yticks(range(len(settings)), [setting.name for setting in settings])
        axes.invert_yaxis()
    right.tick_params(labelleft=False)
    left.set_xlabel("test accuracy, % (dot: a seed, cross: the paper's)")
    right.set_xlabel("difference from dense, points (bar: mean with 95% interval)")
    return figure


def _draw_seeds(axes: Axes, place: int, values: Sequence[float], paper: float | None) -> None:
    axes.plot(values, [place] * len(values), "o", color="#4c6a92", alpha=0.5)
    if values:
        half = half_interval(values)
        bar: dict[str, Any] = {"color": "#e07a2f", "capsize": 7, "elinewidth": 2, "capthick": 2}
        axes.errorbar(mean(values), place, xerr=None if math.isnan(half) else half, fmt="|", **bar)
    if paper is not None:
        axes.plot(paper, place, "x", color="black", markersize=7, zorder=4)


def draw_curves(rows: Sequence[Row], settings: Sequence[Setting], title: str) -> Figure:
    """Draw figures 6 and 7: training loss and test accuracy by epoch, the mean of all seeds."""
    figure, (left, right) = make_figure(2, title)
    for setting in settings:
        own = runs_of(rows, setting)
        if not own:
            continue
        epochs = range(1, len(own[0]["losses"]) + 1)
        marker = "." if len(epochs) < 20 else None
        for axes, key, scale in ((left, "losses", 1), (right, "accuracies", 100)):
            means = [scale * value for value in by_epoch(own, key)]
            axes.plot(epochs, means, marker=marker, label=setting.name)
    left.set_ylabel("training loss")
    right.set_ylabel("test accuracy, %")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(frameon=False)
    return figure


def draw_pattern(rows: Sequence[Row], settings: Sequence[Setting], title: str) -> Figure:
    """Draw figure 8: accuracy over m, a line for each m / n."""
    figure, (axes,) = make_figure(1, title)
    lines: dict[int, list[tuple[int, float, float | None]]] = {}
    for setting in settings:
        own = list(accuracies(rows, setting).values())
        if not own:
            continue
        if setting.config is None:
            axes.axhline(mean(own), color="0.5", linestyle=":", label=setting.name)
            continue
        n, m = setting.config.n, setting.config.m
        lines.setdefault(m // n, []).append((m, mean(own), setting.paper))
    for ratio, points in sorted(lines.items()):
        sizes, means, _ = zip(*sorted(points), strict=True)
        axes.plot(sizes, means, marker="o", label=f"m/n = {ratio}")
    axes.set_xscale("log", base=2)
    axes.set_xticks([4, 8, 16, 32], ["4", "8", "16", "32"])
    axes.set_xlabel("m")
    axes.set_ylabel("test accuracy, %")
    axes.legend(frameon=False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Save a figure as a PNG file."""
    figure.savefig(path, format="png")


def entitle(figure: Figure, title: str) -> None:
    """Write title in as many lines as the figure is wide for."""
    characters = int(figure.get_figwidth() * 13)
    figure.suptitle(textwrap.fill(title, characters), x=0.01, ha="left", fontsize=10)


def by_epoch(rows: Sequence[Row], key: str) -> list[float]:
    """Return what rows have under key for each epoch: the mean of all."""
    return [mean(values) for values in zip(*(row[key] for row in rows), strict=True)]


def make_figure(columns: int, title: str, height: float = 4.5) -> tuple[Figure, Sequence[Axes]]:
    """Make a figure, so many inches high, with its title and so many axes beside each other."""
    figure = Figure(figsize=(5.5 * columns + 2, height), dpi=150, layout="constrained")
    entitle(figure, title)
    grid: Any = figure.subplots(1, columns, squeeze=False)[0]
    for axes in grid:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid

"""The pictures of the documentation, written beside this file.

PYTHONPATH=. python docs/pictures/draw.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from benchmarks import roofline
from sdgp_fx import prune
from sdgp_fx.measurement.convolutions import Convolution
from sdgp_fx.measurement.workload import Workload

INK, DENSE, PRUNED, PAPER = "#2b2b2b", "#4c6a92", "#e07a2f", "#eef1f5"


def functions() -> Figure:
    """What each pruning function makes of four groups of four channels."""
    torch.manual_seed(3)
    gradient = torch.randn(1, 16, 1)
    named = {"output gradient": gradient}
    named |= {
        name.replace("_", " "): prune(gradient, 2, 4, prune=name)
        for name in ("random", "magnitude", "rescaled_magnitude", "mvue")
    }
    figure = Figure(figsize=(9, 6), layout="constrained")
    plots = figure.subplots(len(named), sharex=True, sharey=True)
    for axes, (name, values) in zip(plots, named.items(), strict=True):
        axes.bar(range(16), gradient.flatten().tolist(), color=DENSE, alpha=0.25, width=0.75)
        color = DENSE if values is gradient else PRUNED
        axes.bar(range(16), values.flatten().tolist(), color=color, width=0.5)
        for edge in (3.5, 7.5, 11.5):
            axes.axvline(edge, color=INK, linewidth=0.8, linestyle=":")
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_title(f"{name}, sum |g| = {values.abs().sum():.2f}", loc="left", fontsize=10)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    plots[-1].set_xticks(range(16))
    plots[-1].set_xlabel("channel, in groups of m = 4")
    return figure


def graph() -> Figure:
    """A convolution's part of the joint graph, before and after the pass."""
    figure, axes = _canvas(9.6, 4.4)
    axes.text(0.1, 4.15, "before", weight="bold", color=INK)
    _value(axes, 1.2, 3.5, "gO")
    _arrow(axes, (1.55, 3.5), (2.2, 3.5))
    _call(axes, 4.9, 3.5, "convolution_backward(gO, x, w, mask=[1, 1, 1])", DENSE, 5.4)
    for y, name in ((4.0, "gx"), (3.5, "gw"), (3.0, "gb")):
        _arrow(axes, (7.6, 3.5), (8.7, y))
        _value(axes, 9.05, y, name)
    axes.axhline(2.6, color=INK, linewidth=0.8, linestyle=":")

    axes.text(0.1, 2.3, "after", weight="bold", color=INK)
    _value(axes, 0.5, 1.1, "gO")
    _arrow(axes, (0.75, 1.35), (1.2, 1.65))
    _arrow(axes, (0.85, 1.0), (2.2, 0.6))
    _call(axes, 1.95, 1.7, "prune_nm(gO)", PRUNED, 1.5)
    _arrow(axes, (2.7, 1.7), (3.35, 1.7), "p", PRUNED)
    _call(axes, 5.85, 1.7, "convolution_backward(p, x, w, mask=[1, 0, 0])", PRUNED, 5.0)
    _arrow(axes, (8.35, 1.7), (8.7, 1.7), color=PRUNED)
    _value(axes, 9.05, 1.7, "gx", PRUNED)
    _call(axes, 4.9, 0.6, "convolution_backward(gO, x, w, mask=[0, 1, 1])", DENSE, 5.4)
    for y, name in ((0.85, "gw"), (0.35, "gb")):
        _arrow(axes, (7.6, 0.6), (8.7, y))
        _value(axes, 9.05, y, name)
    return figure


def fusion() -> Figure:
    """Which kernels read and write the gradient and its pruned copy."""
    figure, axes = _canvas(9.6, 5.6)
    for top, fused in ((5.35, False), (2.55, True)):
        kernels, memory = top - 0.65, top - 1.75
        title = "fused" if fused else "an operator of its own"
        axes.text(0.1, top, title, weight="bold", color=INK)
        axes.text(0.1, kernels, "kernels", va="center", color=INK)
        axes.text(0.1, memory, "memory", va="center", color=INK)
        start, end = kernels - 0.3, memory + 0.25
        producer = "BatchNorm and ReLU\nbackward" + (", and prune" if fused else "")
        _call(axes, 2.2, kernels, producer, PRUNED if fused else DENSE, 2.0)
        _call(axes, 6.7, kernels, "input gradient", PRUNED, 1.7)
        _call(axes, 8.6, kernels, "weight gradient", DENSE, 1.7)
        dense, pruned = (2.0, 3.6) if fused else (3.2, 5.3)
        _value(axes, dense, memory, "gO")
        _value(axes, pruned, memory, "p", PRUNED)
        _arrow(axes, (2.0 if fused else 2.4, start), (dense - (not fused) * 0.15, end))
        if fused:
            _arrow(axes, (2.6, start), (pruned - 0.1, end), color=PRUNED)
        else:
            _call(axes, 4.3, kernels, "prune_nm", PRUNED, 1.4)
            _arrow(axes, (dense + 0.15, end), (4.1, start))
            _arrow(axes, (4.5, start), (pruned - 0.1, end), color=PRUNED)
        _arrow(axes, (pruned + 0.2, memory + 0.15), (6.5, start), color=PRUNED)
        _arrow(axes, (dense + 0.25, memory - 0.2), (8.6, start), curve=0.22)
    axes.axhline(2.9, color=INK, linewidth=0.8, linestyle=":")
    return figure


def layers() -> Figure:
    """The counted time of resnet50's input gradients on an H200, dense and pruned."""
    rates = roofline.attained(0.8, 0.9)["H200"]
    found = Workload("resnet50", batch=256, size=224).count_convolutions()
    costs = {c: roofline.costs(c, rates, speedup=2) for c in found if c.is_prunable(roofline.M)}
    bars = {
        "dense": (DENSE, [cost.input_gradient for cost in costs.values()]),
        "2 x, fused prune": (PRUNED, [cost.pruned["fused"] for cost in costs.values()]),
        "2 x, separate prune": ("#f2c6a0", [cost.pruned["separate"] for cost in costs.values()]),
    }
    figure = Figure(figsize=(9, 8), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, (color, seconds)) in enumerate(bars.items()):
        places = [place + 0.27 * (i - 1) for place in range(len(costs))]
        axes.barh(places, [1e6 * s for s in seconds], 0.25, color=color, label=name)
    axes.set_yticks(
        range(len(costs)), [f"{_convolution(c)}, {found[c]} x" for c in costs], fontsize=9
    )
    axes.invert_yaxis()
    axes.set_xlabel("µs for one input gradient and its prune, counted")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    return figure


def _convolution(convolution: Convolution) -> str:
    outputs, inputs, height, width = convolution.weight
    stride = f" / {convolution.stride[0]}" if convolution.stride[0] > 1 else ""
    return f"{height}x{width}{stride}, {inputs} to {outputs} at {convolution.output[-1]}²"


PICTURES = {"functions": functions, "graph": graph, "fusion": fusion, "layers": layers}


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return figure, axes


def _call(axes: Axes, x: float, y: float, text: str, color: str, width: float) -> None:
    corner, shape = (x - width / 2, y - 0.28), "round,pad=0,rounding_size=0.1"
    axes.add_patch(FancyBboxPatch(corner, width, 0.56, boxstyle=shape, color=color))
    axes.text(x, y, text, ha="center", va="center", color="white")


def _value(axes: Axes, x: float, y: float, text: str, color: str = DENSE) -> None:
    box = {"boxstyle": "round,pad=0.35", "facecolor": PAPER, "edgecolor": color, "linewidth": 1.4}
    axes.text(x, y, text, ha="center", va="center", color=INK, bbox=box)


def _arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    text: str = "",
    color: str = INK,
    curve: float = 0,
) -> None:
    style = {
        "arrowstyle": "-|>",
        "color": color,
        "linewidth": 1.3,
        "shrinkA": 0,
        "shrinkB": 0,
        "connectionstyle": f"arc3,rad={curve}",
    }
    axes.annotate("", end, start, arrowprops=style)
    if text:
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.15)
        axes.text(*middle, text, ha="center", color=INK)


def main(folder: Path) -> None:
    """Write all pictures into folder."""
    for name, draw in PICTURES.items():
        draw().savefig(folder / f"{name}.png", dpi=130, facecolor="white")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent)

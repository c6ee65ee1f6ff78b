"""Compare pruned gradients of a network with the dense ones: what pruning does to the signal.

The network is trained with dense gradients, so that all functions are held against the same ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from ..harness.report import Report, Row, environment
from ..harness.terminal import print_table, progress
from .cifar10 import Images, Recipe, Run, normalize
from .experiment import (
    Setting,
    add_rows,
    epochs_of,
    facts_of,
    make_trainer,
    mean,
    resume,
    runs_of,
)
from .fast import FastRecipe
from .pictures import entitle

# How a layer's pruned gradient p is compared with its gradient g.
MEASURES = {
    "error": "relative error |p - g| / |g|",
    "cosine": "cosine <p, g> / |p| |g|",
    "bias": "bias <p, g> / <g, g>",
}
# Gradients that are compared so.
SIGNALS = {
    "pruned": "the layer's gradient, pruned",
    "input": "the input gradient that it leads to",
    "arriving": "what arrives, all layers after it pruned",
    "shift": "of BatchNorm's bias after it, all layers pruned",
}
PARTS = 4
# Of which gradients are compared, at most.
IMAGES = 512


def run(
    settings: Sequence[Setting],
    seeds: int,
    recipe: Recipe | FastRecipe,
    data: Images,
    test: Images,
    path: Path | None,
) -> Report:
    """Train, dense, from each seed that is not in the file at path yet, and measure on the way.

    There is a row for each seed, number of epochs that are done, setting and layer, in float32.

    Raises:
        ValueError: The file holds those of another recipe or other data.
    """
    here = environment(data.labels.device)
    report = resume("paper signal", facts_of(recipe, data, test), here, path)
    done = {row["seed"] for row in report.rows}
    missing = [seed for seed in range(seeds) if seed not in done]
    if not missing:
        return report
    train_from = make_trainer(Setting("dense"), recipe, data, test)
    with progress(len(missing) * math.ceil(recipe.epochs), estimate=True) as begin:
        for seed in missing:
            rows = train_and_measure(settings, seed, recipe, data, train_from, begin)
            add_rows(report, [{"seed": seed, **row} for row in rows], here)
    return report


def train_and_measure(
    settings: Sequence[Setting],
    seed: int,
    recipe: Recipe | FastRecipe,
    data: Images,
    train_from: Callable[[int, Callable[[int, nn.Module], None]], Run],
    begin: Callable[[str], None],
) -> list[Row]:
    """Train, and measure at the begin, at the end, and PARTS - 1 times between.

    Args:
        train_from: From `make_trainer`.
        begin: Called with the name of each epoch as it begins.

    Returns:
        The run's rows.
    """
    rows: list[Row] = []
    moments = {round(recipe.epochs * part / PARTS) for part in range(PARTS + 1)}
    count = min(recipe.batch, IMAGES)
    images, labels = data.images[:count], data.labels[:count]
    show_epoch = epochs_of(f"dense, seed {seed}", recipe, begin)

    def watch(done: int, network: nn.Module) -> None:
        show_epoch(done, network)
        if done in moments:
            inputs = normalize(images)
            measured = measure(network, inputs, labels, settings, recipe.label_smoothing)
            rows.extend({"epoch": done, **row} for row in measured)

    train_from(seed, watch)
    return rows


def measure(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: Sequence[Setting],
    smoothing: float,
) -> list[Row]:
    """Compare the gradients of every convolution but the first, which is not pruned.

    Args:
        images: Floats (N, C, H, W).
        smoothing: Of labels, in the loss.

    Returns:
        A row for each setting and convolution.
    """
    network = copy.deepcopy(network).train()
    first, *layers = convolutions(network)
    dense = backward(network, images, labels, smoothing)
    dense_shifts = shift_gradients(network, len(layers))
    rows = []
    for setting in settings:
        arriving = backward(network, images, labels, smoothing, first, setting.prune)
        shifts = shift_gradients(network, len(layers))
        for place, layer in enumerate(layers, start=2):
            gradient, size = dense[layer]
            pruned = setting.prune(gradient)
            compared = {
                "pruned": (pruned, gradient),
                "input": (
                    input_gradient(layer, size, pruned),
                    input_gradient(layer, size, gradient),
                ),
                "arriving": (arriving[layer].gradient, gradient),
                "shift": (shifts[place - 2], dense_shifts[place - 2]),
            }
            values = {name: compare(*pair) for name, pair in compared.items()}
            rows.append({"setting": setting.name, **setting.facts(), "layer": place, **values})
    return rows


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    """List the convolutions in the order of named_modules()."""
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


def shift_gradients(network: nn.Module, count: int) -> list[Tensor]:
    """Copy the gradients of the biases of the last BatchNorms, count of them."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    gradients = [norm.bias.grad for norm in norms[-count:]]
    return [gradient.clone() for gradient in gradients if gradient is not None]


class Backward(NamedTuple):
    """Gradient and shape that a convolution meets in a backward pass.

    Attributes:
        gradient: Of its output.
        size: Of its input.
    """

    gradient: Tensor
    size: torch.Size


def backward(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    smoothing: float,
    keep: nn.Module | None = None,
    prune: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> dict[nn.Conv2d, Backward]:
    """Run a backward pass in eager mode, and watch the convolutions.

    Args:
        smoothing: Of labels, in the loss.
        keep: A convolution whose gradient is passed on as it is.
        prune: Applied to a gradient after it has arrived at any other convolution. The gradients
            of weights are then pruned, too; no use is made of them. Those of BatchNorm's
            parameters are as in training.
    """
    met: dict[nn.Conv2d, Backward] = {}

    def watch(layer: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        def arrive(gradient: Tensor) -> Tensor:
            met[layer] = Backward(gradient, inputs[0].shape)
            return gradient if layer is keep else prune(gradient)

        output.register_hook(arrive)

    hooks = [layer.register_forward_hook(watch) for layer in convolutions(network)]
    network.zero_grad()
    F.cross_entropy(network(images), labels, label_smoothing=smoothing).backward()
    for hook in hooks:
        hook.remove()
    return met


def input_gradient(layer: nn.Conv2d, size: torch.Size, gradient: Tensor) -> Tensor:
    """Compute the gradient of the layer's input, of this size, from its output's gradient."""
    return conv2d_input(
        size, layer.weight, gradient, layer.stride, layer.padding, layer.dilation, layer.groups
    )


def compare(pruned: Tensor, dense: Tensor) -> dict[str, float]:
    """Compute MEASURES of two gradients; NaN where there is none to compare with."""
    p, g = pruned.double().flatten(), dense.double().flatten()
    product, size = p @ g, g.norm()
    return {
        "error": ((p - g).norm() / size).item(),
        "cosine": (product / (p.norm() * size)).item(),
        "bias": (product / (g @ g)).item(),
    }


def averages(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """Return the mean over rows of each measure of each signal; NaN of what older rows lack."""
    return {
        (signal, measure): mean([row[signal][measure] for row in rows if signal in row])
        for signal in SIGNALS
        for measure in MEASURES
    }


def show(rows: Sequence[Row], settings: Sequence[Setting]) -> None:
    """Print a table over depth, at the end of training, and one over training, of all layers."""
    header = [f"{signal} {measure}" for signal in SIGNALS for measure in MEASURES]
    last = max(row["epoch"] for row in rows)
    for name, key, chosen in (
        ("layer", "layer", [row for row in rows if row["epoch"] == last]),
        ("epoch", "epoch", rows),
    ):
        cells = []
        for setting in settings:
            own = runs_of(chosen, setting)
            for value in sorted({row[key] for row in own}):
                means = averages([row for row in own if row[key] == value])
                cells.append(
                    [f"{setting.name}, {name} {value}", *(f"{m:.3f}" for m in means.values())]
                )
        print_table([f"setting, {name}", *header], cells)


def draw(rows: Sequence[Row], settings: Sequence[Setting], title: str) -> Figure:
    """Draw each measure over the layers at the end of training, and in the last row over time."""
    figure = Figure(figsize=(15, 17), dpi=110, layout="constrained")
    entitle(figure, title)
    grid: Any = figure.subplots(len(SIGNALS) + 1, len(MEASURES), squeeze=False)
    last = max(row["epoch"] for row in rows)
    at_end = [row for row in rows if row["epoch"] == last]
    panels = [(signal, "layer", at_end) for signal in SIGNALS] + [("pruned", "epoch", rows)]
    for line, (signal, key, chosen) in zip(grid, panels, strict=True):
        for axes, (measure, formula) in zip(line, MEASURES.items(), strict=True):
            for i, setting in enumerate(settings):
                own = runs_of(chosen, setting)
                places = sorted({row[key] for row in own})
                means = [
                    averages([row for row in own if row[key] == place])[signal, measure]
                    for place in places
                ]
                # There are ten colours.
                style = "-" if i < 10 else "--"
                axes.plot(places, means, style, marker=".", label=setting.name)
            where = "after the last epoch" if key == "layer" else "mean of the layers"
            axes.set_title(f"{SIGNALS[signal]}, {where}", fontsize=9)
            axes.set_ylabel(formula)
            axes.set_xlabel(key)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    return figure

"""Draw figures 4 and 5: what pruning functions make of a real gradient, channel by channel."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import nn
from torchvision.models import resnet18

from ..harness.report import Report, Row, environment
from ..harness.terminal import print_table, progress
from .cifar10 import LABEL_SMOOTHING, Images, Recipe, normalize, train
from .experiment import Setting, add_rows, epochs_of, facts_of, resume, runs_of
from .pictures import entitle
from .signals import backward, convolutions

CHANNELS = 4


def run(
    settings: Sequence[Setting],
    seeds: int,
    recipe: Recipe,
    data: Images,
    test: Images,
    path: Path | None,
) -> Report:
    """Train a ResNet-18 with dense gradients, and prune the gradient of its second convolution.

    There is a row for each setting that is not in the file at path yet: the first CHANNELS
    channels, in float32, of the sample with the largest gradient in a batch, from the first seed
    alone.

    Raises:
        ValueError: The file holds those of another recipe or other data.
    """
    here = environment(data.labels.device)
    report = resume("paper fig4", facts_of(recipe, data, test), here, path)
    missing = [setting for setting in settings if not runs_of(report.rows, setting)]
    if not missing:
        return report
    images, labels = data.images[: recipe.batch], data.labels[: recipe.batch]
    with progress(recipe.epochs, estimate=True) as begin:
        show_epoch = epochs_of("resnet18", recipe, begin)

        def watch(done: int, network: nn.Module) -> None:
            show_epoch(done, network)
            if done == recipe.epochs:
                add_rows(report, maps(network, normalize(images), labels, missing), here)

        compile = {"backend": recipe.compiler}
        train(recipe, compile, data, test, 0, watch, lambda width: small_resnet18())
    return report


def small_resnet18() -> nn.Module:
    """Build a ResNet-18 for images of 32 pixels: no stride and no pooling in its stem."""
    network = resnet18(num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


def maps(
    network: nn.Module, images: torch.Tensor, labels: torch.Tensor, settings: Sequence[Setting]
) -> list[Row]:
    """Prune the gradient of the network's second convolution; return a row for each setting."""
    network = copy.deepcopy(network).train()
    second = convolutions(network)[1]
    gradient = backward(network, images, labels, LABEL_SMOOTHING)[second].gradient
    sample = int(gradient.flatten(1).norm(dim=1).argmax())
    return [
        {
            "setting": setting.name,
            **setting.facts(),
            "sample": sample,
            "maps": setting.prune(gradient)[sample, :CHANNELS].tolist(),
        }
        for setting in settings
    ]


def show(rows: Sequence[Row], settings: Sequence[Setting]) -> None:
    """Print how much of the maps is zero, and what becomes of their norms."""
    first, *_ = (torch.tensor(row["maps"]) for row in rows)
    cells = []
    for setting in settings:
        maps = torch.tensor(runs_of(rows, setting)[0]["maps"])
        zeros = (maps == 0).double().mean().item()
        l1, l2 = (maps.norm(p) / first.norm(p) for p in (1, 2))
        cells.append([setting.name, f"{zeros:.1%}", f"{l1:.3f}", f"{l2:.3f}"])
    print_table(["setting", "zeros", "sum |g|", "|g|"], cells)


def draw(rows: Sequence[Row], settings: Sequence[Setting], title: str) -> Figure:
    """Draw a line of maps for each setting, exact zeros in red, and one scale for a channel."""
    figure = Figure(figsize=(9, 2.1 * len(settings) + 1), dpi=110, layout="constrained")
    entitle(figure, title)
    grid: Any = figure.subplots(len(settings), CHANNELS, squeeze=False)
    colors = matplotlib.colormaps["gray"].with_extremes(bad="red")
    stored = [runs_of(rows, setting)[0] for setting in settings]
    limits = [quantile(torch.tensor(channel)) for channel in stored[0]["maps"]]
    for line, row, setting in zip(grid, stored, settings, strict=True):
        for channel, (axes, limit) in enumerate(zip(line, limits, strict=True)):
            values = torch.tensor(row["maps"][channel])
            shown = values.masked_fill(values == 0, torch.nan)
            axes.imshow(shown.numpy(), cmap=colors, vmin=-limit, vmax=limit)
            zeros = (values == 0).double().mean().item()
            axes.set_title(f"channel {channel}, {zeros:.0%} zeros", fontsize=8)
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(setting.name.replace(", ", ",\n"), fontsize=8)
    return figure


def quantile(values: torch.Tensor) -> float:
    """Return the size that 98% of values are within."""
    return values.abs().flatten().quantile(0.98).item()

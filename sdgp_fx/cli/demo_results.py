"""The demo's results: tables, and a picture of the loss curves."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from ..passes.decisions import Decision

LAST = 20
NOT_MEASURED = "not measured"

DENSE, SDGP = "dense", "SDGP"
COLORS = {DENSE: "#4c6a92", SDGP: "#e07a2f"}


@dataclasses.dataclass(frozen=True)
class Result:
    """Measurements of one network.

    Attributes:
        losses: Of the training steps.
        seconds: Of the training steps, of which the first compiles.
        accuracy: On the test images; None if the test was interrupted.
    """

    name: str
    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    accuracy: float | None

    @property
    def step_ms(self) -> float | None:
        """The median of all steps but the first; None if there are no others."""
        return median(self.seconds[1:]) * 1e3 if len(self.seconds) > 1 else None


def results_table(results: Sequence[Result], total: int) -> Table:
    """Make a table of the networks' losses, accuracies and step times."""
    table = Table(title="Results", title_justify="left", title_style="bold")
    table.add_column("network")
    table.add_column("steps", justify="right")
    table.add_column("test accuracy", justify="right")
    table.add_column(f"training loss,\nmean of last {LAST} steps", justify="right")
    table.add_column("a step,\nmedian ms", justify="right")
    for result in results:
        last = result.losses[-LAST:]
        table.add_row(
            result.name,
            f"{len(result.losses)} of {total}",
            percent(result.accuracy),
            f"{fmean(last):.4f}" if last else NOT_MEASURED,
            NOT_MEASURED if result.step_ms is None else f"{result.step_ms:.1f}",
        )
    return table


def layers_table(decisions: Sequence[Decision]) -> Table:
    """Make a table of how many convolutions are pruned, and why others are not."""
    table = Table(title="Convolutions of SDGP", title_justify="left", title_style="bold")
    table.add_column("input gradient")
    table.add_column("layers", justify="right")
    table.add_row("pruned", str(sum(decision.pruned for decision in decisions)))
    skipped = sum(decision.product == "sparse" for decision in decisions)
    table.add_row("of these, zeros are skipped in", str(skipped))
    reasons = Counter(decision.reason for decision in decisions if not decision.pruned)
    for reason, count in reasons.most_common():
        table.add_row(f"dense: {reason}", str(count))
    return table


def draw(results: Sequence[Result], title: str, path: Path) -> None:
    """Draw the loss curves, as measured and smoothed, into a PNG file."""
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for result in results:
        if not result.losses:
            continue
        steps = range(1, len(result.losses) + 1)
        color = COLORS[result.name]
        label = f"{result.name}, test accuracy {percent(result.accuracy)}"
        axes.plot(steps, result.losses, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(
            steps,
            smooth(result.losses),
            color=color,
            linewidth=2,
            marker="." if len(steps) < LAST else None,
            label=label,
        )
    losses = [loss for result in results for loss in result.losses]
    if max(losses) > 10 * min(losses):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(title.replace(": ", "\n"), loc="left", linespacing=1.4)
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("training loss (cross entropy)")
    axes.grid(which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, format="png")


def smooth(losses: Sequence[float]) -> list[float]:
    """Average each loss with its neighbours, a fortieth of the curve on either side."""
    reach = len(losses) // 40
    curve = torch.tensor(losses)[None]
    width = 2 * reach + 1
    means = F.avg_pool1d(curve, width, stride=1, padding=reach, count_include_pad=False)
    return means[0].tolist()


def percent(accuracy: float | None) -> str:
    """Format an accuracy."""
    return NOT_MEASURED if accuracy is None else f"{accuracy:.1%}"

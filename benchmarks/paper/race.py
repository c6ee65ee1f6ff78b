"""Train several settings side by side, and compare how long each takes to a common accuracy.

They take turns, an epoch each, so that a machine that is slow for a while is slow for all of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from sdgp_fx.measurement import timing

from ..harness.report import Report, Row, environment
from ..harness.terminal import print_table, progress
from .cifar10 import Images
from .experiment import (
    Setting,
    add_rows,
    facts_of,
    make_fast_trainer,
    make_row,
    mean,
    resume,
    runs_of,
)
from .fast import FastRecipe, FastRun
from .pictures import by_epoch, make_figure

# Of accuracy, in which a loss counts as none.
MARGIN = 0.01


def run(
    settings: Sequence[Setting],
    seeds: int,
    recipe: FastRecipe,
    data: Images,
    test: Images,
    path: Path | None,
) -> Report:
    """Train all settings from each seed that is not in the file at path yet.

    Args:
        settings: With their dtypes, dense among them.

    Raises:
        ValueError: There is no dense setting, there are too few epochs to compare times, or the
            file holds runs of other settings, another recipe or other data.
    """
    if all(setting.config is not None for setting in settings):
        raise ValueError(f"--only: expected dense among them, got {settings[0].name}")
    if recipe.epochs <= 2:
        # The first epoch compiles, and quartiles are of two epochs or more.
        raise ValueError(f"--epochs: expected more than 2 for race, got {recipe.epochs}")
    recipe = dataclasses.replace(recipe, curve=True)
    facts = {**facts_of(recipe, data, test), "compared": [setting.name for setting in settings]}
    here = environment(data.labels.device)
    report = resume("paper race", facts, here, path)
    missing = set(range(seeds)) - {row["seed"] for row in report.rows}
    if not missing:
        return report
    torch.compiler.reset()
    trainers = [make_fast_trainer(setting, recipe, data, test) for setting in settings]
    epochs = math.ceil(recipe.epochs)
    with (
        # All settings count together.
        torch._dynamo.config.patch(recompile_limit=len(settings) + 1),
        progress(len(missing) * epochs * len(settings), estimate=True) as begin,
    ):
        for seed in sorted(missing):
            runs: list[FastRun] = []
            trainings = [trainer.by_epoch(seed) for trainer in trainers]
            for epoch in range(epochs):
                runs = []
                for setting, training in zip(settings, trainings, strict=True):
                    begin(f"{setting.name}, seed {seed}, epoch {epoch + 1} of {epochs}")
                    runs.append(next(training))
            for training in trainings:
                next(training)
            pairs = zip(settings, runs, strict=True)
            add_rows(report, [make_row(setting, seed, result) for setting, result in pairs], here)
    return report


def epochs_to(accuracy: float, accuracies: Sequence[float]) -> float:
    """Return after how many epochs an accuracy is first reached; infinity if it never is.

    Args:
        accuracies: After each epoch. Between two, accuracy is taken to grow evenly.
    """
    before = 0.0
    for done, after in enumerate(accuracies):
        if after >= accuracy:
            return done + (accuracy - before) / (after - before)
        before = after
    return math.inf


def common_accuracy(dense: Sequence[Row]) -> float:
    """Return an accuracy that all dense runs reach, in whole tenths of a percent.

    It is MARGIN below the worst of them, so that small losses do not show as time.
    """
    return math.floor(1000 * (min(row["accuracy"] for row in dense) - MARGIN)) / 1000


def dense_runs(rows: Sequence[Row], settings: Sequence[Setting]) -> list[Row]:
    """Return the rows of the one setting without pruning."""
    (dense,) = (setting for setting in settings if setting.config is None)
    return runs_of(rows, dense)


def warm_epochs(rows: Sequence[Row]) -> list[float]:
    """Return the seconds of each epoch but every run's first, in which it may be compiled."""
    return [
        seconds
        for row in sorted(rows, key=lambda row: row["seed"])
        for seconds in row["seconds"][1:]
    ]


def show(rows: Sequence[Row], settings: Sequence[Setting]) -> None:
    """Print each setting's accuracy, its time for an epoch, and its time to a common accuracy.

    A time to an accuracy is a number of epochs times the median ratio to dense epochs, in dense
    epochs: what the machine did meanwhile counts only as far as that ratio does. It is "never" of
    a setting of which a run does not reach it.
    """
    accuracy = common_accuracy(dense_runs(rows, settings))
    dense = warm_epochs(dense_runs(rows, settings))
    cells = []
    for setting in settings:
        own = runs_of(rows, setting)
        reached = [mean([row[key] for row in own]) for key in ("accuracy", "fresh_accuracy")]
        seconds = timing.summarize(warm_epochs(own)).median
        ratio = timing.ratio(warm_epochs(own), dense)
        times = [ratio.median * epochs_to(accuracy, row["accuracies"]) for row in own]
        cells.append(
            [
                setting.name,
                *(f"{100 * value:.2f}" for value in reached),
                f"{seconds:.2f}",
                f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
                "never" if math.isinf(max(times)) else spread_of(times),
            ]
        )
    header = ["setting", "accuracy %", "with new statistics", "s an epoch", "of dense (quartiles)"]
    print_table([*header, f"dense epochs to {accuracy:.1%} (least, most)"], cells)


def spread_of(values: Sequence[float]) -> str:
    """Format the mean of values, with the least and the most."""
    return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def draw(rows: Sequence[Row], settings: Sequence[Setting], title: str) -> Figure:
    """Draw test accuracy over the time of training, in dense epochs: the means of all seeds."""
    figure, (axes,) = make_figure(1, title)
    dense = warm_epochs(dense_runs(rows, settings))
    for setting in settings:
        own = runs_of(rows, setting)
        ratio = timing.ratio(warm_epochs(own), dense).median
        means = [100 * value for value in by_epoch(own, "accuracies")]
        times = [ratio * (i + 1) for i in range(len(means))]
        axes.plot(times, means, marker=".", label=setting.name)
    accuracy = common_accuracy(dense_runs(rows, settings))
    axes.axhline(100 * accuracy, color="0.5", linestyle=":")
    axes.set_xlabel("time of training, in epochs of dense gradients")
    axes.set_ylabel("test accuracy, %")
    axes.legend(frameon=False)
    return figure

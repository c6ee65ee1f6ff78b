"""Training runs of several settings from several seeds: done once each, kept in one JSON file."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..report import Report, Row, environment
from ..terminal import print_table, progress
from .cifar10 import Images, Recipe, Run, train


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is compared: a name, and options of the backend "sdgp"; None for dense gradients.

    paper: the test accuracy that McDanel et al. report, in percent.
    """

    name: str
    options: Mapping[str, Any] | None = None
    paper: float | None = None


def run(
    name: str,
    settings: Sequence[Setting],
    seeds: int,
    recipe: Recipe,
    data: Images,
    test: Images,
    path: Path | None,
) -> Report:
    """Train what is not in the file at path yet, all settings from a seed before the next seed.

    Raises ValueError if the file holds runs of another recipe or other data.
    """
    device = data.labels.device
    facts = {**dataclasses.asdict(recipe), "images": len(data), "test_images": len(test)}
    report = resume(name, facts, device, path)
    done = {(row["setting"], row["seed"]) for row in report.rows}
    missing = [
        (setting, seed)
        for seed in range(seeds)
        for setting in settings
        if (setting.name, seed) not in done
    ]
    with progress(len(missing)) as begin:
        spent: list[float] = []
        for i, (setting, seed) in enumerate(missing):
            left = f", about {time_left(spent, len(missing) - i)} left" if spent else ""
            begin(f"{setting.name}, seed {seed}{left}")
            options = None if setting.options is None else dict(setting.options)
            result = train(recipe, options, data, test, seed)
            spent.append(sum(result.seconds))
            report.add([make_row(setting, seed, result)])
    return report


def resume(name: str, facts: dict[str, Any], device: torch.device, path: Path | None) -> Report:
    """The report at path, to go on with, or a new one."""
    report = Report(name, environment(device), facts, path)
    if path is None or not path.exists():
        return report
    stored = json.loads(path.read_text())
    if (stored["benchmark"], stored["settings"]) != (name, facts):
        raise ValueError(
            f"--out: expected a new file, or runs of {name} with {facts}, got {path}, which has "
            f"runs of {stored['benchmark']} with {stored['settings']}"
        )
    report.rows += stored["rows"]
    return report


def make_row(setting: Setting, seed: int, result: Run) -> Row:
    """A run as it is kept."""
    return {
        "setting": setting.name,
        "options": setting.options and dict(setting.options),
        "seed": seed,
        "accuracy": result.accuracies[-1],
        **dataclasses.asdict(result),
    }


def time_left(spent: Sequence[float], runs: int) -> str:
    """Minutes that so many more runs take, if they take what those before did."""
    return f"{statistics.fmean(spent) * runs / 60:.0f} min"


def accuracies(rows: Sequence[Row], setting: Setting) -> dict[int, float]:
    """The setting's test accuracy in percent, by seed."""
    own = (row for row in rows if row["setting"] == setting.name)
    return {row["seed"]: 100 * row["accuracy"] for row in own}


def show(rows: Sequence[Row], settings: Sequence[Setting]) -> None:
    """Print what each setting reaches, and how it differs from dense gradients.

    The difference is taken seed by seed, as both runs start from the same weights and see the
    same batches; its standard error says how far off chance alone can put its mean.
    """
    dense = next((accuracies(rows, setting) for setting in settings if not setting.options), {})
    cells = []
    for setting in settings:
        own = accuracies(rows, setting)
        less = [value - dense[seed] for seed, value in own.items() if seed in dense]
        error = deviation(less) / math.sqrt(len(less)) if less else math.nan
        cells.append(
            [
                setting.name,
                str(len(own)),
                percent(mean(list(own.values()))),
                percent(deviation(list(own.values()))),
                percent(mean(less), "+") if setting.options else "-",
                percent(error) if setting.options else "-",
                "-" if setting.paper is None else f"{setting.paper:.1f}",
            ]
        )
    print_table(
        ["setting", "seeds", "accuracy %", "std", "to dense", "std error", "paper %"], cells
    )


def mean(values: Sequence[float]) -> float:
    """NaN of none."""
    return statistics.fmean(values) if values else math.nan


def deviation(values: Sequence[float]) -> float:
    """The standard deviation; NaN of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def percent(value: float, sign: str = "") -> str:
    """With two decimals; NaN is not known."""
    return "-" if math.isnan(value) else f"{value:{sign}.2f}"

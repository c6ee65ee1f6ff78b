"""Training runs of several settings from several seeds: done once each, kept in one JSON file."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from sdgp_fx import SDGPConfig

from ..report import Report, Row, environment
from ..terminal import print_table, progress
from .cifar10 import Images, Recipe, Run, train
from .scaled import scaled

# What settings differ in, of SDGPConfig.
OPTIONS = ("n", "m", "prune", "rescale")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is compared: a name, and how gradients are pruned; None for dense gradients.

    config: read for what is in OPTIONS.
    paper: the test accuracy that McDanel et al. report, in percent.
    scale: what pruned gradients are multiplied by.
    dtype: of autocast; None for the recipe's.
    """

    name: str
    config: SDGPConfig | None = None
    paper: float | None = None
    scale: float = 1.0
    dtype: str | None = None

    def compile(self, compiler: str) -> dict[str, Any]:
        """Arguments for torch.compile, with this compiler inside."""
        if self.config is None:
            return {"backend": compiler}
        config = dataclasses.replace(self.config, inner=compiler)
        if self.scale != 1:
            return scaled(config, self.scale)
        options = {f"sdgp.{name}": getattr(config, name) for name in (*OPTIONS, "inner")}
        return {"backend": "sdgp", "options": options}

    def facts(self) -> dict[str, Any]:
        """What makes a run be of this setting, whatever its name."""
        config = self.config
        options = None if config is None else {name: getattr(config, name) for name in OPTIONS}
        return {"options": options, "scale": self.scale, "dtype": self.dtype}


def run(
    settings: Sequence[Setting],
    seeds: int,
    recipe: Recipe,
    data: Images,
    test: Images,
    path: Path | None,
) -> Report:
    """Train what is not in the file at path yet, all settings from a seed before the next seed.

    settings: with their dtypes.
    Raises ValueError if the file holds runs of another recipe or other data.
    """
    report = resume(facts_of(recipe, data, test), data.labels.device, path)
    missing = [
        (setting, seed)
        for seed in range(seeds)
        for setting in settings
        if seed not in accuracies(report.rows, setting)
    ]
    start, total = perf_counter(), len(missing) * recipe.epochs
    with progress(total) as show_progress:

        def begin(number: int, setting: Setting, seed: int, epoch: int) -> None:
            done = number * recipe.epochs + epoch
            left = time_left(perf_counter() - start, done, total)
            show_progress(f"{setting.name}, seed {seed}, epoch {epoch + 1}{left}")

        for number, (setting, seed) in enumerate(missing):
            own = dataclasses.replace(recipe, dtype=setting.dtype or recipe.dtype)
            begin_epoch = functools.partial(begin, number, setting, seed)
            result = train(own, setting.compile(own.compiler), data, test, seed, begin_epoch)
            report.add([make_row(setting, seed, result)])
    return report


def facts_of(recipe: Recipe, data: Images, test: Images) -> dict[str, Any]:
    """What all runs in a file have in common; they have their own dtypes."""
    facts = {**dataclasses.asdict(recipe), "images": len(data), "test_images": len(test)}
    del facts["dtype"]
    return facts


def resume(facts: dict[str, Any], device: torch.device, path: Path | None) -> Report:
    """The report at path, to go on with, or a new one."""
    report = Report("paper", environment(device), facts, path)
    if path is None or not path.exists():
        return report
    stored = json.loads(path.read_text())
    if (stored["benchmark"], stored["settings"]) != (report.benchmark, facts):
        raise ValueError(
            f"--out: expected a new file, or one of runs with {facts}, got {path}, which has "
            f"{stored['benchmark']} with {stored['settings']}"
        )
    report.rows += stored["rows"]
    return report


def make_row(setting: Setting, seed: int, result: Run) -> Row:
    """A run as it is kept."""
    return {
        "setting": setting.name,
        **setting.facts(),
        "seed": seed,
        "accuracy": result.accuracies[-1],
        **dataclasses.asdict(result),
    }


def time_left(seconds: float, done: int, total: int) -> str:
    """What the rest takes, if it takes what was done in so many seconds; "" if nothing was."""
    if not done:
        return ""
    return f", about {seconds / done * (total - done) / 60:.0f} min left"


def runs_of(rows: Sequence[Row], setting: Setting) -> list[Row]:
    """The setting's rows, by whatever name."""
    facts = setting.facts()
    return [row for row in rows if all(row[key] == value for key, value in facts.items())]


def accuracies(rows: Sequence[Row], setting: Setting) -> dict[int, float]:
    """The setting's test accuracy in percent, by seed."""
    return {row["seed"]: 100 * row["accuracy"] for row in runs_of(rows, setting)}


def less_dense(rows: Sequence[Row], setting: Setting) -> list[float]:
    """By how many percent the setting's accuracy differs from that of dense gradients.

    Seed by seed, as both runs start from the same weights and see the same batches.
    """
    dense = accuracies(rows, dataclasses.replace(setting, config=None, scale=1.0))
    own = accuracies(rows, setting)
    return [value - dense[seed] for seed, value in own.items() if seed in dense]


def show(rows: Sequence[Row], settings: Sequence[Setting]) -> None:
    """Print what each setting reaches, and how it differs from dense gradients of its dtype.

    The standard error of the difference says how far off chance alone can put its mean.
    """
    cells = []
    for setting in settings:
        own = list(accuracies(rows, setting).values())
        less = less_dense(rows, setting) if setting.config else []
        error = deviation(less) / math.sqrt(len(less)) if less else math.nan
        cells.append(
            [
                setting.name,
                str(len(own)),
                percent(mean(own)),
                percent(deviation(own)),
                percent(mean(less), "+"),
                percent(error),
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

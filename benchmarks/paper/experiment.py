"""Training runs of several settings from several seeds: done once each, kept in one JSON file."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn

from sdgp_fx import SDGPConfig, prune

from ..report import Report, Row, environment
from ..terminal import print_table, progress
from .cifar10 import Images, Recipe, Run, train
from .fast import FastRecipe, Trainer
from .scaled import scaled

# What settings differ in, of SDGPConfig.
OPTIONS = ("n", "m", "prune", "rescale", "structure")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is compared: a name, and how gradients are pruned; None for dense gradients.

    config: read for what is in OPTIONS.
    paper: the test accuracy that McDanel et al. report, in percent.
    scale: what pruned gradients are multiplied by.
    dtype: of autocast; None for the recipe's.
    dense_last: the share of the steps, the last ones, whose gradients are dense after all.
    """

    name: str
    config: SDGPConfig | None = None
    paper: float | None = None
    scale: float = 1.0
    dtype: str | None = None
    dense_last: float = 0.0

    def compile(self, compiler: str) -> dict[str, Any]:
        """Arguments for torch.compile, with this compiler inside."""
        if self.config is None:
            return {"backend": compiler}
        config = dataclasses.replace(self.config, inner=compiler)
        if self.scale != 1:
            return scaled(config, self.scale)
        options = {f"sdgp.{name}": getattr(config, name) for name in (*OPTIONS, "inner")}
        return {"backend": "sdgp", "options": options}

    def prune(self, gradient: Tensor) -> Tensor:
        """A gradient (N, C, *spatial), pruned in eager mode: elements, whatever the structure."""
        if self.config is None:
            return gradient
        config = self.config
        pruned = prune(gradient, config.n, config.m, prune=config.prune, rescale=config.rescale)
        return self.scale * pruned

    def facts(self) -> dict[str, Any]:
        """What makes a run be of this setting, whatever its name."""
        config = self.config
        options = None if config is None else {name: getattr(config, name) for name in OPTIONS}
        own = {name: getattr(self, name) for name in ("scale", "dtype", "dense_last")}
        return {"options": options, **own}


def run(
    settings: Sequence[Setting],
    seeds: int,
    recipe: Recipe | FastRecipe,
    data: Images,
    test: Images,
    path: Path | None,
    minutes: float = math.inf,
) -> Report:
    """Train what is not in the file at path yet.

    All settings are trained from a seed before the next seed; by the fast recipe, which compiles
    a setting once, a setting from all seeds before the next setting.

    Args:
        settings: With their dtypes.
        minutes: No run is begun later.

    Raises:
        ValueError: The file holds runs of another recipe or other data.
    """
    deadline = monotonic() + 60 * minutes
    facts = facts_of(recipe, data, test)
    del facts["dtype"]  # Runs have their own.
    report = resume("paper", facts, data.labels.device, path)
    missing = [
        (setting, seed)
        for seed in range(seeds)
        for setting in settings
        if seed not in accuracies(report.rows, setting)
    ]
    if isinstance(recipe, FastRecipe):
        missing.sort(key=lambda pair: settings.index(pair[0]))
    ready: Setting | None = None
    with progress(len(missing) * math.ceil(recipe.epochs), estimate=True) as begin:
        for setting, seed in missing:
            if monotonic() >= deadline:
                break
            if setting != ready:
                train_from, ready = make_trainer(setting, recipe, data, test), setting
            watch = epochs_of(f"{setting.name}, seed {seed}", recipe, begin)
            report.add([make_row(setting, seed, train_from(seed, watch))])
    return report


def make_trainer(
    setting: Setting, recipe: Recipe | FastRecipe, data: Images, test: Images
) -> Callable[[int, Callable[[int, nn.Module], None]], Run]:
    """Return a function that trains from a seed and calls watch as the recipe's training does."""
    own = dataclasses.replace(recipe, dtype=setting.dtype or recipe.dtype)
    compile = setting.compile(own.compiler)
    if isinstance(own, FastRecipe):
        return Trainer(own, compile, data, test, setting.dense_last).run
    return partial(train, own, compile, data, test, dense_last=setting.dense_last)


def epochs_of(
    name: str, recipe: Recipe | FastRecipe, begin: Callable[[str], None]
) -> Callable[[int, nn.Module], None]:
    """What calls begin with the name of a run, and the epoch's number, as each epoch begins."""
    epochs = math.ceil(recipe.epochs)

    def watch(done: int, network: nn.Module) -> None:
        if done < epochs:
            begin(f"{name}, epoch {done + 1} of {epochs}")

    return watch


def facts_of(recipe: Recipe | FastRecipe, data: Images, test: Images) -> dict[str, Any]:
    """What all rows of a file have in common."""
    return {**dataclasses.asdict(recipe), "images": len(data), "test_images": len(test)}


def resume(name: str, facts: dict[str, Any], device: torch.device, path: Path | None) -> Report:
    """The report of this name at path, to go on with, or a new one.

    Raises ValueError if there is another one.
    """
    report = Report(name, environment(device), facts, path)
    if path is None or not path.exists():
        return report
    stored = json.loads(path.read_text())
    if (stored["benchmark"], stored["settings"]) != (report.benchmark, facts):
        raise ValueError(
            f"--out: expected a new file, or one of {name} with {facts}, got {path}, which has "
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
    dense = accuracies(rows, dataclasses.replace(setting, config=None, scale=1.0, dense_last=0.0))
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


def against_paper(facts: Iterable[tuple[str, Any, Any]]) -> str:
    """What was not done as in the paper, from names, what was done, and what the paper did."""
    other = [f"{name} {own} (paper: {papers})" for name, own, papers in facts if own != papers]
    return ", ".join(other) or "the paper's recipe"


def mean(values: Sequence[float]) -> float:
    """NaN of none."""
    return statistics.fmean(values) if values else math.nan


def deviation(values: Sequence[float]) -> float:
    """The standard deviation; NaN of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def percent(value: float, sign: str = "") -> str:
    """With two decimals; NaN is not known."""
    return "-" if math.isnan(value) else f"{value:{sign}.2f}"

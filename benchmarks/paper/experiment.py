"""Train several settings from several seeds, once each, and keep the runs in one JSON file."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn

from sdgp_fx import SDGPConfig, prune, sdgp
from sdgp_fx.kernels.channels import channel_norms, scale_channels, select_channels

from ..harness.report import Report, Row, environment
from ..harness.terminal import print_table, progress
from .cifar10 import Images, Recipe, Run, train
from .fast import BIAS_SCALE, FastRecipe, Trainer
from .scaled import scaled

# Options of SDGPConfig that settings differ in.
OPTIONS = ("n", "m", "prune", "rescale", "structure", "layers")

# Of the environment; runs of a file may have been made on several days, by several machines.
_MADE = ("device", "torch", "date", "commit")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One of the settings that are compared.

    Attributes:
        config: How gradients are pruned, of which OPTIONS are read; None for dense gradients.
        paper: The test accuracy that McDanel et al. report, in percent.
        scale: Pruned gradients are multiplied by it.
        dtype: Of autocast; None for the recipe's.
        dense_last: The share of the steps, the last ones, whose gradients are dense after all.
    """

    name: str
    config: SDGPConfig | None = None
    paper: float | None = None
    scale: float = 1.0
    dtype: str | None = None
    dense_last: float = 0.0

    def compile(self, compiler: str) -> dict[str, Any]:
        """Return the arguments for torch.compile, with this compiler inside."""
        if self.config is None:
            return {"backend": compiler}
        config = dataclasses.replace(self.config, inner=compiler)
        if self.scale != 1:
            return scaled(config, self.scale)
        options = {f"sdgp.{name}": getattr(config, name) for name in (*OPTIONS, "inner")}
        # The function, as its name is only known where the package is installed.
        return {"backend": sdgp, "options": options}

    def prune(self, gradient: Tensor) -> Tensor:
        """Prune a gradient (N, C, *spatial) in eager mode, if its channels are whole groups."""
        if self.config is None or gradient.shape[1] % self.config.m:
            return gradient
        config = self.config
        if config.structure == "channel":
            return self.scale * prune_channels(gradient, config)
        pruned = prune(gradient, config.n, config.m, prune=config.prune, rescale=config.rescale)
        return self.scale * pruned

    def facts(self) -> dict[str, Any]:
        """Return what identifies a run of this setting, whatever its name."""
        config = self.config
        options = None if config is None else {name: getattr(config, name) for name in OPTIONS}
        own = {name: getattr(self, name) for name in ("scale", "dtype", "dense_last")}
        return {"options": options, **own}


def prune_channels(gradient: Tensor, config: SDGPConfig) -> Tensor:
    """Zero the channels of a gradient (N, C, *spatial) that are not kept, and scale the others."""
    norms = channel_norms(gradient, 1)
    drawn = torch.randint(2**63 - 1, norms.shape, device=norms.device)
    if config.prune == "mvue":
        drawn = drawn[:: config.m]  # One for each group.
    index, factor = select_channels(norms, config.n, config.m, config.prune, drawn)
    kept = gradient.index_select(1, index)
    if factor is not None:
        kept = scale_channels(kept, factor, 1)
    return torch.zeros_like(gradient).index_copy(1, index, kept)


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
    here = environment(data.labels.device)
    report = resume("paper", facts, here, path)
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
            add_rows(report, [make_row(setting, seed, train_from(seed, watch))], here)
    return report


def make_trainer(
    setting: Setting, recipe: Recipe | FastRecipe, data: Images, test: Images
) -> Callable[[int, Callable[[int, nn.Module], None]], Run]:
    """Return a function that trains from a seed and calls watch as the recipe's training does."""
    if isinstance(recipe, FastRecipe):
        torch.compiler.reset()  # Or all settings would count against Dynamo's recompile_limit.
        return make_fast_trainer(setting, recipe, data, test).run
    own = dataclasses.replace(recipe, dtype=setting.dtype or recipe.dtype)
    compile = setting.compile(own.compiler)
    return partial(train, own, compile, data, test, dense_last=setting.dense_last)


def make_fast_trainer(setting: Setting, recipe: FastRecipe, data: Images, test: Images) -> Trainer:
    """Return what trains a setting by the fast recipe, beside others that are compiled."""
    own = dataclasses.replace(recipe, dtype=setting.dtype or recipe.dtype)
    return Trainer(own, setting.compile(own.compiler), data, test, setting.dense_last)


def epochs_of(
    name: str, recipe: Recipe | FastRecipe, begin: Callable[[str], None]
) -> Callable[[int, nn.Module], None]:
    """Return a function that calls begin with a run's name, and the epoch, as each begins."""
    epochs = math.ceil(recipe.epochs)

    def watch(done: int, network: nn.Module) -> None:
        if done < epochs:
            begin(f"{name}, epoch {done + 1} of {epochs}")

    return watch


def facts_of(recipe: Recipe | FastRecipe, data: Images, test: Images) -> dict[str, Any]:
    """Return what all rows of a file have in common."""
    return {**dataclasses.asdict(recipe), "images": len(data), "test_images": len(test)}


def resume(name: str, facts: dict[str, Any], here: dict[str, Any], path: Path | None) -> Report:
    """Load the report of this name at path, to go on with, or make a new one.

    Args:
        here: The environment of a new one.

    Raises:
        ValueError: There is another one.
    """
    report = Report(name, here, facts, path)
    if path is None or not path.exists():
        return report
    stored = json.loads(path.read_text())
    if stored["settings"].get("name") == "fast":
        # Files from before it could be chosen do not have it.
        stored["settings"] = {"bias_scale": BIAS_SCALE, **stored["settings"]}
    if (stored["benchmark"], stored["settings"]) != (report.benchmark, facts):
        raise ValueError(
            f"--out: expected a new file, or one of {name} with {facts}, got {path}, which has "
            f"{stored['benchmark']} with {stored['settings']}"
        )
    report.environment = stored["environment"]
    report.rows += [with_current_options(row) for row in stored["rows"]]
    return report


def add_rows(report: Report, rows: Sequence[Row], here: dict[str, Any]) -> None:
    """Append rows and save; each says where and with what it was made, as others may differ.

    Args:
        here: The environment, as it was when what makes the rows was started.
    """
    report.environment = here
    made = {name: here[name] for name in _MADE}
    report.add([{**row, **made} for row in rows])


def with_current_options(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is stored of a setting, with options as they are called now.

    Before there was `layers`, structure "channel_always" pruned all layers, and "channel" those
    that are profitable; before there was `structure`, elements were pruned; and before there was
    `dense_last`, all steps.
    """
    facts = {"dense_last": 0.0, **facts}
    options = facts.get("options")
    if options is None or "layers" in options:
        return facts
    structure = options.get("structure", "element")
    layers = "profitable" if structure == "channel" else "all"
    structure = structure.removesuffix("_always")
    return {**facts, "options": {**options, "structure": structure, "layers": layers}}


def make_row(setting: Setting, seed: int, result: Run) -> Row:
    """Make the row that is kept of a run."""
    return {
        "setting": setting.name,
        **setting.facts(),
        "seed": seed,
        "accuracy": result.accuracies[-1],
        **dataclasses.asdict(result),
    }


def runs_of(rows: Sequence[Row], setting: Setting) -> list[Row]:
    """Return the setting's rows, by whatever name."""
    facts = setting.facts()
    return [row for row in rows if all(row[key] == value for key, value in facts.items())]


def accuracies(rows: Sequence[Row], setting: Setting, key: str = "accuracy") -> dict[int, float]:
    """Return the setting's test accuracy in percent, by seed.

    Args:
        key: "fresh_accuracy" for that with BatchNorm's statistics computed anew, of runs with one.
    """
    return {row["seed"]: 100 * row[key] for row in runs_of(rows, setting) if key in row}


def less_dense(rows: Sequence[Row], setting: Setting, key: str = "accuracy") -> list[float]:
    """Return by how many percent the accuracy differs from that of dense gradients.

    Seed by seed, as both runs start from the same weights and see the same batches.

    Args:
        key: As for `accuracies`.
    """
    without = dataclasses.replace(setting, config=None, scale=1.0, dense_last=0.0)
    dense, own = (accuracies(rows, each, key) for each in (without, setting))
    return [value - dense[seed] for seed, value in own.items() if seed in dense]


def paper_less_dense(settings: Sequence[Setting], setting: Setting) -> float | None:
    """Return by how many percent the paper's accuracy differs from the paper's dense one."""
    dense = next((s.paper for s in settings if s.config is None), None)
    return None if dense is None or setting.paper is None else setting.paper - dense


def show(rows: Sequence[Row], settings: Sequence[Setting]) -> None:
    """Print what each setting reaches, and how it differs from dense gradients of its dtype.

    Differences have 95% intervals. "detectable" is the smallest true difference that so many seeds
    would have told from none, four times out of five.
    """
    cells = []
    for setting in settings:
        own = list(accuracies(rows, setting).values())
        less, fresh, paper = [], [], None
        if setting.config:
            less = less_dense(rows, setting)
            fresh = less_dense(rows, setting, "fresh_accuracy")
            paper = paper_less_dense(settings, setting)
        cells.append(
            [
                setting.name,
                str(len(own)),
                percent(mean(own)),
                percent(deviation(own)),
                with_interval(less),
                percent(detectable(less)),
                with_interval(fresh),
                "-" if setting.paper is None else f"{setting.paper:.1f}",
                "-" if paper is None else f"{paper:+.1f}",
            ]
        )
    header = ["setting", "seeds", "accuracy %", "std", "to dense", "detectable"]
    print_table([*header, "with new statistics", "paper %", "paper, to dense"], cells)


def against_paper(facts: Iterable[tuple[str, Any, Any]], paper: str = "paper") -> str:
    """Say what was not done as in a paper.

    Args:
        facts: Names, what was done, and what the paper did.
        paper: Its name.
    """
    other = [f"{name} {own} ({paper}: {theirs})" for name, own, theirs in facts if own != theirs]
    return ", ".join(other) or f"all as in the {paper}"


def mean(values: Sequence[float]) -> float:
    """Return the mean; NaN of none."""
    return statistics.fmean(values) if values else math.nan


def deviation(values: Sequence[float]) -> float:
    """Return the standard deviation; NaN of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def half_interval(differences: Sequence[float]) -> float:
    """Return half the length of the mean's 95% interval, by Student's t; NaN of fewer than two."""
    return _in_errors(differences, 0.975)


def detectable(differences: Sequence[float]) -> float:
    """Return which true mean so many differences tell from 0 at 95%, with a power of 80%.

    NaN of fewer than two.
    """
    return _in_errors(differences, 0.975) + _in_errors(differences, 0.8)


def _in_errors(values: Sequence[float], share: float) -> float:
    """Return the quantile of Student's t at share, in standard errors of the mean of values."""
    # Only what shows runs needs it: the machine that makes them may have no SciPy.
    from scipy import stats

    if len(values) < 2:
        return math.nan
    quantile = float(stats.t.ppf(share, len(values) - 1))
    return quantile * deviation(values) / math.sqrt(len(values))


def with_interval(differences: Sequence[float]) -> str:
    """Format the mean with its 95% interval."""
    half = percent(half_interval(differences))
    return percent(mean(differences), "+") + (f" ± {half}" if half != "-" else "")


def percent(value: float, sign: str = "") -> str:
    """Format with two decimals; NaN is not known."""
    return "-" if math.isnan(value) else f"{value:{sign}.2f}"

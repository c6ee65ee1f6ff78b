"""Benchmarks: tasks that return rows, and how the rows are shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from sdgp_fx import SDGPConfig
from sdgp_fx.measurement.networks import check_model
from sdgp_fx.measurement.workload import Workload, default_dtype

from .report import Report, Row, caption
from .terminal import print_table

AUTO = "auto"
# Settings that become part of each workload, and those that become the config.
_WORKLOAD = ("batch", "size", "dtype", "memory_format")
_CONFIG = ("n", "m", "prune", "rescale", "structure", "layers", "product", "targets")


class Task(NamedTuple):
    """A part of a benchmark that is worth saving by itself."""

    name: str
    run: Callable[[], list[Row]]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        plan: Returns the tasks. It is called with the settings by name, but with a `Workload` for
            each model as workloads in place of models, batch, size, dtype and memory_format, or
            else the device; and with an `SDGPConfig` as config in place of its options.
        columns: Header -> name in a row, format of the value there.
        headline: Returns the lines that say what came out, from at least one row.
    """

    name: str
    plan: Callable[..., list[Task]]
    columns: Mapping[str, tuple[str, str]]
    headline: Callable[[Sequence[Row]], list[str]]

    def tasks(self, device: torch.device, settings: Mapping[str, Any]) -> list[Task]:
        """Plan the tasks.

        Args:
            settings: As the command line has them, and as a report stores them.

        Raises:
            ValueError: They do not fit; the message names the option.
        """
        rest = dict(settings)
        if "models" in rest:
            rest["workloads"] = _take_workloads(rest, device)
        else:
            rest["device"] = device
        if "structure" in rest:
            given = {name: rest.pop(name) for name in _CONFIG if name in rest}
            rest["config"] = SDGPConfig(**given)
        return self.plan(**rest)

    def show(self, report: Report) -> None:
        """Print a table of the rows, what came out, and where it was measured."""
        cells = [
            [_cell(row[name], form) for name, form in self.columns.values()] for row in report.rows
        ]
        print_table(list(self.columns), cells)
        if report.rows:
            print("\n".join(self.headline(report.rows)))
        print(caption(report.benchmark, report.environment))


def options_of(config: SDGPConfig) -> dict[str, Any]:
    """Return what the command line has set of config, for a row."""
    options = {name: getattr(config, name) for name in _CONFIG}
    return {**options, "targets": ",".join(config.targets)}


def _take_workloads(settings: dict[str, Any], device: torch.device) -> list[Workload]:
    shared = {name: settings.pop(name) for name in _WORKLOAD if name in settings}
    if shared.get("dtype") == AUTO:
        shared["dtype"] = default_dtype(device)
    models = settings.pop("models")
    for model in models:
        check_model(model, "--model")
    return [Workload(model, **shared, device=device) for model in models]


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return "x".join(map(str, value))
    return format(value, form)

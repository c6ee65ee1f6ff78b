"""What a benchmark is: tasks that return rows, and how the rows are shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .report import Report, Row, caption
from .terminal import print_table


class Task(NamedTuple):
    """A part of a benchmark that is worth saving by itself."""

    name: str
    run: Callable[[], list[Row]]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    plan: called with the device and the settings by name, returns the tasks; ValueError, with
        the option's name, for settings that don't fit.
    columns: header -> name in a row, format of the value there.
    headline: lines that say what came out, from the rows, at least one.
    """

    name: str
    plan: Callable[..., list[Task]]
    columns: Mapping[str, tuple[str, str]]
    headline: Callable[[Sequence[Row]], list[str]]

    def show(self, report: Report) -> None:
        """Print a table of the rows, what came out, and where it was measured."""
        cells = [
            [_cell(row[name], form) for name, form in self.columns.values()] for row in report.rows
        ]
        print_table(list(self.columns), cells)
        if report.rows:
            print("\n".join(self.headline(report.rows)))
        print(caption(report.benchmark, report.environment))


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return "x".join(map(str, value))
    return format(value, form)

"""Print progress and tables: by rich on a terminal, else, or without rich, as plain lines."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def find_console() -> Console | None:
    """Return rich's console, if it is installed and the output goes to a terminal."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console()


@contextlib.contextmanager
def progress(total: int, estimate: bool = False) -> Iterator[Callable[[str], None]]:
    """Yield a function to call with the name of each of total tasks as it begins.

    Args:
        estimate: Say how long the rest takes, if tasks take about the same time.
    """
    console = find_console()
    if console is None:
        number, start = itertools.count(), perf_counter()

        def begin(name: str) -> None:
            done = next(number)
            left = time_left(perf_counter() - start, done, total) if estimate else ""
            print(f"{done + 1}/{total} {name}{left}", file=sys.stderr, flush=True)

        yield begin
        return

    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    with Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *([TextColumn("left"), TimeRemainingColumn()] if estimate else []),
        TextColumn("{task.description}", markup=False),
        console=console,
    ) as bar:
        task = bar.add_task("", total=total)
        done = itertools.count()
        yield lambda name: bar.update(task, description=name, completed=next(done))
        bar.update(task, description="", completed=total)


def time_left(seconds: float, done: int, total: int) -> str:
    """Estimate how long the rest of total takes, in words; "" if nothing is done yet.

    Args:
        seconds: How long that which is done took.
    """
    if not done:
        return ""
    return f", about {seconds / done * (total - done) / 60:.0f} min left"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print cells under their headers; the first column is text, the others are numbers."""
    console = find_console()
    if console is None:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for first, *rest in (header, *rows):
            cells = [first.ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
            print("  ".join(cells).rstrip())
        return

    from rich.table import Table

    table = Table()
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)

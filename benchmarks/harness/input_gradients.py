"""Sum up the input gradients of networks, of whose layers a rule chooses some."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import itemgetter

from .report import Row


def sum_up(
    rows: Sequence[Row], pruned: str, others: Mapping[str, str] | None = None
) -> Iterator[tuple[str, list[Row]]]:
    """Say for each model and pattern what share of the dense time its input gradients take.

    Args:
        rows: With model, count, n, m, dense_us and chosen, one for each distinct layer.
        pruned: The column of the time with the layer pruned, in microseconds.
        others: More columns to sum up, by what they are called.

    Yields:
        A line, and the rows that it is of.
    """
    for model, n, m in dict.fromkeys((row["model"], row["n"], row["m"]) for row in rows):
        here = [row for row in rows if (row["model"], row["n"], row["m"]) == (model, n, m)]

        def total(time: Callable[[Row], float], here: list[Row] = here) -> float:
            return sum(row["count"] * time(row) for row in here) / 1e3

        dense = total(itemgetter("dense_us"))
        parts = {
            "all pruned": total(itemgetter(pruned)),
            "as the rule chooses": total(lambda row: row[pruned if row["chosen"] else "dense_us"]),
            "at best": total(lambda row: min(row[pruned], row["dense_us"])),
        }
        parts |= {name: total(itemgetter(column)) for name, column in (others or {}).items()}
        shares = ", ".join(f"{name} {time / dense:.3f}" for name, time in parts.items())
        yield f"input gradients of {model} {n}:{m}: dense {dense:.2f} ms; {shares} of it", here

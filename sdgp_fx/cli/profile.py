"""`python -m sdgp_fx profile MODEL`: times of a network's convolutions and of its training step."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..arguments import check_file, refuse, refusing_values
from ..measurement.convolutions import PRODUCTS
from ..measurement.networks import check_model
from ..measurement.profile import (
    STOCK,
    Row,
    describe,
    measure_layers,
    measure_steps,
    spread,
    totals_ms,
)
from ..measurement.workload import Workload, default_dtype


def run(
    *,
    model: str,
    batch: int | None,
    size: int,
    dtype: str | None,
    memory_format: str,
    inner: str,
    patterns: Sequence[tuple[int, int]],
    seconds: float,
    no_step: bool,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Measure and show.

    Args:
        batch, dtype: None for what is usual on the device.
        seconds: About how long to time each layer; the steps take 20 times as long.

    Raises:
        argparse.ArgumentError: The network or the picture cannot be had.
    """
    with refusing_values():
        check_file("--plot", plot)
        check_model(model, "MODEL")
    if plot is not None:
        import matplotlib  # noqa: F401  (It is missed now, not after the work.)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workload = Workload(
        model=model,
        batch=batch or (256 if device.type == "cuda" else 16),
        size=size,
        dtype=dtype or default_dtype(device),
        memory_format=memory_format,
        device=device,
    )
    with refusing_values():
        layers = measure_layers(workload, seconds, _tell)
    if not layers:
        refuse(f"MODEL: expected a network with convolutions, got {model}")
    timed = [] if no_step else patterns[:1]
    steps = measure_steps(workload, inner, timed, 20 * seconds, _tell) if timed else {}
    report = describe(workload, inner, layers, steps, patterns)
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        _print(report)
    if plot is not None:
        from ..measurement.pictures import draw

        draw(report).savefig(plot)


def _tell(name: str) -> None:
    print(name, file=sys.stderr, flush=True)


def _print(report: Row) -> None:
    from rich.console import Console
    from rich.table import Table

    layers, console = report["layers"], Console()
    table = Table(title=report["title"], title_justify="left")
    table.add_column("layer", no_wrap=True)
    for name in ("forward", "input grad", "weight grad"):
        table.add_column(f"{name}, ms", justify="right")
    table.add_column("pruned up to m", justify="right")
    totals = totals_ms(layers)
    for row in layers:
        m = row["largest_m"]
        cells = [f"{row[f'{product}_ms']:.3f}" for product in PRODUCTS]
        table.add_row(
            row["layer"], *cells, str(m) if m > 1 else "dense", end_section=row is layers[-1]
        )
    table.add_row("all", *(f"{totals[product]:.2f}" for product in PRODUCTS), "")
    whole = sum(totals.values())
    table.add_row("share", *(f"{totals[product] / whole:.1%}" for product in PRODUCTS), "")
    console.print(table)

    table = Table(title="Estimate: pruned products at n/m of their time", title_justify="left")
    table.add_column("n:m")
    columns = ("convolutions, ms", "of dense", "step, ms", "measured step, ms")
    for name in columns:
        table.add_column(name, justify="right")
    stock = report["steps"].get(STOCK, {}).get("ms")
    table.add_row("dense", f"{whole:.2f}", "100.0%", _ms(stock), _ms(stock))
    for row in report["estimates"]:
        table.add_row(
            f"{row['n']}:{row['m']}",
            f"{row['convolutions_ms']:.2f}",
            f"{row['share']:.1%}",
            _ms(row["step_ms"]),
            _ms(row["measured_step_ms"]),
        )
    console.print(table)
    if stock is not None:
        rest = stock - whole
        console.print(f"All else in a stock step: {rest:.2f} ms, {rest / stock:.1%} of it.")
    note = (
        "The estimate is for pruning that costs nothing and a product that makes full use of the "
        "zeros. The measured steps skip zeros only on a CPU, where a rule expects that to be "
        f"faster. Half of the layers' products have quartiles within {spread(layers):.0%} of each "
        "other."
    )
    console.print(note, highlight=False)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"

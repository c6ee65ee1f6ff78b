"""Measure figures 9 and 10 of the paper: where a step's time goes, and what pruning may save."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from sdgp_fx.arguments import check_file, positive
from sdgp_fx.config import INNER_COMPILERS
from sdgp_fx.measurement.convolutions import PRODUCTS
from sdgp_fx.measurement.networks import check_model
from sdgp_fx.measurement.pictures import draw_estimates, draw_layers
from sdgp_fx.measurement.profile import (
    STOCK,
    Row,
    describe,
    measure_layers,
    measure_steps,
    spread,
    totals_ms,
)
from sdgp_fx.measurement.workload import DTYPES, Workload

from ..harness import command
from ..harness.report import Report, caption, environment
from ..harness.terminal import print_table
from . import pictures
from .experiment import add_rows, resume

# The input gradients' part of the time of all convolutions of ResNet-18, batch 256 (Fig. 9).
PAPER_SHARE = 0.3317

# n:m of Fig. 10, and two with larger groups.
PATTERNS = ((2, 4), (1, 4), (4, 8), (2, 8), (1, 8), (2, 16), (4, 32))

FIGURES = {
    "fig9": "Figure 9: forward, input gradient and weight gradient of every convolution",
    "fig10": "Figure 10: the estimate for every n:m, beside measured training steps",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in argv, sys.argv by default; return the exit code."""
    parser = command.Parser(
        "paper",
        description="Time the convolutions of a network, and for fig10 its training step; show "
        "how the time divides and what the paper's estimate takes off it. What --out has already "
        "is not measured again, and fig10 takes fig9's times, if it has them.",
        example="fig10 --batch 256 --out times.json --picture fig10.png",
    )
    add = parser.add_argument
    names = "; ".join(f"{name}: {help_}" for name, help_ in FIGURES.items())
    add("name", choices=list(FIGURES), metavar="NAME", help=names)
    add("--model", default="resnet18", metavar="NAME", help="timm network (%(default)s)")
    add("--batch", type=positive(int), default=256, metavar="IMAGES", help="(%(default)s)")
    add("--size", type=positive(int), default=224, metavar="PIXELS", help="(%(default)s)")
    parser.add_dtype(DTYPES, "bfloat16", "of the operands, and of autocast in the step")
    parser.add_memory_format()
    add("--compiler", choices=INNER_COMPILERS, default="inductor", help="(%(default)s)")
    parser.add_seconds(0.5)
    add("--picture", type=Path, metavar="FILE", help="PNG file")
    parser.add_out()
    args = parser.parse_args(argv)
    try:
        check_file("--out", args.out)
        check_file("--picture", args.picture)
        check_model(args.model, "--model")
        device = command.find_device(args.device)
        settings = (args.model, args.batch, args.size, args.dtype, args.memory_format)
        workload = Workload(*settings, device)
        report = measure(workload, args.compiler, args.name, args.seconds, args.out)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    layers, steps = parts(report)
    result = describe(workload, args.compiler, layers, steps, PATTERNS)
    show(result)
    print(caption(args.name, report.environment))
    if args.picture is not None:
        pictures.save(draw(args.name, result), args.picture)
    return 0


def measure(workload: Workload, inner: str, name: str, seconds: float, path: Path | None) -> Report:
    """Measure what the figure needs and the file at path does not have.

    Args:
        inner: "inductor" or "aot_eager", for the steps.
        name: A key of FIGURES.
        seconds: About how long to time each layer; the steps take 20 times as long.

    Raises:
        ValueError: The file holds other measurements.
    """
    facts = {**workload.facts(), "dtype": f"torch.{workload.dtype}", "inner": inner}
    facts["device"] = str(workload.device)
    here = environment(workload.device)
    report = resume("times", facts, here, path)
    have_layers, have_steps = (bool(part) for part in parts(report))

    def begin(what: str) -> None:
        print(what, file=sys.stderr, flush=True)

    if not have_layers:
        add_rows(report, measure_layers(workload, seconds, begin), here)
    if name == "fig10" and not have_steps:
        steps = measure_steps(workload, inner, PATTERNS, 20 * seconds, begin)
        add_rows(report, [{"step": step, **row} for step, row in steps.items()], here)
    return report


def parts(report: Report) -> tuple[list[Row], dict[str, Row]]:
    """Return the rows of layers, and those of steps by name."""
    layers = [row for row in report.rows if "layer" in row]
    return layers, {row["step"]: row for row in report.rows if "step" in row}


def show(result: Row) -> None:
    """Print the shares and the estimates, beside the paper's."""
    layers, steps = result["layers"], result["steps"]
    totals = totals_ms(layers)
    whole = sum(totals.values())
    rows = [
        [product, f"{totals[product]:.2f}", f"{totals[product] / whole:.2%}"]
        for product in PRODUCTS
    ]
    print_table(["all convolutions", "ms", "share"], rows)
    print(f"input gradients in the paper: {PAPER_SHARE:.2%} (ResNet-18, batch 256)")
    cells = []
    for row in result["estimates"]:
        paper = 1 - PAPER_SHARE * (1 - row["n"] / row["m"])
        cells.append([f"{row['n']}:{row['m']}", f"{row['share']:.1%}", f"{paper:.1%}"])
        cells[-1] += [_ms(row["step_ms"]), _ms(row["measured_step_ms"])]
    print_table(
        ["n:m", "convolutions, of dense", "by the paper's share", "step, ms", "measured, ms"], cells
    )
    for name, step in steps.items():
        quartiles = f"quartiles {step['low_ms']:.1f} to {step['high_ms']:.1f}"
        if name == STOCK:
            print(f"measured step, stock: {step['ms']:.1f} ms, {quartiles}")
            continue
        ratio = f"{step['ratio']:.3f} ({step['ratio_low']:.3f} to {step['ratio_high']:.3f})"
        print(f"measured step, sdgp {name}: {step['ms']:.1f} ms, {quartiles}; {ratio} of stock")
    print(f"half of the products' times have quartiles within {spread(layers):.0%} of each other")
    print(result["title"])


def draw(name: str, result: Row) -> Figure:
    """Draw a figure of FIGURES."""
    figure = Figure(figsize=(10, 5.5), dpi=150, layout="constrained")
    figure.suptitle(f"{name}: {result['title']}", x=0.01, ha="left", fontsize=10)
    axes = figure.subplots()
    if name == "fig9":
        draw_layers(axes, result["layers"])
    else:
        draw_estimates(axes, result)
    return figure


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"

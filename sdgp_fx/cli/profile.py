"""`python -m sdgp_fx profile MODEL`: times of a network's convolutions and of its training step.

After McDanel et al. 2022: forward, input gradient and weight gradient of every layer (Fig. 9), and
the estimate of Fig. 10, by which a product with n of m values takes n / m of its time. The step
that is measured beside it multiplies the pruned gradients as dense ones.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backend import sdgp
from ..config import MAX_M
from ..measurement import timing
from ..measurement.convolutions import (
    FORWARD,
    INPUT_GRADIENT,
    PRODUCTS,
    WEIGHT_GRADIENT,
    Convolution,
    calls_for_images,
    time_products,
)
from .networks import check_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLASSES = 1000
STOCK = "stock"
COLORS = {FORWARD: "#9aa5b1", INPUT_GRADIENT: "#e07a2f", WEIGHT_GRADIENT: "#4c6a92"}
MEMORY_FORMATS = {
    "channels_last": torch.channels_last,
    "contiguous": torch.contiguous_format,
}

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is timed: a training step of a timm network on images (batch, 3, size, size) of noise.

    dtype: of the layers' operands; of autocast in the step.
    inner: what the step is compiled with, "inductor" or "aot_eager".
    """

    model: str
    batch: int
    size: int
    dtype: torch.dtype
    memory_format: str
    inner: str
    device: torch.device

    def build(self, device: torch.device) -> nn.Module:
        """The network, with new weights, in training mode. Raises ValueError if there is none."""
        check_model(self.model, "MODEL")
        network: nn.Module = timm.create_model(self.model, num_classes=CLASSES).to(device)
        return network

    def images(self, device: torch.device) -> Tensor:
        return torch.randn(self.batch, 3, self.size, self.size, device=device)

    def calls(self) -> list[tuple[str, Convolution]]:
        """Raises ValueError for images that the network does not take."""
        network = self.build(torch.device("meta"))
        return calls_for_images(network, self.model, self.batch, self.size)


def measure_layers(
    workload: Workload, seconds: float, begin: Callable[[str], None] = lambda name: None
) -> list[Row]:
    """A row for each convolution, in the order of the forward; equal ones are timed once.

    seconds: about how long to time each. begin: called with what is timed next.
    """
    format_ = MEMORY_FORMATS[workload.memory_format]
    measured: dict[Convolution, dict[str, timing.Timing]] = {}
    rows = []
    for name, convolution in workload.calls():
        if convolution not in measured:
            begin(f"{name}: {convolution}")
            measured[convolution] = time_products(
                convolution, workload.dtype, format_, workload.device, seconds
            )
        times = measured[convolution]
        row: Row = {"layer": name, "convolution": str(convolution)}
        row["largest_m"] = max(m for m in powers_of_two() if m == 1 or convolution.is_pruned(m))
        for product in PRODUCTS:
            row[f"{product}_ms"] = times[product].median * 1e3 if product in times else 0.0
        row["times"] = {product: dataclasses.asdict(time) for product, time in times.items()}
        rows.append(row)
    return rows


def measure_steps(
    workload: Workload,
    patterns: Sequence[tuple[int, int]],
    seconds: float,
    begin: Callable[[str], None] = lambda name: None,
) -> dict[str, Row]:
    """Times of a whole training step by stock and at each n:m, in turn, from the same weights.

    Returns "stock", "2:4" and so on -> "ms", and "low_ms" and "high_ms", the quartiles.
    """
    torch.manual_seed(0)
    device, format_ = workload.device, MEMORY_FORMATS[workload.memory_format]
    network: Any = workload.build(device)
    network = network.to(memory_format=format_)
    images = workload.images(device).contiguous(memory_format=format_)
    labels = torch.randint(CLASSES, (workload.batch,), device=device)
    options: dict[str, dict[str, Any] | None] = {STOCK: None}
    for n, m in patterns:
        options[f"{n}:{m}"] = {"sdgp.n": n, "sdgp.m": m, "sdgp.inner": workload.inner}
    steps = {}
    for name, settings in options.items():
        backend = workload.inner if settings is None else sdgp
        begin(f"a training step, {name}; compiling with {workload.inner}")
        model = copy.deepcopy(network)
        compiled = torch.compile(model, backend=backend, options=settings)
        steps[name] = partial(train, compiled, model, images, labels, workload.dtype)
        steps[name]()
    return {
        name: {"ms": time.median * 1e3, "low_ms": time.low * 1e3, "high_ms": time.high * 1e3}
        for name, time in timing.measure(steps, device, seconds).items()
    }


def train(
    compiled: Callable[[Tensor], Tensor],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
) -> None:
    """One step: forward, loss, backward, SGD."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        loss = F.cross_entropy(compiled(images), labels)
    loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.step()
    optimizer.zero_grad()


def saved_ms(layers: Sequence[Row], n: int, m: int) -> float:
    """What Fig. 10's estimate takes off: (1 - n / m) of the input gradients that are pruned."""
    pruned = (row["input_gradient_ms"] for row in layers if m <= row["largest_m"])
    return sum(pruned) * (1 - n / m)


def totals_ms(layers: Sequence[Row]) -> dict[str, float]:
    """The time of each of PRODUCTS in all layers."""
    return {product: sum(row[f"{product}_ms"] for row in layers) for product in PRODUCTS}


def estimate(
    layers: Sequence[Row], steps: dict[str, Row], patterns: Sequence[tuple[int, int]]
) -> list[Row]:
    """For each n:m: the estimate for the convolutions and the step, and the step as measured."""
    whole = sum(totals_ms(layers).values())
    rows = []
    for n, m in patterns:
        saved = saved_ms(layers, n, m)
        measured = steps.get(f"{n}:{m}", {}).get("ms")
        step = steps[STOCK]["ms"] - saved if steps else None
        row = {"n": n, "m": m, "convolutions_ms": whole - saved, "share": 1 - saved / whole}
        rows.append({**row, "step_ms": step, "measured_step_ms": measured})
    return rows


def powers_of_two() -> list[int]:
    """The values that m may have."""
    return [2**i for i in range(MAX_M.bit_length())]


def draw(report: Row) -> Figure:
    """Both pictures, from what `run` prints as JSON."""
    from matplotlib.figure import Figure

    width = max(8, 2 + 0.3 * len(report["layers"]))
    figure = Figure(figsize=(width, 9), dpi=100, layout="constrained")
    figure.suptitle(report["title"], x=0.01, ha="left", fontsize=11)
    top, bottom = figure.subplots(2)
    draw_layers(top, report["layers"])
    draw_estimates(bottom, report)
    return figure


def draw_layers(axes: Axes, layers: Sequence[Row]) -> None:
    """Figure 9: a bar for each layer, of its three products."""
    base = [0.0] * len(layers)
    whole = totals_ms(layers)
    for product in PRODUCTS:
        heights = [row[f"{product}_ms"] for row in layers]
        share = whole[product] / sum(whole.values())
        label = f"{product.replace('_', ' ')}, {share:.1%}"
        axes.bar(range(len(layers)), heights, 0.8, base, color=COLORS[product], label=label)
        base = [below + height for below, height in zip(base, heights, strict=True)]
    axes.set_xticks(range(len(layers)), [row["layer"] for row in layers], rotation=90, fontsize=8)
    axes.set_ylabel("ms")
    axes.set_title("time of every convolution", loc="left", fontsize=10)
    _finish(axes, "y")


def draw_estimates(axes: Axes, report: Row) -> None:
    """Figure 10: the estimate for each n:m, and steps that were measured."""
    estimates, steps = report["estimates"], report["steps"]
    key = "step_ms" if steps else "convolutions_ms"
    stock = steps[STOCK]["ms"] if steps else sum(totals_ms(report["layers"]).values())
    names = ["dense", *(f"{row['n']}:{row['m']}" for row in estimates)]
    values = [stock, *(row[key] for row in estimates)]
    axes.bar(names, values, 0.6, color="#d7dce2", label="estimate")
    measured = [(name, step) for name, step in steps.items()]
    for i, (name, step) in enumerate(measured):
        axes.errorbar(
            "dense" if name == STOCK else name,
            step["ms"],
            [[step["ms"] - step["low_ms"]], [step["high_ms"] - step["ms"]]],
            fmt="o",
            color="#e07a2f",
            capsize=4,
            label=None if i else "measured: median and quartiles",
        )
    axes.set_ylabel("ms")
    what = "a training step" if steps else "all convolutions"
    axes.set_title(f"{what}: pruned products at n/m of their time", loc="left", fontsize=10)
    _finish(axes, "y")


def _finish(axes: Axes, grid: Any) -> None:
    axes.grid(axis=grid, alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # Above what is drawn, of which the tallest may be anywhere.
    axes.margins(y=0.25)
    axes.legend(frameon=False, ncols=3, loc="upper right", fontsize=9)


def run(args: argparse.Namespace) -> None:
    """Measure and show. args: of the command line.

    Raises argparse.ArgumentError for what can't be measured.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    workload = Workload(
        model=args.model,
        batch=args.batch or (256 if on_gpu else 16),
        size=args.size,
        dtype=getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32")),
        memory_format=args.memory_format,
        inner=args.inner,
        device=device,
    )
    if args.plot is not None and not args.plot.absolute().parent.is_dir():
        _refuse(f"--plot: expected a file in a folder that exists, got {args.plot}")
    try:
        layers = measure_layers(workload, args.seconds, args.begin)
    except ValueError as error:
        _refuse(str(error))
    if not layers:
        _refuse(f"MODEL: expected a network with convolutions, got {args.model}")
    timed = [] if args.no_step else args.patterns[:1]
    steps = measure_steps(workload, timed, 20 * args.seconds, args.begin) if timed else {}
    report = describe(workload, layers, steps, args.patterns)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        _print(report)
    if args.plot is not None:
        draw(report).savefig(args.plot)


def describe(
    workload: Workload,
    layers: list[Row],
    steps: dict[str, Row],
    patterns: Sequence[tuple[int, int]],
) -> Row:
    """All that was measured and estimated, as it is printed as JSON."""
    device = workload.device
    cuda = device.type == "cuda"
    where = (
        torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} thread(s)"
    )
    dtype = str(workload.dtype).removeprefix("torch.")
    what = f"{workload.model}, batch {workload.batch}, {workload.size} x {workload.size}"
    title = f"{what}, {dtype}, {workload.memory_format}; {where}, torch {torch.__version__}"
    return {
        "title": title,
        "inner": workload.inner,
        "layers": layers,
        "steps": steps,
        "estimates": estimate(layers, steps, patterns),
    }


def spread(layers: Sequence[Row]) -> float:
    """How far apart the quartiles of a product's times lie, for half of the products."""
    widths = sorted(
        (time["high"] - time["low"]) / time["median"]
        for row in layers
        for time in row["times"].values()
    )
    return widths[len(widths) // 2]


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
        "The measured steps multiply pruned gradients as dense ones: the estimate needs a product "
        f"that makes use of the zeros. Half of the layers' products have quartiles within "
        f"{spread(layers):.0%} of each other."
    )
    console.print(note, highlight=False)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _refuse(message: str) -> NoReturn:
    """Raise what the command line turns into one line and the exit code 2."""
    raise argparse.ArgumentError(None, message)

"""Profile a network: times of its convolutions and its training step, and what pruning may save.

After McDanel et al. 2022: forward, input gradient and weight gradient of every layer (Fig. 9), and
the estimate of Fig. 10, by which a product with n of m values takes n / m of its time. In the steps
that are measured beside it, each layer has the product that `sdgp.product` chooses.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..backend import sdgp
from ..config import MAX_M
from . import timing
from .convolutions import PRODUCTS, Convolution, time_products
from .steps import make_step
from .workload import Workload

STOCK = "stock"

Row = dict[str, Any]


def measure_layers(
    workload: Workload, seconds: float, begin: Callable[[str], None] = lambda name: None
) -> list[Row]:
    """Time every convolution; equal ones are timed once.

    Args:
        seconds: About how long to time each.
        begin: Called with what is timed next.

    Returns:
        A row for each, in the order of the forward.

    Raises:
        ValueError: The network takes no such images.
    """
    measured: dict[Convolution, dict[str, timing.Timing]] = {}
    rows = []
    for name, convolution in workload.convolution_calls():
        if convolution not in measured:
            begin(f"{name}: {convolution}")
            settings = (workload.torch_dtype, workload.torch_memory_format, workload.device)
            measured[convolution] = time_products(convolution, *settings, seconds)
        times = measured[convolution]
        row: Row = {"layer": name, "convolution": str(convolution)}
        row["largest_m"] = largest_m(convolution)
        for product in PRODUCTS:
            row[f"{product}_ms"] = times[product].median * 1e3 if product in times else 0.0
        row["times"] = {product: dataclasses.asdict(time) for product, time in times.items()}
        rows.append(row)
    return rows


def largest_m(convolution: Convolution) -> int:
    """Return the largest m at which the input gradient can be pruned, 1 if there is none."""
    powers = [2**i for i in range(1, MAX_M.bit_length())]
    return max((m for m in powers if convolution.is_prunable(m)), default=1)


def measure_steps(
    workload: Workload,
    inner: str,
    patterns: Sequence[tuple[int, int]],
    seconds: float,
    begin: Callable[[str], None] = lambda name: None,
) -> dict[str, Row]:
    """Time a whole training step by stock and at each n:m, in turn, from the same weights.

    Args:
        inner: "inductor" or "aot_eager", for all of them.
        seconds: About how long to time.
        begin: Called with what is compiled next.

    Returns:
        "stock", "2:4" and so on -> "ms", with the quartiles "low_ms" and "high_ms"; and "ratio" to
        stock's step of the same round, with "ratio_low" and "ratio_high".
    """
    torch.manual_seed(0)
    network: Any = workload.build().to(workload.device)
    network = network.to(memory_format=workload.torch_memory_format)
    images, labels = workload.random_batch()
    options: dict[str, dict[str, Any] | None] = {STOCK: None}
    for n, m in patterns:
        options[f"{n}:{m}"] = {"sdgp.n": n, "sdgp.m": m, "sdgp.inner": inner}
    steps = {}
    for name, settings in options.items():
        begin(f"a training step, {name}; compiling with {inner}")
        model = copy.deepcopy(network)
        backend = inner if settings is None else sdgp
        compiled = torch.compile(model, backend=backend, options=settings)
        steps[name] = make_step(compiled, model, images, labels, workload.torch_dtype)
        steps[name]()
    samples = timing.sample(steps, workload.device, seconds)
    rows: dict[str, Row] = {}
    for name, column in samples.items():
        time = timing.summarize(column)
        ratio = timing.ratio(column, samples[STOCK])
        row = {"ms": time.median * 1e3, "low_ms": time.low * 1e3, "high_ms": time.high * 1e3}
        ratios = {"ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high}
        rows[name] = {**row, **ratios}
    return rows


def describe(
    workload: Workload,
    inner: str,
    layers: list[Row],
    steps: dict[str, Row],
    patterns: Sequence[tuple[int, int]],
) -> Row:
    """Put all that was measured, and the estimates for patterns, into one report."""
    device = workload.device
    cuda = device.type == "cuda"
    where = (
        torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} thread(s)"
    )
    what = f"{workload.model}, batch {workload.batch}, {workload.size} x {workload.size}"
    form = f"{workload.dtype}, {workload.memory_format}"
    return {
        "title": f"{what}, {form}; {where}, torch {torch.__version__}",
        "inner": inner,
        "layers": layers,
        "steps": steps,
        "estimates": estimate(layers, steps, patterns),
    }


def estimate(
    layers: Sequence[Row], steps: dict[str, Row], patterns: Sequence[tuple[int, int]]
) -> list[Row]:
    """Estimate convolutions and step at each n:m, beside the step as it was measured."""
    whole = sum(totals_ms(layers).values())
    rows = []
    for n, m in patterns:
        saved = saved_ms(layers, n, m)
        measured = steps.get(f"{n}:{m}", {}).get("ms")
        step = steps[STOCK]["ms"] - saved if steps else None
        row = {"n": n, "m": m, "convolutions_ms": whole - saved, "share": 1 - saved / whole}
        rows.append({**row, "step_ms": step, "measured_step_ms": measured})
    return rows


def saved_ms(layers: Sequence[Row], n: int, m: int) -> float:
    """Return what Fig. 10 takes off: (1 - n / m) of the input gradients that can be pruned."""
    pruned = (row["input_gradient_ms"] for row in layers if m <= row["largest_m"])
    return sum(pruned) * (1 - n / m)


def totals_ms(layers: Sequence[Row]) -> dict[str, float]:
    """Return the time of each of PRODUCTS in all layers."""
    return {product: sum(row[f"{product}_ms"] for row in layers) for product in PRODUCTS}


def spread(layers: Sequence[Row]) -> float:
    """Return how far apart, as a share of the median, the quartiles of half of the times lie."""
    widths = sorted(
        (time["high"] - time["low"]) / time["median"]
        for row in layers
        for time in row["times"].values()
    )
    return widths[len(widths) // 2]

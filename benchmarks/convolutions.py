"""`python -m benchmarks.convolutions`: time forward and gradients of a network's convolutions."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial

import torch

from sdgp_fx.measurement.convolutions import PRODUCTS, Convolution, time_products
from sdgp_fx.measurement.workload import DTYPES, Workload

from .harness import command
from .harness.benchmark import Benchmark, Task
from .harness.report import Row


def plan(workloads: Sequence[Workload], cudnn_benchmark: bool, seconds: float) -> list[Task]:
    """Plan a task for each distinct convolution of each network."""
    return [
        Task(
            f"{workload.model} {convolution}",
            partial(measure, workload, convolution, count, cudnn_benchmark, seconds),
        )
        for workload in workloads
        for convolution, count in workload.count_convolutions().items()
    ]


def measure(
    workload: Workload, convolution: Convolution, count: int, cudnn_benchmark: bool, seconds: float
) -> list[Row]:
    """Time all products of one convolution of a network, without a bias.

    Args:
        count: How often the network has it.
    """
    torch.backends.cudnn.benchmark = cudnn_benchmark
    settings = (workload.torch_dtype, workload.torch_memory_format, workload.device)
    times = time_products(convolution, *settings, seconds)
    row: Row = {
        "convolution": str(convolution),
        "count": count,
        **workload.facts("batch", "size"),
        "flops": convolution.flops,
    }
    for name in PRODUCTS:
        time = times[name].median if name in times else None
        row[f"{name}_us"] = time and time * 1e6
        row[f"{name}_tflops"] = time and convolution.flops / time / 1e12
    row["times"] = {name: dataclasses.asdict(time) for name, time in times.items()}
    return [row]


def headline(rows: Sequence[Row]) -> list[str]:
    """Say, for each model, how the time of all its convolutions divides."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        totals = {
            name: sum(
                row["count"] * (row[f"{name}_us"] or 0) for row in rows if row["model"] == model
            )
            for name in PRODUCTS
        }
        whole = sum(totals.values())
        shares = (f"{name.replace('_', ' ')} {time / whole:.1%}" for name, time in totals.items())
        lines.append(f"{model} convolutions {whole / 1e3:.2f} ms: {', '.join(shares)}")
    return lines


BENCHMARK = Benchmark(
    name="convolutions",
    plan=plan,
    columns={
        "input * weight / stride": ("convolution", ""),
        "count": ("count", ""),
        "forward us": ("forward_us", ".1f"),
        "input grad us": ("input_gradient_us", ".1f"),
        "weight grad us": ("weight_gradient_us", ".1f"),
        "forward TFLOP/s": ("forward_tflops", ".1f"),
        "input grad TFLOP/s": ("input_gradient_tflops", ".1f"),
        "weight grad TFLOP/s": ("weight_gradient_tflops", ".1f"),
    },
    headline=headline,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in argv, sys.argv by default; return the exit code."""
    parser = command.Parser(
        "convolutions",
        description="Time forward, input gradient and weight gradient of every distinct "
        "convolution of networks, and the share of each in the time of all convolutions. "
        "The first layer has no input gradient.",
        example="--model resnet18 --out convolutions.json",
    )
    parser.add_models(("resnet18",))
    parser.add_dtype(DTYPES, "bfloat16")
    parser.add_memory_format()
    parser.add_cudnn_benchmark()
    parser.add_seconds(0.5)
    parser.add_out()
    return command.run(BENCHMARK, parser, argv)


if __name__ == "__main__":
    sys.exit(main())

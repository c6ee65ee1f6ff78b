"""`python -m benchmarks.convolutions`: forward and both gradients of a network's convolutions."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial

import torch

from sdgp_fx.measurement.convolutions import PRODUCTS, Convolution, time_products

from . import command
from .benchmark import Benchmark, Task
from .layers import find_convolutions
from .report import Row


def plan(
    device: torch.device,
    models: Sequence[str],
    batch: int,
    size: int,
    dtype: str,
    memory_format: str,
    cudnn_benchmark: bool,
    seconds: float,
) -> list[Task]:
    """A task for each distinct convolution of each model."""
    tasks = []
    for model in models:
        for convolution, count in find_convolutions(model, batch, size).items():
            arguments = (device, model, convolution, count, dtype, memory_format)
            run = partial(measure, *arguments, cudnn_benchmark, seconds)
            tasks.append(Task(f"{model} {convolution}", run))
    return tasks


def measure(
    device: torch.device,
    model: str,
    convolution: Convolution,
    count: int,
    dtype: str,
    memory_format: str,
    cudnn_benchmark: bool,
    seconds: float,
) -> list[Row]:
    """A row with the times of all products of one convolution, without a bias."""
    torch.backends.cudnn.benchmark = cudnn_benchmark
    format_ = command.MEMORY_FORMATS[memory_format]
    times = time_products(convolution, getattr(torch, dtype), format_, device, seconds)
    row: Row = {
        "model": model,
        "convolution": str(convolution),
        "count": count,
        "dtype": dtype,
        "memory_format": memory_format,
        "flops": convolution.flops,
    }
    for name in PRODUCTS:
        time = times[name].median if name in times else None
        row[f"{name}_us"] = time and time * 1e6
        row[f"{name}_tflops"] = time and convolution.flops / time / 1e12
    row["times"] = {name: dataclasses.asdict(time) for name, time in times.items()}
    return [row]


def headline(rows: Sequence[Row]) -> list[str]:
    """For each model, how the time of all its convolutions divides."""
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
    parser.add_dtype(command.DTYPES, "bfloat16")
    parser.add_memory_format()
    parser.add_cudnn_benchmark()
    parser.add_seconds(0.5)
    parser.add_out()
    return command.run(BENCHMARK, parser, argv)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.ceilings`: the best that the device does, to compare the others with."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial

import torch

from sdgp_fx.arguments import positive
from sdgp_fx.measurement import timing
from sdgp_fx.measurement.workload import DTYPES

from .harness import command
from .harness.benchmark import Benchmark, Task
from .harness.report import Row


def plan(
    device: torch.device, dtype: str, copy_mib: int, sizes: Sequence[int], seconds: float
) -> list[Task]:
    """Plan a task for the copy and one for each size of a square product."""
    tasks = [Task("copy", partial(measure_copy, device, copy_mib, seconds))]
    for size in sizes:
        run = partial(measure_product, device, dtype, size, seconds)
        tasks.append(Task(f"matmul {size}", run))
    return tasks


def measure_copy(device: torch.device, mib: int, seconds: float) -> list[Row]:
    """Measure the bandwidth of a copy, counting what is read and what is written."""
    x = torch.randint(-(2**31), 2**31, (mib * 2**18,), device=device, dtype=torch.int32)
    copy = partial(torch.empty_like(x).copy_, x)
    time = timing.measure({"copy": copy}, device, seconds)["copy"]
    return [_row(f"copy {mib} MiB", "GB/s", 2 * x.nbytes / time.median / 1e9, time)]


def measure_product(device: torch.device, dtype: str, size: int, seconds: float) -> list[Row]:
    """Measure the speed of a dense product of square matrices."""
    a, b = torch.randn(2, size, size, device=device, dtype=getattr(torch, dtype))
    time = timing.measure({"matmul": partial(torch.mm, a, b)}, device, seconds)["matmul"]
    return [_row(f"matmul {size} {dtype}", "TFLOP/s", 2 * size**3 / time.median / 1e12, time)]


def _row(name: str, unit: str, value: float, time: timing.Timing) -> Row:
    times = {name: dataclasses.asdict(time)}
    return {"ceiling": name, "unit": unit, "value": value, "times": times}


def headline(rows: Sequence[Row]) -> list[str]:
    """Say all of it on one line."""
    return [", ".join(f"{row['ceiling']}: {row['value']:.1f} {row['unit']}" for row in rows)]


BENCHMARK = Benchmark(
    name="ceilings",
    plan=plan,
    columns={"ceiling": ("ceiling", ""), "unit": ("unit", ""), "value": ("value", ".1f")},
    headline=headline,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in argv, sys.argv by default; return the exit code."""
    parser = command.Parser(
        "ceilings",
        description="Measure the bandwidth of a copy and the speed of a dense product.",
        example="--dtype float16",
    )
    parser.add_dtype(DTYPES, "bfloat16")
    above_0 = positive(int)
    parser.add_argument("--copy-mib", type=above_0, default=1024, help="to copy (%(default)s)")
    parser.add_list("--matmul", "sizes", (8192,), type=above_0, metavar="SIZE", help="n of n x n")
    parser.add_seconds(1)
    parser.add_out()
    return command.run(BENCHMARK, parser, argv)


if __name__ == "__main__":
    sys.exit(main())

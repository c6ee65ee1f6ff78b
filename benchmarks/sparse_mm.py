"""`python -m benchmarks.sparse_mm`: time cuSPARSELt's 2:4 sparse product beside the dense one.

The input gradient of a 1x1 convolution is grad_output @ weight, [positions, C_out] by
[C_out, C_in]. grad_output pruned along its channels is 2:4 along the dimension that is summed
over, which is what sparse tensor cores ask of a first operand; its rows are channels-last memory
as it is.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from sdgp_fx import prune
from sdgp_fx.arguments import positive
from sdgp_fx.measurement import timing
from sdgp_fx.measurement.workload import Workload

from .harness import command
from .harness.benchmark import Benchmark, Task
from .harness.report import Row

Product = tuple[int, int, int]


def plan(workloads: Sequence[Workload], squares: Sequence[int], seconds: float) -> list[Task]:
    """Plan a task for each square product, and each input gradient of a 1x1 convolution.

    Args:
        workloads: Of one dtype, on one device.
    """
    device, dtype = workloads[0].device, workloads[0].dtype
    if device.type != "cuda":
        raise ValueError(f"--device: expected cuda, which cuSPARSELt needs, got {device.type}")
    products = [(square,) * 3 for square in squares]
    products += [product for workload in workloads for product in input_gradients(workload)]
    return [
        Task("x".join(map(str, product)), partial(measure, device, product, dtype, seconds))
        for product in dict.fromkeys(products)
    ]


def input_gradients(workload: Workload) -> list[Product]:
    """Return positions, C_out and C_in of the 1x1 convolutions that have input gradients."""
    return [
        (math.prod(c.output) // c.output[1], c.output[1], c.input[1])
        for c in workload.count_convolutions()
        if c.needs_input_gradient and math.prod(c.weight[2:]) == c.groups == 1
    ]


def measure(device: torch.device, product: Product, dtype: str, seconds: float) -> list[Row]:
    """Time [rows, inner] by [inner, columns]: dense, sparse, and the compression apart."""
    rows, inner, columns = product
    torch_dtype = getattr(torch, dtype)

    def operands() -> tuple[Tensor, Tensor]:
        grad_output = torch.randn(rows, inner, device=device, dtype=torch_dtype)
        weight = torch.randn(inner, columns, device=device, dtype=torch_dtype)
        return prune(grad_output, 2, 4, prune="magnitude"), weight

    size = (rows * inner + inner * columns) * torch_dtype.itemsize
    dense = timing.cold(operands, size, device)
    sparse = [(torch._cslt_compress(a), b) for a, b in dense]
    algorithm = torch._cslt_sparse_mm_search(*sparse[0])
    multiply = partial(torch._cslt_sparse_mm, alg_id=algorithm)
    expected, actual = torch.mm(*dense[0]).float(), multiply(*sparse[0]).float()

    def compress() -> None:
        for a, _ in dense:
            torch._cslt_compress(a)

    functions = {
        "dense": timing.back_to_back([partial(torch.mm, a, b) for a, b in dense], device),
        "sparse": timing.back_to_back([partial(multiply, a, b) for a, b in sparse], device),
        "compress": compress,
    }
    times = timing.measure(functions, device, seconds, len(dense))
    flops = 2 * math.prod(product)
    return [
        {
            "product": product,
            "dtype": dtype,
            "algorithm": algorithm,
            # Both round the same sums, taken in another order.
            "relative_error": ((actual - expected).norm() / expected.norm()).item(),
            "dense_us": times["dense"].median * 1e6,
            "sparse_us": times["sparse"].median * 1e6,
            "compress_us": times["compress"].median * 1e6,
            # Of the dense product, for both.
            "dense_tflops": flops / times["dense"].median / 1e12,
            "sparse_tflops": flops / times["sparse"].median / 1e12,
            "speedup": times["dense"].median / times["sparse"].median,
            "times": {name: dataclasses.asdict(time) for name, time in times.items()},
        }
    ]


def headline(rows: Sequence[Row]) -> list[str]:
    """Compare sparse with dense products: each square one, and the median of the others."""
    lines = []
    others = []
    for row in rows:
        if len(set(row["product"])) == 1:
            size = row["product"][0]
            lines.append(f"sparse mm {size}: {row['speedup']:.2f} x dense speed")
        else:
            others.append(row["speedup"])
    if others:
        median = statistics.median(others)
        lines.append(f"sparse mm, {len(others)} input gradients: {median:.2f} x dense speed")
    return lines


BENCHMARK = Benchmark(
    name="sparse_mm",
    plan=plan,
    columns={
        "rows x inner x columns": ("product", ""),
        "dense us": ("dense_us", ".1f"),
        "sparse us": ("sparse_us", ".1f"),
        "compress us": ("compress_us", ".1f"),
        "dense TFLOP/s": ("dense_tflops", ".1f"),
        "sparse TFLOP/s": ("sparse_tflops", ".1f"),
        "speedup": ("speedup", ".2f"),
        "error": ("relative_error", ".1e"),
    },
    headline=headline,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in argv, sys.argv by default; return the exit code."""
    parser = command.Parser(
        "sparse_mm",
        description="Time cuSPARSELt's product of a 2:4 sparse and a dense matrix beside the "
        "dense product, and the compression apart: on square matrices, and on the input "
        "gradients of a network's 1x1 convolutions. Needs CUDA.",
        example="--model resnet50 --out sparse_mm.json",
    )
    parser.add_models(("resnet50",))
    squares = "n of n x n"
    parser.add_list(
        "--square",
        "squares",
        (4096, 8192),
        type=positive(int),
        metavar="SIZE",
        help=squares,
    )
    parser.add_dtype(("bfloat16", "float16"), "bfloat16")
    parser.add_seconds(0.5)
    parser.add_out()
    return command.run(BENCHMARK, parser, argv)


if __name__ == "__main__":
    sys.exit(main())

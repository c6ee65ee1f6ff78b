"""`python -m benchmarks.products`: time the product that skips zeros beside the dense one."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sdgp_fx import SDGPConfig, explain
from sdgp_fx.arguments import pattern, positive
from sdgp_fx.config import PRUNING_FUNCTIONS
from sdgp_fx.kernels.sparse import cuda, cusparselt
from sdgp_fx.kernels.sparse.op import PRUNED_INPUT_GRAD, why_no_product
from sdgp_fx.kernels.sparse.problem import Problem, empty_result
from sdgp_fx.measurement import timing
from sdgp_fx.measurement.convolutions import Convolution, cold_operands
from sdgp_fx.measurement.workload import Workload

from .harness import command
from .harness.benchmark import Benchmark, Task
from .harness.input_gradients import dense_input_grad, is_covered, problem_of, sum_up
from .harness.report import Row

PATTERNS = ((2, 4), (1, 4), (2, 8), (2, 16), (4, 32))


def plan(
    workloads: Sequence[Workload],
    targets: str,
    patterns: Sequence[tuple[int, int]],
    prune: str,
    threads: int | None,
    seconds: float,
) -> list[Task]:
    """Plan a task for each distinct layer of each network that any of patterns prunes."""
    if threads is not None:
        torch.set_num_threads(threads)
    config = SDGPConfig(prune=prune, targets=targets)
    tasks = []
    for workload in workloads:
        reason = why_no_product(workload.torch_dtype, workload.device)
        if reason:
            raise ValueError(f"--device, --dtype: expected what has a sparse product: {reason}")
        for layer, count in workload.count_convolutions(tuple(config.targets)).items():
            fitting = [
                (n, m)
                for n, m in patterns
                if n < m and layer.is_prunable(m) and is_covered(workload, layer, n, m, prune)
            ]
            if fitting:
                run = partial(measure, workload, layer, count, fitting, prune, seconds)
                tasks.append(Task(f"{workload.model} {layer}", run))
    return tasks


def measure(
    workload: Workload,
    layer: Convolution,
    count: int,
    patterns: Sequence[tuple[int, int]],
    prune: str,
    seconds: float,
) -> list[Row]:
    """Time the input gradient of a network's layer: by the library, and with its zeros skipped.

    Prune and packing are part of the product that skips zeros; the dense one is not pruned, as by
    stock.

    Args:
        count: How often the network has it.

    Returns:
        A row for each pattern.
    """
    form = workload.torch_memory_format if len(layer.output) == 4 else torch.contiguous_format
    torch_dtype, on_gpu = workload.torch_dtype, workload.device.type == "cuda"
    operands = cold_operands(layer, torch_dtype, form, workload.device)
    functions: dict[Any, Any] = {
        "dense": [partial(dense_input_grad, layer, *each) for each in operands]
    }
    for n, m in patterns:
        problems = [problem_of(layer, gO, weight, n, m, prune) for gO, _, weight in operands]
        functions[n, m] = [partial(PRUNED_INPUT_GRAD, *problem) for problem in problems]
        if on_gpu:
            functions["multiply", n, m] = list(map(multiply_alone, problems))
        if on_gpu and not cusparselt.why_not(problems[0]):
            functions["cusparselt", n, m] = [
                partial(cusparselt.pruned_input_grad, problem) for problem in problems
            ]
    timed = {name: timing.back_to_back(calls, workload.device) for name, calls in functions.items()}
    times = timing.sample(timed, workload.device, seconds)
    rows = []
    for n, m in patterns:
        ratio = timing.ratio(times[n, m], times["dense"])
        sparse, library = (
            timing.summarize([time / len(operands) for time in times[name]])
            for name in ((n, m), "dense")
        )
        others = {
            name: timing.ratio(times[name, n, m], times["dense"])
            for name in ("multiply", "cusparselt")
            if (name, n, m) in times
        }
        if on_gpu:  # It is times that decide.
            is_faster = min(ratio.median, others.get("cusparselt", ratio).median) < 1
        else:
            is_faster = is_chosen(layer, n, m, prune, torch_dtype)
        row: Row = {
            "layer": str(layer),
            "count": count,
            **workload.facts("batch", "size"),
            "threads": torch.get_num_threads(),
            "n": n,
            "m": m,
            "prune": prune,
            "chosen": is_faster,
            "dense_us": library.median * 1e6,
            "sparse_us": sparse.median * 1e6,
            "ratio": ratio.median,
            "dense_gflops": layer.flops / library.median / 1e9,
            "times": {"dense": dataclasses.asdict(library), "sparse": dataclasses.asdict(sparse)},
            "ratio_quartiles": [ratio.low, ratio.high],
        }
        # "multiply" is without prune and packing, "cusparselt" with prune and compression.
        for name, other in others.items():
            row |= {f"{name}_ratio": other.median, f"{name}_quartiles": [other.low, other.high]}
        rows.append(row)
    return rows


def multiply_alone(problem: Problem) -> Callable[[], None]:
    """Return a function that multiplies a gradient that is packed already."""
    return partial(cuda.multiply, problem, cuda.pack(problem), empty_result(problem))


class Alone(nn.Module):
    """A layer as a model of its own."""

    def __init__(self, layer: Convolution) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layer.weight))
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer's output."""
        if not self.layer.stride:
            return nn.functional.linear(x, self.weight)
        return torch.ops.aten.convolution(x, self.weight, None, *self.layer.settings)


def is_chosen(layer: Convolution, n: int, m: int, prune: str, dtype: torch.dtype) -> bool:
    """Whether a CPU is expected to take less time for it than for a product without any pruning."""
    alone = Alone(layer).to(dtype)
    x = torch.empty(layer.input, dtype=dtype, requires_grad=True)
    options = {"sdgp.n": n, "sdgp.m": m, "sdgp.prune": prune, "sdgp.targets": "conv,linear"}
    options["sdgp.layers"] = "profitable"
    (report,) = explain(alone, x, options=options)
    return report.pruned


def headline(rows: Sequence[Row]) -> list[str]:
    """Sum up, for each model and pattern, the input gradients of all layers that can be pruned."""
    lines = []
    for line, here in sum_up(rows, "sparse_us"):
        slowest = max((row["ratio"] for row in here if row["chosen"]), default=0)
        lines.append(f"{line}; slowest that the rule chooses {slowest:.3f}")
    return lines


BENCHMARK = Benchmark(
    name="products",
    plan=plan,
    columns={
        "input * weight / stride": ("layer", ""),
        "count": ("count", ""),
        "n": ("n", "d"),
        "m": ("m", "d"),
        "dense us": ("dense_us", ".1f"),
        "sparse us": ("sparse_us", ".1f"),
        "ratio": ("ratio", ".3f"),
        "dense GFLOP/s": ("dense_gflops", ".1f"),
        "chosen": ("chosen", ""),
    },
    headline=headline,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in argv, sys.argv by default; return the exit code."""
    parser = command.Parser(
        "products",
        description="Time the input gradient of every distinct layer of networks: dense by the "
        "library, and by the product that prunes and skips the zeros, in turn; and tell whether "
        "it is expected to pay. On a GPU also without prune and packing, and only the layers that "
        "sparse tensor cores cover, those that are products of matrices by cuSPARSELt too. The "
        "gradients are noise.",
        example="--model resnet18 --batch 16 --size 128 --out products.json",
    )
    parser.add_models(("resnet18",))
    parser.add_dtype(("float32", "bfloat16", "float16"), "float32")
    parser.add_memory_format()
    parser.add_targets()
    kept = "values kept of every m channels"
    parser.add_list("--pattern", "patterns", PATTERNS, kept, metavar="N:M", type=pattern)
    parser.add_argument(
        "--prune", choices=PRUNING_FUNCTIONS, default="rescaled_magnitude", help="(%(default)s)"
    )
    parser.add_argument("--threads", type=positive(int), help="of PyTorch (as PyTorch has it)")
    parser.add_seconds(2)
    parser.add_out()
    return command.run(BENCHMARK, parser, argv)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.whole_channels`: time input gradients from whole channels, by layer."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sdgp_fx import SDGPConfig, explain, sdgp
from sdgp_fx.arguments import pattern
from sdgp_fx.config import PRUNING_FUNCTIONS
from sdgp_fx.measurement import timing
from sdgp_fx.measurement.convolutions import Convolution, cold_operands
from sdgp_fx.measurement.workload import DTYPES, Workload

from .harness import command
from .harness.benchmark import Benchmark, Task
from .harness.input_gradients import sum_up
from .harness.report import Row

PATTERNS = ((2, 4), (1, 4), (2, 16))
DENSE = "dense"


class InputGradient(nn.Module):
    """The product that computes a convolution's input gradient, as a model of its own."""

    def __init__(self, settings: Sequence[Any]) -> None:
        super().__init__()
        self.settings = tuple(settings)

    def forward(self, grad_output: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Compute the gradient.

        Args:
            x: Gives the gradient its shape.
        """
        gradient: Tensor = torch.ops.aten.convolution_backward(
            grad_output, x, weight, None, *self.settings, [True, False, False]
        )[0]
        return gradient


def plan(
    workloads: Sequence[Workload],
    patterns: Sequence[tuple[int, int]],
    prune: str,
    inner: str,
    cudnn_benchmark: bool,
    seconds: float,
) -> list[Task]:
    """Plan a task for each distinct convolution of each network that any of patterns prunes."""
    for n, m in patterns:
        SDGPConfig(n=n, m=m)
    tasks = []
    for workload in workloads:
        for convolution, count in workload.count_convolutions().items():
            fitting = [(n, m) for n, m in patterns if n < m and convolution.is_prunable(m)]
            if fitting:
                arguments = (workload, convolution, count, fitting, prune, inner)
                run = partial(measure, *arguments, cudnn_benchmark, seconds)
                tasks.append(Task(f"{workload.model} {convolution}", run))
    return tasks


def measure(
    workload: Workload,
    convolution: Convolution,
    count: int,
    patterns: Iterable[tuple[int, int]],
    prune: str,
    inner: str,
    cudnn_benchmark: bool,
    seconds: float,
) -> list[Row]:
    """Time the input gradient of a network's convolution, without a bias, by stock and by sdgp.

    whole is the time of sdgp, product that of the part of it that multiplies, compiled as well, as
    its call takes time, too.

    Args:
        count: How often the network has it.

    Returns:
        A row for each pattern.
    """
    torch.backends.cudnn.benchmark = cudnn_benchmark
    torch._dynamo.reset()  # Every shape is compiled as if there were no other.
    settings = (workload.torch_dtype, workload.torch_memory_format, workload.device)
    operands = cold_operands(convolution, *settings)
    product = InputGradient(convolution.settings)
    dense = torch.compile(product, backend=inner, dynamic=False)
    # What computes the gradient, and sets of its operands.
    ways: dict[Any, tuple[Callable[..., Tensor], list[Any]]] = {DENSE: (dense, operands)}
    chosen = {}
    for n, m in patterns:
        options: dict[str, Any] = {"sdgp.n": n, "sdgp.m": m, "sdgp.prune": prune}
        options |= {"sdgp.structure": "channel", "sdgp.gradients": "all"}
        profitable = {**options, "sdgp.layers": "profitable"}
        chosen[n, m] = explain(product, *operands[0], options=profitable).layers[0].pruned
        options["sdgp.inner"] = inner
        # A backend of its own: what Dynamo has compiled with an equal one it would use again.
        whole = torch.compile(product, backend=partial(sdgp), options=options, dynamic=False)
        ways["whole", n, m] = whole, operands
        smaller = fewer_outputs(convolution, n / m)
        ways["product", n, m] = dense, cold_operands(smaller, *settings)

    # Dynamo compiles a function for no more than 8 shapes and backends, else.
    with torch._dynamo.config.patch(recompile_limit=len(ways)):
        functions = {
            name: timing.back_to_back([partial(compute, *each) for each in sets], workload.device)
            for name, (compute, sets) in ways.items()
        }
        samples = timing.sample(functions, workload.device, seconds)
    times = {
        name: timing.summarize([time / len(ways[name][1]) for time in column])
        for name, column in samples.items()
    }
    rows = []
    for n, m in chosen:
        columns = {"dense": DENSE, "whole": ("whole", n, m), "product": ("product", n, m)}
        row: Row = {
            "convolution": str(convolution),
            "count": count,
            **workload.facts("batch", "size"),
            "n": n,
            "m": m,
            "prune": prune,
            "chosen": chosen[n, m],
            **{f"{column}_us": times[name].median * 1e6 for column, name in columns.items()},
        }
        row["ratio"] = row["whole_us"] / row["dense_us"]
        row["times"] = {c: dataclasses.asdict(times[name]) for c, name in columns.items()}
        rows.append(row)
    return rows


def fewer_outputs(convolution: Convolution, kept: float) -> Convolution:
    """Return the convolution with that share of its output channels."""
    output, weight = list(convolution.output), list(convolution.weight)
    dim = 1 if convolution.transposed else 0
    output[1], weight[dim] = round(output[1] * kept), round(weight[dim] * kept)
    return dataclasses.replace(convolution, output=tuple(output), weight=tuple(weight))


def headline(rows: Sequence[Row]) -> list[str]:
    """Sum up, for each model and pattern, the input gradients of all layers that can be pruned."""
    lines = sum_up(rows, "whole_us", {"products alone": "product_us"})
    return [line for line, _ in lines]


BENCHMARK = Benchmark(
    name="whole_channels",
    plan=plan,
    columns={
        "input * weight / stride": ("convolution", ""),
        "count": ("count", ""),
        "n": ("n", "d"),
        "m": ("m", "d"),
        "dense us": ("dense_us", ".1f"),
        "product us": ("product_us", ".1f"),
        "whole us": ("whole_us", ".1f"),
        "ratio": ("ratio", ".3f"),
        "chosen": ("chosen", ""),
    },
    headline=headline,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in argv, sys.argv by default; return the exit code."""
    parser = command.Parser(
        "whole_channels",
        description="Time the input gradient of every distinct convolution of networks: dense by "
        "stock Inductor, from whole channels by sdgp, with the choice of channels, and the "
        "smaller product alone, in turn; and tell whether layers=profitable chooses the layer. "
        "The gradients are noise, and come from no kernel that could do a part of the choice.",
        example="--model resnet18 --out whole_channels.json",
    )
    parser.add_models(("resnet18",))
    parser.add_dtype(DTYPES, "bfloat16")
    parser.add_memory_format()
    kept = "channels kept of every m"
    parser.add_list("--pattern", "patterns", PATTERNS, kept, metavar="N:M", type=pattern)
    parser.add_argument(
        "--prune", choices=PRUNING_FUNCTIONS, default="magnitude", help="(%(default)s)"
    )
    parser.add_inner()
    parser.add_cudnn_benchmark()
    parser.add_seconds(2)
    parser.add_out()
    return command.run(BENCHMARK, parser, argv)


if __name__ == "__main__":
    sys.exit(main())

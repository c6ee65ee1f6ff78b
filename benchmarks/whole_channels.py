"""`python -m benchmarks.whole_channels`: input gradients from whole channels, layer by layer."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sdgp_fx import SDGPConfig, explain, sdgp
from sdgp_fx.cli.arguments import pattern
from sdgp_fx.config import PRUNING_FUNCTIONS
from sdgp_fx.measurement import timing
from sdgp_fx.measurement.convolutions import Convolution, cold_operands

from . import command
from .benchmark import Benchmark, Task
from .layers import find_convolutions
from .report import Row

PATTERNS = ((2, 4), (1, 4), (2, 16))
DENSE = "dense"


class InputGradient(nn.Module):
    """The product that computes a convolution's input gradient, as a model of its own."""

    def __init__(self, settings: Sequence[Any]) -> None:
        super().__init__()
        self.settings = tuple(settings)

    def forward(self, grad_output: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """x: gives the gradient its shape."""
        gradient: Tensor = torch.ops.aten.convolution_backward(
            grad_output, x, weight, None, *self.settings, [True, False, False]
        )[0]
        return gradient


def plan(
    device: torch.device,
    models: Sequence[str],
    batch: int,
    size: int,
    dtype: str,
    memory_format: str,
    patterns: Sequence[tuple[int, int]],
    prune: str,
    inner: str,
    cudnn_benchmark: bool,
    seconds: float,
) -> list[Task]:
    """A task for each distinct convolution of each model that any of patterns prunes."""
    for n, m in patterns:
        SDGPConfig(n=n, m=m)
    tasks = []
    for model in models:
        for convolution, count in find_convolutions(model, batch, size).items():
            fitting = [(n, m) for n, m in patterns if n < m and is_pruned(convolution, m)]
            if fitting:
                arguments = (device, model, convolution, count, dtype, memory_format, fitting)
                run = partial(measure, *arguments, prune, inner, cudnn_benchmark, seconds)
                tasks.append(Task(f"{model} {convolution}", run))
    return tasks


def is_pruned(convolution: Convolution, m: int) -> bool:
    """Whether whole channels of the gradient of convolution's output can be pruned."""
    return convolution.is_pruned(m) and convolution.output[1] > convolution.groups


def measure(
    device: torch.device,
    model: str,
    convolution: Convolution,
    count: int,
    dtype: str,
    memory_format: str,
    patterns: Iterable[tuple[int, int]],
    prune: str,
    inner: str,
    cudnn_benchmark: bool,
    seconds: float,
) -> list[Row]:
    """A row for each pattern, with the times of the input gradient by stock and by sdgp.

    whole is that by sdgp, product the part of it that multiplies, compiled as well, as its call
    takes time, too. The convolution has no bias.
    """
    torch.backends.cudnn.benchmark = cudnn_benchmark
    torch._dynamo.reset()  # Every shape is compiled as if there were no other.
    settings = (getattr(torch, dtype), command.MEMORY_FORMATS[memory_format], device)
    operands = cold_operands(convolution, *settings)
    product = InputGradient(convolution.settings)
    dense = torch.compile(product, backend=inner, dynamic=False)
    # What computes it, and of what.
    ways: dict[Any, tuple[Callable[..., Tensor], list[Any]]] = {DENSE: (dense, operands)}
    chosen = {}
    for n, m in patterns:
        options: dict[str, Any] = {"sdgp.n": n, "sdgp.m": m, "sdgp.prune": prune}
        by_rule = explain(product, *operands[0], options={**options, "sdgp.structure": "channel"})
        chosen[n, m] = by_rule.layers[0].pruned
        options |= {"sdgp.structure": "channel_always", "sdgp.inner": inner}
        # A backend of its own: what Dynamo has compiled with an equal one it would use again.
        whole = torch.compile(product, backend=partial(sdgp), options=options, dynamic=False)
        ways["whole", n, m] = whole, operands
        smaller = fewer_outputs(convolution, n / m)
        ways["product", n, m] = dense, cold_operands(smaller, *settings)

    # Dynamo compiles a function for no more than 8 shapes and backends, else.
    with torch._dynamo.config.patch(recompile_limit=len(ways)):
        functions = {
            name: timing.back_to_back([partial(compute, *each) for each in sets], device)
            for name, (compute, sets) in ways.items()
        }
        samples = timing.sample(functions, device, seconds)
    times = {
        name: timing.summarize([time / len(ways[name][1]) for time in column])
        for name, column in samples.items()
    }
    rows = []
    for n, m in chosen:
        columns = {"dense": DENSE, "whole": ("whole", n, m), "product": ("product", n, m)}
        row: Row = {
            "model": model,
            "convolution": str(convolution),
            "count": count,
            "dtype": dtype,
            "memory_format": memory_format,
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
    """convolution with so many of its output channels."""
    output, weight = list(convolution.output), list(convolution.weight)
    dim = 1 if convolution.transposed else 0
    output[1], weight[dim] = round(output[1] * kept), round(weight[dim] * kept)
    return dataclasses.replace(convolution, output=tuple(output), weight=tuple(weight))


def headline(rows: Sequence[Row]) -> list[str]:
    """For each model and pattern, the input gradients of all its layers that can be pruned."""
    lines = []
    for model, n, m in dict.fromkeys((row["model"], row["n"], row["m"]) for row in rows):
        here = [row for row in rows if (row["model"], row["n"], row["m"]) == (model, n, m)]

        def total(time: Callable[[Row], float], here: list[Row] = here) -> float:
            return sum(row["count"] * time(row) for row in here) / 1e3

        dense = total(lambda row: row["dense_us"])
        parts = {
            "all pruned": total(lambda row: row["whole_us"]),
            "as the rule chooses": total(
                lambda row: row["whole_us"] if row["chosen"] else row["dense_us"]
            ),
            "at best": total(lambda row: min(row["whole_us"], row["dense_us"])),
            "products alone": total(lambda row: row["product_us"]),
        }
        shares = ", ".join(f"{name} {time / dense:.3f}" for name, time in parts.items())
        lines.append(f"input gradients of {model} {n}:{m}: dense {dense:.2f} ms; {shares} of it")
    return lines


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
        "smaller product alone, in turn; and tell whether structure=channel chooses the layer. "
        "The gradients are noise, and come from no kernel that could do a part of the choice.",
        example="--model resnet18 --out whole_channels.json",
    )
    parser.add_models(("resnet18",))
    parser.add_dtype(command.DTYPES, "bfloat16")
    parser.add_memory_format()
    kept = "channels kept of every m"
    parser.add_list("--pattern", "patterns", PATTERNS, kept, metavar="N:M", type=pattern)
    function = "magnitude"
    parser.add_argument(
        "--prune", choices=PRUNING_FUNCTIONS, default=function, help="(%(default)s)"
    )
    parser.add_inner()
    parser.add_cudnn_benchmark()
    parser.add_seconds(2)
    parser.add_out()
    return command.run(BENCHMARK, parser, argv)


if __name__ == "__main__":
    sys.exit(main())

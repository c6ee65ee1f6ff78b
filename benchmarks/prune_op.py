"""`python -m benchmarks.prune_op`: time the pruning operator beside a copy of the same tensor."""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from collections.abc import Sequence
from functools import partial

import torch

from sdgp_fx.config import PRUNING_FUNCTIONS
from sdgp_fx.kernels.op import prune_nm
from sdgp_fx.measurement import timing
from sdgp_fx.measurement.workload import DTYPES, MEMORY_FORMATS, Workload

from .harness import command
from .harness.benchmark import Benchmark, Task
from .harness.report import Row

M = (2, 4, 8, 16, 32)
DEFAULT_M = 4
DEFAULT_VARIANT = ("rescaled_magnitude", "group")

_COPY = ("copy", "")

Shape = tuple[int, ...]


def plan(
    workloads: Sequence[Workload],
    functions: Sequence[str],
    ms: Sequence[int],
    everything: bool,
    seconds: float,
) -> list[Task]:
    """Plan a task for each m, shape and memory format; those of the default m first.

    Every shape is pruned the default way; all functions, scopes and m are for the shape of
    median size alone, or with everything for all shapes.

    Args:
        workloads: Of one dtype, on one device.
    """
    shapes = gradient_shapes(workloads)
    if not shapes:
        models = [workload.model for workload in workloads]
        raise ValueError(f"--model: expected a network with layers to prune, got {models}")
    device, dtype = workloads[0].device, workloads[0].dtype
    median = sorted(shapes, key=math.prod)[len(shapes) // 2]
    tasks = []
    for m in sorted(ms, key=lambda m: m != DEFAULT_M):
        for shape in shapes:
            thorough = everything or shape == median
            variants = command.VARIANTS if thorough else [DEFAULT_VARIANT] * (m == DEFAULT_M)
            variants = [variant for variant in variants if variant[0] in functions]
            if not variants or shape[1] % m:
                continue
            for memory_format in MEMORY_FORMATS:
                name = f"{'x'.join(map(str, shape))} {memory_format} {m // 2}:{m}"
                arguments = (device, shape, dtype, memory_format, m, variants, seconds)
                tasks.append(Task(name, partial(measure, *arguments)))
    return tasks


def gradient_shapes(workloads: Sequence[Workload]) -> list[Shape]:
    """Return the distinct shapes of output gradients that 2:4 pruning gets in these networks."""
    return list(
        dict.fromkeys(
            convolution.output
            for workload in workloads
            for convolution in workload.count_convolutions()
            if convolution.is_prunable(DEFAULT_M)
        )
    )


def measure(
    device: torch.device,
    shape: Shape,
    dtype: str,
    memory_format: str,
    m: int,
    variants: Sequence[tuple[str, str]],
    seconds: float,
) -> list[Row]:
    """Time variants, (prune, rescale), at m / 2 of m, in turn with a copy.

    Returns:
        A row for each variant.
    """
    torch_dtype = getattr(torch, dtype)
    size = math.prod(shape) * torch_dtype.itemsize

    def gradient() -> torch.Tensor:
        x = torch.randn(shape, device=device, dtype=torch_dtype)
        return x.contiguous(memory_format=MEMORY_FORMATS[memory_format])

    gradients = timing.cold(gradient, size, device)
    seed = torch.tensor([42], device=device)
    calls = {_COPY: [partial(torch.empty_like(g).copy_, g) for g in gradients]}
    for prune, rescale in variants:
        calls[prune, rescale] = [
            partial(prune_nm, g, seed, m // 2, m, prune, rescale, 1) for g in gradients
        ]
    functions = {name: timing.back_to_back(each, device) for name, each in calls.items()}
    times = timing.measure(functions, device, seconds, len(gradients))
    copy = times[_COPY]
    return [
        {
            "shape": shape,
            "memory_format": memory_format,
            "dtype": dtype,
            "prune": prune,
            "rescale": rescale if prune == "rescaled_magnitude" else None,
            "n": m // 2,
            "m": m,
            "prune_us": times[prune, rescale].median * 1e6,
            "copy_us": copy.median * 1e6,
            # Read once and written once, however often a kernel reads.
            "prune_gb_per_s": 2 * size / times[prune, rescale].median / 1e9,
            "copy_gb_per_s": 2 * size / copy.median / 1e9,
            "share_of_copy": copy.median / times[prune, rescale].median,
            "times": {
                "prune": dataclasses.asdict(times[prune, rescale]),
                "copy": dataclasses.asdict(copy),
            },
        }
        for prune, rescale in variants
    ]


def headline(rows: Sequence[Row]) -> list[str]:
    """Say what share of the copy's bandwidth each function has: the median over the shapes."""
    shares: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        function = " ".join(filter(None, (row["prune"], row["rescale"])))
        line = shares.setdefault(f"{row['n']}:{row['m']} {row['dtype']} {row['memory_format']}", {})
        line.setdefault(function, []).append(row["share_of_copy"])
    return [
        f"prune {name}, share of copy bandwidth: "
        + ", ".join(f"{function} {statistics.median(s):.2f}" for function, s in line.items())
        for name, line in shares.items()
    ]


BENCHMARK = Benchmark(
    name="prune_op",
    plan=plan,
    columns={
        "grad_output": ("shape", ""),
        "format": ("memory_format", ""),
        "function": ("prune", ""),
        "scope": ("rescale", ""),
        "n": ("n", ""),
        "m": ("m", ""),
        "prune us": ("prune_us", ".1f"),
        "copy us": ("copy_us", ".1f"),
        "prune GB/s": ("prune_gb_per_s", ".0f"),
        "copy GB/s": ("copy_gb_per_s", ".0f"),
        "share of copy": ("share_of_copy", ".2f"),
    },
    headline=headline,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in argv, sys.argv by default; return the exit code."""
    parser = command.Parser(
        "prune_op",
        description="Time the pruning operator beside a copy of the same tensor, on the output "
        "gradients that get pruned in networks. Every shape is pruned 2:4 by rescaled magnitude; "
        "the other functions, scopes and patterns (m / 2 of m) are for the shape of median size. "
        "On CUDA this is the Triton kernel, on the CPU the reference in eager PyTorch.",
        example="--model resnet18 --dtype float16 --out prune_op.json",
    )
    parser.add_models(("resnet18", "resnet50"))
    parser.add_dtype(DTYPES, "bfloat16")
    parser.add_list(
        "--prune",
        "functions",
        PRUNING_FUNCTIONS,
        choices=PRUNING_FUNCTIONS,
        metavar="FUNCTION",
        help="pruning function",
    )
    parser.add_list("--m", "ms", M, type=int, choices=M, metavar="M", help="channels in a group")
    everything = "every function, scope and m for every shape"
    parser.add_argument("--all", dest="everything", action="store_true", help=everything)
    parser.add_seconds(0.5)
    parser.add_out()
    return command.run(BENCHMARK, parser, argv)


if __name__ == "__main__":
    sys.exit(main())

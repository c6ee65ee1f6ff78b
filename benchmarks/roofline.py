"""`python -m benchmarks.roofline`: count what pruning could save of a network's convolutions.

Operations and bytes are counted, nothing is run or timed. A product takes as long as its
operations at the GPU's rate, or as its operands and its result, each moved once, at the GPU's
bandwidth, whichever is longer. Values have 16 bits, the pattern is 2:4, and a product with a 2:4
operand exists for every convolution, which it does not. "packed" is the way of sdgp's own product,
in the layers that it covers alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from sdgp_fx.arguments import positive
from sdgp_fx.kernels.sparse import cuda
from sdgp_fx.kernels.sparse.packed import empty_packed
from sdgp_fx.measurement.convolutions import Convolution
from sdgp_fx.measurement.workload import Workload

from .harness import command
from .harness.benchmark import Benchmark, Task
from .harness.input_gradients import problem_without_values
from .harness.report import Row

MODELS = ("resnet18", "resnet50")
SPEEDUPS = (2.0, 1.2)
ITEMSIZE = 2
N, M = 2, 4
# Two of every four 16-bit values, and two bits for the place of each.
COMPRESSED = N * (16 + 2) / (M * 16)


class Rates(NamedTuple):
    """Rates of a GPU.

    Attributes:
        flops: Dense operations in 16 bits, a second.
        bandwidth: Bytes a second.
    """

    flops: float
    bandwidth: float

    def seconds(self, flops: float, size: float) -> float:
        """Return the time of a product that moves size bytes."""
        return max(flops / self.flops, size / self.bandwidth)


# From NVIDIA's data sheets, of the SXM modules; theirs with sparsity are twice as high.
GPUS = {"H100": Rates(989.4e12, 3.35e12), "H200": Rates(989.4e12, 4.8e12)}


class Prune(NamedTuple):
    """Way of the pruned gradient to the product, in multiples of the gradient's bytes.

    Attributes:
        moved: By the prune, beside what computing the gradient takes.
        read: By the product.
    """

    moved: float
    read: float


PRUNES = {
    # In the kernel that computes the gradient, which writes it once more: compressed, or, as
    # sdgp does for a dense product, with its zeros.
    "fused": Prune(COMPRESSED, COMPRESSED),
    "with_zeros": Prune(1, 1),
    # In a pass of its own, which reads the gradient.
    "separate": Prune(1 + COMPRESSED, COMPRESSED),
}
# As "separate", but with a halo; see `prunes_of`.
PACKED = "packed"


class Costs(NamedTuple):
    """Seconds of a convolution's products.

    Attributes:
        input_gradient: 0 where none is computed.
        pruned: Of the input gradient and its prune, by the name of the prune; empty where the
            layer cannot be pruned, and without PACKED where it is not covered.
    """

    forward: float
    input_gradient: float
    weight_gradient: float
    pruned: dict[str, float]

    @property
    def dense(self) -> float:
        """All three products without pruning."""
        return self.forward + self.input_gradient + self.weight_gradient


def costs(convolution: Convolution, rates: Rates, speedup: float) -> Costs:
    """Count the costs of a convolution.

    Args:
        speedup: Of the operations of a product with a 2:4 operand.
    """
    x, weight, output = (
        math.prod(shape) * ITEMSIZE
        for shape in (convolution.input, convolution.weight, convolution.output)
    )
    flops = convolution.flops
    # The weight gradient reads what the forward reads, and where one writes the other reads.
    with_input = rates.seconds(flops, _read_of_input(convolution) * ITEMSIZE + weight + output)
    if not convolution.needs_input_gradient:
        return Costs(with_input, 0, with_input, {})
    pruned = {
        name: rates.seconds(flops / speedup, x + weight + prune.read * output)
        + prune.moved * output / rates.bandwidth
        for name, prune in prunes_of(convolution).items()
    }
    return Costs(
        forward=with_input,
        input_gradient=rates.seconds(flops, x + weight + output),
        weight_gradient=with_input,
        pruned=pruned if convolution.is_prunable(M) else {},
    )


def prunes_of(convolution: Convolution) -> dict[str, Prune]:
    """Return PRUNES and, if sdgp's own product on GPUs covers the convolution, PACKED.

    That writes the positions of the halo, too.
    """
    problem = problem_without_values(convolution, torch.bfloat16, N, M, "magnitude")
    if cuda.why_not_covered(problem):
        return PRUNES
    packed = empty_packed(problem.grad_output, cuda.halo_of(problem))
    share = sum(tensor.nbytes for tensor in packed) / problem.grad_output.nbytes
    return {**PRUNES, PACKED: Prune(1 + share, share)}


def _read_of_input(convolution: Convolution) -> int:
    """Count the values that are read: strides longer than the kernel leave some out."""
    if convolution.transposed:
        return math.prod(convolution.input)
    spatial = zip(
        convolution.input[2:], convolution.output[2:], convolution.weight[2:], strict=True
    )
    read = math.prod(min(size, count * kernel) for size, count, kernel in spatial)
    return math.prod(convolution.input[:2]) * read


def attained(compute: float, bandwidth: float) -> dict[str, Rates]:
    """Return GPUS at these shares of their operations and of their bandwidth."""
    return {
        gpu: Rates(rates.flops * compute, rates.bandwidth * bandwidth)
        for gpu, rates in GPUS.items()
    }


def plan(
    workloads: Sequence[Workload], speedups: Sequence[float], compute: float, bandwidth: float
) -> list[Task]:
    """Plan a task for each network."""
    rates = attained(compute, bandwidth)
    found = {workload.model: workload.count_convolutions() for workload in workloads}
    return [
        Task(model, partial(count, model, convolutions, rates, speedups))
        for model, convolutions in found.items()
    ]


def count(
    model: str,
    convolutions: Mapping[Convolution, int],
    gpus: Mapping[str, Rates],
    speedups: Sequence[float],
) -> list[Row]:
    """Summarize a network for each GPU and speedup."""
    return [
        summary(model, convolutions, gpu, rates, speedup)
        for gpu, rates in gpus.items()
        for speedup in speedups
    ]


def summary(
    model: str, convolutions: Mapping[Convolution, int], gpu: str, rates: Rates, speedup: float
) -> Row:
    """Sum up what pruning saves of the time of all convolutions.

    In "NAME", the layers are pruned in which it saves time; in "NAME_all", all that can be, and
    in "packed_all" all that are covered.
    """
    each = [(costs(c, rates, speedup), count) for c, count in convolutions.items()]
    dense = sum(cost.dense * count for cost, count in each)
    row: Row = {
        "model": model,
        "gpu": gpu,
        "tflops": rates.flops / 1e12,
        "tb_per_s": rates.bandwidth / 1e12,
        "speedup": speedup,
        "layers": sum(count for cost, count in each if cost.pruned),
        "covered_layers": sum(count for cost, count in each if PACKED in cost.pruned),
        "dense_ms": dense * 1e3,
        "input_gradients": sum(cost.input_gradient * count for cost, count in each) / dense,
    }
    for name in (*PRUNES, PACKED):
        saved = [
            (c.input_gradient - c.pruned[name], count) for c, count in each if name in c.pruned
        ]
        row[name] = sum(max(time, 0) * count for time, count in saved) / dense
        row[f"{name}_all"] = sum(time * count for time, count in saved) / dense
        row[f"{name}_layers"] = sum(count for time, count in saved if time > 0)
    return row


def headline(rows: Sequence[Row]) -> list[str]:
    """Say what is saved at best, for each network, GPU and speedup."""
    return [
        f"{row['model']} on {row['gpu']}, sparse products {row['speedup']:g} x as fast: at most "
        f"{row['fused']:.1%} of the convolutions' time, in {row['fused_layers']} of "
        f"{row['layers']} layers"
        for row in rows
    ]


BENCHMARK = Benchmark(
    name="roofline",
    plan=plan,
    columns={
        "model": ("model", ""),
        "GPU": ("gpu", ""),
        "speedup": ("speedup", "g"),
        "layers": ("layers", "d"),
        "dense ms": ("dense_ms", ".2f"),
        "input grads": ("input_gradients", ".1%"),
        "fused": ("fused", ".1%"),
        "fused, all": ("fused_all", ".1%"),
        "with zeros": ("with_zeros", ".1%"),
        "with zeros, all": ("with_zeros_all", ".1%"),
        "separate": ("separate", ".1%"),
        "separate, all": ("separate_all", ".1%"),
        "covered": ("covered_layers", "d"),
        "packed": ("packed", ".1%"),
        "packed, all": ("packed_all", ".1%"),
    },
    headline=headline,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in argv, sys.argv by default; return the exit code."""
    parser = command.Parser(
        "roofline",
        description="Count what 2:4 pruned input gradients could save of the time of a network's "
        "convolutions, forward and both gradients, in 16 bits on NVIDIA's H100 and H200. Of each "
        "way to prune: the saving where only layers are pruned in which there is one, and where "
        "all are. fused: pruned and compressed where the gradient is computed; with zeros: the "
        "same, not compressed; separate: a pass of its own, compressed; packed: the same with a "
        "border of zeros, as sdgp's own product reads it, in the layers that it covers alone. "
        "Nothing is run or timed.",
        example="--model resnet50 --speedup 1.2 --out roofline.json",
    )
    parser.add_models(MODELS)
    factor = "of the operations of a product with a 2:4 operand"
    number = positive(float)
    parser.add_list("--speedup", "speedups", SPEEDUPS, type=number, metavar="FACTOR", help=factor)
    add = parser.add_argument
    share = "share of the data sheet's {} that is attained (%(default)s)"
    add("--compute", type=number, default=0.8, metavar="SHARE", help=share.format("operations"))
    add("--bandwidth", type=number, default=0.9, metavar="SHARE", help=share.format("bandwidth"))
    parser.add_out()
    return command.run(BENCHMARK, parser, argv)


if __name__ == "__main__":
    sys.exit(main())

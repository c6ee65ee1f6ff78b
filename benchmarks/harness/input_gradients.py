"""Compute the input gradients of networks' layers, and sum up what they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import itemgetter

import torch
from torch import Tensor

from sdgp_fx.kernels.op import STOCHASTIC
from sdgp_fx.kernels.sparse import cuda
from sdgp_fx.kernels.sparse.problem import Problem
from sdgp_fx.measurement.convolutions import Convolution
from sdgp_fx.measurement.workload import Workload

from .report import Row


def sum_up(
    rows: Sequence[Row], pruned: str, others: Mapping[str, str] | None = None
) -> Iterator[tuple[str, list[Row]]]:
    """Say for each model and pattern what share of the dense time its input gradients take.

    Args:
        rows: With model, count, n, m, dense_us and chosen, one for each distinct layer.
        pruned: The column of the time with the layer pruned, in microseconds.
        others: More columns to sum up, by what they are called.

    Yields:
        A line, and the rows that it is of.
    """
    for model, n, m in dict.fromkeys((row["model"], row["n"], row["m"]) for row in rows):
        here = [row for row in rows if (row["model"], row["n"], row["m"]) == (model, n, m)]

        def total(time: Callable[[Row], float], here: list[Row] = here) -> float:
            return sum(row["count"] * time(row) for row in here) / 1e3

        dense = total(itemgetter("dense_us"))
        parts = {
            "all pruned": total(itemgetter(pruned)),
            "as the rule chooses": total(lambda row: row[pruned if row["chosen"] else "dense_us"]),
            "at best": total(lambda row: min(row[pruned], row["dense_us"])),
        }
        parts |= {name: total(itemgetter(column)) for name, column in (others or {}).items()}
        shares = ", ".join(f"{name} {time / dense:.3f}" for name, time in parts.items())
        yield f"input gradients of {model} {n}:{m}: dense {dense:.2f} ms; {shares} of it", here


def problem_of(
    layer: Convolution, grad_output: Tensor, weight: Tensor, n: int, m: int, prune: str
) -> Problem:
    """Return what the product that skips zeros is given."""
    seed = torch.ones(1, dtype=torch.int64, device=weight.device) if prune in STOCHASTIC else None
    return Problem(
        *(grad_output, weight, seed, n, m, prune, "group", layer.input),
        *(layer.stride, layer.padding, layer.dilation, layer.transposed, layer.groups),
    )


def problem_without_values(
    layer: Convolution, dtype: torch.dtype, n: int, m: int, prune: str
) -> Problem:
    """Return a problem of tensors that have shapes and no values."""
    grad_output, weight = (
        torch.empty(shape, dtype=dtype, device="meta") for shape in (layer.output, layer.weight)
    )
    return problem_of(layer, grad_output, weight, n, m, prune)


def is_covered(workload: Workload, layer: Convolution, n: int, m: int, prune: str) -> bool:
    """Whether the device's product covers a layer."""
    if workload.device.type != "cuda":
        return True
    problem = problem_without_values(layer, workload.torch_dtype, n, m, prune)
    return not cuda.why_not_covered(problem)


def dense_input_grad(layer: Convolution, grad_output: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Compute the input gradient by the library."""
    if not layer.stride:
        return grad_output @ weight
    gradient: Tensor = torch.ops.aten.convolution_backward(
        grad_output, x, weight, None, *layer.settings, [True, False, False]
    )[0]
    return gradient

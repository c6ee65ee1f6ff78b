"""Check that the kernels and the compiled backward are right on this device."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sdgp_fx
from sdgp_fx.kernels import reference
from sdgp_fx.kernels.op import prune_nm
from sdgp_fx.kernels.sparse import choice
from sdgp_fx.kernels.sparse.measured import DENSE
from sdgp_fx.measurement.convolutions import Convolution
from sdgp_fx.measurement.workload import DTYPES, MEMORY_FORMATS, Workload

from .benchmark import Benchmark, Task
from .command import VARIANTS
from .input_gradients import dense_input_grad, is_covered, problem_of
from .report import Row

# The share of its norm by which a network's gradient in float32 may differ: sums are taken in
# another order.
GRADIENT = 1e-4
# The share of its norm by which an input gradient may differ: both are rounded once, and their sums
# are taken in another order.
PRODUCT = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}
# The share of its norm by which a pruned gradient differs from the dense one at the least.
PRUNED = 1e-2


class Case(NamedTuple):
    """A call of the operator at m / 2 of m."""

    prune: str
    rescale: str
    m: int
    dtype: str
    memory_format: str
    shape: tuple[int, ...]

    @property
    def exact(self) -> bool:
        """Whether values are kept as they are or not at all."""
        return self.prune in ("random", "magnitude")


def plan_kernels(device: torch.device, ms: Sequence[int], processes: int) -> list[Task]:
    """Plan a task for each case of each m, in order: all functions, scopes, dtypes and formats.

    Of the two shapes one has no size that is a multiple of 16, the other none that isn't, and
    several tiles: kernels are compiled for either.

    Args:
        processes: Processes that share the cases, since compiling the kernels is most of the
            work; 0 for none.
    """
    cases = [
        Case(prune, rescale, m, dtype, memory_format, shape)
        for m in ms
        for shape in ((3, 3 * m, 5, 7), (4, 16 * m, 16, 16))
        for (prune, rescale), dtype, memory_format in itertools.product(
            VARIANTS, DTYPES, MEMORY_FORMATS
        )
    ]
    calls: list[Callable[[], list[Row]]] = [partial(check_kernel, device, case) for case in cases]
    if processes:
        pool = multiprocessing.get_context("spawn").Pool(processes)
        calls = [pool.apply_async(call).get for call in calls]
        pool.close()  # The pool ends with its last call.
    return [Task(" ".join(map(str, case)), call) for case, call in zip(cases, calls, strict=True)]


def check_kernel(device: torch.device, case: Case) -> list[Row]:
    """Compare the operator on device with the reference on the CPU."""
    x = gradient(case)
    seed = torch.tensor([-6148914691236517206])
    settings = (case.m // 2, case.m, case.prune, case.rescale)
    expected = reference.prune_nm(x, seed, *settings)
    actual = prune_nm(x.to(device), seed.to(device), *settings, 1)
    return [{**case._asdict(), "failure": difference(case, actual.cpu(), expected)}]


def gradient(case: Case) -> Tensor:
    """Draw numbers, with ties and zeros in the first sample, NaN and infinity in the last."""
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(0))
    x[0] = (2 * x[0]).round() / 2
    x[-1, 0, 0, 0], x[-1, -1, -1, -1] = float("nan"), -float("inf")
    memory_format = MEMORY_FORMATS[case.memory_format]
    return x.to(getattr(torch, case.dtype)).contiguous(memory_format=memory_format)


def difference(case: Case, actual: Tensor, expected: Tensor) -> str | None:
    """Say how actual differs from expected; None if it does not."""
    if actual.stride() != expected.stride():
        return f"has strides {actual.stride()}, expected {expected.stride()}"
    if wrong := int(((actual != 0) != (expected != 0)).sum()):
        return f"keeps other values in {wrong} of {expected.numel()} places"
    if case.exact:
        integer = torch.int32 if actual.dtype == torch.float32 else torch.int16
        right = actual.view(integer) == expected.view(integer)
    else:
        rtol, atol, _ = reference.TOLERANCES[actual.dtype]
        right = torch.isclose(actual, expected, rtol, atol, equal_nan=True)
    if wrong := int((~right).sum()):
        return f"has other values in {wrong} of {expected.numel()} places"
    return None


def plan_network(
    device: torch.device, variants: Sequence[tuple[str, str]], memory_formats: Sequence[str]
) -> list[Task]:
    """Plan a task for each (prune, rescale) and memory format."""
    return [
        Task(
            f"{prune} {rescale} {memory_format}",
            partial(check_network, device, prune, rescale, memory_format),
        )
        for prune, rescale in variants
        for memory_format in memory_formats
    ]


def check_network(device: torch.device, prune: str, rescale: str, memory_format: str) -> list[Row]:
    """Compare gradients by Inductor with those of the same graph in eager mode.

    A small network in float32: the fewer groups of channels, the less likely are two values so
    close that rounding decides which of them is kept.
    """
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(16 * 9 * 9, 10)),
    )
    format_ = MEMORY_FORMATS[memory_format]
    network = network.to(device).to(memory_format=format_)
    images = torch.randn(2, 3, 9, 9, device=device).contiguous(memory_format=format_)

    def compile_with(inner: str) -> Callable[[Tensor], Tensor]:
        options: dict[str, Any] = {"sdgp.prune": prune, "sdgp.rescale": rescale}
        options["sdgp.inner"] = inner
        return torch.compile(network, backend=sdgp_fx.sdgp, options=options)

    def gradients(forward: Callable[[Tensor], Tensor]) -> Tensor:
        network.zero_grad()
        forward(images).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

    torch._dynamo.reset()  # Dynamo compiles only so many networks of one class.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        dense = gradients(network)
        expected = gradients(compile_with("aot_eager"))
        actual = gradients(compile_with("inductor"))
    error = ((actual - expected).norm() / expected.norm()).item()
    pruned = ((dense - expected).norm() / expected.norm()).item()
    failure = None
    if not error <= GRADIENT:
        failure = f"gradients differ by {error:.1e} of their norm, expected {GRADIENT:.0e} at most"
    elif not pruned >= PRUNED:
        failure = f"gradients differ by {pruned:.1e} of their norm from those of dense training"
    return [
        {
            "prune": prune,
            "rescale": rescale,
            "memory_format": memory_format,
            "error": error,
            "distance_to_dense": pruned,
            "failure": failure,
        }
    ]


def plan_products(workloads: Sequence[Workload], batches: Sequence[int]) -> list[Task]:
    """Plan a task for each distinct layer whose zeros are skipped on the workloads' device.

    Args:
        batches: Each layer is checked with so many images, whatever its workload has.
    """
    sized = [dataclasses.replace(w, batch=batch) for w in workloads for batch in batches]
    layers = {
        (workload.dtype, workload.memory_format, layer): workload
        for workload in sized
        for layer in workload.count_convolutions()
        if layer.is_prunable(4) and is_covered(workload, layer, 2, 4, "magnitude")
    }
    return [
        Task(str(layer), partial(check_product, workload, layer))
        for (_, _, layer), workload in layers.items()
    ]


def check_product(workload: Workload, layer: Convolution) -> list[Row]:
    """Compare the products that skip zeros with the library's, of the gradient pruned before.

    Returns:
        A row for each: the package's own, and cuSPARSELt's where a GPU's is one of matrices.
    """
    torch.manual_seed(0)
    format_ = workload.torch_memory_format
    grad_output, x, weight = (
        torch.randn(shape, device=workload.device)
        .to(workload.torch_dtype)
        .contiguous(memory_format=format_)
        for shape in (layer.output, layer.input, layer.weight)
    )
    problem = problem_of(layer, grad_output, weight, 2, 4, "magnitude")
    pruned = prune_nm(grad_output, None, 2, 4, "magnitude", "group", 1)
    expected = dense_input_grad(layer, pruned, x, weight).float()
    most, rows = PRODUCT[workload.dtype], []
    for name, product in choice.products_of(problem).items():
        if name == DENSE:
            continue
        error = ((product().float() - expected).norm() / expected.norm()).item()
        failure = None
        if not error <= most:
            failure = f"differs by {error:.1e} of its norm, expected {most:.0e} at most"
        facts = {"layer": str(layer), "dtype": workload.dtype, "product": name.removesuffix("_ms")}
        rows.append({**facts, "error": error, "failure": failure})
    return rows


def failures(rows: Sequence[Row]) -> list[str]:
    """Return a line for each row that failed."""
    return [
        " ".join(str(value) for value in row.values()) for row in rows if row["failure"] is not None
    ]


def headline(what: str, rows: Sequence[Row]) -> list[str]:
    """Say how many rows are right."""
    return [f"{what}: {len(rows) - len(failures(rows))} of {len(rows)} right"]


KERNELS = Benchmark(
    name="kernels",
    plan=plan_kernels,
    columns={name: (name, "") for name in (*Case._fields, "failure")},
    headline=partial(headline, "kernels against the reference"),
)

NETWORK = Benchmark(
    name="network",
    plan=plan_network,
    columns={name: (name, "") for name in ("prune", "rescale", "memory_format", "failure")},
    headline=partial(headline, "compiled network against eager"),
)

PRODUCTS = Benchmark(
    name="products_check",
    plan=plan_products,
    columns={name: (name, "") for name in ("layer", "dtype", "product", "error", "failure")},
    headline=partial(headline, "products that skip zeros against the library's"),
)

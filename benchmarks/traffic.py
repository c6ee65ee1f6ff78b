"""`python -m benchmarks.traffic`: count what a backward pass launches and moves on a GPU.

The code of a training step is generated for a GPU by stock Inductor and by sdgp, and read. No GPU
is needed, and nothing is run or timed.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch._inductor import memory
from torch._inductor.dependencies import Dep
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import FallbackKernel
from torch._inductor.scheduler import (
    BaseSchedulerNode,
    ExternKernelSchedulerNode,
    NopKernelSchedulerNode,
)
from torch.utils._ordered_set import OrderedSet

from sdgp_fx import SDGPConfig
from sdgp_fx.inductor.lowering import TileLoops
from sdgp_fx.inspection.gpu_codegen import generate
from sdgp_fx.kernels.op import PRUNE_NM
from sdgp_fx.kernels.sparse import cuda
from sdgp_fx.kernels.sparse.op import PRUNED_INPUT_GRAD
from sdgp_fx.kernels.sparse.packed import empty_packed
from sdgp_fx.kernels.sparse.problem import Problem, empty_result
from sdgp_fx.measurement.workload import DTYPES, Workload
from sdgp_fx.passes import marks
from sdgp_fx.passes.graph import value_of

from .harness import command
from .harness.benchmark import Benchmark, Task, options_of
from .harness.report import Row

MODELS = (
    "resnet18",
    "resnet50",
    "regnetx_004",
    "convnext_tiny",
    "mobilenetv3_large_100",
    "efficientnet_b0",
    "densenet121",
)


class Packing(NamedTuple):
    """What the sparse product of a layer does ahead of the launch that multiplies.

    Attributes:
        read: Bytes of the gradient, and of the seed.
        packed: Bytes of the packed gradient, with its halo.
        copied: Bytes of each tensor that is copied to or from channels-last memory.
    """

    read: int
    packed: int
    copied: list[int]

    @classmethod
    def of(cls, problem: Problem) -> Packing:
        """Count what a covered problem takes."""
        grad_output, weight, seed, *_ = problem
        packed = empty_packed(grad_output, cuda.halo_of(problem))
        tensors = (grad_output, weight, empty_result(problem))
        return cls(
            read=grad_output.nbytes + (0 if seed is None else seed.nbytes),
            packed=sum(tensor.nbytes for tensor in packed),
            copied=[t.nbytes for t in tensors if not t.movedim(1, -1).is_contiguous()],
        )


@dataclasses.dataclass(frozen=True)
class Backward:
    """Counts of the generated code of a backward pass.

    Attributes:
        launches: Launches of generated kernels, and calls of this package's own. Libraries'
            kernels, such as those of convolutions, are the same with and without pruning, and
            left out; so is the launch of a sparse product that multiplies, in place of one of
            theirs.
        kernels: Different generated kernels.
        read, written: Bytes by these launches: each tensor, or the part that is used, once a
            launch. What a kernel reads of its own results has not left its registers and is not
            counted.
        pruned: Bytes of each gradient that is pruned.
        packed: Bytes of each that is packed, for a sparse product.
        unfused: What computes the gradient, for each that is pruned in a launch of its own.
        peak: The most bytes that are held at once, by Inductor's estimate; with the saved
            tensors, and with what sparse products hold by themselves.
    """

    launches: int
    kernels: int
    read: int
    written: int
    pruned: list[int]
    packed: list[int]
    unfused: list[str]
    peak: int

    @classmethod
    def count(cls, graph: GraphLowering, code: str) -> Backward:
        """Count what is in a graph whose code has been generated, in the graph's context."""
        packings = {
            node: Packing.of(_problem(node))
            for node in graph.scheduler.nodes
            if _operator(node) is PRUNED_INPUT_GRAD
        }
        copied = [size for packing in packings.values() for size in packing.copied]
        read = sum(packing.read for packing in packings.values()) + sum(copied)
        written = sum(packing.packed for packing in packings.values()) + sum(copied)
        nodes = [n for n in graph.scheduler.nodes if _is_counted(n) and n not in packings]
        for node in nodes:
            writes = node.read_writes.writes
            results = {dep.name for dep in writes}
            written += _bytes(graph, writes)
            read += _bytes(graph, (d for d in node.read_writes.reads if d.name not in results))
        own = sum(map(_is_own_kernel, nodes)) + len(packings) + len(copied)
        return cls(
            launches=code.count(".run(") + own,
            kernels=len(set(re.findall(r"^def (triton_\w+)", code, re.M))),
            read=read,
            written=written,
            pruned=_pruned(graph),
            packed=[packing.packed for packing in packings.values()],
            unfused=[source for node in nodes for source in _unfused(graph, node)],
            peak=_peak(graph, packings),
        )


def _problem(product: BaseSchedulerNode) -> Problem:
    """Return what a call of the sparse product's operator is given, without values."""
    node: Any = product.node
    return Problem(*value_of(node.get_origin_node().args))


def _pruned(graph: GraphLowering) -> list[int]:
    """Return the bytes of each gradient that is pruned."""
    sizes = {}
    for node in graph.orig_gm.graph.nodes:
        mark = marks.COMPUTES if node.target is PRUNED_INPUT_GRAD else marks.DECISION
        if decision := node.meta.get(mark):
            # A layer has both marks where its statistics are recorded.
            size = math.prod(decision.grad_output_shape) * node.meta["val"].itemsize
            sizes[id(decision)] = size
    return list(sizes.values())


def _is_counted(node: BaseSchedulerNode) -> bool:
    if isinstance(node, ExternKernelSchedulerNode):
        return _is_own_kernel(node)
    return not isinstance(node, NopKernelSchedulerNode)


def _is_own_kernel(node: BaseSchedulerNode) -> bool:
    called = _operator(node)
    return isinstance(called, torch._ops.OpOverload) and called.namespace == "sdgp"


def _operator(node: BaseSchedulerNode) -> Any:
    """Return the operator that a node calls; None if it is a generated kernel."""
    return node.node.op_overload if isinstance(node.node, FallbackKernel) else None


def _bytes(graph: GraphLowering, dependencies: Iterable[Dep]) -> int:
    """Count the bytes of dependencies that are in memory, no more than each tensor has."""
    accessed: Counter[str] = Counter()
    for dependency in set(dependencies):
        if dependency.name in graph.removed_buffers:
            continue
        buffer = graph.name_to_buffer.get(dependency.name)
        if isinstance(buffer, FallbackKernel) and not buffer.has_tensor_output():
            # On torch 2.11 each result of a call is a buffer of its own.
            names = [result.get_name() for result in buffer.outputs]
            accessed.update({name: _size(graph, name) for name in names})
        else:
            accessed[dependency.name] += dependency.numbytes_hint()
    return sum(min(size, _size(graph, name)) for name, size in accessed.items())


def _size(graph: GraphLowering, name: str) -> int:
    return int(graph.get_numel(name)) * graph.get_dtype(name).itemsize


def _unfused(graph: GraphLowering, node: BaseSchedulerNode) -> list[str]:
    """Name what computes the gradients that are pruned in this launch but come from others."""
    if isinstance(node.node, FallbackKernel):
        return ["not lowered"] if _operator(node) is PRUNE_NM else []
    results = {dep.name for dep in node.read_writes.writes}
    sources = []
    for part in node.get_nodes():
        if isinstance(getattr(part.node, "data", None), TileLoops):
            # The seed, which may be read as well, is smaller.
            gradient = max(part.read_writes.reads, key=lambda dep: dep.numbytes_hint())
            if gradient.name not in results:
                sources.append(_source(graph, gradient.name))
    return sources


def _source(graph: GraphLowering, name: str) -> str:
    """Name the kind of launch that computes a tensor."""
    scheduler = graph.scheduler
    if name not in scheduler.name_to_buf:
        return "input of the graph"
    node = scheduler.name_to_fused_node[scheduler.name_to_buf[name].defining_op_name()]
    if isinstance(node, ExternKernelSchedulerNode):
        return "library kernel"
    return "reduction" if node.is_reduction() else "pointwise kernel"


def _peak(graph: GraphLowering, packings: Mapping[BaseSchedulerNode, Packing]) -> int:
    scheduler, results = graph.scheduler, OrderedSet(graph.get_output_names())
    _, inputs = memory.prepare_planning_info(
        scheduler.nodes,
        scheduler.name_to_buf,
        scheduler.name_to_fused_node,
        OrderedSet(graph.graph_inputs),
        results,
    )
    peak, held = memory.estimate_peak_memory(scheduler.nodes, inputs, results)
    # Inductor doesn't know what an operator holds by itself.
    packed = {node: packing.packed + sum(packing.copied) for node, packing in packings.items()}
    with_packed = (
        size + packed.get(node, 0) for size, node in zip(held, scheduler.nodes, strict=False)
    )
    return max(peak, *with_packed)


def plan(workloads: Sequence[Workload], config: SDGPConfig, monitor: bool) -> list[Task]:
    """Plan a task for each network."""
    return [
        Task(workload.model, partial(compare, workload, config, monitor)) for workload in workloads
    ]


def compare(workload: Workload, config: SDGPConfig, monitor: bool = False) -> list[Row]:
    """Count stock's backward and sdgp's, and how they differ.

    Args:
        monitor: Whether sdgp's is one whose statistics are recorded.
    """
    dtype, format_ = workload.torch_dtype, workload.torch_memory_format
    network: Any = workload.build().to(dtype)
    network = network.to(memory_format=format_)
    shape = (workload.batch, 3, workload.size, workload.size)
    images = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=format_)
    counted: dict[str, Backward] = {}
    saved: dict[str, int] = {}
    for name, pruning in (("stock", None), ("sdgp", config)):

        def inspect(graph: GraphLowering, code: str, name: str = name) -> None:
            if graph.is_backward:
                counted[name] = Backward.count(graph, code)
                saved[name] = sum(_size(graph, value) for value in graph.graph_inputs)

        generate(network, images, pruning, inspect, monitor="traffic" if monitor else None)
    stock, ours = counted["stock"], counted["sdgp"]
    pruned = sum(ours.pruned)
    extra = ours.read + ours.written - stock.read - stock.written
    return [
        {
            **workload.facts(),
            **options_of(config),
            "which_layers": config.layers,
            "monitor": monitor,
            "layers": len(ours.pruned),
            "sparse_layers": len(ours.packed),
            "pruned_bytes": pruned,
            "largest_pruned_bytes": max(ours.pruned, default=0),
            "stock": dataclasses.asdict(stock),
            "sdgp": dataclasses.asdict(ours),
            "stock_launches": stock.launches,
            "extra_launches": ours.launches - stock.launches,
            "extra_kernels": ours.kernels - stock.kernels,
            "stock_gb": (stock.read + stock.written) / 1e9,
            "extra_read_gb": (ours.read - stock.read) / 1e9,
            "extra_written_gb": (ours.written - stock.written) / 1e9,
            "pruned_gb": pruned / 1e9,
            "extra_bytes_per_pruned": extra / pruned if pruned else None,
            "extra_saved_bytes": saved["sdgp"] - saved["stock"],
            "extra_peak_per_largest": (ours.peak - stock.peak) / max(ours.pruned, default=math.nan),
            "unfused": dict(Counter(ours.unfused)),
        }
    ]


def headline(rows: Sequence[Row]) -> list[str]:
    """Name what is pruned in launches of its own: for sparse products, or after other launches."""
    lines = []
    for row in rows:
        if row["sparse_layers"]:
            lines.append(
                f"{row['model']}: {row['sparse_layers']} of {row['layers']} layers multiplied "
                "sparsely, by a launch in place of the library's, after one that prunes and packs"
            )
        if row["structure"] != "element":
            lines.append(f"{row['model']}: {row['extra_launches']} for {row['layers']} layers")
        for source, count in row["unfused"].items():
            lines.append(f"{row['model']}: {count} pruned in a launch of its own, after {source}")
    return lines or ["every gradient is pruned in the kernel that computes it"]


BENCHMARK = Benchmark(
    name="traffic",
    plan=plan,
    columns={
        "model": ("model", ""),
        "layers": ("layers", "d"),
        "sparse": ("sparse_layers", "d"),
        "launches": ("stock_launches", "d"),
        "+launches": ("extra_launches", "+d"),
        "+kernels": ("extra_kernels", "+d"),
        "GB": ("stock_gb", ".3f"),
        "+GB read": ("extra_read_gb", "+.3f"),
        "+GB written": ("extra_written_gb", "+.3f"),
        "GB pruned": ("pruned_gb", ".3f"),
        "+GB/pruned": ("extra_bytes_per_pruned", ".4f"),
        "+peak/largest": ("extra_peak_per_largest", "+.2f"),
    },
    headline=headline,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in argv, sys.argv by default; return the exit code."""
    parser = command.Parser(
        "traffic",
        description="Count what the backward pass of networks launches, reads and writes on a "
        "GPU, as compiled by stock Inductor and by sdgp: launches and bytes of generated kernels "
        "and of the prune's own, without those of libraries. +GB/pruned are the bytes that sdgp "
        "adds, as a multiple of the pruned gradients' own; 1 is one write and nothing else. "
        "--product sparse counts sparse products, where a layer has one on an H200: a launch that "
        "prunes and packs, as the one that multiplies takes the place of a library's. "
        "+peak/largest is the growth of the peak memory as a multiple of the largest gradient. "
        "No GPU is used, and nothing is timed.",
        example="--model resnet18 --out traffic.json",
    )
    parser.add_models(MODELS)
    parser.add_dtype(DTYPES, "bfloat16")
    parser.add_memory_format()
    parser.add_pruning()
    recorded = "count a step whose statistics sdgp_fx.monitor records"
    parser.add_argument("--monitor", action="store_true", help=recorded)
    parser.add_out()
    return command.run(BENCHMARK, parser, argv)


if __name__ == "__main__":
    sys.exit(main())

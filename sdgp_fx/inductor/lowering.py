"""Inductor's lowering of sdgp::prune_nm on GPUs: fused with what produces the gradient.

Importing this module registers it. What is computed is said in `pruning_functions`; here are the
loops around it, a subclass of Inductor's private IR. A tile [groups, m] has the iteration space of
the pointwise kernel that produces the gradient, and the scheduler makes the two one: the gradient
is pruned in registers, before it leaves for memory.

Where `reason_not_fused` has a reason, the operator's own kernel is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._inductor import config, ir
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from ..kernels.op import PRUNE_NM
from .pruning_functions import Index, Tile, Variable, prune_group
from .scheduler_patch import keep_ordering_dependencies

keep_ordering_dependencies()


def reason_not_fused(grad_output: ir.TensorBox, prune: str, rescale: str) -> str:
    """Return why the operator's own kernel is called; "" if it is not."""
    if prune == "rescaled_magnitude" and rescale != "group":
        return "the factor needs sums over more than a group"
    if not isinstance(grad_output.get_size()[1], (int, sympy.Integer)):
        return "symbolic number of channels"
    if V.graph.sizevars.statically_known_equals(grad_output.get_numel(), 0):
        return "no values"
    device = grad_output.get_device_or_error().type
    generator = getattr(config, f"{device}_backend", None)
    if (device, generator) != ("cuda", "triton"):
        return "no lowering for this code generator"
    # A tile is pruned where its reductions are made: they must not need a loop or an exchange.
    triton = config.triton
    whole = triton.persistent_reductions and not triton.multi_kernel
    whole = whole and not triton.cooperative_reductions
    if triton.force_cooperative_reductions or not whole:
        return "an option splits Triton's reductions"
    return ""


@register_lowering(PRUNE_NM, type_promotion_kind=None)
def _prune_nm(
    grad_output: ir.TensorBox,
    seed: ir.TensorBox | None,
    n: int,
    m: int,
    prune: str,
    rescale: str,
    groups: int,
) -> ir.TensorBox:
    # The weight gradient reads the same gradient, and other layers the same draw of seeds.
    grad_output.realize()
    if seed is not None:
        seed.realize()
    node = V.current_node
    order = _decide_stride_order(node)
    _reconsider_layout(grad_output, node.all_input_nodes[0], order)
    if reason_not_fused(grad_output, prune, rescale):
        call_kernel = fallback_handler(PRUNE_NM, add_to_fallback_set=False)
        pruned: ir.TensorBox = call_kernel(grad_output, seed, n, m, prune, rescale, groups)
        if grad_output.get_device_or_error().type == "cpu":
            _wait_for_weight_grads(pruned, node.all_input_nodes[0])
        return pruned

    dtype, size = grad_output.get_dtype(), grad_output.get_size()

    def draw(index: Index) -> tuple[Variable, Variable]:
        """Return the seed, and the number of the group at index in channels-last order."""
        assert seed is not None
        sample, channel_group, *position = index
        numbers, number = (sample, *position, channel_group), sympy.S.Zero
        for i, count in zip(numbers, (size[0], *size[2:], FloorDiv(size[1], m)), strict=True):
            number = number * count + i
        load = seed.make_loader()
        return load([sympy.S.Zero] * len(seed.get_size())), ops.index_expr(number, torch.int64)

    loops = TileLoops.over(grad_output, m, functools.partial(prune_group, n, m, prune, dtype, draw))
    buffer = ir.ComputedBuffer(name=None, layout=_dense_layout(grad_output, order), data=loops)
    buffer.name = V.graph.register_buffer(buffer)
    V.graph.register_operation(buffer)
    return ir.TensorBox.create(buffer)


def _decide_stride_order(node: fx.Node) -> Sequence[int]:
    """Decide node's stride order, and record it.

    It is that of the input gradients computed from node, if they are its only use. The recorded
    strides are those of an eager run. A convolution's kernel wants those of its result, and
    Inductor makes a copy of what has others on record.
    """
    recorded, shape_env = node.meta["val"], V.graph.sizevars.shape_env
    order = ir.get_stride_order(recorded.stride(), shape_env)
    wanted = order
    for user in node.users:
        if user.target is not torch.ops.aten.convolution_backward.default:
            return order
        wanted = ir.get_stride_order(user.meta["val"][0].stride(), shape_env)
    _record_stride_order(node, wanted)
    return wanted


def _reconsider_layout(grad_output: ir.TensorBox, node: fx.Node, order: Sequence[int]) -> None:
    """Let grad_output have the strides that it would have without a prune.

    Inductor leaves the layout of a gradient to the convolution, if that alone uses it; but gives
    it the recorded strides early, if there is another use, which the prune is. As long as nothing
    reads it that can be taken back.
    """
    buffer = grad_output.data.data if isinstance(grad_output.data, ir.StorageBox) else None
    if not isinstance(buffer, ir.ComputedBuffer) or V.graph.name_to_users[buffer.get_name()]:
        return
    if isinstance(buffer.layout, ir.FixedLayout) and not buffer.layout.is_stride_ordered(order):
        buffer.layout = _dense_layout(grad_output, order)
        _record_stride_order(node, order)


def _wait_for_weight_grads(pruned: ir.TensorBox, grad_output: fx.Node) -> None:
    """Have pruned computed after the weight gradients that were lowered from grad_output.

    Left to itself Inductor puts weight gradients off until they take the least memory, and so
    scatters library calls among the loops. But loops that have no call between them make one C++
    file, and compiling the files is most of what compiling takes. In the order of the graph
    without the pass, where both gradients are one call, there are as many as there.
    """
    assert isinstance(pruned.data, ir.StorageBox)
    names = V.graph.additional_buffer_deps[pruned.data.data.get_operation_name()]
    for user in grad_output.users:
        if user.target is torch.ops.aten.convolution_backward.default:
            lowered = [V.graph.env[grad] for grad in user.users if grad in V.graph.env]
            names.update(grad.get_name() for grad in lowered)


def _dense_layout(like: ir.TensorBox, order: Sequence[int]) -> ir.FixedLayout:
    size = like.get_size()
    strides = ir.FlexibleLayout.stride_ordered(size, order)
    return ir.FixedLayout(like.get_device_or_error(), like.get_dtype(), size, strides)


def _record_stride_order(node: fx.Node, order: Sequence[int]) -> None:
    recorded = node.meta["val"]
    if ir.get_stride_order(recorded.stride(), V.graph.sizevars.shape_env) != order:
        outermost_first = sorted(range(recorded.dim()), key=order.__getitem__, reverse=True)
        dense = recorded.new_empty([recorded.shape[dim] for dim in outermost_first])
        node.meta["val"] = dense.permute([outermost_first.index(dim) for dim in range(dense.dim())])


# The loops


class TileLoops(ir.Sort):
    """Loops over groups, and within over m channels, that write every value.

    The loops of a sort are those of Inductor's that write along the dimension they reduce.
    """

    @classmethod
    def over(
        cls, grad_output: ir.TensorBox, m: int, prune_values: Callable[..., Variable]
    ) -> TileLoops:
        """Make the loops over a gradient; prune_values prunes a group, see `prune_group`."""
        load, dtype = _stored(grad_output), grad_output.get_dtype()
        samples, channels, *spatial = grad_output.get_size()
        ranges = [samples, FloorDiv(channels, m), *spatial]

        def value(index: Index) -> Variable:
            group = [index[0], FloorDiv(index[1], m), *index[2:]]
            tile = Tile(m, ModularIndexing(index[1], 1, m))
            return prune_values(tile, load(index), group)

        return cls(
            device=grad_output.get_device_or_error(),
            dtype=dtype,
            inner_fn=value,
            ranges=ranges,
            sort_ranges=[sympy.Integer(m)],
            size=[*ranges, sympy.Integer(m)],
            reindex=lambda group, position: [group[0], group[1] * m + position[0], *group[2:]],
            # With inner loops this short, a few hundred values a program and groups undivided.
            reduction_hint=ReductionHint.OUTER_TINY,
            output_index=0,
            dtypes=(dtype,),
            inner_fns=(value,),
            stable=True,
            descending=False,
        )

    def store_reduction(
        self, output_name: str | None, indexer: Any, vars: Index, reduction_vars: Index
    ) -> Any:
        index = self.reindex(vars, reduction_vars)
        return ops.store(output_name or "unnamed", indexer(index), self.inner_fn(index))


def _stored(grad_output: ir.TensorBox) -> Callable[[Index], Variable]:
    """Return a loader in float32 that gives what is, or is about to be, in memory."""
    load, dtype = grad_output.make_loader(), grad_output.get_dtype()
    if dtype == torch.float32:
        return load

    def rounded(index: Index) -> Variable:
        # A value that this kernel has just computed comes in float32, not rounded.
        value = ops.to_dtype(load(index), dtype, src_dtype=torch.float32, use_compute_types=False)
        return ops.to_dtype(value, torch.float32, src_dtype=dtype)

    return rounded

"""Prune the output gradient of every convolution, ahead of its input gradient only.

    before   gx, gw, gb = convolution_backward(gO, x, w, ..., mask=[1, 1, 1])

    after    p      = sdgp.prune_nm(gO, ...)
             gx     = convolution_backward(p, x, w, ..., mask=[1, 0, 0])
             gw, gb = convolution_backward(gO, x, w, ..., mask=[0, 1, 1])

The weight gradient keeps the dense gO (McDanel et al. 2022, section III). Libraries run the two
halves of convolution_backward one after the other anyway.

Rescaled magnitude with scope "channel" needs sums over all of gO, which a kernel that produces gO
doesn't have while it prunes. But the input gradient is linear in each output channel: the weight
takes the channels' factors, and the prune that is left needs one group at a time.

             p      = sdgp.prune_nm(gO, ..., "magnitude", ...)
             wf     = w * sdgp.channel_factor(gO, ...)
             gx     = convolution_backward(p, x, wf, ..., mask=[1, 0, 0])
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..config import SDGPConfig
from ..kernels import op
from ..kernels.op import CHANNEL_FACTOR, PRUNE_NM

CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default

# A channel that keeps next to nothing may have any factor. A kept value times it stays below the
# channel's sum, but a weight could become infinite, and NaN times the zeros of the gradient.
LARGEST_FACTOR = 2.0**64

# In a node's meta: it keeps the dense gradient of a layer, whose input gradient is another node.
_DENSE_HALF = "sdgp_dense_half"

NO_INPUT_GRADIENT = "no input gradient"
KEEPS_ALL = "n = m keeps every value"
EXCLUDED = "excluded by a rule"
DTYPE = "dtype not supported"
DEPTHWISE = "depthwise, one output channel a group"
NOT_A_MULTIPLE = "C_out per group is not a multiple of m"


@dataclasses.dataclass(frozen=True)
class Decision:
    """What became of one convolution_backward.

    module: the layer's name in `named_modules()`; that of the module around it for a
        convolution without a module of its own, "" for the compiled module itself.
    grad_output: shape (N, C_out, *spatial); a symbolic size is its symbol's name.
    weight: shape (C_out, C_in / groups, *kernel), or (C_in, C_out / groups, *kernel) if
        transposed.
    reason: why the layer stays dense; "" if it is pruned.
    """

    module: str
    grad_output: tuple[int | str, ...]
    weight: tuple[int | str, ...]
    groups: int
    transposed: bool
    pruned: bool
    reason: str


class _Arguments(NamedTuple):
    """Of aten.convolution_backward."""

    grad_output: fx.Node
    input: fx.Node
    weight: fx.Node
    bias_sizes: Any
    stride: Any
    padding: Any
    dilation: Any
    transposed: bool
    output_padding: Any
    groups: int
    output_mask: Sequence[bool]  # input, weight, bias


def prune_input_grads(graph: fx.Graph, config: SDGPConfig) -> list[Decision]:
    """Rewrite graph in place; return a Decision for each convolution, in the graph's order.

    graph: ATen operators with `meta["val"]`, such as AOTAutograd's joint graph. A graph that
    has been rewritten before is left as it is, with the same decisions.
    """
    found = graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD)
    layers = [node for node in found if _DENSE_HALF not in node.meta]
    reasons = {node: "" if _is_pruned(node) else _reason_dense(node, config) for node in layers}

    to_prune = [node for node in layers if not reasons[node] and not _is_pruned(node)]
    decisions = [_decision(node, reasons[node]) for node in layers]
    seeds = _draw_seeds(graph, to_prune) if config.prune in op.STOCHASTIC else {}
    for node in to_prune:
        _rewrite(graph, node, seeds.get(node), config)
    if to_prune:
        graph.eliminate_dead_code()
        graph.lint()
    return decisions


def _reason_dense(node: fx.Node, config: SDGPConfig) -> str:
    """Why the layer of this convolution_backward can't be pruned; "" if it can."""
    args = _arguments(node)
    grad_output = args.grad_output.meta["val"]
    channels = grad_output.shape[1]
    if not args.output_mask[0] or not _outputs(node, 0):
        return NO_INPUT_GRADIENT
    if config.n == config.m:
        return KEEPS_ALL
    if not config.selects(_module_name(node)):
        return EXCLUDED
    if not op.supports_dtype(grad_output.dtype, grad_output.device):
        return DTYPE
    if statically_known_true(channels == args.groups):
        return DEPTHWISE
    if not statically_known_true(channels % (args.groups * config.m) == 0):
        return NOT_A_MULTIPLE
    return ""


def _rewrite(graph: fx.Graph, node: fx.Node, seed: fx.Node | None, config: SDGPConfig) -> None:
    """Split node into its input gradient, of the pruned grad_output, and the rest as it was."""
    args = _arguments(node)
    values = node.meta["val"]
    prune, weight = config.prune, args.weight
    with graph.inserting_before(node):
        if _folds_factor(args, config):
            prune, weight = "magnitude", _scaled_weight(graph, node, config)
        settings = (config.n, config.m, prune, config.rescale, args.groups)
        pruned = _call(
            graph,
            PRUNE_NM,
            (args.grad_output, seed, *settings),
            torch.empty_like(args.grad_output.meta["val"]),
            node,
        )
        mask = [True, False, False]
        input_grad = _call(
            graph,
            CONVOLUTION_BACKWARD,
            tuple(args._replace(grad_output=pruned, weight=weight, output_mask=mask)),
            (values[0], None, None),
            node,
        )
    for output in _outputs(node, 0):
        output.update_arg(0, input_grad)
    node.args = tuple(args._replace(output_mask=[False, *args.output_mask[1:]]))
    node.meta.update({"val": (None, *values[1:]), _DENSE_HALF: True})


def _folds_factor(args: _Arguments, config: SDGPConfig) -> bool:
    """Whether the weight takes the factors of the rescaled magnitude.

    Not in float16, where ordinary factors can carry a weight past its range. In float64 there is
    nothing to gain: no fused prune takes it. The output channels of a transposed convolution in
    groups lie in two dimensions of its weight, which is not worth the views.
    """
    return (
        config.prune == "rescaled_magnitude"
        and config.rescale == "channel"
        and args.grad_output.meta["val"].dtype in (torch.float32, torch.bfloat16)
        and not (args.transposed and args.groups > 1)
    )


def _scaled_weight(graph: fx.Graph, node: fx.Node, config: SDGPConfig) -> fx.Node:
    """node's weight times its output channels' factors, multiplied in float32."""

    def call(target: Any, *operands: Any) -> fx.Node:
        value = target(*fx.node.map_arg(operands, lambda operand: operand.meta["val"]))
        return _call(graph, target, operands, value, node)

    args = _arguments(node)
    weight = args.weight.meta["val"]
    along_outputs = [1] * weight.dim()
    along_outputs[1 if args.transposed else 0] = -1
    factor = call(CHANNEL_FACTOR, args.grad_output, config.n, config.m)
    factor = call(torch.ops.aten.clamp_max.default, factor, LARGEST_FACTOR)
    factor = call(torch.ops.aten.view.default, factor, along_outputs)
    scaled = call(torch.ops.aten.mul.Tensor, args.weight, factor)
    return call(torch.ops.prims.convert_element_type.default, scaled, weight.dtype)


def _draw_seeds(graph: fx.Graph, layers: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """One seed for each layer, from one draw for each device.

    The draw is an ordinary random operator of the backward: it follows torch.manual_seed, and
    a captured CUDA graph replays it with fresh numbers.
    """
    on_device: dict[torch.device, list[fx.Node]] = {}
    for node in layers:
        grad_output = _arguments(node).grad_output.meta["val"]
        on_device.setdefault(grad_output.device, []).append(node)
    seeds = {}
    for device, nodes in on_device.items():
        like = _arguments(nodes[0]).grad_output.meta["val"]
        with graph.inserting_before(nodes[0]):
            drawn = _call(
                graph,
                torch.ops.aten.randint.default,
                (2**63 - 1, [len(nodes)]),
                like.new_empty((len(nodes),), dtype=torch.int64),
                nodes[0],
                {"dtype": torch.int64, "device": device, "pin_memory": False},
            )
        for i, node in enumerate(nodes):
            with graph.inserting_before(node):
                value = drawn.meta["val"][i]
                seeds[node] = _call(graph, torch.ops.aten.select.int, (drawn, 0, i), value, node)
    return seeds


def _call(
    graph: fx.Graph,
    target: Any,
    args: tuple[Any, ...],
    value: Any,
    source: fx.Node,
    kwargs: dict[str, Any] | None = None,
) -> fx.Node:
    """A new node with source's meta (module, stack trace, side of the partition), and its val."""
    node = graph.call_function(target, args, kwargs)
    node.meta = {**source.meta, "val": value}
    node.meta.pop("tensor_meta", None)
    return node


def _arguments(node: fx.Node) -> _Arguments:
    return _Arguments(*cast(Any, node.args))


def _outputs(node: fx.Node, index: int) -> list[fx.Node]:
    return [
        user for user in node.users if user.target is operator.getitem and user.args[1] == index
    ]


def _is_pruned(node: fx.Node) -> bool:
    """Whether node is the input gradient of a layer that this pass has rewritten."""
    args = _arguments(node)
    return args.grad_output.target is PRUNE_NM and list(args.output_mask) == [True, False, False]


def _decision(node: fx.Node, reason: str) -> Decision:
    args = _arguments(node)
    return Decision(
        module=_module_name(node),
        grad_output=_shape(args.grad_output),
        weight=_shape(args.weight),
        groups=args.groups,
        transposed=args.transposed,
        pruned=not reason,
        reason=reason,
    )


def _shape(node: fx.Node) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in node.meta["val"].shape)


def _module_name(node: fx.Node) -> str:
    """The layer's name from the innermost entry of the forward's module stack.

    Dynamo (checked on torch 2.11, 2.13 and 2.15) writes the stack's paths as Python expressions
    whose root is the compiled module or the variable that holds it: "L['self'].layer1.0.conv1".
    """
    stack = node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    return path.partition("]")[2].removeprefix(".") if "]" in path else path

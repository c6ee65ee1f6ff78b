"""Prune the output gradient of every convolution, ahead of its input gradient only.

    before   gx, gw, gb = convolution_backward(gO, x, w, ..., mask=[1, 1, 1])

    after    p      = sdgp.prune_nm(gO, ...)
             gx     = convolution_backward(p, x, w, ..., mask=[1, 0, 0])
             gw, gb = convolution_backward(gO, x, w, ..., mask=[0, 1, 1])

The weight gradient keeps the dense gO (McDanel et al. 2022, section III). Libraries run the two
halves of convolution_backward one after the other anyway.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..config import SDGPConfig
from ..kernels import op

PRUNE_NM = torch.ops.sdgp.prune_nm.default
CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default

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


def prune_input_grads(graph: fx.Graph, config: SDGPConfig) -> list[Decision]:
    """Rewrite graph in place; return a Decision for each convolution, in the graph's order.

    graph: ATen operators with `meta["val"]`, such as AOTAutograd's joint graph. A graph that
    has been rewritten before is left as it is, with the same decisions.
    """
    found = graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD)
    rewritten = {_without_input_grad(node) for node in found if _is_pruned(node)}
    layers = [node for node in found if _is_pruned(node) or _operands(node) not in rewritten]
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
    grad_output = node.args[0].meta["val"]
    channels, groups = grad_output.shape[1], node.args[9]
    if not node.args[10][0] or not _outputs(node, 0):
        return NO_INPUT_GRADIENT
    if config.n == config.m:
        return KEEPS_ALL
    if not config.selects(_module_name(node)):
        return EXCLUDED
    if not op.supports_dtype(grad_output.dtype, grad_output.device):
        return DTYPE
    if statically_known_true(channels == groups):
        return DEPTHWISE
    if not statically_known_true(channels % (groups * config.m) == 0):
        return NOT_A_MULTIPLE
    return ""


def _rewrite(graph: fx.Graph, node: fx.Node, seed: fx.Node | None, config: SDGPConfig) -> None:
    """Split node into its input gradient, of the pruned grad_output, and the rest as it was."""
    grad_output, mask, values = node.args[0], node.args[10], node.meta["val"]
    with graph.inserting_before(node):
        pruned = _call(
            graph,
            PRUNE_NM,
            (grad_output, seed, config.n, config.m, config.prune, config.rescale, node.args[9]),
            torch.empty_like(grad_output.meta["val"]),
            node,
        )
        input_grad = _call(
            graph,
            CONVOLUTION_BACKWARD,
            (pruned, *node.args[1:10], [True, False, False]),
            (values[0], None, None),
            node,
        )
    for output in _outputs(node, 0):
        output.update_arg(0, input_grad)
    node.update_arg(10, [False, *mask[1:]])
    node.meta["val"] = (None, *values[1:])


def _draw_seeds(graph: fx.Graph, layers: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """One seed for each layer, from one draw for each device.

    The draw is an ordinary random operator of the backward: it follows torch.manual_seed, and
    a captured CUDA graph replays it with fresh numbers.
    """
    device = {node: node.args[0].meta["val"].device for node in layers}
    drawn: dict[torch.device, fx.Node] = {}
    taken: Counter[torch.device] = Counter()
    seeds = {}
    for node in layers:
        grad_output, where = node.args[0].meta["val"], device[node]
        with graph.inserting_before(node):
            if where not in drawn:
                count = sum(other == where for other in device.values())
                drawn[where] = _call(
                    graph,
                    torch.ops.aten.randint.default,
                    (2**63 - 1, [count]),
                    grad_output.new_empty((count,), dtype=torch.int64),
                    node,
                    {"dtype": torch.int64, "device": where, "pin_memory": False},
                )
            seeds[node] = _call(
                graph,
                torch.ops.aten.select.int,
                (drawn[where], 0, taken[where]),
                drawn[where].meta["val"][taken[where]],
                node,
            )
        taken[where] += 1
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


def _outputs(node: fx.Node, index: int) -> list[fx.Node]:
    return [
        user for user in node.users if user.target is operator.getitem and user.args[1] == index
    ]


def _is_pruned(node: fx.Node) -> bool:
    """Whether node is the input gradient of a layer that this pass has rewritten."""
    return node.args[0].target is PRUNE_NM and list(node.args[10]) == [True, False, False]


def _operands(node: fx.Node) -> tuple[Any, ...]:
    """What tells one call of a layer from another: grad_output, input, weight, input gradient."""
    return (*node.args[:3], node.args[10][0])


def _without_input_grad(pruned: fx.Node) -> tuple[Any, ...]:
    """The operands of the other half of a layer that is pruned already."""
    return (pruned.args[0].args[0], *pruned.args[1:3], False)


def _decision(node: fx.Node, reason: str) -> Decision:
    return Decision(
        module=_module_name(node),
        grad_output=_shape(node.args[0]),
        weight=_shape(node.args[2]),
        groups=node.args[9],
        transposed=node.args[7],
        pruned=not reason,
        reason=reason,
    )


def _shape(node: fx.Node) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in node.meta["val"].shape)


def _module_name(node: fx.Node) -> str:
    """The layer's name from the innermost entry of the forward's module stack.

    Dynamo (torch 2.11 to 2.15) writes the stack's paths as Python expressions whose root is the
    compiled module or the variable that holds it: "L['self'].layer1.0.conv1".
    """
    stack = node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    return path.partition("]")[2].removeprefix(".") if "]" in path else path

"""Add nodes to a joint graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true


def add_call(
    target: Any, args: tuple[Any, ...], value: Any, source: fx.Node, **kwargs: Any
) -> fx.Node:
    """Insert a call before source, with source's meta (module, stack trace, side of the partition).

    Args:
        value: What the call returns, as a fake tensor.
    """
    with source.graph.inserting_before(source):
        node = source.graph.call_function(target, args, kwargs)
    node.meta = {**source.meta, "val": value}
    node.meta.pop("tensor_meta", None)
    return node


def compute(target: Any, args: tuple[Any, ...], source: fx.Node, **kwargs: Any) -> fx.Node:
    """Insert a call as `add_call` does, with the value that target computes from fake tensors."""
    value = target(*value_of(args), **kwargs)
    return add_call(target, args, value, source, **kwargs)


def value_of(argument: Any) -> Any:
    """Return an argument of a call with the values of the nodes in it: fake tensors, and sizes."""
    return fx.map_arg(argument, lambda node: node.meta["val"])


def trace(function: Callable[..., Any], operands: tuple[fx.Node, ...], source: fx.Node) -> Any:
    """Trace function over the values of operands, and insert its operators before source.

    The values are fake tensors of one mode. Operators are decomposed as Inductor wants them.

    Returns:
        The nodes of what function returns, in the same structure.
    """
    values = [operand.meta["val"] for operand in operands]
    with values[0].fake_mode:
        traced = make_fx(function, select_decomp_table())(*values).graph
    known = dict(zip(traced.find_nodes(op="placeholder"), operands, strict=True))
    for node in traced.nodes:
        if node.op != "call_function":
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        known[node] = add_call(node.target, args, node.meta["val"], source, **kwargs)
    return fx.map_arg(traced.output_node().args[0], known.__getitem__)


def sizes_of(node: fx.Node, source: fx.Node) -> list[Any]:
    """Return a tensor's sizes, ints or nodes inserted before source that compute symbolic ones."""
    size = torch.ops.aten.sym_size.int
    return [
        length if isinstance(length, int) else compute(size, (node, dim), source)
        for dim, length in enumerate(node.meta["val"].shape)
    ]


def is_channels_last(node: fx.Node) -> bool:
    """Whether dimension 1 of a tensor with spatial dimensions is the one of stride 1."""
    value = node.meta["val"]
    return value.dim() > 2 and statically_known_true(value.stride(1) == 1)

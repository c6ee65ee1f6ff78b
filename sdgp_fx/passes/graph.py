"""How nodes are added to a joint graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx


def add_call(
    target: Any, args: tuple[Any, ...], value: Any, source: fx.Node, **kwargs: Any
) -> fx.Node:
    """A call before source, with its meta (module, stack trace, side of the partition).

    value: what the call returns, as a fake tensor.
    """
    with source.graph.inserting_before(source):
        node = source.graph.call_function(target, args, kwargs)
    node.meta = {**source.meta, "val": value}
    node.meta.pop("tensor_meta", None)
    return node


def compute(target: Any, args: tuple[Any, ...], source: fx.Node, **kwargs: Any) -> fx.Node:
    """add_call, with the value that target computes of its arguments' values."""
    value = target(*fx.node.map_arg(args, lambda operand: operand.meta["val"]), **kwargs)
    return add_call(target, args, value, source, **kwargs)


def trace(function: Callable[..., Any], operands: tuple[fx.Node, ...], source: fx.Node) -> Any:
    """Put the operators of function, of the values of operands, before source; return its results.

    The values are fake tensors of one mode. Operators are decomposed as Inductor wants them.
    """
    values = [operand.meta["val"] for operand in operands]
    with values[0].fake_mode:
        # The table is private; checked on torch 2.11, 2.14 and 2.15.
        traced = make_fx(function, select_decomp_table())(*values).graph
    known = dict(zip(traced.find_nodes(op="placeholder"), operands, strict=True))
    for node in traced.nodes:
        if node.op != "call_function":
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        known[node] = add_call(node.target, args, node.meta["val"], source, **kwargs)
    return fx.map_arg(traced.output_node().args[0], known.__getitem__)

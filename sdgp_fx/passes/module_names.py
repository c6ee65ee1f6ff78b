"""The names of layers in `named_modules()`, from what Dynamo notes in its graphs."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import fx


def module_roots(gm: fx.GraphModule) -> frozenset[str]:
    """Find the outermost modules that hold parameters of a graph of Dynamo's.

    A parameter's source is a path that says which of its parts are modules:
    "L['trainer'].model._modules['layer1']._parameters['weight']". That it is an attribute of the
    placeholder is private; a placeholder that Dynamo has not made has none.

    Returns:
        Paths of Dynamo's.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    sources = filter(None, (getattr(node, "_dynamo_source", None) for node in inputs))
    held = (re.match(r"(.+?)\._(?:modules|parameters)\b", _with_dots(s.name)) for s in sources)
    return frozenset(match[1] for match in held if match)


def module_of(node: fx.Node, roots: Collection[str] = ()) -> str:
    """Return the name of the module that a backward node belongs to, the innermost one.

    Args:
        roots: As for `module_name`.
    """
    stack = node.meta.get("fwd_nn_module_stack")
    return module_name(list(stack.values())[-1][0], roots) if stack else ""


def module_name(path: str, roots: Collection[str] = ()) -> str:
    """Return the name in `named_modules()` for a path of Dynamo's.

    The paths are Python expressions that begin with a variable: "L['self'].layer1.0.conv1",
    "getattr(L['self'].layer1, '0').conv1" or "L['model']._modules['layer1'].conv1". A module
    within that was itself compiled has a wrapper, "_orig_mod"; one that keeps a bound method of
    its own as an attribute, as some do with their forward, is found by way of that, "__self__".

    Args:
        roots: The modules from which names start, as from `module_roots`; the outermost counts.
            Below none of them, the variable is taken for the module.
    """
    path = _with_dots(path)
    above = [root for root in roots if re.match(rf"{re.escape(root)}(?![^.\[])", path)]
    if above:
        path = path.removeprefix(min(above, key=len))
    else:
        path = re.sub(r"^[LG]\['[^']*'\]", "", path)
    path = path.replace("._modules", "").replace("._orig_mod", "")
    path = re.sub(r"\.\w+\.__self__\b", "", path)
    return re.sub(r"\['?([^'\]]*)'?\]", r".\1", path).removeprefix(".")


def _with_dots(path: str) -> str:
    """Write getattr(a, 'b') as a.b."""
    while (attribute := re.sub(r"getattr\(([^()]*), '([^']*)'\)", r"\1.\2", path)) != path:
        path = attribute
    return path

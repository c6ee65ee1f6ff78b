"""The names of layers in `named_modules()`.

They follow from two things that Dynamo notes. A node has the stack of the modules that it was
called in, each with its identity. An input of the graph has its source, an expression that leads
to it from a variable of the frame: "L['self']._modules['conv']._parameters['weight']". So a layer
goes by the innermost module of its stack, or by the module in that one which holds its weight. The
paths in the stack are no names of `named_modules()`, and only read without a graph of Dynamo's.
"""

from __future__ import annotations

import ast
import dataclasses
import operator
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import fx, nn
from torch._dynamo.eval_frame import OptimizeContext, OptimizedModule
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._functorch import eager_transforms
from torch._functorch._aot_autograd.descriptors import PlainAOTInput
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from .layers import Layer, plain_sizes

aten = torch.ops.aten

_INVOKE_SUBGRAPH = torch.ops.higher_order.invoke_subgraph
# Operators that return what they are given, in other memory or another dtype.
_COPIES = (
    aten.clone.default,
    aten._to_copy.default,
    aten._unsafe_view.default,
    torch.ops.prims.convert_element_type.default,
    operator.getitem,
)
# Functions that take gradients: what they add to a graph belongs to the module that calls them.
_TRANSFORMS = (eager_transforms._autograd_grad, torch.autograd.grad)

_TORCH_FOLDER = str(Path(torch.__file__).parent)

# After a graph break, a function may be left with nothing but a part of its model in a variable.
_roots: WeakKeyDictionary[OptimizeContext, WeakSet[nn.Module]] = WeakKeyDictionary()

# Of a node, as Dynamo makes it: by the identity of each module, its path and its class.
Stack = Mapping[str, tuple[str, type]]


@dataclasses.dataclass(frozen=True)
class ModuleNames:
    """Name the layers of one of Dynamo's graphs; without a graph, by Dynamo's paths.

    Attributes:
        modules: The names of the modules that the graph's nodes were called in, by their keys in
            stacks. None without a graph.
        calls: The name of each node's module in the graph's order, None if it is not known.
        owners: For each input of the graph, the names of the modules that have it as a parameter.
        frame: The name of the module whose code the graph is of; "" for the model or a function,
            None if it is not known.
        shared: For a module in a region that is compiled once for several calls, by its key: the
            names of all modules that are called in its place.
        layers: The names of all modules that hold a weight, in the graph or not.
        others: The names of all other modules in which a layer could be.
        is_complete: Whether these are all of the compiled model or function.
    """

    modules: Mapping[str, str] | None = None
    calls: tuple[str | None, ...] = ()
    owners: tuple[frozenset[str], ...] = ()
    frame: str | None = ""
    shared: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    layers: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    is_complete: bool = False

    def of(self, layer: Layer, operands: Mapping[fx.Node, fx.Node] = {}) -> tuple[str, ...]:
        """Return the name of a layer of a joint graph.

        Args:
            operands: As of `Part`, for a layer in a branch or loop.

        Returns:
            One name. Several if the layer stands for several, in a region that is compiled once
            for all of them; none if the name is not known.
        """
        stack = _stack(layer)
        owners = self._owners(layer.weight, operands)
        is_region = self.modules is not None and not _has_inputs(layer.node.graph)
        known: str | None
        if stack:
            key, path = _innermost(stack)
            if is_region and key in self.shared:
                return self.shared[key]
            known = module_name(path) if self.modules is None else self.modules.get(key)
        else:
            known = None if stack is None or is_region else self.frame
        if known is not None:
            # A module may multiply with the weight of one in it, which it doesn't call.
            owners = [owner for owner in owners if is_in(owner, known)]
        if len(owners) == 1:
            return tuple(owners)
        return () if known is None else (known,)

    def decisive(self) -> tuple[Any, ...]:
        """Return all names that `of` may return, in an order that depends on the graph alone."""
        return self.calls, [*map(sorted, self.owners)], self.frame, [*self.shared.values()]

    def _owners(self, weight: fx.Node, operands: Mapping[fx.Node, fx.Node]) -> list[str]:
        """Return the modules that have weight, or all that it is made of, as parameters."""
        inputs: set[int | None] = set()
        seen: set[fx.Node] = set()
        todo = [weight]
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in operands:
                todo.append(operands[node])
                continue
            if node.op == "placeholder":
                inputs.add(_input_index(node))
            todo += _same_values(node)
        owners = [frozenset() if i is None else self.owners[i] for i in inputs if self.owners]
        return sorted(frozenset.intersection(*owners)) if owners else []


def module_names(gm: fx.GraphModule) -> ModuleNames:
    """Find the names of the modules in a graph of Dynamo's, while Dynamo compiles it.

    They start at the module that is compiled; in a compiled function, at the outermost modules
    that its variables lead to.
    """
    scope = _scope()
    if scope is None:
        return ModuleNames()
    sources = [_parsed(_source(node)) for node in gm.graph.find_nodes(op="placeholder")]
    stacks = list(_stacks(gm))
    starts = [_parsed(next(iter(stack.values()))[0]) for stack in stacks if stack]
    compiled, running, has_begun, seen = _running()
    found = running if compiled is None else [compiled]
    found += [_outermost_module(expression, scope) for expression in (*sources, *starts)]
    roots = _not_in_others([*seen, *found])
    seen.update(roots)

    names: dict[int, str] = {}
    owners: dict[int, set[str]] = defaultdict(set)
    layers: dict[str, None] = {}
    others: dict[str, None] = {}
    for root in roots:
        for path, module in root.named_modules():
            name = without_wrappers(path)
            names.setdefault(id(module), name)
            if isinstance(module, ParametrizationList):
                name = name.rpartition("parametrizations.")[0].removesuffix(".")
            for parameter in module.parameters(recurse=False):
                owners[id(parameter)].add(name)
            if _holds_weight(module):
                layers[name] = None
            elif not type(module).__module__.startswith("torch.nn."):
                others[name] = None

    modules: dict[str, str] = {}
    for stack in stacks:
        for key, (path, _) in stack.items():
            key = _without_count(key)
            # Where Dynamo doesn't inline modules, keys are no identities.
            known = names.get(int(key)) if key.isdecimal() else module_name(path)
            if known is not None:
                modules[key] = known
    by_input = tuple(frozenset(owners.get(id(_value(s, scope)), ())) for s in sources)
    reason = getattr(gm, "compile_subgraph_reason", None)
    is_whole = not has_begun and not getattr(reason, "graph_break", True)
    return ModuleNames(
        modules=modules,
        calls=tuple(modules.get(_innermost(stack)[0]) if stack else None for stack in stacks),
        owners=by_input,
        frame=names.get(id(_unwrapped(running[0]))) if running else "",
        shared=_shared(gm, modules, by_input),
        layers=tuple(layers),
        others=tuple(others),
        is_complete=compiled is not None or is_whole,
    )


def module_name(path: str) -> str:
    """Return the name in `named_modules()` that one of Dynamo's paths suggests.

    A path is a Python expression, "getattr(L['self'].layer1, '0').conv1", but that Dynamo writes
    names as attributes that can't be: "L['self'].layer1.0.conv1". Its variable is taken for the
    model. A module that keeps a bound method of its own as an attribute, as some do with their
    forward, is found by way of that, "__self__".
    """
    steps: list[str] = []
    rest = path
    while rest:
        ends = [i for i, char in enumerate(rest) if char in ".[" and i] + [len(rest)]
        end = next((i for i in reversed(ends) if _steps(_parsed(rest[:i])) is not None), ends[0])
        found = _steps(_parsed(rest[:end]))
        steps += [rest[:end]] if found is None else found
        rest = rest[end:]
        if rest.startswith("."):  # Then this attribute is none.
            attribute = rest[1:].partition("[")[0].partition(".")[0]
            steps.append(attribute)
            rest = rest[1 + len(attribute) :]
        rest = rest and f"_modules{rest}"
    kept: list[str] = []
    for step in steps:
        if step == "__self__":
            kept = kept[:-1]
        elif step not in ("_modules", "__dict__"):
            kept.append(step)
    return without_wrappers(".".join(kept))


def _steps(expression: ast.expr | None) -> list[str] | None:
    """Return the attributes and keys by which an expression gets from its variable to its value.

    None if it does anything else: "block-0" is a difference.
    """
    match expression:
        case ast.Subscript(value=ast.Name(id="L" | "G"), slice=ast.Constant()):
            return []
        case ast.Name(id=name):
            return [name]
        case (
            ast.Attribute(value=owner, attr=key)
            | ast.Subscript(value=owner, slice=ast.Constant(value=key))
            | ast.Call(func=ast.Name(id="getattr"), args=[owner, ast.Constant(value=key)])
        ):
            above = _steps(owner)
            return None if above is None else [*above, str(key)]
    return None


def _value(expression: ast.expr | None, scope: Mapping[str, Any]) -> Any:
    """Evaluate one of Dynamo's expressions, as its guards do; None if that is not possible."""
    try:
        match expression:
            case ast.Name(id=name):
                return scope[name]
            case ast.Attribute(value=owner, attr=name):
                return getattr(_value(owner, scope), name)
            case ast.Subscript(value=owner, slice=ast.Constant(value=key)):
                return _value(owner, scope)[key]
            case ast.Call(func=ast.Name(id="getattr"), args=[owner, ast.Constant(value=name)]):
                return getattr(_value(owner, scope), str(name))
    except Exception:
        return None
    return None


def _outermost_module(expression: ast.expr | None, scope: Mapping[str, Any]) -> nn.Module | None:
    """Return the first module on the way from an expression's variable to its value."""
    owner: Any
    match expression:
        case ast.Attribute(value=owner) | ast.Subscript(value=owner):
            pass
        case ast.Call(func=ast.Name(id="getattr"), args=[owner, _]):
            pass
        case _:
            owner = None
    above = _outermost_module(owner, scope) if owner is not None else None
    if above is not None:
        return above
    value = _value(expression, scope)
    return value if isinstance(value, nn.Module) else None


def _not_in_others(modules: Iterable[Any]) -> list[nn.Module]:
    """Return the modules without wrappers, once each, and without those in another one."""
    distinct = {id(m): m for m in map(_unwrapped, modules) if m is not None}
    within = {id(part) for m in distinct.values() for part in m.modules() if part is not m}
    return [module for key, module in distinct.items() if key not in within]


def _unwrapped(module: Any) -> Any:
    """Return the model in what is called in its place."""
    while isinstance(module, (OptimizedModule, DistributedDataParallel)):
        module = module._orig_mod if isinstance(module, OptimizedModule) else module.module
    return module


def without_wrappers(path: str) -> str:
    """Leave the wrappers of modules that were themselves compiled out of a path."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def _holds_weight(module: nn.Module) -> bool:
    """Whether a module has a tensor of its own that can be multiplied with, or will have one."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return is_parametrized(module) or any(
        nn.parameter.is_lazy(tensor) or tensor.dim() > 1 for tensor in tensors
    )


# Dynamo


def _scope() -> dict[str, Any] | None:
    """Return the variables of the frame that Dynamo is compiling; None if it isn't."""
    try:
        output = InstructionTranslator.current_tx().output
    except AttributeError:
        return None
    return {"L": output.local_scope, "G": output.global_scope}


def _running() -> tuple[nn.Module | None, list[Any], bool, WeakSet[nn.Module]]:
    """Look up in Python's stack what `torch.compile` is running.

    Returns:
        The compiled module, None for a function; the modules whose methods are running, innermost
        first; whether code outside of torch is, as after a graph break; and where to keep the
        modules from which names start for the graphs to come.
    """
    running: list[Any] = []
    has_begun = False
    frame: Any = sys._getframe()
    # First come frames of ours, or of a backend that calls ours, then Dynamo's.
    while frame is not None and not _is_torch(frame):
        frame = frame.f_back
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, OptimizeContext):
            seen = _roots.setdefault(owner, WeakSet())
            return _called_with(frame.f_back), running, has_begun, seen
        if isinstance(owner, nn.Module) and not isinstance(owner, fx.GraphModule):
            running.append(owner)
        has_begun |= not _is_torch(frame)
        frame = frame.f_back
    return None, [], True, WeakSet()


def _called_with(caller: Any) -> nn.Module | None:
    """Return the module that is compiled, by what calls the compiled code; None for a function."""
    # Reading the variables of a frame keeps them alive until it ends: of the user's, too long.
    module = caller.f_locals.get("self") if caller is not None and _is_torch(caller) else None
    is_compiled = isinstance(module, OptimizedModule) or (
        isinstance(module, nn.Module) and module._compiled_call_impl is not None
    )
    return _unwrapped(module) if is_compiled else None


def _is_torch(frame: Any) -> bool:
    return bool(frame.f_code.co_filename.startswith(_TORCH_FOLDER))


def _source(node: fx.Node) -> str:
    """Return the expression for an input of a graph; "" if Dynamo has not made it."""
    return getattr(getattr(node, "_dynamo_source", None), "name", "")


def _parsed(path: str) -> ast.expr | None:
    try:
        return ast.parse(path, mode="eval").body
    except SyntaxError:
        return None


def _stacks(gm: nn.Module) -> Iterator[Stack]:
    """Return what the nodes of a graph, and of those in it, note of their modules."""
    for part in gm.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                if node.op in ("call_function", "call_method", "call_module"):
                    yield node.meta.get("nn_module_stack") or {}


def _innermost(stack: Stack) -> tuple[str, str]:
    """Return the key and the path of the innermost module."""
    *_, (key, (path, _)) = stack.items()
    return _without_count(key), path


def _without_count(key: str) -> str:
    """Return a module's key whatever number of call it is."""
    return key.partition("@")[0]


def _shared(
    gm: fx.GraphModule, modules: Mapping[str, str], owners: Sequence[frozenset[str]]
) -> dict[str, tuple[str, ...]]:
    """Find the modules of regions that are compiled once for several calls, by their keys.

    Dynamo traces the first call. What is called in place of its modules in the others is known by
    the parameters that are in place of theirs.
    """
    inputs = {node: owners[i] for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    calls = defaultdict(list)
    for node in gm.graph.find_nodes(op="call_function", target=_INVOKE_SUBGRAPH):
        region, name, *operands = node.args
        calls[name].append((region, [inputs.get(operand, frozenset()) for operand in operands]))
    shared: dict[str, tuple[str, ...]] = {}
    for (region, first), *others in calls.values():
        subgraph = gm.get_submodule(region.target)
        for key in {_innermost(stack)[0] for stack in _stacks(subgraph) if stack}:
            name = modules.get(key)
            places = [i for i, names in enumerate(first) if name in names]
            names = [name] if name is not None else []
            for _, operands in others:
                found = {other for i in places for other in operands[i]}
                names = [*names, *found] if names and len(found) == 1 else []
            known = shared.get(key, names)
            shared[key] = tuple(dict.fromkeys([*known, *names])) if known and names else ()
    return shared


# The joint graph


def _stack(layer: Layer) -> Stack | None:
    """Return the stack of the modules that a layer was called in; None if that is not known."""
    meta = layer.node.meta
    forwards = [node for node in layer.input.users if _multiplies(node, layer)]
    stacks = [node.meta.get("nn_module_stack") or {} for node in forwards]
    # By its number in the sequence of operators, which those without a gradient don't count in.
    by_number = meta.get("fwd_nn_module_stack") or {}
    if stacks:
        return by_number if by_number in stacks else stacks[0]
    if by_number or meta.get("fwd_source_fn_stack"):
        return by_number
    # In the backward of an autograd.Function.
    return meta.get("nn_module_stack") or {} if _is_traced(layer.node) else None


def _multiplies(node: fx.Node, layer: Layer) -> bool:
    """Whether node is the forward of a layer."""
    if node.meta.get("partitioner_tag") == "is_backward" or not _is_traced(node):
        return False
    weight = _base(layer.weight)
    return node is not layer.node and any(_base(n) is weight for n in node.all_input_nodes)


def _is_traced(node: fx.Node) -> bool:
    """Whether Dynamo has traced a node from the code of its module."""
    stack = node.meta.get("source_fn_stack")
    return stack is not None and stack[-1][1] not in _TRANSFORMS


def _base(node: fx.Node) -> fx.Node:
    """Return what node is a view of."""
    while _is_view(node):
        node = node.all_input_nodes[0]
    return node


def _same_values(node: fx.Node) -> list[fx.Node]:
    """Return the operands whose values are those of node, or become those of node one by one."""
    if _is_view(node) or node.target in _COPIES:
        return node.all_input_nodes[:1]
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.pointwise not in target.tags:
        return []
    size = plain_sizes(node.meta["val"].shape)
    return [n for n in node.all_input_nodes if plain_sizes(n.meta["val"].shape) == size]


def _is_view(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def _input_index(node: fx.Node) -> int | None:
    """Return which input of Dynamo's graph an input of the joint graph is; None if it is none."""
    origin = node.meta.get("desc")
    return origin.idx if isinstance(origin, PlainAOTInput) else None


def _has_inputs(graph: fx.Graph) -> bool:
    """Whether this is the joint graph of a graph of Dynamo's, not of a region in one."""
    return any("desc" in node.meta for node in graph.find_nodes(op="placeholder"))


def is_in(name: str, module: str) -> bool:
    """Whether the module of this name is part of another."""
    return name != module and (not module or name.startswith(f"{module}."))

"""Run a model without values, and leave the compiler and all random states as they were."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import random
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
from torch._dynamo.convert_frame import register_bytecode_hook
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
)
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten

# Takes a graph of Dynamo's, its inputs, and the names of the modules that own some of these.
Backend = Callable[[fx.GraphModule, Sequence[Any], set[str]], Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class GraphBreak:
    """A point at which Dynamo leaves the graph.

    Attributes:
        reason: Why.
        place: "file.py:12 in forward"; "" if it is not known.
    """

    reason: str
    place: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}" if self.place else self.reason


@dataclasses.dataclass(frozen=True)
class Product:
    """A convolution, or a linear layer's matrix product, as it runs.

    Attributes:
        module: Name of the module whose parameter the weight is.
        kind: "conv" or "linear".
        compiled: Whether it runs in a graph; in eager mode otherwise.
        input, weight, output: Fake tensors, the weight as the product reads it.
        groups, transposed: Those of the convolution.
    """

    module: str
    kind: str
    compiled: bool
    input: Tensor
    weight: Tensor
    output: Tensor
    groups: int = 1
    transposed: bool = False


class DryRun(FakeTensorMode):
    """Run a model on tensors that have shapes and no values.

    Args:
        on_product: Called with every product with a parameter of the model, as it runs.

    Attributes:
        in_eager, in_graphs: Names of the modules whose parameters eager mode, and graphs, used.
        graph_breaks: The graph breaks that Dynamo has reported.
        has_guessed: Whether the model asked for a tensor's value, and got 1.
    """

    def __init__(self, on_product: Callable[[Product], None]) -> None:
        super().__init__()
        self.on_product = on_product
        self.in_eager: set[str] = set()
        self.in_graphs: set[str] = set()
        self.graph_breaks: list[GraphBreak] = []
        self.has_guessed = False
        self._owners: dict[int, str] = {}
        self._is_compiling = False
        self._is_in_graph = False

    def run(self, model: nn.Module, inputs: Sequence[Any], backend: Backend) -> str:
        """Run a copy of model, compiled by backend.

        Args:
            inputs: What model.forward takes; tensors may be real ones.
            backend: Compiles each graph of Dynamo's.

        Returns:
            The error that stopped the run for want of values; "" if there was none.

        Raises:
            Exception: Whatever else the model raises.
        """
        with FakeCopyMode(self):
            fake_model = copy.deepcopy(model)
        fake_inputs = tree_map_only(Tensor, self.from_tensor, inputs)
        for name, module in fake_model.named_modules():
            for parameter in module.parameters(recurse=False):
                self._owners.setdefault(id(parameter), name)

        def compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
            owners = self._owners_of(example_inputs)
            self.in_graphs |= owners
            self._note_end(gm)
            with self._set("_is_compiling"):
                compiled = backend(gm, example_inputs, owners)

            def run_graph(*args: Any) -> Any:
                with self._set("_is_in_graph"):
                    return compiled(*args)

            return run_graph

        def run(*args: Any) -> Any:
            return fake_model(*args)

        stopped = ""
        with as_it_was(), torch.inference_mode(False), torch.enable_grad(), self:
            try:
                _compile(run, compile_graph)(*fake_inputs)
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                stopped = f"{type(error).__name__}: {error}"
            self._note_breaks_without_graphs()
        return stopped

    def _owners_of(self, tensors: Sequence[Any]) -> set[str]:
        """Return the names of the modules that have one of tensors as a parameter."""
        return {self._owners[id(x)] for x in tensors if id(x) in self._owners}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        except DataDependentOutputException:
            if self._is_compiling or func is not aten._local_scalar_dense.default:
                raise
            self.has_guessed = True
            dtype = args[0].dtype
            return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
        if not self._is_compiling:
            if not self._is_in_graph:
                self.in_eager |= self._owners_of(args)
            self._note_product(func, args, result)
        return result

    def _note_product(self, func: Any, args: Any, output: Any) -> None:
        """Report an operator that is a convolution or a matrix product with a parameter."""
        settings: tuple[Any, ...] = ()
        if func is aten.convolution.default:
            kind, (x, weight), (transposed, _, groups) = "conv", args[:2], args[6:]
            settings = groups, transposed
        elif func in (aten.mm.default, aten.addmm.default, aten.bmm.default):
            kind, (x, weight) = "linear", args[-2:]
        else:
            return
        for module in self._owners_of([weight if weight._base is None else weight._base]):
            self.on_product(Product(module, kind, self._is_in_graph, x, weight, output, *settings))

    def _note_end(self, gm: fx.GraphModule) -> None:
        """Note why a graph of Dynamo's ends where it does."""
        why: Any = getattr(gm, "compile_subgraph_reason", None)
        if why is not None and why.graph_break:
            frame = why.user_stack[-1] if why.user_stack else None
            place = f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}" if frame else ""
            self.graph_breaks.append(GraphBreak(_first_line(why.reason), place))

    def _note_breaks_without_graphs(self) -> None:
        """Note the graph breaks that no graph ends with, as Dynamo counts them."""
        known = {graph_break.reason for graph_break in self.graph_breaks}
        reasons = dict.fromkeys(map(_first_line, counters["graph_break"]))
        self.graph_breaks += [GraphBreak(reason, "") for reason in reasons if reason not in known]

    @contextlib.contextmanager
    def _set(self, flag: str) -> Iterator[None]:
        """Set an attribute to True inside."""
        before = getattr(self, flag)
        setattr(self, flag, True)
        try:
            yield
        finally:
            setattr(self, flag, before)


def _first_line(reason: str) -> str:
    return reason.strip().partition("\n")[0]


def _compile(run: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """Compile run for sizes that stay as they are, apart from all other compilations.

    Dynamo counts compilations by code object, and past a limit silently compiles no more. So run
    gets a code object of its own. Those of the model, which Dynamo compiles one by one after a
    graph break, count apart where torch can do that: 2.14 can, 2.11 can't.
    """
    run.__code__ = run.__code__.replace()
    apart = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    options: dict[str, Any] = {"isolate_recompiles": True} if apart else {}
    # With dynamic=None Dynamo would note the sizes, to tell later which of them change.
    return torch.compile(run, backend=backend, dynamic=False, **options)


@contextlib.contextmanager
def as_it_was() -> Iterator[None]:
    """Restore at the end what running and compiling a model changes outside of it.

    That is Dynamo's counters, which start out empty; what it compiles of functions of which it
    had compiled nothing before; and the random states of torch, Python and NumPy.
    """
    is_new: dict[int, tuple[types.CodeType, bool]] = {}  # Equal code objects are no less two.

    def note(code: types.CodeType, new_code: types.CodeType) -> None:
        is_new.setdefault(id(code), (code, not _debug_get_cache_entry_list(code)))

    counted = copy.deepcopy(counters)
    counters.clear()
    numpy: Any = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    python_state = random.getstate()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    hook = register_bytecode_hook(note)
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        hook.remove()
        for code, new in is_new.values():
            if new:
                reset_code(code)
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)
        counters.clear()
        counters.update(counted)

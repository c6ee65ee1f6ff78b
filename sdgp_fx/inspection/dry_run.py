"""Run a model without values, and leave the compiler and all random states as they were."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import inspect
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
from torch._decomp.decompositions_for_rng import PhiloxStateTracker
from torch._dynamo.convert_frame import register_bytecode_hook
from torch._dynamo.eval_frame import cached_backends
from torch._dynamo.utils import counters, get_metrics_context
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode

from ..passes.module_names import without_wrappers
from .fake_copy import fake_copy
from .python_state import python_state_kept

aten = torch.ops.aten

# What operators, and errors that reach Python without their type, say of tensors without values.
_NO_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
_NO_VALUES_WORDS = ("(e.g. FakeTensor", "Meta tensors", "'Meta' backend", "tensor subclasses")


class Held(NamedTuple):
    """A parameter or buffer: its module's name, and its own in that module."""

    module: str
    name: str


# Takes a graph of Dynamo's, its inputs, and what the model holds of these, by position.
Backend = Callable[
    [fx.GraphModule, Sequence[Any], Mapping[int, Sequence[Held]]], Callable[..., Any]
]


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
        input_shape, weight_shape, output_shape: Shapes, the weight's as the product reads it.
        has_input_grad, has_weight_grad: Whether these have a gradient, in eager mode.
        groups, transposed: Those of the convolution.
    """

    module: str
    kind: str
    compiled: bool
    input_shape: tuple[Any, ...]
    weight_shape: tuple[Any, ...]
    output_shape: tuple[Any, ...]
    has_input_grad: bool
    has_weight_grad: bool
    groups: int = 1
    transposed: bool = False


class DryRun:
    """Run a model on tensors that have shapes and no values.

    Args:
        on_product: Called with every product with a parameter of the model, as it runs.

    Attributes:
        in_eager, in_graphs: Names of the modules whose parameters eager mode, and graphs, used.
        graph_breaks: The graph breaks that Dynamo has reported.
        has_guessed: Whether the model asked for a tensor's value, and got 1.
        stopped: The error that ended the run for want of values; "" if there was none.
        left: How many tensors without values something outside of the model still holds.
    """

    def __init__(self, on_product: Callable[[Product], None]) -> None:
        self.on_product = on_product
        self.in_eager: set[str] = set()
        self.in_graphs: set[str] = set()
        self.graph_breaks: list[GraphBreak] = []
        self.has_guessed = False
        self.stopped = ""
        self.left = 0
        self._held: dict[int, tuple[Tensor, list[Held]]] = {}  # A tensor keeps its id alive.
        self._is_in_graph = False

    def run(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], backend: Backend
    ) -> None:
        """Run a copy of model, compiled by backend.

        Args:
            args, kwargs: What model.forward takes; tensors may be real ones.
            backend: Compiles each graph of Dynamo's.

        Raises:
            Exception: What the model raises, where it isn't for want of values.
        """
        # The model may use tensors that it doesn't hold, and that its copy therefore hasn't.
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        try:
            with as_it_was(), python_state_kept(model):
                self._run(model, args, kwargs, backend, mode)
        except Exception as error:
            if not (self.has_guessed or _wants_values(error)):
                raise
            self.stopped = f"{type(error).__name__}: {_first_line(str(error))}"
        self._held.clear()
        gc.collect()
        alive = (thing for thing in gc.get_objects() if issubclass(type(thing), FakeTensor))
        self.left = sum(tensor.fake_mode is mode for tensor in alive)

    def _run(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        backend: Backend,
        mode: FakeTensorMode,
    ) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            model, args, kwargs = fake_copy((model, args, kwargs), mode)
            for name, module in model.named_modules():
                for parts in (module.named_parameters, module.named_buffers):
                    for part, tensor in parts(recurse=False):
                        _, holders = self._held.setdefault(id(tensor), (tensor, []))
                        holders.append(Held(without_wrappers(name), part))

            def compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
                held = {i: h for i, x in enumerate(example_inputs) if (h := self._holders(x))}
                self.in_graphs.update(holder.module for each in held.values() for holder in each)
                self._note_end(gm)
                compiled = backend(gm, example_inputs, held)

                def run_graph(*args: Any) -> Any:
                    self._is_in_graph = True
                    try:
                        return compiled(*args)
                    finally:
                        self._is_in_graph = False

                return run_graph

            def run(*args: Any, **kwargs: Any) -> Any:
                return model(*args, **kwargs)

            try:
                with mode, _Watch(self._on_operator, self._on_value):
                    _compile(run, compile_graph)(*args, **kwargs)
            finally:
                self._note_breaks_without_graphs()

    def _holders(self, tensor: Any) -> list[Held]:
        """Return the parameters and buffers that tensor is, if it is one."""
        return self._held.get(id(tensor), (tensor, []))[1]

    def _on_operator(self, func: Any, args: Sequence[Any], output: Any) -> None:
        """Note the modules that eager mode uses, and report convolutions and matrix products."""
        if not self._is_in_graph:
            self.in_eager.update(h.module for x in args for h in self._holders(x))
        settings: tuple[Any, ...] = ()
        if func is aten.convolution.default:
            kind, (x, weight), (transposed, _, groups) = "conv", args[:2], args[6:]
            settings = groups, transposed
        elif func in (aten.mm.default, aten.addmm.default, aten.bmm.default):
            kind, (x, weight) = "linear", args[-2:]
        else:
            return
        holders = self._holders(weight if weight._base is None else weight._base)
        for holder in holders[:1]:
            self.on_product(
                Product(
                    holder.module,
                    kind,
                    self._is_in_graph,
                    tuple(x.shape),
                    tuple(weight.shape),
                    tuple(output.shape),
                    x.requires_grad,
                    weight.requires_grad,
                    *settings,
                )
            )

    def _on_value(self, dtype: torch.dtype) -> bool | int | float:
        """Guess the value of a tensor that the model asks for."""
        self.has_guessed = True
        return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1

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


class _Watch(TorchDispatchMode):
    """Watch the operators that run, in eager mode and in graphs, but not while Dynamo compiles.

    Args:
        on_operator: Called with each operator, its arguments and its result.
        on_value: Called with the dtype of a tensor whose value is asked for, to supply one.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        on_operator: Callable[[Any, Sequence[Any], Any], None],
        on_value: Callable[[torch.dtype], bool | int | float],
    ) -> None:
        super().__init__()
        self._on_operator = on_operator
        self._on_value = on_value

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            result = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if func is not aten._local_scalar_dense.default:
                raise
            return self._on_value(args[0].dtype)
        self._on_operator(func, args, result)
        return result


def _wants_values(error: BaseException | None) -> bool:
    """Whether error, or what caused it, is because tensors have no values."""
    while error is not None:
        if isinstance(error, _NO_VALUES) or any(word in str(error) for word in _NO_VALUES_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


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
    had compiled nothing before, and the backends that it keeps for that; what AOTAutograd keeps
    of the latest graph; and the random states of torch, Python and NumPy.
    """
    is_new: dict[int, tuple[types.CodeType, bool]] = {}  # Equal code objects are no less two.

    def note(code: types.CodeType, new_code: types.CodeType) -> None:
        is_new.setdefault(id(code), (code, not _debug_get_cache_entry_list(code)))

    counted = copy.deepcopy(counters)
    counters.clear()
    backends = dict(cached_backends)
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
        cached_backends.clear()
        cached_backends.update(backends)
        PhiloxStateTracker.reset()
        get_metrics_context()._edits.clear()  # They have the frames that were compiled.

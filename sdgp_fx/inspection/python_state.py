"""Restore what a model's hooks and methods keep in Python objects outside of the model."""

from __future__ import annotations

import contextlib
import functools
import types
from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import nn

# Objects within objects are restored to this depth: a hook's recorder, its dict, a list in that.
DEPTH = 4
# Containers with more than this are data: they are restored, what is in them isn't.
MANY = 1000

_NO_STATE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
_ABSENT = object()


@contextlib.contextmanager
def python_state_kept(model: nn.Module) -> Iterator[None]:
    """Restore at the end the variables, and what they refer to, that the code of model can reach.

    That code is the model's hooks and the methods of its classes, torch's own left out. Its
    variables are those of enclosing functions, default arguments, and the globals that it names.
    """
    undo: list[Callable[[], Any]] = []
    seen: set[int] = set()
    variables: dict[tuple[int, str], dict[str, Any]] = {}
    for function in _functions(model):
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # The cell is empty.
                undo.append(functools.partial(setattr, cell, "cell_contents", cell.cell_contents))
                _keep(cell.cell_contents, undo, seen)
        _keep(function.__defaults__, undo, seen)
        _keep(function.__kwdefaults__, undo, seen)
        for name in _names(function.__code__):
            variables[id(function.__globals__), name] = function.__globals__
    for (_, name), scope in variables.items():
        value = scope.get(name, _ABSENT)
        undo.append(functools.partial(_put, scope, name, value))
        _keep(value, undo, seen)
    try:
        yield
    finally:
        for restore in reversed(undo):
            restore()


def _functions(model: nn.Module) -> Iterator[types.FunctionType]:
    """Yield the functions that are not torch's among hooks, attributes and methods."""
    classes: set[type] = set()
    for module in model.modules():
        for value in vars(module).values():
            values = value.values() if isinstance(value, dict) else (value,)
            yield from filter(None, map(_function, values))
        classes |= {*type(module).__mro__}
    for cls in classes:
        yield from filter(None, map(_function, vars(cls).values()))


def _function(value: Any) -> types.FunctionType | None:
    while isinstance(value, functools.partial):
        value = value.func
    value = getattr(value, "__func__", value) if isinstance(value, types.MethodType) else value
    is_function = isinstance(value, types.FunctionType)
    return value if is_function and value.__module__.partition(".")[0] != "torch" else None


def _names(code: types.CodeType) -> set[str]:
    """Return the names of globals, and of attributes, in a function and those within it."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _keep(value: Any, undo: list[Callable[[], Any]], seen: set[int], depth: int = DEPTH) -> None:
    """Add to undo what restores value, if it can change, and the objects in it."""
    if depth == 0 or id(value) in seen or isinstance(value, _NO_STATE):
        return
    seen.add(id(value))
    parts: Collection[Any] = ()
    if isinstance(value, dict):
        undo.append(functools.partial(_refill, value, value.update, dict(value)))
        parts = value.values()
    elif isinstance(value, (list, deque)):
        undo.append(functools.partial(_refill, value, value.extend, list(value)))
        parts = value
    elif isinstance(value, set):
        undo.append(functools.partial(_refill, value, value.update, set(value)))
    elif isinstance(value, tuple):
        parts = value
    elif isinstance(attributes := getattr(value, "__dict__", None), dict):
        parts = (attributes,)
    if len(parts) <= MANY:
        for part in list(parts):
            _keep(part, undo, seen, depth - 1)


def _refill(container: Any, fill: Callable[[Any], Any], contents: Any) -> None:
    if len(container) != len(contents) or any(
        a is not b for a, b in zip(_items(container), _items(contents), strict=True)
    ):
        container.clear()
        fill(contents)


def _items(container: Any) -> Iterator[Any]:
    for item in container.items() if isinstance(container, dict) else container:
        yield from item if isinstance(container, dict) else (item,)


def _put(names: dict[str, Any], name: str, value: Any) -> None:
    if value is not _ABSENT:
        names[name] = value
    elif name in names:
        del names[name]

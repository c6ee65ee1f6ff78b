"""What the backend does to a model, without running or changing the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._pytree import tree_map_only

from .backend import aot_eager
from .config import SDGPConfig
from .passes.layers import module_roots
from .passes.prune_input_grads import Decision, prune_input_grads


def explain(
    model: torch.nn.Module, *inputs: Any, options: dict[str, Any] | None = None
) -> list[Decision]:
    """The backend's decision for every convolution of model, from the last layer to the first.

    The model is copied with fake tensors (shapes, no values), so nothing is computed or changed
    and a large model takes no memory. Layers appear if a gradient flows through them: their
    parameters or the inputs must require one, as in training.

    inputs: what model.forward takes; tensors are read for shape, dtype, strides and device.
    options: as for `torch.compile(model, backend="sdgp", options=...)`.
    Raises ValueError for a bad option.
    """
    config, _ = SDGPConfig.from_options(options)
    decisions: list[Decision] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        roots = module_roots(gm)
        rewrite = aot_eager(lambda graph: decisions.extend(prune_input_grads(graph, config, roots)))
        return rewrite(gm, example_inputs)

    mode = FakeTensorMode()
    with FakeCopyMode(mode):  # Private; checked on torch 2.11, 2.13 and 2.15.
        fake_model = copy.deepcopy(model)
    fake_inputs = tree_map_only(torch.Tensor, mode.from_tensor, inputs)

    def run(*args: Any) -> Any:
        return fake_model(*args)

    # Dynamo counts compilations by code object, and past a limit silently compiles no more: a
    # code object of its own keeps those made here from counting against the model's.
    run.__code__ = run.__code__.replace()
    with mode:
        torch.compile(run, backend=backend)(*fake_inputs)
    return decisions

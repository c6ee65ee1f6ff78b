"""Explain what the backend does to a model, without running or changing the model."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch._inductor.decomposition import select_decomp_table
from torch.nn.parameter import UninitializedParameter

from ..backend import aot_eager
from ..config import SDGPConfig
from ..passes.convolutions import convolution_macs
from ..passes.decisions import UNKNOWN, Decision
from ..passes.layers import plain_sizes
from ..passes.linears import linear_macs
from ..passes.module_names import module_names, without_wrappers
from ..passes.prune_input_grads import prune_input_grads
from .dry_run import DryRun, Held, Product
from .report import Explanation, LayerReport, MultiplyAdds
from .weights import NESTED, NO_GRADIENT, OTHER_OPERATORS, find_origins, why_no_layer

# Why a layer that is in no graph stays dense; of one that is in a graph, see `weights`.
NOT_COMPILED = "not compiled, runs in eager mode"
NOT_RUN = "not run with these inputs"
NOT_KNOWN = "not known, as values of tensors decide"

# Of a weight that a layer has: it stands for the layer's own report.
_IN_LAYER = ""
# A weight that several graphs use is reported by the first of these.
_REASONS = (NESTED, OTHER_OPERATORS, NO_GRADIENT)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Modules that are reported if they are not compiled or not run, by kind.
_MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "conv": (*_CONVOLUTIONS, *_TRANSPOSED),
    "linear": (nn.Linear,),
}


def explain(
    model: nn.Module, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any
) -> Explanation:
    """Report what the backend decides for every layer of model, and the multiply-adds.

    The model is copied with fake tensors (shapes, no values): nothing is computed, and a large
    model takes no memory. The model, random states and what the compiler knows of other
    compilations stay as they are.

    Args:
        model: The model, compiled or not.
        args, kwargs: What model.forward takes; tensors are read for shape, dtype, strides and
            device, those of one element for their value too.
        options: As for `torch.compile(model, backend="sdgp", options=...)`.

    Returns:
        The layers whose gradients training computes, and the modules of the targeted kinds that
        the backend doesn't get. Symbolic sizes are sizes that depend on data.

    Raises:
        ValueError: An option is unknown or has a bad value.
        Exception: Whatever the model raises. Where it raises for want of values, the report is of
            what came before, and has a warning.
    """
    config, _ = SDGPConfig.from_options(options)
    decompositions = {}
    if config.inner == "inductor":
        # Some decompositions take Inductor's lowerings for imported.
        from ..inductor import lowering  # noqa: F401

        decompositions = select_decomp_table()
    model = getattr(model, "_orig_mod", model)  # Of a model that is compiled already.
    names = _first_names(model)
    layers: list[LayerReport] = []
    uses: dict[Held, set[str]] = defaultdict(set)
    reached: set[str] = set()
    products: dict[str, Product] = {}

    def on_product(product: Product) -> None:
        products.setdefault(product.module, product)
        if product.kind in config.targets and not product.compiled:
            reached.add(product.module)
            layers.append(_dense(product, NOT_COMPILED))

    def backend(
        gm: fx.GraphModule, example_inputs: Sequence[Any], held: Mapping[int, Sequence[Held]]
    ) -> Callable[..., Any]:
        graph_names = module_names(gm)

        def rewrite(graph: fx.Graph) -> None:
            origins = find_origins(graph, held)
            for position, reason in why_no_layer(graph, origins).items():
                for holder in held[position]:
                    uses[holder].add(reason)
            decisions = prune_input_grads(graph, config, graph_names)
            # The backward goes from the last layer to the first; branches are in no order with it.
            decisions.sort(key=lambda made: made.layer is None or made.layer.node.graph is graph)
            for decision in reversed(decisions):
                assert decision.layer is not None
                holders = [
                    holder
                    for position in origins.get(decision.layer.weight, ())
                    for holder in held[position]
                ]
                for holder in holders:
                    uses[holder].add(_IN_LAYER)
                if decision.module == UNKNOWN and holders:
                    module = ", ".join(sorted({holder.module for holder in holders}))
                    decision = dataclasses.replace(decision, module=module)
                reached.update(names.get(name, name) for name in decision.module.split(", "))
                layers.append(_decided(decision, config))

        return aot_eager(rewrite, decompositions)(gm, example_inputs)

    run = DryRun(on_product)
    run.run(model, args, kwargs, backend)
    layers += _not_reached(model, config.targets, reached, uses, run, products)
    return Explanation(
        config=config,
        layers=tuple(layers),
        graph_breaks=tuple(run.graph_breaks),
        warnings=tuple(_warnings(model, layers, run)),
    )


def _decided(decision: Decision, config: SDGPConfig) -> LayerReport:
    """Report a layer of a graph that the pass has just rewritten."""
    layer = decision.layer
    assert layer is not None
    count = _known(layer.macs)
    input_gradient = count if layer.has_input_grad else 0
    saved = input_gradient if decision.pruned else 0
    return LayerReport(
        **{**decision.to_dict(), "weight_shape": plain_sizes(layer.parameter_shape)},
        operation=_operation(decision.kind, decision.transposed, len(decision.grad_output_shape)),
        input_shape=plain_sizes(layer.input.meta["val"].shape),
        compiled=True,
        multiply_adds=MultiplyAdds(
            forward=count,
            input_gradient=input_gradient,
            weight_gradient=count if layer.has_weight_grad else 0,
            saved=saved and saved * (config.m - config.n) // config.m,
        ),
    )


def _dense(product: Product, reason: str) -> LayerReport:
    """Report a layer that ran in eager mode, or without a gradient."""
    kind, transposed = product.kind, product.transposed
    x, weight, output = product.input_shape, product.weight_shape, product.output_shape
    is_linear = kind == "linear"
    macs = linear_macs(x, output) if is_linear else convolution_macs(x, weight, output, transposed)
    count = _known(macs)
    trains = reason == NOT_COMPILED
    none = 0 if trains or reason == NO_GRADIENT else None
    return LayerReport(
        module=product.module,
        kind=kind,
        grad_output_shape=plain_sizes(output),
        weight_shape=plain_sizes((output[-1], x[-1]) if is_linear else weight),
        groups=product.groups,
        transposed=transposed and not is_linear,
        pruned=False,
        reason=reason,
        operation=_operation(kind, transposed, len(output)),
        input_shape=plain_sizes(x),
        compiled=product.compiled,
        multiply_adds=MultiplyAdds(
            forward=count,
            input_gradient=count if trains and product.has_input_grad else none,
            weight_gradient=count if trains and product.has_weight_grad else none,
        ),
    )


def _not_reached(
    model: nn.Module,
    kinds: Iterable[str],
    reached: Collection[str],
    uses: Mapping[Held, Collection[str]],
    run: DryRun,
    products: Mapping[str, Product],
) -> list[LayerReport]:
    """Report the modules of model that have no decision, and have not run in eager mode."""
    layers = []
    for path, module in model.named_modules():
        name = without_wrappers(path)
        kind = next((kind for kind in kinds if isinstance(module, _MODULES.get(kind, ()))), "")
        if not kind or name in reached:
            continue
        reason = _why_not_reached(name, module, uses, run)
        if reason == _IN_LAYER:
            continue
        in_graph = reason not in (NOT_COMPILED, NOT_RUN, NOT_KNOWN)
        if in_graph and name in products:
            layers.append(_dense(products[name], reason))
            continue
        count = 0 if reason == NOT_RUN else None
        weight: Any = module.weight
        shape = () if isinstance(weight, UninitializedParameter) else tuple(weight.shape)
        transposed = isinstance(module, _TRANSPOSED)
        layers.append(
            LayerReport(
                module=name,
                kind=kind,
                grad_output_shape=(),
                weight_shape=plain_sizes(shape),
                groups=getattr(module, "groups", 1),
                transposed=transposed,
                pruned=False,
                reason=reason,
                operation=_operation(kind, transposed, _dims(module)),
                input_shape=(),
                compiled=in_graph,
                multiply_adds=MultiplyAdds(
                    forward=count, input_gradient=count, weight_gradient=count
                ),
            )
        )
    return layers


def _why_not_reached(
    name: str, module: nn.Module, uses: Mapping[Held, Collection[str]], run: DryRun
) -> str:
    """Return what becomes of a module that no decision is named after.

    That is `_IN_LAYER` if its weight is a layer's that has another name: of the module around it
    that uses the weight, or one of several whose weights are merged.
    """
    own = Held(name, "weight")
    held = [own] if own in uses else [h for h in uses if _is_within(h.module, name)]
    found = {use for holder in held if holder.name != "bias" for use in uses[holder]}
    if _IN_LAYER in found:
        return _IN_LAYER
    if any(_is_within(used, name) for used in run.in_eager):
        return NOT_COMPILED
    if found:
        return min(found, key=_REASONS.index)
    if run.has_guessed or run.stopped or any(_is_within(used, name) for used in run.in_graphs):
        return NOT_KNOWN
    return NOT_RUN


def _is_within(name: str, outer: str) -> bool:
    """Whether a module is the one named outer, or one in it, as a parametrization is."""
    return name == outer or name.startswith(f"{outer}.")


def _warnings(model: nn.Module, layers: Sequence[LayerReport], run: DryRun) -> list[str]:
    """Say what a reader of the report might miss."""
    warnings = []
    if not model.training:
        warnings.append("the model is in evaluation mode, model.train() puts it into training mode")
    if not layers:
        warnings.append("the model has no layer of the kinds that sdgp.targets names")
    parameters = (p for p in model.parameters() if not isinstance(p, UninitializedParameter))
    if any(parameter.is_inference() for parameter in parameters):
        warnings.append(
            "the model was made in inference mode, where it cannot be trained: it is explained as "
            "one that was not"
        )
    if run.has_guessed:
        warnings.append("the model asks for values of tensors: 1 was taken for each of them")
    if run.stopped:
        warnings.append(
            "explain could not follow the model to its end without values of tensors: "
            f"{run.stopped}"
        )
    if run.left:
        warnings.append(
            f"{run.left} tensors without values are left in what the model keeps outside of "
            "itself, as in a cache of a function"
        )
    unknown = sum(layer.multiply_adds.forward is None for layer in layers)
    if unknown:
        warnings.append(f"the multiply-adds of {unknown} layers are not known and not in the sums")
    return warnings


def _first_names(model: nn.Module) -> dict[str, str]:
    """Map each name of a module to its first, which is the one in `named_modules()`."""
    first: dict[nn.Module, str] = {}
    names = {}
    for path, module in model.named_modules(remove_duplicate=False):
        name = without_wrappers(path)
        names[name] = first.setdefault(module, name)
    return names


def _dims(module: nn.Module) -> int:
    """Return the dimensions of what a convolution's or linear layer's module returns."""
    return 2 + len(getattr(module, "kernel_size", ()))


def _operation(kind: str, transposed: bool, dims: int) -> str:
    """Name the operation by the number of dimensions of what it returns."""
    return f"conv{'_transpose' * transposed}{dims - 2}d" if kind == "conv" else kind


def _known(count: Any) -> int | None:
    """Return a count, or None if it is symbolic."""
    return count if isinstance(count, int) else None

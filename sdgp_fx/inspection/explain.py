"""What the backend does to a model, without running or changing the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from ..backend import aot_eager
from ..config import SDGPConfig
from ..passes.decisions import Decision
from ..passes.layers import Layer, multiply_adds, plain_sizes
from ..passes.module_names import module_roots
from ..passes.prune_input_grads import find_layers, prune_input_grads
from .dry_run import DryRun, Product
from .report import NO_GRADIENT, NOT_COMPILED, NOT_RUN, Explanation, LayerReport, MultiplyAdds

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MODULES = {"conv": (*_CONVOLUTIONS, *_TRANSPOSED), "linear": (nn.Linear,)}


def explain(model: nn.Module, *inputs: Any, options: dict[str, Any] | None = None) -> Explanation:
    """What the backend decides for every layer of model, and the multiply-adds, as a report.

    The model is copied with fake tensors (shapes, no values): nothing is computed, and a large
    model takes no memory. The model, random states and what the compiler knows of other
    compilations stay as they are. Listed are the layers of which training computes a gradient, and
    modules of the targeted kinds that the backend doesn't get. Symbolic sizes are sizes that
    depend on data.

    inputs: what model.forward takes; tensors are read for shape, dtype, strides and device.
    options: as for `torch.compile(model, backend="sdgp", options=...)`.
    Raises ValueError for a bad option, and what the model raises.
    """
    config, _ = SDGPConfig.from_options(options)
    model = getattr(model, "_orig_mod", model)  # Of a model that is compiled already.
    kinds = config.targets.split(",")
    names = _first_names(model)
    layers: list[LayerReport] = []
    reached: set[str] = set()
    products: dict[str, Product] = {}

    def on_product(product: Product) -> None:
        products.setdefault(product.module, product)
        if product.kind in kinds and not product.compiled:
            reached.add(product.module)
            layers.append(_dense(product, NOT_COMPILED))

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        roots, modules = module_roots(gm), run.owners(example_inputs)

        def rewrite(graph: fx.Graph) -> None:
            found = find_layers(graph, config)
            decisions = prune_input_grads(graph, config, roots)
            rows = [_decided(*pair, config) for pair in zip(decisions, found, strict=True)]
            layers.extend(reversed(rows))  # The backward goes from the last layer to the first.
            for decision in decisions:
                name = names.get(decision.module, decision.module)
                reached.update(_modules_named(name, modules))

        return aot_eager(rewrite)(gm, example_inputs)

    run = DryRun(on_product)
    stopped = run.run(model, inputs, backend)
    layers += _not_reached(model, kinds, reached, run, products)
    return Explanation(
        config=config,
        layers=tuple(layers),
        graph_breaks=tuple(run.graph_breaks),
        warnings=tuple(_warnings(model, layers, run, stopped)),
    )


def _decided(decision: Decision, layer: Layer, config: SDGPConfig) -> LayerReport:
    x, grad_output = (node.meta["val"].shape for node in (layer.input, layer.grad_output))
    count = _known(layer.multiply_adds)
    input_gradient = count if layer.has_input_grad else 0
    saved = input_gradient if decision.pruned else 0
    fields = {field.name: getattr(decision, field.name) for field in dataclasses.fields(decision)}
    if decision.kind == "linear":
        fields["weight"] = plain_sizes((grad_output[-1], x[-1]))
    return LayerReport(
        **fields,
        operation=_operation(decision.kind, decision.transposed, len(grad_output)),
        input=plain_sizes(x),
        compiled=True,
        multiply_adds=MultiplyAdds(
            forward=count,
            input_gradient=input_gradient,
            weight_gradient=count if layer.has_weight_grad else 0,
            saved=saved and saved * (config.m - config.n) // config.m,
        ),
    )


def _dense(product: Product, reason: str) -> LayerReport:
    """A layer that ran in eager mode, or without a gradient."""
    kind, transposed = product.kind, product.transposed
    x, weight, output = (t.shape for t in (product.input, product.weight, product.output))
    count = _known(multiply_adds(kind, transposed, x, weight, output))
    trains = reason == NOT_COMPILED
    return LayerReport(
        module=product.module,
        kind=kind,
        grad_output=plain_sizes(output),
        weight=plain_sizes((output[-1], x[-1]) if kind == "linear" else weight),
        groups=product.groups,
        transposed=transposed and kind == "conv",
        pruned=False,
        reason=reason,
        operation=_operation(kind, transposed, len(output)),
        input=plain_sizes(x),
        compiled=product.compiled,
        multiply_adds=MultiplyAdds(
            forward=count,
            input_gradient=count if trains and product.input.requires_grad else 0,
            weight_gradient=count if trains and product.weight.requires_grad else 0,
        ),
    )


def _not_reached(
    model: nn.Module,
    kinds: Iterable[str],
    reached: Collection[str],
    run: DryRun,
    products: Mapping[str, Product],
) -> list[LayerReport]:
    """The layers that are modules of model but have no decision, and haven't run in eager mode."""
    layers = []
    for path, module in model.named_modules():
        name = _without_wrappers(path)
        kind = next((kind for kind in kinds if isinstance(module, _MODULES[kind])), "")
        if not kind or name in reached:
            continue
        if _has_part(name, run.in_graphs) and name in products:
            layers.append(_dense(products[name], NO_GRADIENT))
            continue
        in_graphs, in_eager = (_has_part(name, used) for used in (run.in_graphs, run.in_eager))
        reason = NO_GRADIENT if in_graphs else NOT_COMPILED if in_eager else NOT_RUN
        count = 0 if reason == NOT_RUN else None
        weight: Any = module.weight
        transposed = isinstance(module, _TRANSPOSED)
        layers.append(
            LayerReport(
                module=name,
                kind=kind,
                grad_output=(),
                weight=plain_sizes(weight.shape),
                groups=getattr(module, "groups", 1),
                transposed=transposed,
                pruned=False,
                reason=reason,
                operation=_operation(kind, transposed, weight.dim()),
                input=(),
                compiled=in_graphs,
                multiply_adds=MultiplyAdds(
                    forward=count, input_gradient=count, weight_gradient=count
                ),
            )
        )
    return layers


def _warnings(
    model: nn.Module, layers: Sequence[LayerReport], run: DryRun, stopped: str
) -> list[str]:
    warnings = []
    if not model.training:
        warnings.append("the model is in evaluation mode, model.train() puts it into training mode")
    if not layers:
        warnings.append("the model has no layer of the kinds that sdgp.targets names")
    if run.has_guessed:
        warnings.append("the model asks for values of tensors: 1 was taken for each of them")
    if stopped:
        warnings.append(f"the model needs values and could not be followed to its end: {stopped}")
    unknown = sum(layer.multiply_adds.forward is None for layer in layers)
    if unknown:
        warnings.append(f"the multiply-adds of {unknown} layers are not known and not in the sums")
    return warnings


def _first_names(model: nn.Module) -> dict[str, str]:
    """For each name of a module the first, which is that of `named_modules()`."""
    first: dict[nn.Module, str] = {}
    names = {}
    for path, module in model.named_modules(remove_duplicate=False):
        name = _without_wrappers(path)
        names[name] = first.setdefault(module, name)
    return names


def _without_wrappers(path: str) -> str:
    """The name of a module as decisions have it, whatever in the model is compiled itself."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def _modules_named(name: str, modules: Collection[str]) -> set[str]:
    """Those of a graph's modules that may be meant: its names can start below the model."""
    if name in modules:
        return {name}
    return {module for module in modules if module.endswith(f".{name}")} or {name}


def _has_part(name: str, modules: Iterable[str]) -> bool:
    """Whether modules has the module of this name, or one in it, as a parametrization is."""
    return any(module == name or module.startswith(f"{name}.") for module in modules)


def _operation(kind: str, transposed: bool, dims: int) -> str:
    return "linear" if kind == "linear" else f"conv{'_transpose' * transposed}{dims - 2}d"


def _known(count: Any) -> int | None:
    return count if isinstance(count, int) else None

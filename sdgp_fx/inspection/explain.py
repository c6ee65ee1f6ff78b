"""Explain what the backend does to a model, without running or changing the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from ..backend import aot_eager
from ..config import SDGPConfig
from ..passes.convolutions import convolution_macs
from ..passes.decisions import Decision
from ..passes.layers import plain_sizes
from ..passes.linears import linear_macs
from ..passes.module_names import module_names
from ..passes.prune_input_grads import prune_input_grads
from .dry_run import DryRun, Product
from .report import Explanation, LayerReport, MultiplyAdds

# Why a layer that is in no joint graph stays dense.
NOT_COMPILED = "not compiled, runs in eager mode"
NO_GRADIENT = "no gradient flows through it"
NOT_RUN = "not run with these inputs"

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Modules that are reported if they are not compiled or not run, by kind.
_MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "conv": (*_CONVOLUTIONS, *_TRANSPOSED),
    "linear": (nn.Linear,),
}


def explain(model: nn.Module, *inputs: Any, options: dict[str, Any] | None = None) -> Explanation:
    """Report what the backend decides for every layer of model, and the multiply-adds.

    The model is copied with fake tensors (shapes, no values): nothing is computed, and a large
    model takes no memory. The model, random states and what the compiler knows of other
    compilations stay as they are.

    Args:
        model: The model, compiled or not.
        inputs: What model.forward takes; tensors are read for shape, dtype, strides and device.
        options: As for `torch.compile(model, backend="sdgp", options=...)`.

    Returns:
        The layers whose gradients training computes, and the modules of the targeted kinds that
        the backend doesn't get. Symbolic sizes are sizes that depend on data.

    Raises:
        ValueError: An option is unknown or has a bad value.
        Exception: Whatever the model raises.
    """
    config, _ = SDGPConfig.from_options(options)
    model = getattr(model, "_orig_mod", model)  # Of a model that is compiled already.
    names = _first_names(model)
    layers: list[LayerReport] = []
    reached: set[str] = set()
    products: dict[str, Product] = {}

    def on_product(product: Product) -> None:
        products.setdefault(product.module, product)
        if product.kind in config.targets and not product.compiled:
            reached.add(product.module)
            layers.append(_dense(product, NOT_COMPILED))

    def backend(
        gm: fx.GraphModule, example_inputs: Sequence[Any], modules: set[str]
    ) -> Callable[..., Any]:
        graph_names = module_names(gm)

        def rewrite(graph: fx.Graph) -> None:
            decisions = prune_input_grads(graph, config, graph_names)
            # The backward goes from the last layer to the first.
            layers.extend(_decided(decision, config) for decision in reversed(decisions))
            for decision in decisions:
                name = names.get(decision.module, decision.module)
                reached.update(_modules_named(name, modules))

        return aot_eager(rewrite)(gm, example_inputs)

    run = DryRun(on_product)
    stopped = run.run(model, inputs, backend)
    layers += _not_reached(model, config.targets, reached, run, products)
    return Explanation(
        config=config,
        layers=tuple(layers),
        graph_breaks=tuple(run.graph_breaks),
        warnings=tuple(_warnings(model, layers, run, stopped)),
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
    x, weight, output = (t.shape for t in (product.input, product.weight, product.output))
    is_linear = kind == "linear"
    macs = linear_macs(x, output) if is_linear else convolution_macs(x, weight, output, transposed)
    count = _known(macs)
    trains = reason == NOT_COMPILED
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
    """Report the modules of model that have no decision, and have not run in eager mode."""
    layers = []
    for path, module in model.named_modules():
        name = _without_wrappers(path)
        kind = next((kind for kind in kinds if isinstance(module, _MODULES.get(kind, ()))), "")
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
                grad_output_shape=(),
                weight_shape=plain_sizes(weight.shape),
                groups=getattr(module, "groups", 1),
                transposed=transposed,
                pruned=False,
                reason=reason,
                operation=_operation(kind, transposed, weight.dim()),
                input_shape=(),
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
    """Say what a reader of the report might miss."""
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
    """Map each name of a module to its first, which is the one in `named_modules()`."""
    first: dict[nn.Module, str] = {}
    names = {}
    for path, module in model.named_modules(remove_duplicate=False):
        name = _without_wrappers(path)
        names[name] = first.setdefault(module, name)
    return names


def _without_wrappers(path: str) -> str:
    """Return a module's name as decisions have it, whatever in the model is compiled itself."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def _modules_named(name: str, modules: Collection[str]) -> set[str]:
    """Return the graph's modules that name may mean: its names can start below the model."""
    if name in modules:
        return {name}
    return {module for module in modules if module.endswith(f".{name}")} or {name}


def _has_part(name: str, modules: Iterable[str]) -> bool:
    """Whether modules has the module of this name, or one in it, as a parametrization is."""
    return any(module == name or module.startswith(f"{name}.") for module in modules)


def _operation(kind: str, transposed: bool, dims: int) -> str:
    """Name the operation by the number of dimensions of what it returns."""
    return f"conv{'_transpose' * transposed}{dims - 2}d" if kind == "conv" else kind


def _known(count: Any) -> int | None:
    """Return a count, or None if it is symbolic."""
    return count if isinstance(count, int) else None

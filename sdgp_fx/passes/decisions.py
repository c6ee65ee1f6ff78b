"""Decide which layers are pruned, and say why the others stay dense."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..config import SDGPConfig
from ..kernels import op
from ..kernels.sparse.choice import why_not_chosen
from ..kernels.sparse.op import why_not_sparse
from ..kernels.sparse.problem import MOST_POSITION_DIMS, Problem
from .layers import Layer, plain_sizes
from .marks import DECISION
from .profit import is_profitable, is_sparse_faster

# Stands for a name; no module can have it.
UNKNOWN = "(unknown)"

NO_INPUT_GRADIENT = "no input gradient"
KEEPS_ALL = "n = m keeps every value"
EXCLUDED = "excluded by a rule"
NAME_NOT_KNOWN = "name not known, and there are rules"
SHARED = "shares its graph with a layer that is excluded by a rule"
DTYPE = "dtype not supported"
TAKEN_INSIDE = "gradient taken inside the compiled function"
DEPTHWISE = "depthwise, one output channel a group"
NOT_A_MULTIPLE = "C_out per group is not a multiple of m"
NOT_STATIC = "number of channels not known when compiled"
GROUPS_NOT_STATIC = "number of groups not known when compiled"
NOT_PROFITABLE = {
    "element": "skipping the zeros would not pay",
    "channel": "pruning whole channels would not pay",
}

# Why what is pruned is multiplied as a dense tensor.
WHOLE_CHANNELS = "whole channels leave a smaller dense product"
ASKED_FOR = "asked for by sdgp.product"
NO_GEOMETRY = "no sparse product of this form"
NOT_FASTER = "expected to be faster"


@dataclasses.dataclass(frozen=True)
class Decision:
    """What becomes of one layer.

    Attributes:
        module: The layer's name in `named_modules()`, the first of several; that of the module
            around it for a layer without a module of its own, "" for the compiled module itself.
            UNKNOWN if it is not known. All names, with commas, if the layer stands for several:
            in a region that is compiled once and called with several modules.
        kind: "conv" or "linear".
        grad_output_shape: (N, C_out, *spatial), of a linear layer (rows, out_features) or
            (batch, rows, out_features); a symbolic size is its symbol's name.
        weight_shape: (C_out, C_in / groups, *kernel), or (C_in, C_out / groups, *kernel) if
            transposed. A linear layer's is the one that is multiplied with, which may be either.
        groups: Groups of channels; a symbolic number is its symbol's name.
        reason: Why the layer stays dense; "" if it is pruned.
        product: What multiplies the pruned gradient, "dense" or "sparse"; "" if it is not pruned.
        product_reason: Why that product is dense; "" if it is not.
        layer: The layer in the graph; None once the graph is gone.
    """

    module: str
    kind: str
    grad_output_shape: tuple[int | str, ...]
    weight_shape: tuple[int | str, ...]
    groups: int | str
    transposed: bool
    pruned: bool
    reason: str
    product: str = ""
    product_reason: str = ""
    layer: Layer | None = dataclasses.field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields but the layer, for JSON."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "layer"]
        return {name: getattr(self, name) for name in names}


def decide(layer: Layer, names: Sequence[str], config: SDGPConfig, in_backward: bool) -> Decision:
    """Decide what becomes of layer; of one that is pruned already, return what was decided then.

    Args:
        names: The layer's name, as from `ModuleNames.of`.
        in_backward: Whether the layer's gradient belongs to the backward of a joint graph.
    """
    pruned, reason = layer.pruned, ""
    if pruned is not None and DECISION in pruned.meta:
        return dataclasses.replace(cast(Decision, pruned.meta[DECISION]), layer=layer)
    if pruned is None:
        reason = why_not_possible(layer, names, config, in_backward)
    if not reason and pruned is None and config.layers == "profitable":
        can_save = config.structure == "channel" or not why_no_sparse_product(layer, config)
        if not can_save or not is_profitable(layer, config):
            reason = NOT_PROFITABLE[config.structure]
    dense_product = "" if reason else why_dense_product(layer, config)
    product = "" if reason else "dense" if dense_product else "sparse"
    return Decision(
        module=", ".join(names) if names else UNKNOWN,
        kind=layer.kind,
        grad_output_shape=plain_sizes(layer.grad_output.meta["val"].shape),
        weight_shape=plain_sizes(layer.weight_shape),
        groups=plain_sizes([layer.groups])[0],
        transposed=layer.transposed,
        pruned=not reason,
        reason=reason,
        product=product,
        product_reason=dense_product if product else "",
        layer=layer,
    )


def why_not_possible(
    layer: Layer, names: Sequence[str], config: SDGPConfig, in_backward: bool
) -> str:
    """Return why the layer cannot, or must not, be pruned; "" if it can."""
    if not layer.has_input_grad:
        return NO_INPUT_GRADIENT
    if not in_backward and config.gradients == "backward":
        return TAKEN_INSIDE
    if config.n == config.m:
        return KEEPS_ALL
    if why := why_not_selected(names, config):
        return why
    if not op.supports_dtype(layer.dtype, layer.grad_output.meta["val"].device):
        return DTYPE
    if layer.is_depthwise:
        return DEPTHWISE
    if not isinstance(layer.groups, int):
        return GROUPS_NOT_STATIC
    if not has_whole_groups(layer.channels, layer.groups, config.m):
        is_known = statically_known_true(layer.channels % (layer.groups * config.m) != 0)
        return NOT_A_MULTIPLE if is_known else NOT_STATIC
    if config.structure == "channel" and not isinstance(layer.channels, int):
        return NOT_STATIC
    return ""


def why_not_selected(names: Sequence[str], config: SDGPConfig) -> str:
    """Return why the rules leave a layer dense; "" if they don't.

    Args:
        names: As from `ModuleNames.of`.
    """
    if not names:
        return NAME_NOT_KNOWN if config.has_rules else ""
    selected = [config.selects(name) for name in names]
    if all(selected):
        return ""
    return SHARED if any(selected) else EXCLUDED


def why_dense_product(layer: Layer, config: SDGPConfig) -> str:
    """Return why what is pruned is multiplied densely; "" if its zeros are skipped."""
    why = why_no_sparse_product(layer, config)
    if why or config.product == "sparse" or layer.grad_output.meta["val"].device.type != "cuda":
        return why
    return why_not_chosen(problem_of(layer, config))


def why_no_sparse_product(layer: Layer, config: SDGPConfig) -> str:
    """Return why no product that skips zeros is considered; "" if one is. Nothing is measured."""
    if config.structure == "channel":
        return WHOLE_CHANNELS
    if config.product == "dense":
        return ASKED_FOR
    scope = config.rescale if config.prune == "rescaled_magnitude" else ""
    too_many = scope == "feature_map" and layer.position_dims > MOST_POSITION_DIMS
    if layer.geometry is None or too_many:
        return NO_GEOMETRY
    if config.product == "auto" and not is_sparse_faster(layer, config):
        return NOT_FASTER
    return why_not_sparse(problem_of(layer, config))


def problem_of(layer: Layer, config: SDGPConfig) -> Problem:
    """Return what a sparse product of a layer with a geometry is given, of fake tensors."""
    geometry = layer.geometry
    assert geometry is not None
    grad_output, weight, x = (
        node.meta["val"] for node in (layer.grad_output, layer.weight, geometry.input)
    )
    return Problem(
        *(grad_output, weight, None, config.n, config.m, config.prune, config.rescale),
        *(x.shape, *geometry[1:]),
    )


def has_whole_groups(channels: Any, groups: int, m: int) -> bool:
    """Return whether each of a layer's groups is known to have a multiple of m output channels.

    Args:
        channels: All output channels, an int or symbolic.
        groups: Groups of channels that the layer convolves separately.
    """
    return statically_known_true(channels % (groups * m) == 0)

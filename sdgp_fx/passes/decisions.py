"""What becomes of a layer: pruned, or dense and why."""

from __future__ import annotations

import dataclasses
from typing import cast

from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..config import SDGPConfig
from ..kernels import op
from . import channels
from .layers import DECISION, Layer, plain_sizes

NO_INPUT_GRADIENT = "no input gradient"
KEEPS_ALL = "n = m keeps every value"
EXCLUDED = "excluded by a rule"
DTYPE = "dtype not supported"
DEPTHWISE = "depthwise, one output channel a group"
NOT_A_MULTIPLE = "C_out per group is not a multiple of m"
NOT_STATIC = "number of channels not known when compiled"
DOES_NOT_PAY = "pruning whole channels would not pay"


@dataclasses.dataclass(frozen=True)
class Decision:
    """What became of one layer.

    module: the layer's name in `named_modules()`; that of the module around it for a layer
        without a module of its own, "" for the compiled module itself. A module that is
        registered under several names may go by any of them.
    kind: "conv" or "linear".
    grad_output: shape (N, C_out, *spatial), of a linear layer (rows, out_features), or
        (batch, rows, out_features); a symbolic size is its symbol's name.
    weight: shape (C_out, C_in / groups, *kernel), or (C_in, C_out / groups, *kernel) if
        transposed. As it is multiplied with: that of a linear layer may be either.
    reason: why the layer stays dense; "" if it is pruned.
    """

    module: str
    kind: str
    grad_output: tuple[int | str, ...]
    weight: tuple[int | str, ...]
    groups: int
    transposed: bool
    pruned: bool
    reason: str


def _decide(layer: Layer, module: str, config: SDGPConfig) -> Decision:
    if DECISION in layer.grad_output.meta:
        return cast(Decision, layer.grad_output.meta[DECISION])
    reason = _reason_dense(layer, module, config)
    weight = plain_sizes(layer.weight.meta["val"].shape)
    return Decision(
        module=module,
        kind=layer.kind,
        grad_output=plain_sizes(layer.grad_output.meta["val"].shape),
        weight=weight[-2:] if layer.kind == "linear" else weight,
        groups=layer.groups,
        transposed=layer.transposed,
        pruned=not reason,
        reason=reason,
    )


def _reason_dense(layer: Layer, module: str, config: SDGPConfig) -> str:
    """Why this layer can't be pruned; "" if it can, or is."""
    if layer.is_pruned:
        return ""
    grad_output = layer.grad_output.meta["val"]
    if not layer.has_input_grad:
        return NO_INPUT_GRADIENT
    if config.n == config.m:
        return KEEPS_ALL
    if not config.selects(module):
        return EXCLUDED
    if not op.supports_dtype(grad_output.dtype, grad_output.device):
        return DTYPE
    if layer.kind == "conv" and statically_known_true(layer.channels == layer.groups):
        return DEPTHWISE
    if not statically_known_true(layer.channels % (layer.groups * config.m) == 0):
        return NOT_A_MULTIPLE
    if config.structure != "element" and not isinstance(layer.channels, int):
        return NOT_STATIC
    if config.structure == "channel" and not channels.pays(layer, config):
        return DOES_NOT_PAY
    return ""

"""What the pass notes in the meta of nodes, for others and for itself on a second run."""

from __future__ import annotations

from typing import cast

import torch
from torch import fx

from ..kernels.op import PRUNE_NM

aten = torch.ops.aten

# On the grad_output of a pruned layer, as its product reads it: the layer's Decision.
DECISION = "sdgp_decision"

# On a node that computes an input gradient and skips the zeros: the layer's Decision.
COMPUTES = "sdgp_computes"

# On a node that keeps the dense gradient of a layer, whose input gradient another node computes.
DENSE_HALF = "sdgp_dense_half"

# On a node that prunes elements: the channels' factors that the weight was multiplied by instead.
FACTOR_IN_WEIGHT = "sdgp_factor_in_weight"

VIEWS = (aten.view.default, aten._unsafe_view.default)
_LAYOUT = (*VIEWS, aten.permute.default, aten.clone.default)


def find_pruned(grad_output: fx.Node) -> fx.Node | None:
    """Return what the pass has pruned: grad_output, or what it is another layout of.

    None if grad_output is dense.
    """
    while grad_output.target is not PRUNE_NM and DECISION not in grad_output.meta:
        if grad_output.target not in _LAYOUT:
            return None
        grad_output = cast(fx.Node, grad_output.args[0])
    return grad_output


def source_of_layout(node: fx.Node) -> fx.Node:
    """Return what node is another layout of: itself, if of nothing."""
    while node.target in _LAYOUT:
        node = cast(fx.Node, node.args[0])
    return node


def is_pruned(grad_output: fx.Node) -> bool:
    """Whether the pass has pruned this gradient."""
    return find_pruned(grad_output) is not None


def is_rewritten(node: fx.Node) -> bool:
    """Whether the pass has made this node, or what it reads, from a layer that is pruned."""
    return COMPUTES in node.meta or is_pruned(node)

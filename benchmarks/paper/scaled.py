"""Multiply pruned gradients by a number, which sdgp has no option for: unbiased random pruning.

"random" keeps n of m values as they are, so that its mean is n / m of the gradient. Times m / n
it is unbiased, as dropout is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import fx

from sdgp_fx import SDGPConfig
from sdgp_fx.backend import aot_eager
from sdgp_fx.graph_pass import PruneInputGrads
from sdgp_fx.inductor import DENSE_HALF_FIRST
from sdgp_fx.inductor import lowering as lowering  # Importing it registers it.
from sdgp_fx.kernels.op import PRUNE_NM


class ScaledPruning(PruneInputGrads):
    """Run the pass of sdgp, and multiply what it prunes by scale."""

    def __init__(self, config: SDGPConfig, scale: float) -> None:
        super().__init__(config, dense_half_first=DENSE_HALF_FIRST)
        self.scale = scale

    def __call__(self, graph: fx.Graph) -> None:
        if graph.find_nodes(op="call_function", target=PRUNE_NM):
            return  # A graph may get here twice.
        super().__call__(graph)
        for node in graph.find_nodes(op="call_function", target=PRUNE_NM):
            with graph.inserting_after(node):
                scaled = graph.call_function(torch.ops.aten.mul.Tensor, (node, self.scale))
            scaled.meta = dict(node.meta)
            node.replace_all_uses_with(scaled, lambda user, own=scaled: user is not own)

    def uuid(self) -> Any | None:
        return (super().uuid(), self.scale, Path(__file__).read_text())


def scaled(config: SDGPConfig, scale: float) -> dict[str, Any]:
    """Return the arguments for torch.compile to prune as config says and multiply by scale."""
    rewrite = ScaledPruning(config, scale)
    if config.inner == "aot_eager":
        return {"backend": aot_eager(rewrite)}
    return {"backend": "inductor", "options": {"joint_custom_pre_pass": rewrite}}

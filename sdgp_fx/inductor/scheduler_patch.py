"""torch 2.11: what overwrites memory stays behind what has written it.

Inductor makes a node's loops anew where that lets them be fused with others. Its scheduler of torch
2.11 then forgets that the node overwrites what another writes: fused into loops that come earlier,
it is undone, and gradients of all layers below are zero. What sdgp adds decides what else is fused:
on the CPU, networks with a LayerNorm after a global pooling, which stock happens to compile right,
came out so. torch 2.12 to 2.15 remember.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.dependencies import Dep, StarDep, WeakDep
from torch._inductor.scheduler import SchedulerNode
from torch.utils._ordered_set import OrderedSet

_remake = SchedulerNode.recompute_size_and_body


def _recompute_size_and_body(node: SchedulerNode, *args: Any, **kwargs: Any) -> None:
    order: OrderedSet[Dep] = OrderedSet(
        dep for dep in node.read_writes.reads if isinstance(dep, (StarDep, WeakDep))
    )
    _remake(node, *args, **kwargs)
    node.set_read_writes(node.read_writes.with_read(order).rename(node.mutation_renames))


def keep_order() -> None:
    """Have torch 2.11 do what torch 2.12 does, in all that this process compiles from now on."""
    if torch.__version__ < "2.12":
        patched: Any = SchedulerNode
        patched.recompute_size_and_body = _recompute_size_and_body

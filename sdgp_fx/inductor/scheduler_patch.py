"""Patch the scheduler of torch 2.11: what overwrites memory stays behind what has written it.

Inductor makes a node's loops anew where that lets them be fused with others. Its scheduler of torch
2.11 then forgets the dependencies that do nothing but order the node, among them that it overwrites
what another writes: fused into loops that come earlier, it is undone, and gradients of all layers
below are zero. What sdgp adds decides what else is fused: on the CPU, networks with a LayerNorm
after a global pooling, which stock happens to compile right, came out so. torch 2.12 remembers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.dependencies import Dep, StarDep, WeakDep
from torch._inductor.scheduler import SchedulerNode
from torch.utils._ordered_set import OrderedSet

_original = SchedulerNode.recompute_size_and_body


def _recompute_size_and_body(node: SchedulerNode, *args: Any, **kwargs: Any) -> None:
    """Make the loops anew, and put the ordering dependencies back."""
    order: OrderedSet[Dep] = OrderedSet(
        dep for dep in node.read_writes.reads if isinstance(dep, (StarDep, WeakDep))
    )
    _original(node, *args, **kwargs)
    node.set_read_writes(node.read_writes.with_read(order).rename(node.mutation_renames))


def keep_ordering_dependencies() -> None:
    """Have torch 2.11 remember them as torch 2.12 does, in all that this process compiles."""
    if torch.__version__ < "2.12":
        patched: Any = SchedulerNode
        patched.recompute_size_and_body = _recompute_size_and_body

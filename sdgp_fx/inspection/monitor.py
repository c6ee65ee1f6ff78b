"""Record what pruning does to the gradients of a model while it trains."""

from __future__ import annotations

import functools
import itertools
import math
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from ..backend import sdgp
from ..kernels.record import receivers
from ..passes.statistics import SUMS, layers_recorded

STATISTICS = {
    "l1_kept": "share of the L1 norm kept",
    "relative_error": "relative error |p - g| / |g|",
    "bias": "bias <p, g> / <g, g>",
}
CURVES = 6

_keys = map(str, itertools.count())


def monitor(model: nn.Module, every: int = 100, **arguments: Any) -> Monitor:
    """Compile model for the backend "sdgp", and record every so often what pruning does.

    Args:
        every: Of so many calls with gradients, the first is recorded.
        arguments: Arguments of torch.compile: options, mode and so on.

    Returns:
        What is called in place of `torch.compile(model, backend="sdgp", ...)`, and is a module as
        that is: with the parameters, the state and the attributes of model. It holds two
        compilations that share the model: one that records, and for all other calls the one that
        there is without a monitor.

    Raises:
        ValueError: model is no module, or every no int above 0; or, when compiled, whole channels
            are pruned, which a monitor doesn't record.
    """
    return Monitor(model, every, **arguments)


class Monitor(OptimizedModule):
    """Call a model, and record by layer and step how far each pruned p is from its dense g.

        l1_kept          sum |g| where p is not 0, by sum |g|
        relative_error   |p - g| / |g|, in L2
        bias             <p, g> / <g, g>; its mean is 1 for an unbiased function

    All are NaN for g = 0. The sums are those of one process, in float32 (float64 for float64
    gradients), over all calls of a layer in a step. A backward counts for the step of its forward,
    whatever has been called in between. A training step does not wait for the numbers: reading the
    record does, for the device.

    What isn't said here is the model's: parameters, state, attributes, also set ones.

    Attributes:
        every: Of so many calls with gradients, the first is recorded.
        step: Step of the latest call with gradients, from 0; set it to go on from a checkpoint.
        backend: A backend for `torch.compile` that records whenever it is called, as of `step`,
            for those who compile the model themselves.
    """

    # A compiled module takes what its class doesn't have for its model's.
    every: int = 1
    step: int = -1
    backend: Any = None
    _arguments: Any = None
    _pruned: Any = None
    _recording: Any = None
    _received: Any = None
    _sums: Any = None
    _written: int = -1

    def __init__(self, model: nn.Module, every: int, **arguments: Any) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: expected a torch.nn.Module, got {model!r}")
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every: expected an int above 0, got {every!r}")
        pruned: Any = torch.compile(model, backend=sdgp, **arguments)
        super().__init__(pruned._orig_mod, pruned.dynamo_ctx)
        key = next(_keys)
        receivers[key] = self
        self.every = every
        self.backend = functools.partial(sdgp, monitor=key)
        recording: Any = torch.compile(model, backend=self.backend, **arguments)
        self._arguments = arguments
        self._pruned, self._recording = self.forward, recording.forward
        self.forward = self._forward_of_step
        self._received: deque[tuple[Tensor, str, Tensor]] = deque()
        self._sums: dict[int, dict[str, Tensor]] = {}

    def _forward_of_step(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns."""
        if not torch.is_grad_enabled():
            return self._pruned(*args, **kwargs)
        self.step += 1
        due = self.step % self.every == 0
        return (self._recording if due else self._pruned)(*args, **kwargs)

    def __reduce__(self) -> Any:
        """Copy as a monitor of a copy of the model, with a record of its own."""
        make = functools.partial(type(self), every=self.every, **self._arguments)
        return make, (self._orig_mod,)

    def receive(self, layers: str, step: Tensor, numbers: Tensor) -> None:
        """Keep what a graph has recorded.

        Args:
            layers: Names of layers, for `layers_recorded`.
            step: Step of the graph's forward.
            numbers: SUMS of one layer after the other.
        """
        self._received.append((step, layers, numbers))

    def to_dict(self) -> dict[str, dict[str, list[Any]]]:
        """Return the record in plain numbers, for JSON.

        Returns:
            By layer, in the order of the forward: "step" and each of the statistics, a list with
            an item for each record.
        """
        self._read()
        names: dict[str, None] = {}
        for sums in self._sums.values():
            names |= dict.fromkeys(reversed(sums))
        record: dict[str, dict[str, list[Any]]] = {
            name: {key: [] for key in ("step", *STATISTICS)} for name in names
        }
        for step, sums in sorted(self._sums.items()):
            for name, values in sums.items():
                for key, value in {"step": step, **_statistics(values)}.items():
                    record[name][key].append(value)
        return record

    def write(self, writer: Any) -> None:
        """Write what is new since the last call to TensorBoard.

        Args:
            writer: A `torch.utils.tensorboard.SummaryWriter`, or anything with its
                add_scalar(tag, value, step). Tags are "sdgp_bias/layer1.0.conv1" and so on.
        """
        self._read()
        for step in sorted(step for step in self._sums if step > self._written):
            for name, values in self._sums[step].items():
                for key, value in _statistics(values).items():
                    writer.add_scalar(f"sdgp_{key}/{name or 'model'}", value, step)
            self._written = step

    def plot(self, path: str | Path) -> None:
        """Draw the statistics over depth, a curve for each of a few steps. Needs matplotlib.

        Args:
            path: Where the picture is written; its suffix says in which format.

        Raises:
            ValueError: Nothing is recorded.
        """
        from matplotlib import colormaps
        from matplotlib.figure import Figure

        record = self.to_dict()
        steps = sorted(self._sums)
        if not steps:
            raise ValueError("monitor: nothing is recorded: no backward pass has pruned a gradient")
        count = min(CURVES, len(steps))
        chosen = [steps[i * (len(steps) - 1) // max(count - 1, 1)] for i in range(count)]
        figure = Figure(figsize=(max(8, 2 + 0.3 * len(record)), 9), dpi=100, layout="constrained")
        panels: Any = figure.subplots(len(STATISTICS), sharex=True)
        for axes, (key, title) in zip(panels, STATISTICS.items(), strict=True):
            for i, step in enumerate(chosen):
                curve = [
                    dict(zip(of["step"], of[key], strict=True)).get(step, math.nan)
                    for of in record.values()
                ]
                color = colormaps["viridis"](i / count)
                axes.plot(curve, marker="o", markersize=4, color=color, label=f"step {step}")
            axes.set_title(title, loc="left", fontsize=10)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        panels[-1].set_xticks(range(len(record)), record, rotation=90, fontsize=8)
        panels[0].legend(frameon=False, fontsize=8)
        figure.savefig(path)

    def _read(self) -> None:
        """Fetch what was received, and add it up by step and layer."""
        while self._received:
            step, layers, numbers = self._received.popleft()
            sums = self._sums.setdefault(int(step), {})
            rows = numbers.double().cpu().view(-1, len(SUMS))
            for name, row in zip(layers_recorded(layers), rows, strict=True):
                sums[name] = sums[name] + row if name in sums else row


def _statistics(sums: Tensor) -> dict[str, float]:
    """Compute STATISTICS from SUMS."""
    of = dict(zip(SUMS, sums, strict=True))
    values = {
        "l1_kept": of["kept_norm"] / of["norm"],
        "relative_error": (of["squared_error"] / of["square"]).sqrt(),
        "bias": of["product"] / of["square"],
    }
    return {name: value.item() for name, value in values.items()}

"""Present what `explain` finds: as text, as HTML, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import html
import os
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

from ..config import SDGPConfig
from ..passes.decisions import Decision
from .dry_run import GraphBreak

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours of the picture.
KEPT, SAVED, DENSE, EAGER = "#4c6a92", "#e07a2f", "#b9c4d3", "#d9d9d9"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiplyAdds:
    """Count the multiply-adds of one training step.

    A count is None where a size depends on data. Multiplications by the zeros of a padding count.

    Attributes:
        forward, input_gradient, weight_gradient: Multiply-adds of each product.
        saved: Those of input_gradient that multiply the zeros of pruning. A sparse product skips
            them, a dense one does not.
    """

    forward: int | None = 0
    input_gradient: int | None = 0
    weight_gradient: int | None = 0
    saved: int | None = 0

    @property
    def all(self) -> int:
        """Multiply-adds of forward and both gradients, as far as they are known."""
        return sum(filter(None, (self.forward, self.input_gradient, self.weight_gradient)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport(Decision):
    """Add to a layer's decision what the layer computes.

    Attributes:
        operation: "conv2d", "conv_transpose1d", "linear" and so on.
        input_shape: Shape of the forward's input, laid out as grad_output. Both are () for a layer
            whose product was not seen.
        compiled: Whether the layer is part of a compiled graph.
        multiply_adds: Multiply-adds of the layer's products in a training step.
    """

    operation: str
    input_shape: tuple[int | str, ...]
    compiled: bool
    multiply_adds: MultiplyAdds

    @property
    def decision(self) -> str:
        """Return "pruned", or "dense: " and why."""
        return "pruned" if self.pruned else f"dense: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """Return all fields but the layer in plain values, for JSON."""
        return {**super().to_dict(), "multiply_adds": dataclasses.asdict(self.multiply_adds)}


@dataclasses.dataclass(frozen=True)
class Explanation(Sequence[LayerReport]):
    """Report on a model: a sequence of its layers in the order in which they run.

    Layers that don't run come last. A layer that runs twice is there twice.

    Attributes:
        config: The settings that decided.
        layers: The layers of the sequence.
        graph_breaks: Where Dynamo leaves a graph.
        warnings: What makes the report incomplete, or its model an unusual one.
    """

    config: SDGPConfig
    layers: tuple[LayerReport, ...]
    graph_breaks: tuple[GraphBreak, ...]
    warnings: tuple[str, ...]

    @overload
    def __getitem__(self, index: int) -> LayerReport: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[LayerReport, ...]: ...

    def __getitem__(self, index: int | slice) -> LayerReport | tuple[LayerReport, ...]:
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def multiply_adds(self) -> MultiplyAdds:
        """Multiply-adds of all layers, as far as they are known."""
        names = [field.name for field in dataclasses.fields(MultiplyAdds)]
        counts = [layer.multiply_adds for layer in self.layers]
        return MultiplyAdds(
            **{name: sum(getattr(count, name) or 0 for count in counts) for name in names}
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report in plain values, for JSON."""
        return {
            "config": _plain(dataclasses.asdict(self.config)),
            "layers": [_plain(layer.to_dict()) for layer in self.layers],
            "multiply_adds": dataclasses.asdict(self.multiply_adds),
            "graph_breaks": [dataclasses.asdict(graph_break) for graph_break in self.graph_breaks],
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        return "\n".join([*_columns([_HEADER, *self._rows()]), "", *self._summary()])

    def __rich__(self) -> Any:
        """Return a table for rich's console, with pruned layers in colour."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table()
        right = set(range(len(_HEADER))[_NUMBERS])
        for i, name in enumerate(_HEADER):
            table.add_column(name, justify="right" if i in right else "left", overflow="fold")
        for layer, row in zip(self.layers, self._rows(), strict=True):
            table.add_row(*map(Text, row), style="green" if layer.pruned else "")
        return Group(table, *map(Text, self._summary()))

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        header = _html_row("th", _HEADER)
        rows = (_html_row("td", row) for row in self._rows())
        summary = "<br>".join(map(html.escape, self._summary()))
        return f"<table>{header}{''.join(rows)}</table><p>{summary}</p>"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the multiply-adds of each layer, first layer to last. Needs matplotlib.

        Args:
            path: Where the picture is written; its suffix says in which format.
        """
        from matplotlib.figure import Figure

        count = len(self.layers)
        width = min(max(8.0, 2 + 0.16 * count), 24.0)
        figure = Figure(figsize=(width, 5.5), dpi=150, layout="constrained")
        _draw(figure.add_subplot(), self.layers)
        figure.legend(frameon=False, ncols=2 if width < 12 else 4, loc="outside lower left")
        lines = (textwrap.fill(line, round(12 * width)) for line in self._summary()[:2])
        figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize="medium")
        figure.savefig(path)

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                layer.module or "(model)",
                layer.operation,
                _shape(layer.weight_shape),
                str(layer.groups),
                _shape(layer.grad_output_shape),
                *map(_si, dataclasses.astuple(layer.multiply_adds)),
                layer.product or "-",
                layer.decision,
            )
            for layer in self.layers
        ]

    def _summary(self) -> list[str]:
        pruned = sum(layer.pruned for layer in self.layers)
        reasons = Counter(layer.reason for layer in self.layers if not layer.pruned)
        dense = "".join(f", {n} dense: {reason}" for reason, n in reasons.most_common())
        total = self.multiply_adds
        config = self.config
        lines = [
            f"{config.n}:{config.m} {config.prune}, targets {','.join(config.targets)}: "
            f"{pruned} of {len(self.layers)} layers pruned{dense}",
            f"multiply-adds of a training step: forward {_si(total.forward)}, "
            f"input gradients {_si(total.input_gradient)}, "
            f"weight gradients {_si(total.weight_gradient)}; saved {_si(total.saved)}, "
            f"{_percent(total.saved, total.input_gradient)} of the input gradients', "
            f"{_percent(total.saved, total.all)} of all",
        ]
        lines += self._products()
        lines += [f"graph break: {graph_break}" for graph_break in self.graph_breaks]
        return lines + [f"warning: {warning}" for warning in self.warnings]

    def _products(self) -> list[str]:
        """Say how many layers' zeros are skipped, and why those of others are not."""
        pruned = [layer for layer in self.layers if layer.pruned]
        reasons = Counter(layer.product_reason for layer in pruned if layer.product == "dense")
        if not pruned or self.config.structure != "element":
            return []
        sparse = [layer for layer in pruned if layer.product == "sparse"]
        skipped = sum(layer.multiply_adds.saved or 0 for layer in sparse)
        dense = "".join(f", {n} dense: {reason}" for reason, n in reasons.most_common())
        return [
            f"products of pruned layers: {len(sparse)} of {len(pruned)} sparse, which skip "
            f"{_si(skipped)} multiply-adds{dense}"
        ]


_HEADER = (
    "layer",
    "operation",
    "weight",
    "groups",
    "output gradient",
    "forward",
    "input grad",
    "weight grad",
    "saved",
    "product",
    "input gradient is",
)
_NUMBERS = slice(3, 9)  # Columns that are aligned to the right.


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield lines with their cells in columns."""
    right = set(range(len(_HEADER))[_NUMBERS])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(range(len(row)), row, widths, strict=True)
        padded = [c.rjust(w) if i in right else c.ljust(w) for i, c, w in cells]
        yield "  ".join(padded).rstrip()


def _html_row(tag: str, cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _draw(axes: Axes, layers: Sequence[LayerReport]) -> None:
    """Draw stacked bars: what pruning leaves and saves of the input gradient, and the rest."""
    from matplotlib.ticker import EngFormatter

    x = range(len(layers))
    counts = [layer.multiply_adds for layer in layers]
    rest = [(c.forward or 0) + (c.weight_gradient or 0) for c in counts]
    saved = [c.saved or 0 for c in counts]
    kept = [(c.input_gradient or 0) - s for c, s in zip(counts, saved, strict=True)]
    bottom = [0] * len(layers)
    for heights, color, label in (
        (rest, DENSE, "forward and weight gradient"),
        (kept, KEPT, "input gradient, rest"),
        (saved, SAVED, "input gradient, saved"),
    ):
        axes.bar(x, heights, bottom=bottom, color=color, label=label, width=0.85)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    eager = [i for i, layer in enumerate(layers) if not layer.compiled]
    if eager:
        top = max(bottom, default=0) or 1
        label = "not compiled"
        axes.bar(eager, [top] * len(eager), color=EAGER, alpha=0.5, width=1, zorder=0, label=label)
    step = max(1, -(-len(layers) // 100))
    axes.set_xticks(x[::step], [layer.module or "(model)" for layer in layers][::step])
    axes.tick_params(axis="x", rotation=90, labelsize=7)
    axes.set_xlim(-1, max(len(layers), 1))
    axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_ylabel("multiply-adds of a training step")
    axes.spines[["top", "right"]].set_visible(False)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Turn tuples into lists, which is what JSON reads back."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def _shape(sizes: Iterable[int | str]) -> str:
    return "x".join(map(str, sizes)) or "-"


def _si(count: int | None) -> str:
    """Return count in four digits, with an SI prefix."""
    if count is None:
        return "?"
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:#.4g}".rstrip(".") + f" {unit}"
    return str(count)


def _percent(part: int | None, whole: int | None) -> str:
    return f"{part / whole:.1%}" if part and whole else "0%"

"""`python -m benchmarks.timm_sweep`: compile every network of timm and torchvision.

A training step of each is compiled by sdgp, with aot_eager inside, and its joint graphs are held
against what they were. Where tensors have shapes and no values, the largest network takes seconds
and no memory.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import fx, nn
from torch._dynamo.utils import counters

from sdgp_fx import SDGPConfig
from sdgp_fx.arguments import check_file, positive
from sdgp_fx.backend import aot_eager
from sdgp_fx.errors import first_line
from sdgp_fx.passes.decisions import Decision
from sdgp_fx.passes.prune_input_grads import prune_input_grads

from .harness import command
from .harness.apart import run_apart
from .harness.architectures import (
    Architecture,
    Example,
    describe,
    find_example,
    list_architectures,
    loss,
)
from .harness.report import ROOT, Row, commit, write_text
from .harness.rewrite import Original
from .harness.terminal import progress

CONFIG = SDGPConfig(targets="conv,linear", inner="aot_eager")

_LAYERS: dict[str, Any] = {"conv": nn.modules.conv._ConvNd, "linear": nn.Linear}
_COMPILES = "compiles"
_CHUNK = 40  # Networks that are described by one call.
_LIFETIME = 25  # Networks that a process examines; a new one compiles the first slowly.


@dataclasses.dataclass
class Results:
    """Results for networks by their full names, saved whenever there are more.

    Attributes:
        networks: Each one's family, how many parameters it has, and a digest of its structure.
        rows: One for a network of each structure.
    """

    path: Path
    networks: dict[str, tuple[str, int, str]] = dataclasses.field(default_factory=dict)
    rows: dict[str, Row] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Load those of an earlier run, none if there is no file.

        Raises:
            ValueError: The file is something else.
        """
        if not path.exists():
            return cls(path)
        try:
            saved = json.loads(path.read_text())
            return cls(path, saved["networks"], {row["model"]: row for row in saved["rows"]})
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"expected results of timm_sweep, got {path}") from None

    @property
    def examined(self) -> dict[str, Row]:
        """Rows by structure."""
        return {self.networks[name][-1]: row for name, row in self.rows.items()}

    def save(self) -> None:
        """Write the file, a line for each network."""
        rows = ",\n".join(json.dumps(row) for row in self.rows.values())
        networks = json.dumps(self.networks)
        write_text(self.path, f'{{"networks": {networks},\n"rows": [\n{rows}\n]}}\n')


@dataclasses.dataclass
class _Counts:
    """Counts of what the backend sees while a network is compiled."""

    graphs: int = 0
    decisions: list[Decision] = dataclasses.field(default_factory=list)
    violations: list[str] = dataclasses.field(default_factory=list)
    gradients: int = 0
    identical: int = 0

    def rewrite(self, graph: fx.Graph) -> None:
        """Run the pass, and check what it does."""
        original = Original(graph)
        decisions = prune_input_grads(graph, CONFIG)
        result = original.check(graph, decisions, CONFIG)
        self.graphs += 1
        self.decisions += [dataclasses.replace(decision, layer=None) for decision in decisions]
        self.violations += result.violations
        self.gradients += result.gradients
        self.identical += result.identical


def examine(architecture: Architecture) -> Row:
    """Compile a network with sdgp and, where that fails, with stock aot_eager; return a row.

    Without values, and with values where stock fails without: some networks look at them.
    """
    start = time.process_time()
    row = _examine(architecture, fake=True)
    if row["stock"] not in (None, _COMPILES):
        row = _examine(architecture, fake=False)
    return row | {"seconds": round(time.process_time() - start, 1)}


def _examine(architecture: Architecture, fake: bool) -> Row:
    _start_afresh()
    row: Row = {
        "model": architecture.full_name,
        "parameters": None,
        "size": None,
        "fake": fake,
        "error": None,
        "stock": None,
    }
    try:
        example = find_example(architecture, fake)
    except Exception as error:
        return row | {"error": _describe("eager", error), "stock": "not tried"}
    network = example.network
    row["parameters"] = sum(parameter.numel() for parameter in network.parameters())
    row["size"] = example.size
    counts = _Counts()
    try:
        train(example, aot_eager(counts.rewrite))
    except Exception as error:
        row["error"] = _describe("sdgp", error)
        row["stock"] = _examine_stock(architecture, fake)
    kinds = Counter(decision.kind for decision in counts.decisions)
    pruned = Counter(decision.kind for decision in counts.decisions if decision.pruned)
    dense = Counter(f"{d.kind}: {d.reason}" for d in counts.decisions if not d.pruned)
    return row | {
        "layers": kinds,
        "pruned": pruned,
        "dense": dense,
        **_compare(network, counts.decisions),
        "graphs": counts.graphs,
        "breaks": counters["graph_break"].total(),
        "gradients": counts.gradients,
        "identical": counts.identical,
        "violations": counts.violations[:3],
    }


def examine_stock(architecture: Architecture) -> str:
    """Say, as in a row, that stock aot_eager compiles a network, or how it fails."""
    stock = _examine_stock(architecture, fake=True)
    return stock if stock == _COMPILES else _examine_stock(architecture, fake=False)


def _examine_stock(architecture: Architecture, fake: bool) -> str:
    _start_afresh()
    try:
        train(find_example(architecture, fake), "aot_eager")
    except Exception as error:
        return _describe("stock", error)
    return _COMPILES


def _start_afresh() -> None:
    torch.set_num_threads(1)
    torch._dynamo.reset()
    counters.clear()


def train(example: Example, backend: Any) -> None:
    """Compile a network and run a training step of it."""
    with example.context():
        loss(torch.compile(example.network, backend=backend)(*example.inputs)).backward()


def _compare(network: nn.Module, decisions: Iterable[Decision]) -> Row:
    """Count the convolutions and linear layers that got a gradient, by kind.

    "unnamed" in the result is how many of them have no decision of their name, and one of these.
    """
    decided = {(decision.kind, decision.module) for decision in decisions}
    trained = [
        (kind, name)
        for kind, layer in _LAYERS.items()
        for name, module in network.named_modules()
        if isinstance(module, layer) and getattr(module.weight, "grad", None) is not None
    ]
    unnamed = [name for kind, name in trained if (kind, name) not in decided]
    return {
        "modules": Counter(kind for kind, _ in trained),
        "unnamed": [len(unnamed), *unnamed[:1]],
    }


def _describe(stage: str, error: Exception) -> str:
    """Return the class of an error, or of the one that Dynamo wraps, and its first line."""
    error = getattr(error, "inner_exception", error)
    return f"{stage}: {type(error).__name__}: {first_line(error)[:200]}"


def describe_all(architectures: Sequence[Architecture]) -> list[tuple[int, str]]:
    """Describe networks; one that can't be built has no parameters, and its name for a digest."""
    described = []
    for architecture in architectures:
        try:
            described.append(describe(architecture))
        except Exception:
            described.append((0, architecture.full_name))
    return described


def ordered(architectures: Sequence[Architecture], results: Results) -> list[Architecture]:
    """Order networks: the smallest of each family, then the others; one of each structure."""
    by_size = sorted(architectures, key=lambda a: (results.networks[a.full_name][1], a.full_name))
    structures: dict[str, Architecture] = {}
    for architecture in by_size:
        structures.setdefault(results.networks[architecture.full_name][-1], architecture)
    families: set[tuple[str, str]] = set()
    firsts: list[Architecture] = []
    others: list[Architecture] = []
    for architecture in structures.values():
        family = architecture.library, architecture.family
        (others if family in families else firsts).append(architecture)
        families.add(family)
    return firsts + others


def versions() -> str:
    """Return the versions that rows depend on."""
    return (
        f"torch {torch.__version__}, timm {timm.__version__}, "
        f"torchvision {torchvision.__version__}, commit {commit(ROOT) or 'unknown'}"
    )


def sweep(
    results: Results,
    architectures: Sequence[Architecture],
    jobs: int,
    limit: float,
    minutes: float | None,
) -> None:
    """Examine what results don't have yet, and save them after each network.

    Args:
        jobs: Processes at a time.
        limit: Seconds after which a network is given up.
        minutes: No network is begun later; None for no end.
    """
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    made_with = versions()

    def run(function: Callable[..., Any], todo: Sequence[Any], name: Callable[[Any], str]) -> Any:
        with progress(len(todo)) as begin:

            def calls() -> Iterator[Any]:
                for task in todo:
                    if time.monotonic() < end:
                        begin(name(task))
                        yield task, function, (task,)

            yield from run_apart(calls(), jobs, limit, _LIFETIME)

    unknown = [a for a in architectures if a.full_name not in results.networks]
    chunks = [tuple(unknown[i : i + _CHUNK]) for i in range(0, len(unknown), _CHUNK)]
    for chunk, described in run(describe_all, chunks, lambda chunk: f"{chunk[0].full_name} ..."):
        if isinstance(described, Exception):
            described = [(0, a.full_name) for a in chunk]
        for architecture, description in zip(chunk, described, strict=True):
            results.networks[architecture.full_name] = (architecture.family, *description)
        results.save()
    if any(a.full_name not in results.networks for a in architectures):
        return  # No time is left.

    examined = results.examined
    todo = [
        architecture
        for architecture in ordered(architectures, results)
        if results.networks[architecture.full_name][-1] not in examined
    ]
    for architecture, row in run(examine, todo, lambda a: a.full_name):
        if isinstance(row, Exception):
            error = _describe("process", row)
            row = {"model": architecture.full_name, "error": error, "stock": None}
        results.rows[architecture.full_name] = row | {"with": made_with}
        results.save()

    rows = results.rows
    todo = [a for a in architectures if a.full_name in rows]
    todo = [a for a in todo if rows[a.full_name]["error"] and not rows[a.full_name]["stock"]]
    for architecture, stock in run(examine_stock, todo, lambda a: f"stock {a.full_name}"):
        if isinstance(stock, Exception):
            stock = _describe("process", stock)
        results.rows[architecture.full_name]["stock"] = stock
        results.save()


def headline(results: Results) -> list[str]:
    """Say what fails or violates the rules, and how many networks compile."""
    lines = []
    for row in results.rows.values():
        if row["error"]:
            lines.append(f"{row['model']}: {row['error']} (stock: {row['stock']})")
        lines += [f"{row['model']}: {violation}" for violation in row.get("violations", ())]
    examined = results.examined
    rows = [examined[digest] for *_, digest in results.networks.values() if digest in examined]
    compiled = sum(not row["error"] for row in rows)
    return [*lines, f"{compiled} of {len(rows)} networks compile, of {len(results.networks)}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in argv, sys.argv by default; return the exit code."""
    parser = command.Parser(
        "timm_sweep",
        description="Compile a training step of every network of timm and torchvision with sdgp, "
        "aot_eager inside, and check what became of its joint graphs. Goes on where an earlier "
        "run with the same file ended.",
        example="--only 'resnet*' --out timm_sweep.json",
    )
    add = parser.add_argument
    add("--out", type=Path, metavar="FILE", required=True, help="JSON file, saved row by row")
    add("--minutes", type=positive(float), help="begin no network after these (all)")
    add("--jobs", type=positive(int), default=2, help="processes at a time (%(default)s)")
    add("--only", default="*", metavar="GLOB", help="names, as torchvision/resnet18 (%(default)s)")
    limit = "seconds after which a network is given up (%(default)s)"
    add("--limit", type=positive(float), default=600, metavar="SECONDS", help=limit)
    add("--redo", action="store_true", help="what was made with other versions or commits, too")
    args = parser.parse_args(argv)
    try:
        check_file("--out", args.out)
        results = Results.load(args.out)
        chosen = [a for a in list_architectures() if fnmatchcase(a.full_name, args.only)]
        if not chosen:
            raise ValueError(f"--only: expected a glob that fits a network, got {args.only!r}")
    except ValueError as error:
        parser.error(str(error))
    if args.redo:
        current = versions()
        results.rows = {n: row for n, row in results.rows.items() if row["with"] == current}
    try:
        sweep(results, chosen, args.jobs, args.limit, args.minutes)
    except KeyboardInterrupt:
        return 130
    finally:
        print("\n".join(headline(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.timm_summary FILE`: show results of timm_sweep as Markdown."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from sdgp_fx.arguments import OneLineParser
from sdgp_fx.passes.decisions import DEPTHWISE, NO_INPUT_GRADIENT, NOT_A_MULTIPLE

from .harness.report import Row
from .timm_sweep import Results

_KINDS = {"conv": "convolutions", "linear": "linear layers"}
_REASONS = (NO_INPUT_GRADIENT, DEPTHWISE, NOT_A_MULTIPLE)


def summary(results: Results) -> str:
    """Sum up what came out in all, what failed, and each family.

    A network counts as another of the same structure, if that was examined.
    """
    examined = results.examined
    by_family: dict[str, list[Row | None]] = {}
    for name, (family, _, digest) in results.networks.items():
        library = "torchvision/" if name.startswith("torchvision/") else ""
        by_family.setdefault(library + family, []).append(examined.get(digest))
    networks = [row for rows in by_family.values() for row in rows]
    lines = ["# All of timm and torchvision through sdgp", ""]
    lines += _totals(results, networks)
    lines += ["", "## What fails", "", *_failures(results)]
    lines += ["", "## Families", "", *_families(by_family)]
    return "\n".join(lines)


def _totals(results: Results, networks: Sequence[Row | None]) -> list[str]:
    rows = [row for row in networks if row is not None]
    compiled = [row for row in rows if not row["error"]]
    stock = [row for row in rows if row["error"] and row["stock"] == "compiles"]
    layers, modules, pruned, dense = (
        _total(compiled, name) for name in ("layers", "modules", "pruned", "dense")
    )
    gradients, identical = (sum(row[n] for row in compiled) for n in ("gradients", "identical"))
    wrong = sum(bool(row["violations"]) for row in compiled)
    breaks = sum(row["breaks"] > 0 for row in compiled)
    real = sum(not row["fake"] for row in compiled)
    lines = [
        f"{len(networks)} networks, {len(rows)} of them examined, by "
        f"{len(results.rows)} of different structure: a training step, compiled by sdgp with "
        "aot_eager inside, n:m = 2:4, targets conv and linear.",
        "",
        f"- {len(compiled)} compile, {breaks} of these with graph breaks; "
        f"{len(rows) - len(compiled)} fail, of which stock aot_eager compiles {len(stock)}.",
        f"- {wrong} have a joint graph that was changed in any other way than by prunes of input "
        "gradients.",
        f"- Of {gradients} gradients {identical} have no pruned layer downstream, and are computed "
        "as before.",
    ]
    for kind, name in _KINDS.items():
        reasons = {reason: dense[f"{kind}: {reason}"] for reason in _REASONS}
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        lines.append(
            f"- {layers[kind]} {name} found of {modules[kind]} modules with a gradient, "
            f"{pruned[kind]} pruned; dense: {why or 'none'}."
        )
    tensors = f"Tensors have no values but in {real} networks, which look at them. Made with "
    return [*lines, "", tensors + "; ".join(sorted({row["with"] for row in rows})) + "."]


def _failures(results: Results) -> list[str]:
    header = ["| network | fails | stock aot_eager |", "|---|---|---|"]
    failed = [row for row in results.rows.values() if row["error"]]
    lines = [
        "| " + " | ".join(_cell(row[name]) for name in ("model", "error", "stock")) + " |"
        for row in failed
    ]
    return [*header, *lines] if failed else ["Nothing."]


def _families(by_family: dict[str, list[Row | None]]) -> list[str]:
    lines = [
        "Layers are convolutions + linear layers.",
        "",
        "| family | networks | examined | compile | layers | pruned | "
        + " | ".join(_REASONS)
        + " |",
        "|---|" + "---:|" * (5 + len(_REASONS)),
    ]
    for family, networks in sorted(by_family.items()):
        rows = [row for row in networks if row is not None]
        compiled = [row for row in rows if not row["error"]]
        dense = _total(compiled, "dense")
        cells = [family, *map(str, (len(networks), len(rows), len(compiled)))]
        for counts in (_total(compiled, "layers"), _total(compiled, "pruned")):
            cells.append(" + ".join(str(counts[kind]) for kind in _KINDS))
        for reason in _REASONS:
            cells.append(" + ".join(str(dense[f"{kind}: {reason}"]) for kind in _KINDS))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _total(rows: Iterable[Row], name: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row[name])
    return total


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in argv, sys.argv by default; return the exit code."""
    parser = OneLineParser(
        prog="python -m benchmarks.timm_summary",
        description="Show results of benchmarks.timm_sweep on a page of Markdown.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="results of timm_sweep")
    path = parser.parse_args(argv).file
    try:
        results = Results.load(path)
        if not results.rows:
            raise ValueError(f"expected results of timm_sweep, got {path}")
    except ValueError as error:
        parser.error(str(error))
    print(summary(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

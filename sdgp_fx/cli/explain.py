"""`python -m sdgp_fx explain MODEL`: the layers of a network, and what becomes of them."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from ..arguments import PICTURES, check_file, refuse, refusing_values
from ..errors import first_line
from ..inspection.explain import explain
from ..inspection.report import Explanation
from ..measurement.networks import Uninitialized, build_network, check_model, default_input_size


def run(
    *,
    options: dict[str, Any],
    model: str,
    input_size: tuple[int, ...] | None,
    batch: int,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Explain a timm network, and print and draw the report.

    Args:
        options: The "sdgp." options, checked.
        input_size: (H, W) or (C, H, W); None for what the network is made for.

    Raises:
        argparse.ArgumentError: The network or the picture cannot be had.
    """
    with refusing_values():
        check_picture(plot)
        check_model(model, "MODEL")
    if plot is not None:
        import matplotlib  # noqa: F401  (It is missed now, not after the work.)
    report = explain_network(model, input_size, batch, options)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        show(report)
    if plot is not None:
        report.plot(plot)


def check_picture(path: Path | None) -> None:
    """Check that a picture can be written to path.

    Raises:
        ValueError: It cannot.
    """
    if path is not None and path.suffix not in PICTURES:
        expected = ", ".join(PICTURES)
        raise ValueError(f"--plot: expected a file that ends in {expected}, got {path}")
    check_file("--plot", path)


def explain_network(
    model: str, input_size: tuple[int, ...] | None, batch: int, options: dict[str, Any]
) -> Explanation:
    """Explain a timm network without memory for its parameters; refuse images it cannot take."""
    own = default_input_size(model)
    given = (*own[: 3 - len(input_size)], *input_size) if input_size else own
    channels = {} if given[0] == own[0] else {"in_chans": given[0]}
    size = None if given == own else (given[1], given[2])
    try:
        with Uninitialized():
            network = build_network(model, size, **channels)
        return explain(network, torch.empty(batch, *given), options=options)
    except Exception as error:  # Networks refuse a size with whatever error they happen to meet.
        if given == own and batch > 1:
            raise
        refuse(
            f"{model} takes no batch of {'x'.join(map(str, (batch, *given)))} "
            f"({first_line(error)}); it is meant for --input-size {'x'.join(map(str, own))}"
            + (", and --batch 2 or more" if batch == 1 else "")
        )


def show(report: Explanation) -> None:
    """Print by rich if it is installed and the output goes to a terminal, else as plain lines."""
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            from rich.console import Console

            return Console().print(report)
    print(report)

"""Types and checks of arguments that commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ..config import SDGPConfig


def positive(number: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type for argparse: number, above 0."""

    def parse(text: str) -> Any:
        try:
            value = number(text)
        except ValueError:
            value = 0
        if not value > 0:
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
        return value

    return parse


def pattern(text: str) -> tuple[int, int]:
    """A type for argparse: n and m of "n:m"."""
    n, _, m = text.partition(":")
    if not (n.isdecimal() and m.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected n:m, such as 2:4, got {text!r}")
    try:
        config = SDGPConfig(n=int(n), m=int(m))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return config.n, config.m


def _options(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Options for the backend from arguments of the same names, checked."""
    options = {f"sdgp.{name}": getattr(args, name) for name in names}
    try:
        SDGPConfig.from_options(options)
    except ValueError as error:
        raise argparse.ArgumentError(None, str(error)) from None
    return options

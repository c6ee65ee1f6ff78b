"""Parse command lines: types for argparse, and a parser with errors of one line."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from .config import check_pattern

# Suffixes of the pictures that commands draw.
PICTURES = (".png", ".svg", ".pdf")


class OneLineParser(argparse.ArgumentParser):
    """Parser that reports a usage error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def positive(number: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a type for argparse that accepts numbers above 0.

    Args:
        number: Converts the text, int or float.
    """

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
    """Parse "n:m" into n and m; a type for argparse."""
    n, _, m = text.partition(":")
    if not (n.isdecimal() and m.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected n:m, such as 2:4, got {text!r}")
    try:
        check_pattern(int(n), int(m), "sdgp.")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return int(n), int(m)


def check_file(option: str, path: Path | None) -> None:
    """Check, ahead of the work, that a file can be written to path.

    Args:
        option: The option that path was given as, for the message.

    Raises:
        ValueError: There is no such folder, or a folder is where the file would go.
    """
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ValueError(f"{option}: expected a file in a folder that exists, got {path}")


def refuse(message: str) -> NoReturn:
    """Raise what a command reports as a usage error: one line, and the exit code 2."""
    raise argparse.ArgumentError(None, message)


@contextlib.contextmanager
def refusing_values() -> Iterator[None]:
    """Turn a ValueError that is raised inside into a usage error."""
    try:
        yield
    except ValueError as error:
        refuse(str(error))

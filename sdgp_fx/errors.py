"""Messages of exceptions, for people."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not blank, or else its class."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)

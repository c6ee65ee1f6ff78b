"""The command line: `python -m sdgp_fx --help`."""

from __future__ import annotations

import argparse
import os
import sys

from .parser import make_parser

_EXTRA = ("matplotlib", "rich", "sklearn", "timm", "torchvision")


def main(argv: list[str] | None = None) -> int:
    """Run the command in argv, sys.argv by default; return the exit code."""
    settings = vars(make_parser().parse_args(argv))
    run, fail = settings.pop("run"), settings.pop("fail")
    try:
        run(**settings)
        sys.stdout.flush()
    except BrokenPipeError:  # Of a reader that has seen enough, such as head.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except argparse.ArgumentError as error:
        fail(str(error))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        fail(f'{missing} is not installed: pip install "sdgp_fx[demo]"')
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0

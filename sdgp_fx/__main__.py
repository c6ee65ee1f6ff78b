"""`python -m sdgp_fx`: the command line of `cli`."""

from __future__ import annotations

import signal
import sys

from .cli.main import main

if __name__ == "__main__":
    code = main()
    # The compilers' processes take seconds to end; an interrupt then has nothing left to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)

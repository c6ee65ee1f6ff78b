"""Make calls in other processes, which may die or hang."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

Call = tuple[Any, Callable[..., Any], tuple[Any, ...]]


class _Worker:
    """A process that makes calls, one after another.

    Attributes:
        calls: How many it was given.
        key: Of the call that it is making; None if it is idle.
        end: When that call is given up.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.calls = 0
        self.key: Any = None
        self.end = 0.0

    def start(self, call: Call, limit: float) -> None:
        """Begin a call, which is given up after limit seconds."""
        self.key, function, args = call
        self.calls += 1
        self.end = time.monotonic() + limit
        with contextlib.suppress(BrokenPipeError):  # It has died, which result tells.
            self.connection.send((function, args))

    def result(self) -> Any:
        """Return the call's result; a ChildProcessError if the process died over it."""
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            return ChildProcessError(f"died with exit code {self.process.exitcode}")

    def stop(self) -> None:
        """End the process, and the call that it is making."""
        self.connection.close()  # An idle process ends by that.
        if self.key is not None:
            self.process.kill()
        self.process.join()


def run_apart(
    calls: Iterable[Call], jobs: int, limit: float, lifetime: int
) -> Iterator[tuple[Any, Any]]:
    """Make calls, each (key, function, arguments), jobs at a time.

    What functions print is lost. Calls are taken when they can start.

    Args:
        limit: Seconds after which a call is given up.
        lifetime: Calls that a process makes before another takes its place.

    Yields:
        (key, result), as calls end. A call that raises has a RuntimeError as its result, with the
        error's class and message; one whose process dies a ChildProcessError; one that is given up
        a TimeoutError.
    """
    waiting = iter(calls)
    idle: list[_Worker] = []
    busy: list[_Worker] = []
    try:
        while True:
            while len(busy) < jobs and (call := next(waiting, None)) is not None:
                busy.append(idle.pop() if idle else _Worker())
                busy[-1].start(call, limit)
            if not busy:
                return
            left = min(worker.end for worker in busy) - time.monotonic()
            ready = wait([worker.connection for worker in busy], max(0.0, left))
            for worker in list(busy):
                if worker.connection in ready:
                    result = worker.result()
                elif time.monotonic() >= worker.end:
                    result = TimeoutError(f"took longer than {limit:g} s")
                else:
                    continue
                busy.remove(worker)
                key = worker.key
                if not isinstance(result, (ChildProcessError, TimeoutError)):
                    worker.key = None
                if worker.key is None and worker.calls < lifetime:
                    idle.append(worker)
                else:
                    worker.stop()
                yield key, result
    finally:
        for worker in idle + busy:
            worker.stop()


def _work(connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The caller ends this process.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    with contextlib.suppress(EOFError):  # recv raises it when no call will follow.
        while True:
            function, args = connection.recv()
            try:
                result = function(*args)
            except Exception as error:
                result = RuntimeError(f"{type(error).__name__}: {error}")
            connection.send(result)

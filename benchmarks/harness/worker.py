"""Run benchmarks in a process that may hang or die."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any

import torch

from sdgp_fx.errors import first_line

from .benchmark import Benchmark
from .report import Report

DONE, FAILED, NO_TIME = "done", "failed", "no time left"


@dataclasses.dataclass(frozen=True)
class Part:
    """A benchmark with its settings, as a suite runs it.

    Attributes:
        share: The largest share of the suite's time that it may take.
        least: Seconds; it isn't begun with less than these left.
        check: Nothing else is measured if this fails.
    """

    name: str
    benchmark: Benchmark
    settings: dict[str, Any]
    share: float
    least: float = 0
    needs_cuda: bool = False
    check: bool = False


class Worker:
    """A process that runs parts, one after the other.

    It is of its own so that nothing a part does keeps the suite from its end: not a compilation
    that no signal interrupts, a crash, or an error after which a process can't use the GPU.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,))
        # Ctrl-C goes to all processes of a terminal; started so, these leave it to the suite.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, handler)
        theirs.close()
        assert self.process.pid is not None
        self.leader = self.process.pid

    def run(
        self, part: Part, device: torch.device, report: Report, deadline: float
    ) -> tuple[str, int | None, list[str]]:
        """Run a part.

        Args:
            report: Gets the rows.
            deadline: When the part is given up, as by `monotonic`.

        Returns:
            Its status, how many tasks it has if that is known, and errors.
        """
        tasks = None
        errors = []
        with suppress(ConnectionError):  # A process that has ended shows below.
            self.connection.send((part, device))
        while (left := deadline - monotonic()) > 0 and self.connection.poll(left):
            try:
                kind, value = self.connection.recv()
            except (EOFError, ConnectionError):
                self.process.join()
                errors.append(f"the process ended with exit code {self.process.exitcode}")
                return FAILED, tasks, errors
            if kind == "tasks":
                tasks = value
            elif kind == "rows":
                report.add(value)
            elif kind == "error":
                errors.append(value)
            else:
                return FAILED if errors else DONE, tasks, errors
        return NO_TIME, tasks, errors

    def end(self, patience: float = 0) -> None:
        """End the process and what it has started.

        Args:
            patience: Seconds in which it may end by itself.
        """
        self.connection.close()
        self.process.join(patience)
        with suppress(ProcessLookupError):  # All have ended, or it has not made its group yet.
            os.killpg(self.leader, signal.SIGKILL)
        self.process.kill()
        self.process.join()


def serve(connection: Connection) -> None:
    """Run the parts that come from connection, and send back their messages."""
    os.setsid()
    while True:
        try:
            part, device = connection.recv()
        except EOFError:
            return
        for message in messages(part, device):
            connection.send(message)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def messages(part: Part, device: torch.device) -> Iterator[tuple[str, Any]]:
    """Run a part.

    Yields:
        ("tasks", number), for each task ("rows", its rows) or ("error", in words), ("end", None).
    """
    try:
        tasks = part.benchmark.tasks(device, part.settings)
    except Exception as error:
        yield "error", _in_words(error)
        tasks = []
    yield "tasks", len(tasks)
    for task in tasks:
        try:
            yield "rows", task.run()
        except Exception as error:
            yield "error", f"{task.name}: {_in_words(error)}"
    yield "end", None


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"

"""Report a benchmark as one JSON file: its rows, its settings, and where it ran."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass
class Report:
    """Rows of a benchmark, saved whenever some are added.

    Attributes:
        path: Where they are saved, a line for each row; None for nowhere.
    """

    benchmark: str
    environment: dict[str, Any]
    settings: dict[str, Any]
    path: Path | None = None
    rows: list[Row] = dataclasses.field(default_factory=list)

    def add(self, rows: list[Row]) -> None:
        """Append rows and save."""
        self.rows += rows
        if self.path is not None:
            fields = ("benchmark", "environment", "settings")
            head = json.dumps({name: getattr(self, name) for name in fields}, indent=1)
            lines = ",\n  ".join(map(json.dumps, self.rows))
            write_text(self.path, f'{head[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n')


def write_text(path: Path, text: str) -> None:
    """Write a file in one piece: whatever interrupts this, it is never there in part."""
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def environment(device: torch.device) -> dict[str, Any]:
    """Describe where and with what a benchmark runs; None for what is not there, or not known."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else None,
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "torch": torch.__version__,
        "triton": _triton(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(ROOT),
    }


def caption(benchmark: str, environment: dict[str, Any]) -> str:
    """Say in one line what was measured, where, with what and when."""
    versions = ("torch", "triton", "cuda", "cudnn")
    known = [f"{name} {environment[name]}" for name in versions if environment[name] is not None]
    made_of = f"commit {environment['commit'] or 'unknown'}"
    return ", ".join(
        [f"{benchmark} on {environment['device']}", *known, environment["date"], made_of]
    )


def commit(folder: Path) -> str | None:
    """Return the commit that folder is at, with "+changes" if tracked files differ from it."""
    describe = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+changes"]
    try:
        run = subprocess.run(
            describe, cwd=folder, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _cpu_name() -> str:
    model = _search(r"model name\s*: (.*)", "/proc/cpuinfo") or platform.machine()
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"CPU {model} ({instructions}), {torch.get_num_threads()} threads"


def _driver() -> str | None:
    return _search(r"Module\b.*?\s(\d+\.[\d.]+)", "/proc/driver/nvidia/version")


def _search(pattern: str, path: str) -> str | None:
    try:
        found = re.search(pattern, Path(path).read_text())
    except OSError:
        return None
    return found and found[1]

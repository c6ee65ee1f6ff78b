"""The command line that all benchmarks have in common."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from sdgp_fx.cli.arguments import positive
from sdgp_fx.config import INNER_COMPILERS, PRUNING_FUNCTIONS, RESCALE_SCOPES, STRUCTURES

from .benchmark import Benchmark
from .report import Report, environment
from .terminal import progress

DTYPES = ("bfloat16", "float16", "float32")
MEMORY_FORMATS = {
    "channels_last": torch.channels_last,
    "contiguous": torch.contiguous_format,
}


class _Append(argparse.Action):
    """Append to a list of which the default is no part."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if given is self.default else given), values])


class Parser(argparse.ArgumentParser):
    """With errors of one line, and the options of every benchmark."""

    def __init__(self, module: str, description: str, example: str = "") -> None:
        prog = f"python -m benchmarks.{module}"
        super().__init__(
            prog=prog, description=description, epilog=f"example: {prog} {example}".rstrip()
        )
        devices = "auto is cuda if there is one (%(default)s)"
        self.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=devices)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def add_list(
        self, option: str, dest: str, default: Sequence[Any], help: str, **kwargs: Any
    ) -> None:
        """Add an option that may be given several times."""
        values = (value if isinstance(value, tuple) else (value,) for value in default)
        listed = ", ".join(":".join(map(str, value)) for value in values)
        described = f"{help}, may be given several times ({listed})"
        self.add_argument(
            option, dest=dest, action=_Append, default=list(default), help=described, **kwargs
        )

    def add_out(self) -> None:
        """Add --out."""
        self.add_argument("--out", type=Path, metavar="FILE", help="JSON file, saved row by row")

    def add_models(self, default: Sequence[str]) -> None:
        """Add --model, --batch and --size."""
        add = self.add_argument
        self.add_list("--model", "models", default, metavar="NAME", help="timm network")
        add("--batch", type=positive(int), default=256, metavar="IMAGES", help="(%(default)s)")
        add("--size", type=positive(int), default=224, metavar="PIXELS", help="(%(default)s)")

    def add_dtype(self, choices: Sequence[str], default: str, help: str = "") -> None:
        """Add --dtype."""
        described = f"{help} (%(default)s)".lstrip()
        self.add_argument("--dtype", choices=choices, default=default, help=described)

    def add_memory_format(self) -> None:
        """Add --memory-format."""
        formats = list(MEMORY_FORMATS)
        add = self.add_argument
        add("--memory-format", choices=formats, default=formats[0], help="(%(default)s)")

    def add_pruning(self) -> None:
        """Add --n, --m, --prune, --rescale and --structure, of SDGPConfig."""
        add = self.add_argument
        add("--n", type=int, default=2, help="values kept of every m channels (%(default)s)")
        add("--m", type=int, default=4, help="channels in a group (%(default)s)")
        function, scope = "rescaled_magnitude", "group"
        add("--prune", choices=PRUNING_FUNCTIONS, default=function, help="(%(default)s)")
        add("--rescale", choices=RESCALE_SCOPES, default=scope, help="(%(default)s)")
        add("--structure", choices=STRUCTURES, default=STRUCTURES[0], help="(%(default)s)")

    def add_inner(self) -> None:
        """Add --inner, of SDGPConfig."""
        inner = "aot_eager generates no code: to try this command (%(default)s)"
        self.add_argument("--inner", choices=INNER_COMPILERS, default="inductor", help=inner)

    def add_cudnn_benchmark(self) -> None:
        """Add --cudnn-benchmark."""
        chosen = "let cuDNN try its algorithms (torch.backends.cudnn.benchmark)"
        self.add_argument("--cudnn-benchmark", action="store_true", help=chosen)

    def add_seconds(self, default: float) -> None:
        """Add --seconds."""
        budget = "about how long to measure each row (%(default)s)"
        self.add_argument("--seconds", type=positive(float), default=default, help=budget)


def run(benchmark: Benchmark, parser: Parser, argv: Sequence[str] | None) -> int:
    """Measure what argv (sys.argv by default) asks for, and show it; return the exit code."""
    settings = vars(parser.parse_args(argv))
    path = settings.pop("out")
    try:
        try:
            check_out(path)
            device = find_device(settings.pop("device"))
            tasks = benchmark.plan(device, **settings)
        except ValueError as error:
            parser.error(str(error))
        report = Report(benchmark.name, environment(device), settings, path)
        try:
            with progress(len(tasks)) as begin:
                for task in tasks:
                    begin(task.name)
                    report.add(task.run())
        finally:
            benchmark.show(report)
    except KeyboardInterrupt:
        return 130
    return 0


def find_device(name: str) -> torch.device:
    """The device of this name; "auto" is CUDA if there is one. Raises ValueError without one."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("--device: expected auto or cpu where torch finds no GPU, got cuda")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def check_out(path: Path | None) -> None:
    """Raise ValueError, ahead of the work, for a path that no file can be written to."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ValueError(f"--out: expected a file in a folder that exists, got {path}")

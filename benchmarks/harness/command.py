"""Parse the options that benchmarks share, run a benchmark, and show what came out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sdgp_fx.arguments import OneLineParser, check_file, positive
from sdgp_fx.config import (
    INNER_COMPILERS,
    LAYERS,
    PRODUCTS,
    PRUNING_FUNCTIONS,
    RESCALE_SCOPES,
    STRUCTURES,
    TARGETS,
)
from sdgp_fx.measurement.workload import MEMORY_FORMATS

from .benchmark import Benchmark
from .report import Report, environment
from .terminal import progress

# The pruning functions, each with the scopes that make a difference to it.
VARIANTS = [
    (prune, rescale)
    for prune in PRUNING_FUNCTIONS
    for rescale in (RESCALE_SCOPES if prune == "rescaled_magnitude" else ("group",))
]


class _Append(argparse.Action):
    """Append to a list that the default is no part of."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if given is self.default else given), values])


class Parser(OneLineParser):
    """Parser with methods for the options that benchmarks share; all have --device.

    Args:
        module: The command's module, below benchmarks.
        example: Arguments, for the help.
    """

    def __init__(self, module: str, description: str, example: str = "") -> None:
        prog = f"python -m benchmarks.{module}"
        super().__init__(
            prog=prog, description=description, epilog=f"example: {prog} {example}".rstrip()
        )
        devices = "auto is cuda if there is one (%(default)s)"
        self.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=devices)

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
        """Add --n, --m, --prune, --rescale, --structure, --layers and --product, of SDGPConfig."""
        add = self.add_argument
        add("--n", type=int, default=2, help="values kept of every m channels (%(default)s)")
        add("--m", type=int, default=4, help="channels in a group (%(default)s)")
        function = "(rescaled_magnitude, of whole channels magnitude)"
        add("--prune", choices=PRUNING_FUNCTIONS, help=function)
        add("--rescale", choices=RESCALE_SCOPES, default="group", help="(%(default)s)")
        add("--structure", choices=STRUCTURES, default=STRUCTURES[0], help="(%(default)s)")
        add("--layers", choices=LAYERS, default=LAYERS[0], help="(%(default)s)")
        add("--product", choices=PRODUCTS, default=PRODUCTS[0], help="(%(default)s)")

    def add_targets(self) -> None:
        """Add --targets, of SDGPConfig."""
        targets = f"{' or '.join(TARGETS)}, or both with a comma (%(default)s)"
        self.add_argument("--targets", default=TARGETS[0], help=targets)

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
    """Measure what argv asks for, and show it.

    Args:
        argv: sys.argv by default.

    Returns:
        The exit code.
    """
    settings = vars(parser.parse_args(argv))
    path = settings.pop("out")
    try:
        try:
            check_file("--out", path)
            device = find_device(settings.pop("device"))
            tasks = benchmark.tasks(device, settings)
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
    """Return the device of this name; "auto" is CUDA if there is one.

    Raises:
        ValueError: It is "cuda", and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("--device: expected auto or cpu where torch finds no GPU, got cuda")
    return torch.device("cuda" if available and name != "cpu" else "cpu")

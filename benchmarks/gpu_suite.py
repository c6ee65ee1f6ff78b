"""`python -m benchmarks.gpu_suite`: check that the kernels are right, then time everything."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from sdgp_fx.arguments import positive
from sdgp_fx.config import PRUNING_FUNCTIONS
from sdgp_fx.kernels.sparse import store
from sdgp_fx.measurement.workload import MEMORY_FORMATS

from . import (
    ceilings,
    convolutions,
    products,
    prune_op,
    sparse_mm,
    train_step,
    whole_channels,
)
from .harness import command
from .harness.benchmark import AUTO
from .harness.correctness import KERNELS, NETWORK, PRODUCTS, failures
from .harness.report import Report, caption, environment
from .harness.terminal import progress
from .harness.worker import DONE, FAILED, NO_TIME, Part, Worker

# Seconds for what comes before the first part and after the last.
RESERVE = 10
# Lines at the end of an output that are sure to be seen.
LINES = 40

NEEDS_CUDA = "needs CUDA"


@dataclasses.dataclass
class Outcome:
    """The outcome of a part.

    Attributes:
        status: DONE, FAILED, NO_TIME or NEEDS_CUDA.
        tasks: How many it has; None if that is not known.
        errors: What was raised, or found wrong.
    """

    part: str
    status: str
    rows: int = 0
    tasks: int | None = None
    seconds: float = 0
    errors: list[str] = dataclasses.field(default_factory=list)
    headline: list[str] = dataclasses.field(default_factory=list)


def suite(quick: bool, processes: int) -> list[Part]:
    """List the parts, the most important first.

    Args:
        quick: Small shapes, to see that everything runs.
        processes: How many check the kernels.
    """
    networks = ["resnet18", "resnet50", "regnetx_004", "convnext_tiny"]
    images: dict[str, Any] = {"batch": 256, "size": 224}
    seconds, least = 0.5, 45
    if quick:
        networks, images, seconds, least = ["test_resnet"], {"batch": 2, "size": 32}, 0.01, 0
    resnets = networks[:2]
    dtype = {"dtype": "bfloat16"}
    format_ = {"memory_format": "channels_last", "cudnn_benchmark": False}
    deterministic = [v for v in command.VARIANTS if v[0] in ("magnitude", "rescaled_magnitude")]

    kernels = {"ms": (4,) if quick else (4, 2, 8, 16, 32), "processes": processes}
    network: dict[str, Any] = {
        "variants": deterministic,
        "memory_formats": list(MEMORY_FORMATS),
    }
    if quick:
        network = {name: values[-1:] for name, values in network.items()}
    check = {**images, **dtype, "models": resnets, "batches": (2,) if quick else (32, 256)}
    best = {"copy_mib": 1, "sizes": [64]} if quick else {"copy_mib": 1024, "sizes": [8192]}
    best |= {**dtype, "seconds": 2 * seconds}
    prune = {**images, **dtype, "models": resnets, "seconds": seconds}
    prune |= {"functions": PRUNING_FUNCTIONS, "everything": False}
    step = {**images, **format_, "dtype": AUTO, "mode": "default", "compiles": 1}
    step |= {"n": 2, "m": 4, "prune": "rescaled_magnitude", "rescale": "group"}
    step |= {"structure": "element", "layers": "all", "product": "auto"}
    step |= {"also": (), "cached": False, "cpu_time": False}
    step |= {"inner": "aot_eager" if quick else "inductor", "seconds": 20 * seconds}
    convolution = {**images, **dtype, **format_, "seconds": seconds}
    whole = {
        **convolution,
        "models": resnets[:1],
        "patterns": whole_channels.PATTERNS[: 1 if quick else None],
    }
    whole |= {"prune": "magnitude", "inner": step["inner"]}
    sparse = {**images, **dtype, "squares": [4096, 8192], "seconds": seconds}

    def train(model: str) -> Part:
        settings = {**step, "models": [model]}
        return Part(f"train_step_{model}", train_step.BENCHMARK, settings, 0.25, least)

    def convolve(model: str) -> Part:
        settings = {**convolution, "models": [model]}
        return Part(f"convolutions_{model}", convolutions.BENCHMARK, settings, 0.15)

    def multiply(model: str) -> Part:
        settings = {**images, **dtype, "models": [model], "targets": "conv", "threads": None}
        settings |= {"patterns": [(2, 4)], "prune": "rescaled_magnitude", "seconds": seconds}
        # The CPU, on which a dry run is made, may have no fast bfloat16.
        settings |= {"dtype": "float32"} if quick else {}
        return Part(f"products_{model}", products.BENCHMARK, settings, 0.3 if quick else 0.1)

    def pruning(name: str, share: float, **settings: Any) -> Part:
        return Part(name, prune_op.BENCHMARK, {**prune, **settings}, share)

    return [
        Part("products_check", PRODUCTS, check, 0.15, check=True),
        Part("kernels", KERNELS, kernels, 0.15, check=True),
        Part("network", NETWORK, network, 0.15, check=True),
        *map(multiply, resnets),
        *map(train, resnets),
        Part("ceilings", ceilings.BENCHMARK, best, 0.05),
        pruning("prune_op", 0.15, ms=[4]),
        *map(convolve, resnets),
        Part(
            *("sparse_mm", sparse_mm.BENCHMARK, {**sparse, "models": resnets[-1:]}, 0.15),
            needs_cuda=True,
        ),
        *map(train, networks[2:]),
        pruning("prune_op_patterns", 1, ms=[2, 8, 16, 32]),
        pruning("prune_op_float32", 1, ms=[4], dtype="float32"),
        Part("whole_channels", whole_channels.BENCHMARK, whole, 1),
    ]


def run_suite(
    parts: Sequence[Part], device: torch.device, out: Path, seconds: float, note: str
) -> int:
    """Run parts within seconds; write out/PART.json and out/summary.json.

    Args:
        note: A line for the summary.

    Returns:
        The exit code.
    """
    deadline = monotonic() + seconds
    settings = {"seconds": seconds, "note": note}
    summary = Report("gpu_suite", environment(device), settings, out / "summary.json")
    outcomes: list[Outcome] = []
    worker: Worker | None = None
    code = 0
    try:
        with progress(len(parts)) as begin:
            for part in parts:
                if code and not part.check:
                    break
                begin(part.name)
                left = deadline - monotonic()
                if part.needs_cuda and device.type != "cuda":
                    outcome = Outcome(part.name, NEEDS_CUDA)
                elif left <= part.least:
                    outcome = Outcome(part.name, NO_TIME)
                else:
                    worker = worker or Worker()
                    limit = min(left, part.share * seconds)
                    outcome = run_part(worker, part, device, out, limit)
                    if outcome.status != DONE:
                        worker.end()
                        worker = None
                if part.check and outcome.errors:
                    code = 1
                outcomes.append(outcome)
                summary.add([dataclasses.asdict(outcome)])
    except KeyboardInterrupt:
        code = 130
    finally:
        if worker:
            worker.end(patience=0 if code == 130 else 5)
        lines = [caption("gpu_suite", summary.environment), *filter(None, [note])]
        print("\n".join([*lines, *describe(outcomes)][:LINES]))
    return code


def run_part(
    worker: Worker, part: Part, device: torch.device, out: Path, seconds: float
) -> Outcome:
    """Run one part for so many seconds at most."""
    path = out / f"{part.name}.json"
    path.unlink(missing_ok=True)
    report = Report(part.benchmark.name, environment(device), part.settings, path)
    begin = monotonic()
    status, tasks, errors = worker.run(part, device, report, begin + seconds)
    if part.check:
        errors += failures(report.rows)
    return Outcome(
        part=part.name,
        status=FAILED if errors else status,
        rows=len(report.rows),
        tasks=tasks,
        seconds=monotonic() - begin,
        errors=errors,
        headline=part.benchmark.headline(report.rows) if report.rows else [],
    )


def describe(outcomes: Sequence[Outcome]) -> list[str]:
    """Write a line for each part, then what is wrong, then what came out."""
    width = max((len(outcome.part) for outcome in outcomes), default=0)
    lines = [
        f"{o.part:{width}}  {o.status:{len(NO_TIME)}}  {o.rows:4} rows  {o.seconds:5.1f} s"
        for o in outcomes
    ]
    for outcome in outcomes:
        lines += [f"{outcome.part}: {error}" for error in outcome.errors[:5]]
        if len(outcome.errors) > 5:
            lines.append(f"{outcome.part}: {len(outcome.errors) - 5} more errors")
    return lines + [line for outcome in outcomes for line in outcome.headline]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in argv, sys.argv by default; return the exit code."""
    parser = command.Parser(
        "gpu_suite",
        description="Check on a GPU that the kernels and the compiled backward are right, then "
        "run all benchmarks, the most important first, within a given time. Writes a JSON file "
        "for each part and summary.json, and ends with a summary. The exit code is 1 if "
        "something is wrong; nothing is measured then.",
        example="--out results --minutes 8",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON files")
    minutes = "for everything (%(default)s)"
    add("--minutes", type=positive(float), default=8, help=minutes)
    kernels = "folder of compile_products, for a machine without TileLang"
    add("--kernels", type=Path, metavar="DIR", help=kernels)
    root = "folder of CIFAR-10: the rest of the time trains Table I by the fast recipe"
    add("--root", type=Path, metavar="DIR", help=root)
    quick = "a dry run with small shapes, which the CPU can do too; its figures mean nothing"
    add("--quick", action="store_true", help=quick)
    args = parser.parse_args(argv)
    try:
        device = command.find_device(args.device)
        if device.type == "cpu" and not args.quick:
            raise ValueError("--device: expected cuda, got cpu, which is for --quick alone")
        args.out.mkdir(parents=True, exist_ok=True)
        if args.kernels:
            shutil.copytree(args.kernels, store.folder(), dirs_exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    note = "dry run with small shapes: the figures mean nothing" if args.quick else ""
    # Each compiles on a processor, and holds some of the GPU's memory.
    processes = min(8, os.cpu_count() or 1) if device.type == "cuda" else 0
    seconds = max(1, 60 * args.minutes - RESERVE)
    begin = monotonic()
    code = run_suite(suite(args.quick, processes), device, args.out, seconds, note)
    left = seconds - (monotonic() - begin)
    if args.root and not code and left > 0:
        code = train_table(args.root, args.out, left / 60, args.quick)
    return code


def train_table(root: Path, out: Path, minutes: float, quick: bool) -> int:
    """Train the settings of Table I by the fast recipe; return the exit code.

    Runs that out has are not done again.
    """
    command = [sys.executable, "-m", "benchmarks.paper", "table1", "--recipe", "fast"]
    command += ["--root", str(root), "--out", str(out / "table1.json")]
    command += ["--picture", str(out / "table1.png"), "--minutes", str(minutes)]
    if quick:
        command += ["--width", "0.25", "--epochs", "1", "--seeds", "1", "--fraction", "0.02"]
        command += ["--test-fraction", "0.02", "--compiler", "aot_eager", "--dtype", "float32"]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.train_step`: time a training step, stock Inductor and sdgp in turn."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from time import perf_counter, process_time
from typing import Any
from unittest import mock

import torch
import torch._inductor
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from sdgp_fx import SDGPConfig, sdgp
from sdgp_fx.arguments import pattern, positive
from sdgp_fx.measurement import timing
from sdgp_fx.measurement.steps import Step, make_step
from sdgp_fx.measurement.workload import CLASSES, DTYPES, Workload

from .harness import command
from .harness.benchmark import AUTO, Benchmark, Task, options_of
from .harness.report import Row

STOCK, SDGP = "stock", "sdgp"


@dataclasses.dataclass(frozen=True)
class Compiler:
    """Settings that a network is compiled with.

    Attributes:
        mode: torch.compile's.
        config: Of sdgp; stock has its inner compiler alone.
        cached: Whether Inductor's caches may serve what they have.
        is_stock: Whether it is stock's inner compiler, or sdgp.
    """

    mode: str
    config: SDGPConfig
    cached: bool = False
    is_stock: bool = False

    def compile(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return model compiled, when it is first called within environment()."""
        # A backend of its own: what Dynamo has compiled with an equal one it would use again.
        backend = self.config.inner if self.is_stock else partial(sdgp)
        return torch.compile(model, backend=backend, mode=self.mode)

    @contextlib.contextmanager
    def environment(self) -> Iterator[None]:
        """Put the settings of sdgp into the environment, and have empty caches unless cached.

        torch.compile takes a mode or options, not both; the environment goes with either.
        """
        settings = {**options_of(self.config), "inner": self.config.inner}
        variables = {f"SDGP_{name.upper()}": str(value) for name, value in settings.items()}
        caches = contextlib.nullcontext() if self.cached else fresh_cache()
        with mock.patch.dict(os.environ, variables), caches:
            yield


def plan(
    workloads: Sequence[Workload],
    config: SDGPConfig,
    mode: str,
    inner: str,
    also: Sequence[tuple[int, int]],
    compiles: int,
    cudnn_benchmark: bool,
    cached: bool,
    cpu_time: bool,
    seconds: float,
) -> list[Task]:
    """Plan a task for each network, after one that has the compiler start what it needs.

    Args:
        workloads: On one device.
        mode: torch.compile's.
        also: n and m of patterns beside config's.
        compiles: How often each network is compiled.
        cached: Let Inductor's caches serve what they have.
        cpu_time: Time the process, not the clock.
    """
    device = workloads[0].device
    if inner == "aot_eager" and mode != "default":
        raise ValueError(f"--mode: expected default with --inner aot_eager, got {mode}")
    if cpu_time and (device.type != "cpu" or torch.get_num_threads() > 1):
        raise ValueError(
            f"--cpu-time: expected one thread (OMP_NUM_THREADS=1) of a CPU, got {device.type} and "
            f"{torch.get_num_threads()} threads"
        )
    config = dataclasses.replace(config, inner=inner)
    compilers = {STOCK: Compiler(mode, config, cached, is_stock=True)}
    compilers[SDGP] = Compiler(mode, config, cached)
    for n, m in also:
        other = dataclasses.replace(config, n=n, m=m)
        compilers[f"{SDGP} {n}:{m}"] = Compiler(mode, other, cached)
    clock = process_time if cpu_time else perf_counter
    tasks = [Task("starting the compiler", partial(start_compiler, device, compilers))]
    for workload in workloads:
        run = partial(measure, workload, compilers, compiles, cudnn_benchmark, seconds, clock)
        tasks.append(Task(workload.model, run))
    return tasks


def start_compiler(device: torch.device, compilers: Mapping[str, Compiler]) -> list[Row]:
    """Compile something small, so that the first network isn't charged for what all need."""
    layers = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(32 * 4 * 4, CLASSES)).to(device)
    images = torch.randn(2, 3, 8, 8, device=device)
    labels = torch.randint(CLASSES, (2,), device=device)
    for name in (STOCK, SDGP):
        compiler = compilers[name]
        step = make_step(compiler.compile(network), network, images, labels, torch.float32)
        with compiler.environment():
            step()
    return []


def measure(
    workload: Workload,
    compilers: Mapping[str, Compiler],
    compiles: int,
    cudnn_benchmark: bool,
    seconds: float,
    clock: Callable[[], float] = perf_counter,
) -> list[Row]:
    """Time steps that are compiled from the same weights, and train on the same batch.

    Args:
        compilers: By name; all but STOCK are compared with it.
        compiles: How often to compile each; the last compilations are timed.
        seconds: About how long to time all.
        clock: Of the steps; the first step's time, which is to compile, is always perf_counter's.

    Returns:
        A row for each compiler but STOCK.
    """
    torch.backends.cudnn.benchmark = cudnn_benchmark
    torch.manual_seed(0)
    network: Any = workload.build().to(workload.device)
    network = network.to(memory_format=workload.torch_memory_format)
    images, labels = workload.random_batch()
    first: dict[str, list[float]] = {name: [] for name in compilers}
    losses: dict[str, float] = {}
    for _ in range(compiles):
        # Drops what earlier rounds compiled; nothing compiled after it is lost before the timing.
        torch._dynamo.reset()
        steps: dict[str, Step] = {}
        for name, compiler in compilers.items():
            twin = copy.deepcopy(network)
            compiled = compiler.compile(twin)
            step = make_step(compiled, twin, images, labels, workload.torch_dtype)
            with compiler.environment():
                begin = perf_counter()
                losses[name] = step().item()
                first[name].append(perf_counter() - begin)
            steps[name] = step
    samples = timing.sample(steps, workload.device, seconds, clock)
    times = {name: timing.summarize(column) for name, column in samples.items()}
    # A CUDA graph's memory is allocated once and for all, not in the step.
    modes = torch._inductor.list_mode_options(compilers[STOCK].mode)
    graphs = modes.get("triton.cudagraphs", False)
    peaks = {
        name: None if graphs else timing.peak_memory(step, workload.device)
        for name, step in steps.items()
    }
    rows = []
    for ours, compiler in compilers.items():
        if ours == STOCK:
            continue
        row: Row = {
            **workload.facts(),
            "mode": compiler.mode,
            "inner": compiler.config.inner,
            **options_of(compiler.config),
        }
        pair = {STOCK: STOCK, SDGP: ours}
        for column, name in pair.items():
            row[f"{column}_ms"] = times[name].median * 1e3
            row[f"{column}_compile_s"] = statistics.median(first[name])
            row[f"{column}_peak_bytes"] = peaks[name]
            row[f"{column}_first_loss"] = losses[name]
        ratio = timing.ratio(samples[ours], samples[STOCK])
        row["ratio"], row["ratio_low"], row["ratio_high"] = ratio.median, ratio.low, ratio.high
        row["compile_ratio"] = row["sdgp_compile_s"] / row["stock_compile_s"]
        row["loss_difference"] = abs(losses[ours] - losses[STOCK])
        row["compile_s"] = {column: first[name] for column, name in pair.items()}
        row["times"] = {column: dataclasses.asdict(times[name]) for column, name in pair.items()}
        rows.append(row)
    return rows


def headline(rows: Sequence[Row]) -> list[str]:
    """Say how sdgp's times compare with stock's."""
    return [
        f"train step {row['model']} {row['n']}:{row['m']}: sdgp {row['sdgp_ms']:.2f} ms, "
        f"stock {row['stock_ms']:.2f} ms, ratio {row['ratio']:.3f}; "
        f"compile ratio {row['compile_ratio']:.2f}"
        for row in rows
    ]


BENCHMARK = Benchmark(
    name="train_step",
    plan=plan,
    columns={
        "model": ("model", ""),
        "dtype": ("dtype", ""),
        "n": ("n", "d"),
        "m": ("m", "d"),
        "stock ms": ("stock_ms", ".2f"),
        "sdgp ms": ("sdgp_ms", ".2f"),
        "ratio": ("ratio", ".3f"),
        "stock compile s": ("stock_compile_s", ".1f"),
        "sdgp compile s": ("sdgp_compile_s", ".1f"),
        "stock peak bytes": ("stock_peak_bytes", ","),
        "sdgp peak bytes": ("sdgp_peak_bytes", ","),
        "first loss": ("stock_first_loss", ".5f"),
        "difference": ("loss_difference", ".1e"),
    },
    headline=headline,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in argv, sys.argv by default; return the exit code."""
    parser = command.Parser(
        "train_step",
        description="Time a whole training step (forward, loss, backward, SGD) of networks that "
        "stock Inductor and sdgp compiled, in turn, from the same weights and on the same batch "
        "of noise. Compile time is that of the first step, with empty caches. Peak memory is "
        "what a step allocates beyond the weights and the optimizer's state.",
        example="--model resnet18 --n 1 --prune magnitude --out train_step.json",
    )
    add = parser.add_argument
    parser.add_models(("resnet18", "resnet50", "regnetx_004", "convnext_tiny"))
    dtype = "of autocast; auto is bfloat16 on CUDA, float32 on the CPU"
    parser.add_dtype((AUTO, *DTYPES), AUTO, dtype)
    parser.add_memory_format()
    modes = list(torch._inductor.list_mode_options())
    add("--mode", choices=modes, default="default", help="of torch.compile (%(default)s)")
    parser.add_inner()
    parser.add_pruning()
    parser.add_targets()
    also = "another pattern, timed in turn with the others"
    parser.add_list("--also", "also", (), also, metavar="N:M", type=pattern)
    compiles = "how often to compile each network (%(default)s)"
    add("--compiles", type=positive(int), default=1, help=compiles)
    parser.add_cudnn_benchmark()
    cached = "let Inductor's caches serve what they have; compile times then say nothing"
    add("--cached", action="store_true", help=cached)
    cpu_time = "time the processor's work, not the clock's: for a machine that others use too"
    add("--cpu-time", action="store_true", help=cpu_time)
    parser.add_seconds(10)
    parser.add_out()
    return command.run(BENCHMARK, parser, argv)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.train_step`: a whole training step, stock Inductor and sdgp in turn."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import perf_counter, process_time
from typing import Any
from unittest import mock

import torch
import torch._inductor
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from sdgp_fx import SDGPConfig, sdgp
from sdgp_fx.cli.arguments import pattern
from sdgp_fx.cli.networks import check_model
from sdgp_fx.measurement import timing

from . import command
from .benchmark import Benchmark, Task
from .layers import CLASSES, build_network
from .report import Row

STOCK, SDGP = "stock", "sdgp"
AUTO = "auto"

Step = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Compiler:
    """How both networks are compiled.

    mode: torch.compile's.
    pruning: n, m, prune, rescale and structure of SDGPConfig.
    inner: what stock and sdgp compile with; "aot_eager" generates no code, to try things out.
    cached: whether Inductor's caches may serve what they have.
    """

    mode: str
    pruning: dict[str, Any]
    inner: str
    cached: bool = False

    def compile(self, name: str, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """model compiled by STOCK or by sdgp, when it is first called within environment()."""
        # A backend of its own: what Dynamo has compiled with an equal one it would use again.
        backend = self.inner if name == STOCK else partial(sdgp)
        return torch.compile(model, backend=backend, mode=self.mode)

    @contextlib.contextmanager
    def environment(self) -> Iterator[None]:
        """The settings of sdgp, and empty caches, if not those there are.

        torch.compile takes a mode or options, not both; the environment goes with either.
        """
        settings = {**self.pruning, "inner": self.inner}
        variables = {f"SDGP_{name.upper()}": str(value) for name, value in settings.items()}
        caches = contextlib.nullcontext() if self.cached else fresh_cache()
        with mock.patch.dict(os.environ, variables), caches:
            yield


def plan(
    device: torch.device,
    models: Sequence[str],
    batch: int,
    size: int,
    dtype: str,
    memory_format: str,
    mode: str,
    inner: str,
    n: int,
    m: int,
    prune: str,
    rescale: str,
    structure: str,
    also: Sequence[tuple[int, int]],
    compiles: int,
    cudnn_benchmark: bool,
    cached: bool,
    cpu_time: bool,
    seconds: float,
) -> list[Task]:
    """A task for each model, after one that has the compiler import and start what it needs."""
    pruning: dict[str, Any] = {"n": n, "m": m, "prune": prune, "rescale": rescale}
    pruning["structure"] = structure
    SDGPConfig(**pruning)
    for model in models:
        check_model(model, "--model")
    if inner == "aot_eager" and mode != "default":
        raise ValueError(f"--mode: expected default with --inner aot_eager, got {mode}")
    if dtype == AUTO:
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    if cpu_time and (device.type != "cpu" or torch.get_num_threads() > 1):
        raise ValueError(
            f"--cpu-time: expected one thread (OMP_NUM_THREADS=1) of a CPU, got {device.type} and "
            f"{torch.get_num_threads()} threads"
        )
    clock = process_time if cpu_time else perf_counter
    compiler = Compiler(mode, pruning, inner, cached)
    tasks = [Task("starting the compiler", partial(start_compiler, device, compiler))]
    for model in models:
        arguments = (device, model, batch, size, dtype, memory_format, compiler, compiles)
        settings = (cudnn_benchmark, seconds, also, clock)
        tasks.append(Task(model, partial(measure, *arguments, *settings)))
    return tasks


def start_compiler(device: torch.device, compiler: Compiler) -> list[Row]:
    """Compile something small, so that the first network isn't charged for what all need."""
    layers = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(32 * 4 * 4, CLASSES))
    images, labels = random_batch(device, batch=2, size=8)
    for name in (STOCK, SDGP):
        step = make_step(name, network.to(device), images, labels, torch.float32, compiler)
        with compiler.environment():
            step()
    return []


def measure(
    device: torch.device,
    model: str,
    batch: int,
    size: int,
    dtype: str,
    memory_format: str,
    compiler: Compiler,
    compiles: int,
    cudnn_benchmark: bool,
    seconds: float,
    also: Sequence[tuple[int, int]] = (),
    clock: Callable[[], float] = perf_counter,
) -> list[Row]:
    """A row for each pattern: all compiled from the same weights, and trained on the same batch.

    also: n and m of patterns beside the compiler's.
    clock: for the steps; the first step's time, which is to compile, is always perf_counter's.
    """
    torch.backends.cudnn.benchmark = cudnn_benchmark
    torch.manual_seed(0)
    format_ = command.MEMORY_FORMATS[memory_format]
    network = build_network(model).to(device).to(memory_format=format_)
    images, labels = random_batch(device, batch, size)
    images = images.contiguous(memory_format=format_)
    compilers = {STOCK: compiler, SDGP: compiler}
    for n, m in also:
        pruning = {**compiler.pruning, "n": n, "m": m}
        compilers[f"{SDGP} {n}:{m}"] = dataclasses.replace(compiler, pruning=pruning)
    first: dict[str, list[float]] = {name: [] for name in compilers}
    losses: dict[str, float] = {}
    for _ in range(compiles):
        # Drops what earlier rounds compiled; nothing compiled after it is lost before the timing.
        torch._dynamo.reset()
        steps: dict[str, Step] = {}
        for name in first:
            twin = copy.deepcopy(network)
            step = make_step(name, twin, images, labels, getattr(torch, dtype), compilers[name])
            with compilers[name].environment():
                begin = perf_counter()
                losses[name] = step().item()
                first[name].append(perf_counter() - begin)
            steps[name] = step
    samples = timing.sample(steps, device, seconds, clock)
    times = {name: timing.summarize(column) for name, column in samples.items()}
    # A CUDA graph's memory is allocated once and for all, not in the step.
    graphs = torch._inductor.list_mode_options(compiler.mode).get("triton.cudagraphs", False)
    peaks = {
        name: None if graphs else timing.peak_memory(step, device) for name, step in steps.items()
    }
    rows = []
    for ours in [name for name in compilers if name != STOCK]:
        row: Row = {
            "model": model,
            "batch": batch,
            "size": size,
            "dtype": dtype,
            "memory_format": memory_format,
            "mode": compiler.mode,
            "inner": compiler.inner,
            **compilers[ours].pruning,
        }
        pair = {STOCK: STOCK, SDGP: ours}
        for column, name in pair.items():
            row[f"{column}_ms"] = times[name].median * 1e3
            row[f"{column}_compile_s"] = statistics.median(first[name])
            row[f"{column}_peak_bytes"] = peaks[name]
            row[f"{column}_first_loss"] = losses[name]
        # Of steps of one round: what slows the machine for longer than that cancels.
        pairs = zip(samples[ours], samples[STOCK], strict=True)
        ratio = timing.summarize([sdgp / stock for sdgp, stock in pairs])
        row["ratio"], row["ratio_low"], row["ratio_high"] = ratio.median, ratio.low, ratio.high
        row["compile_ratio"] = row["sdgp_compile_s"] / row["stock_compile_s"]
        row["loss_difference"] = abs(losses[ours] - losses[STOCK])
        row["compile_s"] = {column: first[name] for column, name in pair.items()}
        row["times"] = {column: dataclasses.asdict(times[name]) for column, name in pair.items()}
        rows.append(row)
    return rows


def random_batch(device: torch.device, batch: int, size: int) -> tuple[Tensor, Tensor]:
    """Images (batch, 3, size, size) of noise, and labels."""
    images = torch.randn(batch, 3, size, size, device=device)
    return images, torch.randint(CLASSES, (batch,), device=device)


def make_step(
    name: str,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
    compiler: Compiler,
) -> Step:
    """A function that does one training step and returns the loss; its first call compiles."""
    compiled = compiler.compile(name, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    autocast = partial(torch.autocast, images.device.type, dtype, enabled=dtype != torch.float32)

    def step() -> Tensor:
        with autocast():
            loss = F.cross_entropy(compiled(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def headline(rows: Sequence[Row]) -> list[str]:
    """The ratios of sdgp to stock."""
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
    parser.add_dtype((AUTO, *command.DTYPES), AUTO, dtype)
    parser.add_memory_format()
    modes = list(torch._inductor.list_mode_options())
    add("--mode", choices=modes, default="default", help="of torch.compile (%(default)s)")
    parser.add_inner()
    parser.add_pruning()
    also = "another pattern, timed in turn with the others"
    parser.add_list("--also", "also", (), also, metavar="N:M", type=pattern)
    compiles = "how often to compile each network (%(default)s)"
    add("--compiles", type=command.positive(int), default=1, help=compiles)
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

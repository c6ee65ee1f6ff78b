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
from time import perf_counter
from typing import Any
from unittest import mock

import torch
import torch._inductor
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from sdgp_fx import SDGPConfig, sdgp, timing
from sdgp_fx.config import INNER_COMPILERS

from . import command
from .benchmark import Benchmark, Task
from .layers import CLASSES, build_network, check_model
from .report import Row

STOCK, SDGP = "stock", "sdgp"
AUTO = "auto"

Step = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Compiler:
    """How both networks are compiled.

    mode: torch.compile's.
    pruning: n, m, prune and rescale of SDGPConfig.
    inner: what stock and sdgp compile with; "aot_eager" generates no code, to try things out.
    """

    mode: str
    pruning: dict[str, Any]
    inner: str

    def compile(self, name: str, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """model compiled by STOCK or SDGP, when it is first called within environment()."""
        return torch.compile(model, backend=sdgp if name == SDGP else self.inner, mode=self.mode)

    @contextlib.contextmanager
    def environment(self) -> Iterator[None]:
        """The settings of sdgp, and empty caches.

        torch.compile takes a mode or options, not both; the environment goes with either.
        """
        settings = {**self.pruning, "inner": self.inner}
        variables = {f"SDGP_{name.upper()}": str(value) for name, value in settings.items()}
        with mock.patch.dict(os.environ, variables), fresh_cache():
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
    compiles: int,
    cudnn_benchmark: bool,
    seconds: float,
) -> list[Task]:
    """A task for each model, after one that has the compiler import and start what it needs."""
    pruning: dict[str, Any] = {"n": n, "m": m, "prune": prune, "rescale": rescale}
    SDGPConfig(**pruning)
    for model in models:
        check_model(model)
    if inner == "aot_eager" and mode != "default":
        raise ValueError(f"--mode: expected default with --inner aot_eager, got {mode}")
    if dtype == AUTO:
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    compiler = Compiler(mode, pruning, inner)
    tasks = [Task("starting the compiler", partial(start_compiler, device, compiler))]
    for model in models:
        arguments = (device, model, batch, size, dtype, memory_format, compiler, compiles)
        tasks.append(Task(model, partial(measure, *arguments, cudnn_benchmark, seconds)))
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
) -> list[Row]:
    """A row for a model: both compiled from the same weights, and trained on the same batch."""
    torch.backends.cudnn.benchmark = cudnn_benchmark
    torch.manual_seed(0)
    format_ = command.MEMORY_FORMATS[memory_format]
    network = build_network(model).to(device).to(memory_format=format_)
    images, labels = random_batch(device, batch, size)
    images = images.contiguous(memory_format=format_)
    first: dict[str, list[float]] = {STOCK: [], SDGP: []}
    losses: dict[str, float] = {}
    for _ in range(compiles):
        # Drops what earlier rounds compiled; nothing compiled after it is lost before the timing.
        torch._dynamo.reset()
        steps: dict[str, Step] = {}
        for name in first:
            twin = copy.deepcopy(network)
            step = make_step(name, twin, images, labels, getattr(torch, dtype), compiler)
            with compiler.environment():
                begin = perf_counter()
                losses[name] = step().item()
                first[name].append(perf_counter() - begin)
            steps[name] = step
    times = timing.measure(steps, device, seconds)
    row: Row = {
        "model": model,
        "batch": batch,
        "size": size,
        "dtype": dtype,
        "memory_format": memory_format,
        "mode": compiler.mode,
        "inner": compiler.inner,
        **compiler.pruning,
    }
    # A CUDA graph's memory is allocated once and for all, not in the step.
    graphs = torch._inductor.list_mode_options(compiler.mode).get("triton.cudagraphs", False)
    for name, step in steps.items():
        row[f"{name}_ms"] = times[name].median * 1e3
        row[f"{name}_compile_s"] = statistics.median(first[name])
        row[f"{name}_peak_bytes"] = None if graphs else timing.peak_memory(step, device)
        row[f"{name}_first_loss"] = losses[name]
    row["ratio"] = row["sdgp_ms"] / row["stock_ms"]
    row["compile_ratio"] = row["sdgp_compile_s"] / row["stock_compile_s"]
    row["loss_difference"] = abs(losses[SDGP] - losses[STOCK])
    row["compile_s"] = first
    row["times"] = {name: dataclasses.asdict(time) for name, time in times.items()}
    return [row]


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
        f"train step {row['model']}: sdgp {row['sdgp_ms']:.2f} ms, stock {row['stock_ms']:.2f} ms, "
        f"ratio {row['ratio']:.3f}; compile ratio {row['compile_ratio']:.2f}"
        for row in rows
    ]


BENCHMARK = Benchmark(
    name="train_step",
    plan=plan,
    columns={
        "model": ("model", ""),
        "dtype": ("dtype", ""),
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
    inner = "aot_eager generates no code: to try this command (%(default)s)"
    add("--inner", choices=INNER_COMPILERS, default="inductor", help=inner)
    parser.add_pruning()
    compiles = "how often to compile each network (%(default)s)"
    add("--compiles", type=command.positive(int), default=1, help=compiles)
    parser.add_cudnn_benchmark()
    parser.add_seconds(10)
    parser.add_out()
    return command.run(BENCHMARK, parser, argv)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m sdgp_fx demo`: dense training and SDGP, side by side."""

from __future__ import annotations

import contextlib
import copy
import itertools
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from timm.models import PretrainedCfg
from torch import Tensor, nn

from ..arguments import check_file, refuse, refusing_values
from ..config import SDGPConfig
from ..errors import first_line
from ..inspection.explain import explain
from ..measurement.networks import check_model
from .demo_data import Data, digits, load_cifar10, prepare, training_batches
from .demo_results import DENSE, SDGP, Result, draw, layers_table, results_table
from .doctor import missing_for_cpp

CLASSES = 10
WARM_UP = 0.2
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
TEST_BATCH = 500
LINES = 20

Step = Callable[[Tensor, Tensor], float]
Losses = dict[str, list[float]]


def run(
    *,
    options: dict[str, Any],
    model: str,
    data: str,
    root: Path | None,
    size: int,
    epochs: int,
    steps: int | None,
    batch_size: int,
    lr: float,
    seed: int,
    device: str,
    inner: str | None,
    out: Path,
) -> None:
    """Train both networks and show the results.

    Args:
        options: The "sdgp." options, checked.
        data: "digits" or "cifar10", the latter from root.
        steps: Training steps, in place of epochs; None for epochs.
        device: "auto", or a torch device's name.
        inner: "inductor" or "aot_eager"; None for what can compile here.
        out: The picture's file.

    Raises:
        argparse.ArgumentError: Something cannot be run.
        KeyboardInterrupt: After an interrupt, once the results so far are shown.
    """
    console = Console()
    with refusing_values():
        check_file("--out", out)
    place = find_device(device)
    inner = inner or find_inner(console)
    options = {**options, "sdgp.inner": inner}
    images = load_cifar10(root) if data == "cifar10" else digits()
    total = count_steps(len(images.labels), epochs, steps, batch_size)

    torch.manual_seed(seed)
    dense = build_model(model, images.images.shape[1], size).to(place)
    models = {DENSE: dense, SDGP: copy.deepcopy(dense)}
    example = prepare(images.images[:batch_size], images, size).to(place)
    decisions = explain(models[SDGP], example, options=options)

    title = f"{model} on {images.name}: {DENSE} and {SDGP} {describe(options)}"
    say(console, title)
    say(
        console,
        f"{total} steps of {batch_size} images on {place.type}; "
        f"the first compiles both networks with {inner}, which can take a minute",
    )
    trained = {
        DENSE: make_step(models[DENSE], inner, None, total, lr),
        SDGP: make_step(models[SDGP], "sdgp", options, total, lr),
    }
    batches = (
        (prepare(batch, images, size).to(place), labels.to(place))
        for batch, labels in training_batches(images, batch_size, seed)
    )
    losses: Losses = {name: [] for name in models}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    first = itertools.islice(batches, total)
    finished = train(trained, first, losses, seconds, console, total, seed)
    if not any(losses.values()):
        raise KeyboardInterrupt

    accuracies = measure_accuracies(models, images, size, place, console)
    results = [
        Result(name, tuple(losses[name]), tuple(seconds[name]), accuracies.get(name))
        for name in models
    ]
    with ignored_interrupts():
        console.print(results_table(results, total), layers_table(decisions))
        draw(results, title, out)
        say(console, f"loss curves: {out}")
    if not finished or len(accuracies) < len(models):
        raise KeyboardInterrupt


def say(console: Console, line: str) -> None:
    """Print a line as it is, however long."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def find_device(name: str) -> torch.device:
    """Return the device of this name; "auto" is CUDA if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        refuse(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:
        refuse(f"--device: {name!r} can't be used: {first_line(error)}")


def find_inner(console: Console) -> str:
    """Choose Inductor if there is what it needs to compile C++, else aot_eager."""
    missing = missing_for_cpp()
    if not missing:
        return "inductor"
    say(console, f"inductor would need {missing}: aot_eager instead")
    return "aot_eager"


def build_model(name: str, channels: int, size: int) -> nn.Module:
    """Build the timm network of this name, with new weights, in training mode."""
    with refusing_values():
        check_model(name, "--model")
    arguments: dict[str, Any] = {"in_chans": channels, "num_classes": CLASSES}
    default = timm.get_pretrained_cfg(name) or PretrainedCfg()
    own = default.input_size[-1]
    if default.fixed_input_size and size != own:
        arguments["img_size"] = size
    try:
        model = timm.create_model(name, pretrained=False, **arguments)
        with torch.no_grad():
            model.eval()(torch.zeros(2, channels, size, size))
    except Exception as error:  # Networks refuse a size with whatever error they happen to meet.
        refuse(
            f"--model: {name} takes no {channels}x{size}x{size} images ({first_line(error)}); "
            f"it is meant for --size {own}"
        )
    return model.train()


def count_steps(images: int, epochs: int, steps: int | None, batch_size: int) -> int:
    """Count the training steps that are asked for, with this many training images."""
    if not 2 <= batch_size <= images:  # Batch normalisation needs two.
        refuse(f"--batch-size: expected 2 to {images}, the training images, got {batch_size}")
    return steps or epochs * (images // batch_size)


def describe(options: dict[str, Any]) -> str:
    """Describe how gradients are pruned, in words."""
    config, _ = SDGPConfig.from_options(options)
    scope = f" per {config.rescale}" if config.prune == "rescaled_magnitude" else ""
    return f"{config.n}:{config.m} {config.prune}{scope}".replace("_", " ")


def make_step(
    model: nn.Module, backend: str, options: dict[str, Any] | None, total: int, lr: float
) -> Step:
    """Return a function that takes one training step and returns the loss.

    Its first call compiles. The learning rate rises to lr and falls to 0 over total steps.
    """
    compiled = torch.compile(model, backend=backend, options=options)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    warm_up = max(1, round(WARM_UP * total))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda done: min((done + 1) / warm_up, (total - done) / (total - warm_up + 1)),
    )

    def step(images: Tensor, labels: Tensor) -> float:
        loss = F.cross_entropy(compiled(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.item()

    return step


def train(
    steps: dict[str, Step],
    batches: Iterator[tuple[Tensor, Tensor]],
    losses: Losses,
    seconds: dict[str, list[float]],
    console: Console,
    total: int,
    seed: int,
) -> bool:
    """Take each step in turn on every batch, adding to losses and to seconds.

    Returns:
        Whether all steps were taken, without an interrupt.
    """
    with display(console, total) as show, warnings.catch_warnings():
        # Autograd warns of an interrupt that meets it while a network is traced.
        warnings.filterwarnings("ignore", "Error detected in")
        try:
            for number, (images, labels) in enumerate(batches):
                for name, step in steps.items():
                    show("training" if losses[name] else f"compiling {name}", losses)
                    torch.manual_seed(seed + number)  # The same dropout in both networks.
                    begin = perf_counter()
                    losses[name].append(step(images, labels))
                    seconds[name].append(perf_counter() - begin)
            show("trained", losses)
        except KeyboardInterrupt:
            show("interrupted", losses)
            return False
    return True


@contextlib.contextmanager
def display(console: Console, total: int) -> Iterator[Callable[[str, Losses], None]]:
    """Yield a function that shows how far the training is: a bar, or lines in a file."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_interactive,
        expand=True,
    )
    task = bar.add_task("", total=total, losses="")
    printed = None

    def show(phase: str, losses: Losses) -> None:
        nonlocal printed
        done = min(map(len, losses.values()))
        latest = "  ".join(f"{name} {values[-1]:.3f}" for name, values in losses.items() if values)
        bar.update(task, description=phase, completed=done, losses=latest)
        due = (phase, done * LINES // total)
        if not console.is_interactive and due != printed:
            printed = due
            say(console, f"{phase}  {done}/{total}  {latest}".rstrip())

    with bar:
        yield show


def measure_accuracies(
    models: dict[str, nn.Module], data: Data, size: int, device: torch.device, console: Console
) -> dict[str, float]:
    """Test each network; return the accuracies that were had before an interrupt."""
    accuracies = {}
    with contextlib.suppress(KeyboardInterrupt), console.status("testing"):
        for name, model in models.items():
            accuracies[name] = accuracy(model, data, size, device)
    return accuracies


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, size: int, device: torch.device) -> float:
    """Return the share of test images that model classifies right."""
    model.eval()
    right = 0
    batches = zip(
        data.test_images.split(TEST_BATCH), data.test_labels.split(TEST_BATCH), strict=True
    )
    for images, labels in batches:
        guessed = model(prepare(images, data, size).to(device)).argmax(1)
        right += int((guessed.cpu() == labels).sum())
    return right / len(data.test_labels)


@contextlib.contextmanager
def ignored_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C inside, while the results of an interrupted run are written."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)

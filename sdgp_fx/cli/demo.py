"""`python -m sdgp_fx demo`: dense training and SDGP, side by side."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import itertools
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn

import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models import PretrainedCfg
from torch import Tensor, nn
from torchvision.datasets import CIFAR10

from ..inspection.explain import explain
from ..passes.decisions import Decision
from .doctor import missing_for_cpp
from .networks import check_model

CLASSES = 10
LAST = 20
WARM_UP = 0.2
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
TEST_BATCH = 500
LINES = 20
NOT_MEASURED = "not measured"

DENSE, SDGP = "dense", "SDGP"
COLORS = {DENSE: "#4c6a92", SDGP: "#e07a2f"}

Step = Callable[[Tensor, Tensor], float]
Losses = dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Data:
    """Images as bytes, (N, C, H, W), with their labels.

    mean, std: of the training images, by channel.
    augmented: whether training images are flipped and shifted at random.
    """

    name: str
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmented: bool


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured of one network. accuracy: on the test images, None if interrupted."""

    name: str
    losses: tuple[float, ...]
    accuracy: float | None


def run(args: argparse.Namespace) -> None:
    """Train both networks and show the results.

    args: of the command line; args.options has the "sdgp." options.
    Raises argparse.ArgumentError for what can't be run, and KeyboardInterrupt after an
    interrupt, once the results so far are shown.
    """
    console = Console()
    check_out(args.out)
    device = find_device(args.device)
    inner = args.inner or find_inner(console)
    options = {**args.options, "sdgp.inner": inner}
    data = load_cifar10(args.root) if args.data == "cifar10" else digits()
    total = count_steps(args, len(data.labels))

    torch.manual_seed(args.seed)
    dense = build_model(args.model, data.images.shape[1], args.size).to(device)
    models = {DENSE: dense, SDGP: copy.deepcopy(dense)}
    example = prepare(data.images[: args.batch_size], data, args.size).to(device)
    decisions = explain(models[SDGP], example, options=options)

    title = describe(args, data)
    say(console, title)
    say(
        console,
        f"{total} steps of {args.batch_size} images on {device.type}; "
        f"the first compiles both networks with {inner}, which can take a minute",
    )
    steps = {
        DENSE: make_step(models[DENSE], inner, None, total, args.lr),
        SDGP: make_step(models[SDGP], "sdgp", options, total, args.lr),
    }
    batches = (
        (prepare(images, data, args.size).to(device), labels.to(device))
        for images, labels in training_batches(data, args.batch_size, args.seed)
    )
    losses: Losses = {name: [] for name in models}
    finished = train(steps, itertools.islice(batches, total), losses, console, total, args.seed)
    if not any(losses.values()):
        raise KeyboardInterrupt

    accuracies = measure_accuracies(models, data, args.size, device, console)
    results = [Result(name, tuple(losses[name]), accuracies.get(name)) for name in models]
    with ignored_interrupts():
        console.print(results_table(results, total), layers_table(decisions))
        draw(results, title, args.out)
        say(console, f"loss curves: {args.out}")
    if not finished or len(accuracies) < len(models):
        raise KeyboardInterrupt


def say(console: Console, line: str) -> None:
    """Print a line as it is, however long."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def refuse(message: str) -> NoReturn:
    """Raise what the command line turns into one line and the exit code 2."""
    raise argparse.ArgumentError(None, message)


def check_out(path: Path) -> None:
    """Refuse, ahead of the training, a path that the picture can't be written to."""
    if path.is_dir():
        refuse(f"--out: {path} is a folder")
    if not path.absolute().parent.is_dir():
        refuse(f"--out: {path.parent} is not a folder")


def find_device(name: str) -> torch.device:
    """The device of this name; "auto" is CUDA if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        refuse(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:
        refuse(f"--device: {name!r} can't be used: {first_line(error)}")


def find_inner(console: Console) -> str:
    """Inductor if there is what it needs to compile C++, else aot_eager."""
    missing = missing_for_cpp()
    if not missing:
        return "inductor"
    say(console, f"inductor would need {missing}: aot_eager instead")
    return "aot_eager"


def digits() -> Data:
    """scikit-learn's handwritten digits: 1797 images of 8x8 pixels, a fifth of them for tests."""
    source = load_digits()
    images = torch.from_numpy(source.images).to(torch.uint8).unsqueeze(1)
    train, test = train_test_split(
        range(len(images)), test_size=0.2, stratify=source.target, random_state=0
    )
    labels = torch.from_numpy(source.target)
    std, mean = torch.std_mean(images[train].float())
    return Data(
        name="handwritten digits",
        images=images[train],
        labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        mean=(mean.item(),),
        std=(std.item(),),
        augmented=False,
    )


def load_cifar10(root: Path | None) -> Data:
    """CIFAR-10 as torchvision stores it under root."""
    if root is None:
        refuse("--data cifar10 needs --root DIR, the folder that has cifar-10-batches-py in it")
    try:
        train, test = (CIFAR10(root, train=train, download=False) for train in (True, False))
    except RuntimeError:
        refuse(
            f"--root: {root / CIFAR10.base_folder} is missing or is not the CIFAR-10 data set; "
            f"torchvision.datasets.CIFAR10({str(root)!r}, download=True) gets it"
        )
    return Data(
        name="CIFAR-10",
        images=torch.from_numpy(train.data).permute(0, 3, 1, 2).contiguous(),
        labels=torch.tensor(train.targets),
        test_images=torch.from_numpy(test.data).permute(0, 3, 1, 2).contiguous(),
        test_labels=torch.tensor(test.targets),
        mean=(125.3, 123.0, 113.9),
        std=(63.0, 62.1, 66.7),
        augmented=True,
    )


def training_batches(data: Data, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images and labels without end, shuffled anew in each epoch.

    What is left of an epoch is dropped: a smaller batch would have the networks compiled again.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data.labels), generator=generator)
        for chosen in order[: len(order) // size * size].view(-1, size):
            images = data.images[chosen]
            if data.augmented:
                images = augment(images, generator)
            yield images, data.labels[chosen]


def augment(images: Tensor, generator: torch.Generator, margin: int = 4) -> Tensor:
    """Shift each image by up to margin pixels, with black around it, and mirror half of them."""
    count, _, height, width = images.shape
    top, left = torch.randint(2 * margin + 1, (2, count, 1), generator=generator)
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, (margin,) * 4)
    image = torch.arange(count)[:, None, None]
    shifted = padded[image, :, rows[:, :, None], columns[:, None, :]]
    return shifted.permute(0, 3, 1, 2).contiguous()


def prepare(images: Tensor, data: Data, size: int) -> Tensor:
    """What a network takes: normalised, size x size."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    images = (images.float() - mean) / std
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)


def build_model(name: str, channels: int, size: int) -> nn.Module:
    """The timm network of this name, with new weights, in training mode."""
    try:
        check_model(name, "--model")
    except ValueError as error:
        refuse(str(error))
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


def first_line(error: Exception) -> str:
    """What an error says, shortly."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def count_steps(args: argparse.Namespace, images: int) -> int:
    """How many training steps are asked for, with this many training images."""
    if not 2 <= args.batch_size <= images:  # Batch normalisation needs two.
        refuse(f"--batch-size: expected 2 to {images}, the training images, got {args.batch_size}")
    return args.steps or args.epochs * (images // args.batch_size)


def describe(args: argparse.Namespace, data: Data) -> str:
    """What is trained, in words."""
    scope = f" per {args.rescale}" if args.prune == "rescaled_magnitude" else ""
    setting = f"{args.n}:{args.m} {args.prune}{scope}".replace("_", " ")
    return f"{args.model} on {data.name}: {DENSE} and {SDGP} {setting}"


def make_step(
    model: nn.Module, backend: str, options: dict[str, Any] | None, total: int, lr: float
) -> Step:
    """A function that does one training step and returns the loss; its first call compiles."""
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
    console: Console,
    total: int,
    seed: int,
) -> bool:
    """Take each step in turn on every batch, adding to losses; return False if interrupted."""
    with display(console, total) as show, warnings.catch_warnings():
        # What autograd says of an interrupt that meets it while a network is traced.
        warnings.filterwarnings("ignore", "Error detected in")
        try:
            for number, (images, labels) in enumerate(batches):
                for name, step in steps.items():
                    show("training" if losses[name] else f"compiling {name}", losses)
                    torch.manual_seed(seed + number)  # The same dropout in both networks.
                    losses[name].append(step(images, labels))
            show("trained", losses)
        except KeyboardInterrupt:
            show("interrupted", losses)
            return False
    return True


@contextlib.contextmanager
def display(console: Console, total: int) -> Iterator[Callable[[str, Losses], None]]:
    """A function that shows how far the training is: a bar, or lines if not on a terminal."""
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
    """Each network's accuracy on the test images; without those that an interrupt came before."""
    accuracies = {}
    with contextlib.suppress(KeyboardInterrupt), console.status("testing"):
        for name, model in models.items():
            accuracies[name] = accuracy(model, data, size, device)
    return accuracies


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, size: int, device: torch.device) -> float:
    """The share of test images that model classifies right."""
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
    """For the results: written within a second, and what an interrupted run is left with."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def results_table(results: Sequence[Result], total: int) -> Table:
    """A row for each network."""
    table = Table(title="Results", title_justify="left", title_style="bold")
    table.add_column("network")
    table.add_column("steps", justify="right")
    table.add_column("test accuracy", justify="right")
    table.add_column(f"training loss,\nmean of last {LAST} steps", justify="right")
    for result in results:
        last = result.losses[-LAST:]
        table.add_row(
            result.name,
            f"{len(result.losses)} of {total}",
            percent(result.accuracy),
            f"{fmean(last):.4f}" if last else NOT_MEASURED,
        )
    return table


def layers_table(decisions: Sequence[Decision]) -> Table:
    """How many convolutions are pruned, and why others aren't."""
    table = Table(title="Convolutions of SDGP", title_justify="left", title_style="bold")
    table.add_column("input gradient")
    table.add_column("layers", justify="right")
    table.add_row("pruned", str(sum(decision.pruned for decision in decisions)))
    reasons = Counter(decision.reason for decision in decisions if not decision.pruned)
    for reason, count in reasons.most_common():
        table.add_row(f"dense: {reason}", str(count))
    return table


def draw(results: Sequence[Result], title: str, path: Path) -> None:
    """Write a picture of the loss curves: as measured, and smoothed."""
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for result in results:
        if not result.losses:
            continue
        steps = range(1, len(result.losses) + 1)
        color = COLORS[result.name]
        label = f"{result.name}, test accuracy {percent(result.accuracy)}"
        axes.plot(steps, result.losses, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(
            steps,
            smooth(result.losses),
            color=color,
            linewidth=2,
            marker="." if len(steps) < LAST else None,
            label=label,
        )
    losses = [loss for result in results for loss in result.losses]
    if max(losses) > 10 * min(losses):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(title.replace(": ", "\n"), loc="left", linespacing=1.4)
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("training loss (cross entropy)")
    axes.grid(which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, format="png")


def smooth(losses: Sequence[float]) -> list[float]:
    """The mean of each loss and its neighbours, a fortieth of the curve on either side."""
    reach = len(losses) // 40
    curve = torch.tensor(losses)[None]
    width = 2 * reach + 1
    means = F.avg_pool1d(curve, width, stride=1, padding=reach, count_include_pad=False)
    return means[0].tolist()


def percent(accuracy: float | None) -> str:
    """An accuracy as it is shown."""
    return NOT_MEASURED if accuracy is None else f"{accuracy:.1%}"

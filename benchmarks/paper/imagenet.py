"""Train by the paper's ImageNet recipe (McDanel et al. 2022, section V), on folders of images.

    torchrun --nproc-per-node 8 -m benchmarks.paper.imagenet --root DIR --out FILE

The authors' anti-aliased strides in RegNetX and ResNet-50 are not part of it.

What is random in an epoch follows from the seed, the epoch and the process alone: a run that is
taken up again after an epoch goes on with the numbers that it would have had.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from sdgp_fx import SDGPConfig
from sdgp_fx.arguments import check_file, positive
from sdgp_fx.config import INNER_COMPILERS
from sdgp_fx.measurement.networks import check_model
from sdgp_fx.measurement.workload import DTYPES

from ..harness import command
from ..harness.report import Report, Row, caption, environment
from ..harness.terminal import print_table, progress
from .cifar10 import LABEL_SMOOTHING, autocast, make_optimizer, up_and_down, update
from .experiment import OPTIONS, Setting, against_paper, with_current_options

MODELS = ("resnet18", "resnet50", "regnetx_004")
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

EPOCHS = 88
PEAK_EPOCH = 2
FIRST_SHARE = 1e-4
WEIGHT_DECAY = 5e-5
# Images grow between these epochs, to multiples of STRIDE.
FIRST_GROWTH, LAST_GROWTH = 65, 76
STRIDE = 32
CROP = 224 / 256


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Recipe that all runs of a comparison share; the defaults are the paper's.

    Attributes:
        batch: Images of all processes together.
        lr: The peak's.
        first_size, last_size, test_size: Pixels of the images.
        dtype: Of autocast; float32 is without. float16 has a gradient scaler.
        compiler: "inductor" or "aot_eager", of the dense network and inside of sdgp.
    """

    model: str = MODELS[0]
    epochs: int = EPOCHS
    batch: int = 1024
    lr: float = 1.0
    first_size: int = 160
    last_size: int = 192
    test_size: int = 256
    dtype: str = "float16"
    compiler: str = "inductor"


@dataclasses.dataclass(frozen=True)
class Process:
    """A process that torchrun started, or the only one."""

    rank: int
    count: int
    device: torch.device


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in argv, sys.argv by default; return the exit code."""
    parser = command.Parser(
        "paper.imagenet",
        description="Train a network by the paper's ImageNet recipe, dense or pruned; one process "
        "for each GPU under torchrun. Beside --out lies a checkpoint, from which an interrupted "
        "run goes on after its last whole epoch, with the same random numbers.",
        example="--root DIR --model resnet18 --prune magnitude --out resnet18.json",
    )
    add, recipe = parser.add_argument, Recipe()
    folders = "has train/CLASS/*.jpg and val/CLASS/*.jpg"
    add("--root", type=Path, required=True, metavar="DIR", help=folders)
    named = f"timm network; the paper's are {', '.join(MODELS)} (%(default)s)"
    add("--model", default=recipe.model, metavar="NAME", help=named)
    parser.add_pruning()
    add("--dense", action="store_true", help="do not prune")
    for name, kind, described in (
        ("epochs", int, ""),
        ("batch", int, "images in a step, of all processes together"),
        ("lr", float, "the peak's"),
        ("first-size", int, "pixels of training images"),
        ("last-size", int, "the same, at the end"),
        ("test-size", int, "pixels of test images"),
    ):
        default = getattr(recipe, name.replace("-", "_"))
        add(f"--{name}", type=positive(kind), default=default, help=f"{described} (%(default)s)")
    parser.add_dtype(DTYPES, recipe.dtype, "of autocast")
    add("--compiler", choices=INNER_COMPILERS, default=recipe.compiler, help="(%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--workers", type=int, default=8, help="that read images, a process (%(default)s)")
    parser.add_out()
    args = parser.parse_args(argv)
    recipe = Recipe(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)}
    )
    try:
        check_file("--out", args.out)
        options = {name: getattr(args, name) for name in OPTIONS}
        config = None if args.dense else SDGPConfig(**options, product=args.product)
        setting = make_setting(config, args.dtype)
        process = join(command.find_device(args.device))
        report = train(recipe, setting, args.seed, args.root, args.workers, process, args.out)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if process.rank == 0:
        show(report)
    return 0


def make_setting(config: SDGPConfig | None, dtype: str) -> Setting:
    """Name a setting; without a config it is dense."""
    name = f"{config.n}:{config.m} {config.prune}" if config else "dense"
    return Setting(name, config, dtype=dtype)


def join(device: torch.device) -> Process:
    """Join the processes that torchrun started, if it did; each has a GPU of its own."""
    if not dist.is_torchelastic_launched():
        return Process(0, 1, device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Process(dist.get_rank(), dist.get_world_size(), device)


def train(
    recipe: Recipe,
    setting: Setting,
    seed: int,
    root: Path,
    workers: int,
    process: Process,
    path: Path | None,
) -> Report:
    """Train what the checkpoint beside path has not seen yet, and test after each epoch.

    The first process alone writes.

    Returns:
        A report with a row for each epoch.

    Raises:
        ValueError: Something can't be trained, or the checkpoint is of another run.
    """
    data, test = (folder(root, part) for part in ("train", "val"))
    check(recipe, data, test, process)
    torch.manual_seed(seed)
    network = timm.create_model(recipe.model, num_classes=len(data.classes))
    network = network.to(process.device).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(network, WEIGHT_DECAY)
    scaler = torch.amp.GradScaler(process.device.type, enabled=recipe.dtype == "float16")
    parts = {"network": network, "optimizer": optimizer, "scaler": scaler}

    facts = {**dataclasses.asdict(recipe), **setting.facts(), "seed": seed, "workers": workers}
    facts |= {"images": len(data), "test_images": len(test), "classes": len(data.classes)}
    facts |= {"processes": process.count}
    report = Report("paper imagenet", environment(process.device), facts)
    rows = take_up(path, facts, parts, process.device)
    if process.rank == 0:
        report.path = path
    report.add(rows)

    compiled: Any = torch.compile(network, dynamic=False, **setting.compile(recipe.compiler))
    if dist.is_initialized():
        compiled = DistributedDataParallel(compiled)
    total = recipe.epochs - len(rows)
    quiet = contextlib.nullcontext(lambda name: None)
    with quiet if process.rank else progress(total, estimate=True) as begin:
        for epoch in range(len(rows), recipe.epochs):
            begin(f"{recipe.model}, {setting.name}, epoch {epoch + 1} of {recipe.epochs}")
            torch.manual_seed(number(seed, epoch, process.rank))
            data.transform = training_transform(resolution(epoch, recipe))
            loader = training_batches(data, epoch, seed, recipe, workers, process)
            start = perf_counter()
            loss = train_epoch(compiled, optimizer, scaler, loader, epoch, recipe, process.device)
            row = {
                "epoch": epoch + 1,
                "size": resolution(epoch, recipe),
                "loss": sum_over(process, loss) / process.count,
                "seconds": perf_counter() - start,
                "accuracy": accuracy(network, test, recipe, workers, process),
            }
            if process.rank == 0 and path is not None:
                keep(path, facts, [*report.rows, row], parts)
            report.add([row])
    return report


def train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loader: DataLoader[Any],
    epoch: int,
    recipe: Recipe,
    device: torch.device,
) -> Tensor:
    """Train on all batches; return the mean loss."""
    network.train()
    losses = []
    for i, (images, labels) in enumerate(loader):
        with autocast(device, recipe.dtype):
            logits = network(prepare(images, device))
        labels = labels.to(device, non_blocking=True)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=LABEL_SMOOTHING)
        update(loss, optimizer, scaler, learning_rate(epoch + i / len(loader), recipe))
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def folder(root: Path, part: str) -> ImageFolder:
    """Find the images under root / part.

    Raises:
        ValueError: There are none.
    """
    try:
        return ImageFolder(root / part)
    except FileNotFoundError as error:
        raise ValueError(
            f"--root: expected a folder with train and val, each with a folder of images for "
            f"every class, got {root}: {error}"
        ) from None


def check(recipe: Recipe, data: ImageFolder, test: ImageFolder, process: Process) -> None:
    """Check that data and recipe can be trained with so many processes.

    Raises:
        ValueError: They cannot.
    """
    if data.classes != test.classes:
        raise ValueError(
            f"--root: expected the same classes in train and val, got {len(data.classes)} and "
            f"{len(test.classes)}, or other names"
        )
    check_model(recipe.model, "--model")
    if recipe.batch % process.count or recipe.batch > len(data):
        raise ValueError(
            f"--batch: expected a multiple of {process.count}, the processes, up to {len(data)}, "
            f"the images, got {recipe.batch}"
        )


def learning_rate(epoch: float, recipe: Recipe) -> float:
    """Return the learning rate: up to a peak at epoch 2, down to 0, in shares of 88 epochs."""
    return recipe.lr * up_and_down(epoch / recipe.epochs, PEAK_EPOCH / EPOCHS, FIRST_SHARE)


def resolution(epoch: int, recipe: Recipe) -> int:
    """Return the size of training images; it grows from epoch 65 to 76, in shares of 88 epochs."""
    first, last = (e * recipe.epochs / EPOCHS for e in (FIRST_GROWTH, LAST_GROWTH))
    share = min(max((epoch - first) / (last - first), 0), 1)
    if share in (0, 1):
        return recipe.last_size if share else recipe.first_size
    return STRIDE * round(
        (recipe.first_size + share * (recipe.last_size - recipe.first_size)) / STRIDE
    )


def number(seed: int, epoch: int, rank: int) -> int:
    """Return the seed of a process's random numbers in an epoch."""
    return random.Random(f"{seed} {epoch} {rank}").getrandbits(63)


def training_transform(size: int) -> transforms.Compose:
    """Make a transform that cuts, resizes and mirrors an image at random, and returns bytes."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )


def training_batches(
    data: ImageFolder, epoch: int, seed: int, recipe: Recipe, workers: int, process: Process
) -> DataLoader[Any]:
    """Make a loader of the process's part of an epoch, in whole batches."""
    sampler: DistributedSampler[Any] = DistributedSampler(
        data, process.count, process.rank, seed=seed, drop_last=True
    )
    sampler.set_epoch(epoch)
    return DataLoader(
        data,
        recipe.batch // process.count,
        sampler=sampler,
        num_workers=workers,
        pin_memory=process.device.type == "cuda",
        drop_last=True,
    )


def prepare(images: Tensor, device: torch.device) -> Tensor:
    """Convert bytes (N, 3, H, W) to normalized floats on device."""
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (MEAN, STD))
    images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    return (images.float() / 255 - mean) / std


@torch.no_grad()
def accuracy(
    network: nn.Module, test: ImageFolder, recipe: Recipe, workers: int, process: Process
) -> float:
    """Return the share of test images that are classified right, with mirror images' help.

    All processes test the network of the first; their running statistics differ.
    """
    if dist.is_initialized():
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)
    network.eval()
    size = recipe.test_size
    test.transform = transforms.Compose(
        [
            transforms.Resize(round(size / CROP)),
            transforms.CenterCrop(size),
            transforms.PILToTensor(),
        ]
    )
    own = Subset(test, range(process.rank, len(test), process.count))
    right = torch.zeros((), device=process.device)
    for images, labels in DataLoader(own, recipe.batch // process.count, num_workers=workers):
        inputs = prepare(images, process.device)
        with autocast(process.device, recipe.dtype):
            logits = network(inputs) + network(inputs.flip(3))
        right += (logits.argmax(1) == labels.to(process.device)).sum()
    return sum_over(process, right) / len(test)


def sum_over(process: Process, value: Tensor) -> float:
    """Add up all processes' values."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value.item()


def keep(path: Path, facts: dict[str, Any], rows: Sequence[Row], parts: dict[str, Any]) -> None:
    """Write the checkpoint beside path, in one piece."""
    states = {name: part.state_dict() for name, part in parts.items()}
    unfinished = path.with_suffix(".pt.part")
    torch.save({"facts": facts, "rows": list(rows), "states": states}, unfinished)
    os.replace(unfinished, path.with_suffix(".pt"))


def take_up(
    path: Path | None, facts: dict[str, Any], parts: dict[str, Any], device: torch.device
) -> list[Row]:
    """Load the checkpoint beside path, if there is one; return its rows.

    Raises:
        ValueError: It is of another run.
    """
    if path is None or not path.with_suffix(".pt").exists():
        return []
    stored = torch.load(path.with_suffix(".pt"), map_location=device, weights_only=True)
    stored_facts = with_current_options(stored["facts"])
    if stored_facts != facts:
        other = {key: value for key, value in stored_facts.items() if facts.get(key) != value}
        raise ValueError(
            f"--out: expected a new file, or the same run as in {path.with_suffix('.pt')}, which "
            f"has {other}"
        )
    for name, part in parts.items():
        part.load_state_dict(stored["states"][name])
    return stored["rows"]


def show(report: Report) -> None:
    """Print the epochs, what differs from the paper's recipe, and where this ran."""
    columns = {"epoch": "d", "size": "d", "loss": ".3f", "accuracy": ".2%", "seconds": ".0f"}
    cells = [[format(row[name], form) for name, form in columns.items()] for row in report.rows]
    print_table(list(columns), cells)
    own = report.settings
    paper = {**dataclasses.asdict(Recipe(own["model"])), "dtype": "float16"}
    paper |= {"images": 1_281_167, "test_images": 50_000, "classes": 1000}
    print(against_paper((name, own[name], value) for name, value in paper.items()))
    print(caption("paper imagenet", report.environment))


if __name__ == "__main__":
    sys.exit(main())

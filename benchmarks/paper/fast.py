"""Train CIFAR-10 to 94% in ten epochs, so that many runs of a setting can be had.

Written from its published description: K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single
GPU", 2024, arXiv 2404.00498. A network is compiled once for all runs of a setting: each run starts
it anew in place.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from time import perf_counter
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cifar10 import Images, Run, autocast, normalize, up_and_down

EPOCHS = 9.9
BATCH = 1024
# How far a step moves a weight is decoupled from the momentum, and weight decay from both.
LR = 11.5
MOMENTUM = 0.85
WEIGHT_DECAY = 0.0153
BIAS_SCALE = 64
LABEL_SMOOTHING = 0.2
FIRST, LAST, PEAK = 0.2, 0.07, 0.23
WHITENING_EPOCHS = 3
LOOKAHEAD_STEPS, LOOKAHEAD_DECAY = 5, 0.95**5
SHIFT = 2
WHITENED = 5000
FRESH_BATCHES = 10
# Test images that a curve takes its accuracies from, so that it costs little beside the training.
CURVE_IMAGES = 2000


@dataclasses.dataclass(frozen=True)
class FastRecipe:
    """Recipe that all runs of a comparison share; the defaults are those of the publication.

    Attributes:
        epochs: Passes over the training images; the last one may be cut short.
        width: Multiplies the channels of the three blocks, 64, 256 and 256.
        dtype: Of autocast; float32 is without.
        compiler: "inductor" or "aot_eager", of the dense network and inside of sdgp.
        curve: Test after every epoch, on the first CURVE_IMAGES, and not only at the end, on all.
        bias_scale: The learning rate of BatchNorm's biases, in multiples of the weights'.
    """

    epochs: float = EPOCHS
    batch: int = BATCH
    lr: float = LR
    width: float = 1.0
    dtype: str = "float16"
    compiler: str = "inductor"
    curve: bool = False
    bias_scale: float = BIAS_SCALE
    label_smoothing: ClassVar[float] = LABEL_SMOOTHING
    name: str = dataclasses.field(default="fast", init=False)


@dataclasses.dataclass
class FastRun(Run):
    """Results of a training run.

    Attributes:
        accuracies: After each epoch, of a part, and at the end, or of the end alone; by the mean of
            six views of an image.
        fresh_accuracy: At the end, with BatchNorm's statistics computed anew.
    """

    fresh_accuracy: float = math.nan


class Block(nn.Module):
    """Two 3 x 3 convolutions, with max pooling after the first."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm1 = batch_norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = batch_norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H // 2, W // 2)."""
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.norm2(self.conv2(x)))


class FastNet(nn.Module):
    """A whitening layer, three blocks and a linear layer.

    Args:
        width: Multiplies the blocks' channels.
    """

    def __init__(self, width: float = 1.0, classes: int = 10) -> None:
        super().__init__()
        channels = [round(width * count) for count in (64, 256, 256)]
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        pairs = zip((self.whiten.out_channels, *channels), channels, strict=False)
        self.blocks = nn.Sequential(*(Block(*pair) for pair in pairs))
        self.classifier = nn.Linear(channels[-1], classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, classes)."""
        x = self.blocks(F.gelu(self.whiten(images)))
        return self.classifier(F.max_pool2d(x, 3).flatten(1)) / 9

    @torch.no_grad()
    def reset(self, images: Tensor) -> None:
        """Draw all weights anew; whiten patches of images (N, 3, 32, 32)."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
                module.reset_parameters()
            if isinstance(module, nn.Conv2d) and module is not self.whiten:
                # As many filters as there are inputs hand these on.
                nn.init.dirac_(module.weight[: module.in_channels])
        self.whiten.weight.copy_(whitening_filters(images, self.whiten.kernel_size[0]))
        assert self.whiten.bias is not None
        self.whiten.bias.zero_()


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Make a BatchNorm that learns a bias and no scale."""
    norm = nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


def whitening_filters(images: Tensor, size: int, eps: float = 5e-4) -> Tensor:
    """Compute filters whose outputs on images are uncorrelated, and negated ones.

    They are the eigenvectors of the covariance of all patches, each over the square root of its
    eigenvalue.

    Returns:
        A weight (6 size^2, 3, size, size).
    """
    patches = F.unfold(images.float(), size).transpose(1, 2).flatten(0, 1)
    # On the CPU: the same filters on every device.
    covariance = (patches.T @ patches / len(patches)).cpu()
    values, vectors = torch.linalg.eigh(covariance)
    filters = (vectors / (values + eps).sqrt()).T.flip(0).view(-1, 3, size, size)
    return torch.cat([filters, -filters]).to(images.device)


class Trainer:
    """A network, compiled once, that is trained from one seed after the other.

    Args:
        compile: Arguments for torch.compile.
        dense_last: Share of the steps, the last ones, that the recipe's compiler alone compiles.

    Raises:
        ValueError: There is no whole batch.
    """

    def __init__(
        self,
        recipe: FastRecipe,
        compile: Mapping[str, Any],
        data: Images,
        test: Images,
        dense_last: float = 0.0,
    ) -> None:
        if len(data) < recipe.batch:
            count = len(data)
            raise ValueError(f"--batch: expected at most {count}, the images, got {recipe.batch}")
        self.recipe, self.data, self.test, self.dense_last = recipe, data, test, dense_last
        self.device = data.labels.device
        network = FastNet(recipe.width).to(self.device)
        self.network = network.to(memory_format=torch.channels_last)
        self._pruned = self._compile_loss(compile)
        self._dense = self._compile_loss({"backend": recipe.compiler})
        self._logits = torch.compile(self._views, backend=recipe.compiler)

    def run(
        self, seed: int, watch: Callable[[int, nn.Module], None] = lambda done, network: None
    ) -> FastRun:
        """Train from seed, and test.

        Args:
            watch: Called ahead of each epoch and at the end, with the number of epochs that are
                done and the network.
        """
        *_, run = self.by_epoch(seed, watch)
        return run

    def by_epoch(
        self, seed: int, watch: Callable[[int, nn.Module], None] = lambda done, network: None
    ) -> Iterator[FastRun]:
        """Train as `run` does, and yield the run after each epoch, and once more when it is whole.

        Other trainers may train in between. Of the random numbers that they share, only functions
        that draw some, such as "random", take any after the start.
        """
        recipe, data = self.recipe, self.data
        torch.manual_seed(seed)
        self.network.reset(normalize(data.images[:WHITENED]))
        optimizer = make_optimizer(self.network, recipe)
        lookahead = Lookahead(self.network)
        per_epoch = len(data) // recipe.batch
        total = math.ceil(per_epoch * recipe.epochs)
        whitening, *others = optimizer.param_groups
        rates = [group["lr"] for group in others]
        run, step = FastRun(), 0
        for epoch, batches in enumerate(self._epochs(seed, total)):
            watch(epoch, self.network)
            self.network.train()
            start, losses = perf_counter(), []
            for batch in batches:
                now = schedule(step / total)
                for group, rate in zip(others, rates, strict=True):
                    group["lr"] = rate * now
                whitening["lr"] = others[0]["lr"] if epoch < WHITENING_EPOCHS else 0.0
                is_pruned = step < total * (1 - self.dense_last)
                loss = (self._pruned if is_pruned else self._dense)(*batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
                step += 1
                if step % LOOKAHEAD_STEPS == 0:
                    lookahead.update(LOOKAHEAD_DECAY * (step / total) ** 3)
            if step == total:
                lookahead.finish()
            run.losses.append(torch.stack(losses).mean().item() / recipe.batch)
            run.seconds.append(perf_counter() - start)
            if recipe.curve or step == total:
                part = len(self.test) if step == total else CURVE_IMAGES
                run.accuracies.append(self._accuracy(part))
            yield run
        watch(len(run.losses), self.network)
        self._compute_statistics_anew()
        run.fresh_accuracy = self._accuracy(len(self.test))
        yield run

    def _epochs(self, seed: int, total: int) -> Iterator[list[tuple[Tensor, ...]]]:
        """Yield the loss's arguments, an epoch of steps at a time, total steps in all."""
        images, labels = self.data.images, self.data.labels
        generator = torch.Generator().manual_seed(seed)
        count, size = len(labels), self.recipe.batch
        # Mirrored at random in the first epoch, then in every other one.
        mirrored = torch.randint(2, (count,), generator=generator)
        epoch = 0
        while total > 0:
            shifts = torch.randint(2 * SHIFT + 1, (2, count), generator=generator)
            draws = torch.cat([shifts, (mirrored + epoch)[None] % 2])
            order = torch.randperm(count, generator=generator)
            steps = min(count // size, total)
            here = order.to(self.device)
            drawn = draws.to(self.device)[:, here]
            chosen = (part[: steps * size].view(steps, size) for part in (here, *drawn))
            yield [
                (images, labels, which, top, left, mirror)
                for which, top, left, mirror in zip(*chosen, strict=True)
            ]
            total -= steps
            epoch += 1

    def _compile_loss(self, compile: Mapping[str, Any]) -> Callable[..., Tensor]:
        network, device, dtype = self.network, self.device, self.recipe.dtype

        @torch.compile(fullgraph=True, **compile)
        def loss_of(
            images: Tensor, labels: Tensor, which: Tensor, top: Tensor, left: Tensor, mirror: Tensor
        ) -> Tensor:
            inputs = augment(images, which, top, left, mirror)
            with autocast(device, dtype):
                logits = network(inputs.contiguous(memory_format=torch.channels_last))
            return F.cross_entropy(
                logits.float(), labels[which], label_smoothing=LABEL_SMOOTHING, reduction="sum"
            )

        return loss_of

    def _views(self, images: Tensor) -> Tensor:
        """Average the logits of six views: mirrored or not, shifted by a pixel or not."""
        inputs = normalize(images)
        padded = F.pad(inputs, (1,) * 4, "reflect")
        size = images.shape[-1]
        shifted = [padded[..., i : i + size, i : i + size] for i in (0, 2)]
        weights = {0.25: [inputs], 0.125: shifted}
        logits: Any = 0
        with autocast(self.device, self.recipe.dtype):
            for weight, views in weights.items():
                for view in views:
                    for image in (view, view.flip(3)):
                        image = image.contiguous(memory_format=torch.channels_last)
                        logits = logits + weight * self.network(image).float()
        return logits

    @torch.no_grad()
    def _accuracy(self, count: int) -> float:
        """Return the share of the first count test images that are classified right."""
        self.network.eval()
        images, labels = self.test.images[:count], self.test.labels[:count]
        size = math.gcd(len(self.test), 2000)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        for part, truth in zip(images.split(size), labels.split(size), strict=True):
            right += (self._logits(part).argmax(1) == truth).sum()
        return right.item() / len(labels)

    @torch.no_grad()
    def _compute_statistics_anew(self) -> None:
        """Set BatchNorm's statistics to the means over a few batches of training images."""
        self.network.train()
        norms = [m for m in self.network.modules() if isinstance(m, nn.BatchNorm2d)]
        momentum = norms[0].momentum
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # A cumulative mean.
        for images in self.data.images.split(self.recipe.batch)[:FRESH_BATCHES]:
            with autocast(self.device, self.recipe.dtype):
                self.network(normalize(images).contiguous(memory_format=torch.channels_last))
        for norm in norms:
            norm.momentum = momentum


class Lookahead:
    """A slow copy of a network that every few steps takes its place (Zhang et al. 2019)."""

    def __init__(self, network: nn.Module) -> None:
        self._fast = [t for t in network.state_dict().values() if t.is_floating_point()]
        self._slow = [tensor.clone() for tensor in self._fast]

    def update(self, decay: float) -> None:
        """Move the copy towards the network by 1 - decay, and the network to the copy."""
        for slow, fast in zip(self._slow, self._fast, strict=True):
            slow.lerp_(fast, 1 - decay)
        self.finish()

    def finish(self) -> None:
        """Move the network to the copy."""
        for slow, fast in zip(self._slow, self._fast, strict=True):
            fast.copy_(slow)


def augment(images: Tensor, which: Tensor, top: Tensor, left: Tensor, mirror: Tensor) -> Tensor:
    """Cut a batch out of all images, shifted, mirrored and normalised.

    Args:
        images: Bytes (all, 3, H, W).
        which: The images of the batch (N,).
        top, left: From 0 to 2 SHIFT, (N,): where the image begins in one that is padded by SHIFT
            reflected pixels.
        mirror: 1 for a mirror image (N,).

    Returns:
        Floats (N, 3, H, W).
    """
    height, width = images.shape[2:]
    device = images.device
    rows = reflected(top[:, None] + torch.arange(height, device=device) - SHIFT, height)
    columns = torch.arange(width, device=device).expand(len(which), -1)
    columns = reflected(left[:, None] + columns - SHIFT, width)
    columns = torch.where(mirror[:, None] > 0, width - 1 - columns, columns)
    channel = torch.arange(3, device=device)[:, None, None]
    cut = images[
        which[:, None, None, None], channel, rows[:, None, :, None], columns[:, None, None]
    ]
    return normalize(cut)


def reflected(place: Tensor, size: int) -> Tensor:
    """Reflect places that are up to size - 1 beyond either end."""
    return size - 1 - (size - 1 - place.abs()).abs()


def schedule(done: float) -> float:
    """Return the share of the peak's learning rate, from 0.2 up to 1 and down to 0.07."""
    if done < PEAK:
        return up_and_down(done, PEAK, FIRST)
    return LAST + (1 - LAST) * up_and_down(done, PEAK, FIRST)


def make_optimizer(network: FastNet, recipe: FastRecipe) -> torch.optim.Optimizer:
    """Make an SGD optimizer with Nesterov momentum, and a rate of their own for BatchNorm's biases.

    Returns:
        With three groups of parameters: the whitening bias, the weights, and BatchNorm's biases.
    """
    assert network.whiten.bias is not None
    whitening = [network.whiten.bias]
    trained = [p for p in network.parameters() if p.requires_grad and p is not network.whiten.bias]
    # A gradient that stays the same moves the weights by so much more than it is.
    scale = 1 + 1 / (1 - MOMENTUM)
    lr = recipe.lr / BATCH / scale
    decay = WEIGHT_DECAY * recipe.batch / BATCH / scale
    groups = (
        (whitening, lr),
        ([p for p in trained if p.dim() > 1], lr),
        ([p for p in trained if p.dim() == 1], recipe.bias_scale * lr),
    )
    return torch.optim.SGD(
        [{"params": params, "lr": rate, "weight_decay": decay / rate} for params, rate in groups],
        lr=lr,
        momentum=MOMENTUM,
        nesterov=True,
        fused=True,
    )

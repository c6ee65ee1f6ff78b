"""Test trainers that people use, unmodified: they name the backend, the environment the settings.

`SDGP_INNER=inductor python -m pytest tests/integration/test_clients.py` runs them with Inductor
inside.
"""

import csv
import math
import os
import re
import subprocess
import sys
from fnmatch import fnmatchcase

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from sdgp_fx.kernels.op import PRUNE_NM
from sdgp_fx.passes import decisions as why

timm = pytest.importorskip("timm", reason="needs timm")
datasets = pytest.importorskip("torchvision.datasets", reason="needs torchvision")
transforms = pytest.importorskip("torchvision.transforms", reason="needs torchvision")

EXCLUDED = ("layer2.*", "*.layer2.*", "*.shortcut.*")
SETTINGS = {"N": "8", "M": "32", "PRUNE": "magnitude", "TARGETS": "conv,linear"}
CLASSES, SIZE, BATCH = 10, 32, 8


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name, value in {**SETTINGS, "EXCLUDE": ",".join(EXCLUDED)}.items():
        monkeypatch.setenv(f"SDGP_{name}", value)
    monkeypatch.setenv("SDGP_INNER", os.environ.get("SDGP_INNER", "aot_eager"))


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Write two batches of images to train on and one to validate with, in folders by class."""
    from PIL import Image

    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 2 * BATCH), ("validation", BATCH)):
        for i in range(count):
            folder = root / split / str(i % CLASSES)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture
def images(image_folder):
    return datasets.ImageFolder(image_folder / "train", transforms.ToTensor())


def make():
    return timm.create_model("test_resnet", num_classes=CLASSES)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.01)


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def reasons(model):
    """Return why each layer stays dense, by its name in named_modules(); "" if it doesn't."""
    found = {}
    for name, layer in layers(model).items():
        if not found:
            found[name] = why.NO_INPUT_GRADIENT
        elif any(fnmatchcase(name, glob) for glob in EXCLUDED):
            found[name] = why.EXCLUDED
        else:
            is_multiple = len(layer.weight) % 32 == 0
            found[name] = "" if is_multiple else why.NOT_A_MULTIPLE
    assert set(found.values()) > {"", why.EXCLUDED, why.NOT_A_MULTIPLE}
    return found


def assert_pruned_as_set(model, rewritten):
    assert {d.module: d.reason for _, made in rewritten for d in made} == reasons(model)
    calls = [graph.find_nodes(op="call_function", target=PRUNE_NM) for graph, _ in rewritten]
    assert {node.args[2:6] for nodes in calls for node in nodes} == {(8, 32, "magnitude", "group")}


def assert_same_state(state, expected):
    torch.testing.assert_close(dict(state), dict(expected), rtol=0, atol=0)


# timm


@pytest.mark.skipif(
    "TIMM_TRAIN" not in os.environ,
    reason="timm's train.py is in its repository alone: set TIMM_TRAIN to the script's path",
)
def test_timms_script(image_folder, tmp_path):
    data = ["--data-dir", image_folder, "--img-size", SIZE, "--batch-size", BATCH, "--workers", 0]
    model = ["--model", "test_resnet", "--num-classes", CLASSES, "--torchcompile", "sdgp"]
    rest = ["--device", "cpu", "--epochs", 1, "--output", tmp_path, "--experiment", "run"]
    command = [sys.executable, os.environ["TIMM_TRAIN"], *data, *model, *rest]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    logged = re.findall(r"Decision\(module='(.*?)'.*reason='(.*?)'", run.stderr)
    trained = make()
    assert dict(logged) == reasons(trained)
    (epoch,) = csv.DictReader((tmp_path / "run" / "summary.csv").open())
    assert math.isfinite(float(epoch["train_loss"]))
    saved = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=False)
    trained.load_state_dict(saved["state_dict"])


def test_what_timms_script_calls(image_folder, rewritten):
    """Train with the data, the task and the way of compiling it from timm's library."""
    from timm.optim import create_optimizer_v2

    task = pytest.importorskip("timm.task", reason="needs a timm with tasks")
    dataset = timm.data.create_dataset("", root=image_folder, split="train", is_training=True)
    loader = timm.data.create_loader(
        dataset, (3, SIZE, SIZE), BATCH, is_training=True, num_workers=0, use_prefetcher=False
    )
    model = make()
    training = task.ClassificationTask(model, device=torch.device("cpu"))
    training.compile(backend="sdgp", mode=None)
    optimizer = create_optimizer_v2(model, "sgd", lr=0.01)
    for inputs, labels in loader:
        optimizer.zero_grad()
        loss = training(inputs, labels)["loss"]
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    assert_pruned_as_set(model, rewritten)
    trained = timm.utils.unwrap_model(training.get_trainable_module())
    make().load_state_dict(trained.state_dict())


# torchvision


@pytest.mark.parametrize("name", ["ImageFolder", "CIFAR10"])
def test_torchvisions_data(name, rewritten, request):
    if name == "CIFAR10":
        root, _ = request.getfixturevalue("cifar10")
        data = datasets.CIFAR10(root, download=False, transform=transforms.ToTensor())
    else:
        data = request.getfixturevalue("images")
    model = make()
    compiled, optimizer = torch.compile(model, backend="sdgp"), sgd(model)
    for inputs, labels in DataLoader(data, BATCH, shuffle=True):
        loss = F.cross_entropy(compiled(inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss.isfinite()
    assert_pruned_as_set(model, rewritten)
    make().load_state_dict(model.state_dict())


# Lightning


def test_lightning(images, rewritten, tmp_path):
    lightning = pytest.importorskip("lightning", reason="needs lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = make()

        def training_step(self, batch, index):
            inputs, labels = batch
            loss = F.cross_entropy(self.network(inputs), labels)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return sgd(self)

    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision="bf16-mixed",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    classifier = Classifier()
    trainer.fit(torch.compile(classifier, backend="sdgp"), DataLoader(images, BATCH))
    assert trainer.global_step == 2
    assert trainer.callback_metrics["loss"].isfinite()
    assert_pruned_as_set(classifier, rewritten)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    plain = Classifier.load_from_checkpoint(tmp_path / "last.ckpt")
    assert_same_state(plain.state_dict(), classifier.state_dict())


# Hugging Face


@pytest.fixture
def accelerate():
    """Return the package, with none of the state that all its users in a process share."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_transformers_trainer(images, rewritten, tmp_path, accelerate):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 48, 64],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=CLASSES,
        problem_type="single_label_classification",  # Else set, and compiled again, in step 2.
    )
    model = transformers.ResNetForImageClassification(config)
    model.compile(backend="sdgp")
    arguments = transformers.TrainingArguments(
        tmp_path,
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        bf16=True,
        use_cpu=True,
        save_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
    )
    data = [{"pixel_values": image, "labels": label} for image, label in images]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    result = trainer.train()
    assert result.global_step == 2
    assert math.isfinite(result.training_loss)
    assert_pruned_as_set(model, rewritten)
    plain = transformers.ResNetForImageClassification.from_pretrained(tmp_path / "checkpoint-2")
    assert_same_state(plain.state_dict(), model.state_dict())


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate(images, rewritten, tmp_path, mixed_precision, accelerate):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision)
    model = make()
    model.compile(backend="sdgp")
    prepared, optimizer, loader = accelerator.prepare(model, sgd(model), DataLoader(images, BATCH))
    for inputs, labels in loader:
        with accelerator.accumulate(prepared):
            loss = F.cross_entropy(prepared(inputs), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        assert loss.isfinite()
    assert_pruned_as_set(model, rewritten)
    accelerator.save_model(prepared, tmp_path)
    plain = make()
    accelerate.load_checkpoint_in_model(plain, tmp_path)
    assert_same_state(plain.state_dict(), model.state_dict())

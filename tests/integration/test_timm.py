"""Test a training step of the smallest network of many families of timm, and of torchvision's."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="needs timm")
pytest.importorskip("torchvision", reason="needs torchvision")

from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator

from benchmarks.harness.architectures import Architecture, loss
from benchmarks.harness.rewrite import Original
from sdgp_fx import graph_pass
from sdgp_fx.passes.prune_input_grads import prune_input_grads

from ..helpers.eager_sdgp import eager_sdgp

TARGETS = "conv,linear"
OPTIONS = {"sdgp.inner": "aot_eager", "sdgp.targets": TARGETS}

# The smallest network of families that differ; a family is a module of timm.
NETWORKS = [
    "test_resnet",
    "test_vit",
    "test_convnext",
    "test_efficientnet",
    "test_nfnet",
    "test_mambaout",
    "test_byobnet",
    "test_coatnet",
    "fasternet_t0",
]
SIZE = 32

# Relative to the norm of a gradient, or to a hundredth of all gradients' norm: the gradient of a
# bias ahead of a batch norm is nothing but rounding. A pruned weight branch, a pruned first layer
# or a layer left out changes gradients by tens of percent.
TOLERANCE = 1e-3


@pytest.fixture
def checked(monkeypatch):
    """Record the backend's decisions, and the check of each joint graph that it rewrote."""
    seen = [], []

    def check(graph, config, *roots):
        original = Original(graph)
        decisions = prune_input_grads(graph, config, *roots)
        seen[0].extend(decisions)
        seen[1].append(original.check(graph, decisions, config))
        return decisions

    monkeypatch.setattr(graph_pass, "prune_input_grads", check)
    return seen


def step(network, inputs, forward):
    """Return the output of a training step, and the gradients by parameter name."""
    torch.manual_seed(1)
    output = forward(copy.deepcopy(inputs))
    torch.manual_seed(2)
    loss(output).backward()
    return output, {n: p.grad for n, p in network.named_parameters() if p.grad is not None}


def compare(network, inputs, checked):
    """Compare sdgp with dense training, and with SDGP in eager mode."""
    dense_network, definition = copy.deepcopy(network), copy.deepcopy(network)
    output, dense = step(dense_network, inputs, lambda x: dense_network(*x))
    _, expected = step(definition, inputs, lambda x: eager_sdgp(definition, TARGETS)(*x))
    compiled = torch.compile(network, backend="sdgp", options=OPTIONS)
    pruned_output, result = step(network, inputs, lambda x: compiled(*x))
    decisions, checks = checked

    torch.testing.assert_close(pruned_output, output, rtol=0, atol=0)
    assert [violation for check in checks for violation in check.violations] == []
    assert any(decision.pruned for decision in decisions)
    assert result.keys() == dense.keys()
    same = [name for name in dense if torch.equal(result[name], dense[name])]
    assert len(same) < len(dense)
    floor = torch.stack([grad.norm() for grad in expected.values()]).norm() / 100
    for name, grad in expected.items():
        error = (result[name] - grad).norm() / max(grad.norm(), floor)
        assert error < TOLERANCE, (name, error)
    return same


@pytest.mark.parametrize("name", NETWORKS)
def test_network_of_timm(name, checked):
    architecture = Architecture("timm", name, "")
    network = architecture.build(SIZE)
    same = compare(network, architecture.inputs(SIZE), checked)
    decisions, (check,) = checked
    assert len(same) >= check.identical > 0
    assert check.gradients == len([*network.parameters()])
    names = {name for name, _ in network.named_modules()}
    assert {decision.module for decision in decisions} <= names


def test_network_of_torchvision(checked):
    architecture = Architecture("torchvision", "squeezenet1_1", "")
    assert compare(architecture.build(), architecture.inputs(SIZE), checked)


class Backbone(nn.Module):
    out_channels = 8

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, stride=4)

    def forward(self, x):
        return self.second(self.norm(self.first(x)).relu())


def test_faster_rcnn(checked):
    """The training step of this network looks at values, so there are many graphs."""
    anchors = AnchorGenerator(((32,),), ((1.0,),))
    size = {"min_size": 64, "max_size": 64}
    network = FasterRCNN(Backbone(), 3, rpn_anchor_generator=anchors, **size).train()
    compare(network, Architecture("torchvision", "", "detection").inputs(64), checked)
    decisions, checks = checked
    assert len(checks) > 1
    pruned = [(d.kind, d.pruned) for d in decisions]
    assert (pruned.count(("conv", True)), pruned.count(("linear", True))) == (3, 3)

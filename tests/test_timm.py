"""A training step of the smallest network of many families of timm, and of torchvision's."""

import copy

import pytest
import torch

pytest.importorskip("timm", reason="needs timm")
pytest.importorskip("torchvision", reason="needs torchvision")

from benchmarks.architectures import Architecture, loss
from benchmarks.rewrite import Original
from sdgp_fx import backend
from sdgp_fx.passes.prune_input_grads import prune_input_grads

from .definition import eager_sdgp

TARGETS = "conv,linear"
OPTIONS = {"sdgp.inner": "aot_eager", "sdgp.targets": TARGETS}

# The family is timm's module; the size is that of the images.
NETWORKS = {
    "test_resnet": 32,
    "test_vit": 32,
    "test_convnext": 32,
    "test_efficientnet": 32,
}

# Of a gradient's norm: two values of a group may be so close that rounding decides which is kept.
FLIPS = 1e-3


@pytest.fixture
def checked(monkeypatch):
    """What the backend decided, and the check of each joint graph that it rewrote."""
    seen = [], []

    def check(graph, config):
        original = Original(graph)
        decisions = prune_input_grads(graph, config)
        seen[0].extend(decisions)
        seen[1].append(original.check(graph, decisions, config))
        return decisions

    monkeypatch.setattr(backend, "prune_input_grads", check)
    return seen


def step(network, inputs, forward):
    """The output of a training step, and the gradients by parameter name."""
    torch.manual_seed(1)
    output = forward(network)(*inputs)
    torch.manual_seed(2)
    loss(output).backward()
    return output, {n: p.grad for n, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name, checked):
    architecture = Architecture("timm", name, "")
    torch.manual_seed(0)
    network = architecture.build(NETWORKS[name])
    inputs = architecture.inputs(NETWORKS[name])
    output, dense = step(copy.deepcopy(network), inputs, lambda network: network)
    _, expected = step(copy.deepcopy(network), inputs, lambda n: eager_sdgp(n, TARGETS))
    pruned_output, result = step(
        network, inputs, lambda n: torch.compile(n, backend="sdgp", options=OPTIONS)
    )
    decisions, checks = checked

    torch.testing.assert_close(pruned_output, output, rtol=0, atol=0)
    assert [check.violations for check in checks] == [[]]
    (check,) = checks
    assert any(decision.pruned for decision in decisions)
    assert result.keys() == dense.keys()
    assert len(result) == check.gradients
    same = [key for key in dense if torch.equal(result[key], dense[key])]
    assert 0 < check.identical <= len(same) < len(dense)
    for key, grad in expected.items():
        error = (result[key] - grad).norm() / grad.norm().clamp(min=1e-6)
        assert error < FLIPS, (key, error)

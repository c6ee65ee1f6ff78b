"""Test compiled gradients in float64 against finite differences (torch.autograd.gradcheck)."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck


class OverChannels(nn.Linear):
    def forward(self, x):
        return super().forward(x.movedim(1, -1))


NETWORKS = {
    "conv1d": (
        nn.Sequential(nn.Conv1d(2, 4, 2), nn.Tanh(), nn.Conv1d(4, 4, 2, padding=1, groups=2)),
        (1, 2, 4),
    ),
    "conv2d": (
        nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Conv2d(4, 4, 2, stride=2, bias=False)),
        (2, 2, 4, 3),
    ),
    "transposed": (
        nn.Sequential(nn.Conv2d(2, 4, 1), nn.Tanh(), nn.ConvTranspose2d(4, 4, 2, stride=2)),
        (1, 2, 2, 2),
    ),
    "linear": (nn.Sequential(nn.Conv1d(2, 4, 2), nn.Tanh(), OverChannels(4, 4)), (2, 2, 3)),
}


def is_derivative(name, n, m):
    """Return whether the gradients of the input and of the last layer's parameters are derivatives.

    gradcheck changes what it is given in place, and so the network.
    """
    network, shape = NETWORKS[name]
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    options = {"sdgp.n": n, "sdgp.m": m, "sdgp.targets": "conv,linear", "sdgp.inner": "aot_eager"}
    compiled = torch.compile(network.double(), backend="sdgp", options=options)
    return [
        gradcheck(lambda *_: compiled(x), inputs, raise_exception=False)
        for inputs in (x, [*network[-1].parameters()])
    ]


@pytest.mark.filterwarnings("ignore:sdgp pruned nothing")
@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_pruned(name):
    assert is_derivative(name, 2, 2) == [True, True]


@pytest.mark.parametrize("name", NETWORKS)
def test_pruning_changes_input_gradients_and_no_weight_gradient(name):
    assert is_derivative(name, 1, 2) == [False, True]

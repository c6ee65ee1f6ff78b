"""Make layers of every kind and their joint graphs, for the tests of the pass."""

import copy
import functools
import operator

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from sdgp_fx.passes.convolutions import CONVOLUTION_BACKWARD
from sdgp_fx.passes.linears import BMM, MM

from .graphs import copy_graph, joint_graph

PRODUCTS = MM, BMM

CONVOLUTIONS = {
    "conv1d": (nn.Conv1d(8, 16, 3, bias=False), (2, 8, 9)),
    "conv2d": (nn.Conv2d(8, 16, 3, bias=False), (2, 8, 7, 7)),
    "conv2d with bias": (nn.Conv2d(8, 16, 3), (2, 8, 7, 7)),
    "conv3d": (nn.Conv3d(4, 8, 3), (2, 4, 5, 5, 5)),
    "1x1": (nn.Conv2d(8, 16, 1), (2, 8, 4, 4)),
    "strided": (nn.Conv2d(8, 16, 3, stride=2, padding=1), (2, 8, 7, 7)),
    "dilated": (nn.Conv2d(8, 16, 3, dilation=2, padding=2), (2, 8, 7, 7)),
    "grouped": (nn.Conv2d(8, 16, 3, groups=4), (2, 8, 7, 7)),
    "transposed 1d": (nn.ConvTranspose1d(8, 16, 3), (2, 8, 9)),
    "transposed 2d": (nn.ConvTranspose2d(8, 16, 3, 2, 1, output_padding=1), (2, 8, 5, 5)),
    "transposed 3d": (nn.ConvTranspose3d(4, 8, 2), (1, 4, 3, 3, 3)),
    "transposed grouped": (nn.ConvTranspose2d(8, 16, 3, groups=2, bias=False), (2, 8, 5, 5)),
}


@functools.cache
def traced(layer, shape, dtype):
    """Trace a layer once: many tests rewrite the same graph, each a copy of it."""
    layer = copy.deepcopy(layer).to(dtype)
    return joint_graph(layer, torch.randn(shape, dtype=dtype, requires_grad=True))


def convolution_graph(name, dtype=torch.float32):
    return copy_graph(traced(*CONVOLUTIONS[name], dtype))


def convolution_on(device, dtype, grad_output, inputs):
    """Return the graph of a 1x1 convolution's gradients on any device, and the gradients' nodes."""
    graph = fx.Graph()
    batch, outputs, *positions = grad_output
    shapes = {
        "tangents_1": grad_output,
        "primals_1": (batch, inputs, *positions),
        "primals_2": (outputs, inputs, 1, 1),
    }
    with FakeTensorMode():
        tensors = {k: torch.empty(s, device=device).to(dtype) for k, s in shapes.items()}
    nodes = [graph.placeholder(name) for name in tensors]
    for node, tensor in zip(nodes, tensors.values(), strict=True):
        node.meta["val"] = tensor
    rest = ([0], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False])
    backward = graph.call_function(CONVOLUTION_BACKWARD, (*nodes, *rest))
    backward.meta["val"] = (tensors["primals_1"], tensors["primals_2"], None)
    outputs = [graph.call_function(operator.getitem, (backward, i)) for i in (0, 1)]
    graph.output(tuple(outputs))
    return graph, outputs


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 8))

    def forward(self, x):
        return F.linear(x, self.weight)


class ColumnMajor(nn.Linear):
    def forward(self, x):
        return super().forward(x.T)


class Frozen(nn.Linear):
    def __init__(self):
        super().__init__(8, 16)
        self.requires_grad_(False)


class Batched(nn.Linear):
    """Linear layer without a weight gradient; the rows of its input are no view of it."""

    def __init__(self):
        super().__init__(8, 16, bias=False)
        self.requires_grad_(False)

    def forward(self, x):
        return super().forward(x.mT)


LINEARS = {
    "rows": (nn.Linear(8, 16), (6, 8)),
    "no bias": (nn.Linear(8, 16, bias=False), (6, 8)),
    "positions": (nn.Linear(8, 16), (3, 5, 8)),
    "image": (nn.Linear(8, 16, bias=False), (2, 3, 5, 8)),
    "column-major": (ColumnMajor(8, 16), (8, 6)),
    "functional": (Functional(), (3, 5, 8)),
    "frozen": (Frozen(), (3, 5, 8)),
    "batched": (Batched(), (3, 8, 5)),
    "batched image": (Batched(), (2, 3, 8, 5)),
}


def linear_graph(name, dtype=torch.float32):
    return copy_graph(traced(*LINEARS[name], dtype))


def linear_products(gm):
    """Return the products of the backward: [input gradient, weight gradient] in any order."""
    nodes = [node for node in gm.graph.nodes if node.target in PRODUCTS]
    return [node for node in nodes if "source_fn_stack" not in node.meta]


class Block(nn.Module):
    """Convolutions with every reason to stay dense, between two that are pruned."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
        self.odd = nn.ModuleDict({"six": nn.Conv2d(8, 6, 1), "back": nn.Conv2d(6, 16, 1)})
        self.grouped = nn.Conv2d(16, 16, 1, groups=8)
        self.weight = nn.Parameter(torch.randn(4, 16, 1, 1))

    def forward(self, x):
        x = self.body(self.stem(x))
        x = self.grouped(self.odd["back"](self.odd["six"](x)))
        return nn.functional.conv2d(x, self.weight)


def assert_same_form(recorded, real):
    if isinstance(recorded, tuple):
        for pair in zip(recorded, real, strict=True):
            assert_same_form(*pair)
    elif recorded is None:
        assert real is None
    else:
        assert (recorded.shape, recorded.dtype) == (real.shape, real.dtype)
        assert recorded.stride() == real.stride()

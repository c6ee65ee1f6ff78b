"""Strategies for hypothesis: gradients of any form, settings of the pruning, small networks."""

import torch
from hypothesis import strategies as st
from torch import nn

from sdgp_fx.config import PRUNING_FUNCTIONS, RESCALE_SCOPES

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@st.composite
def settings(draw, largest_m=32):
    """Draw (n, m, prune, rescale)."""
    m = draw(st.sampled_from([m for m in (1, 2, 4, 8, 16, 32) if m <= largest_m]))
    n = draw(st.integers(1, m))
    prune = draw(st.sampled_from(PRUNING_FUNCTIONS))
    rescale = draw(st.sampled_from(RESCALE_SCOPES)) if prune == "rescaled_magnitude" else "group"
    return n, m, prune, rescale


def values(shape, dtype, kind, seed):
    """Return random numbers.

    Args:
        kind: "normal"; "ties", zeros among them; "special", with numbers at the ends of the dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if kind == "ties":
        x = x.round()
    x = x.to(dtype)
    if kind == "special":
        info = torch.finfo(dtype)
        palette = [0.0, -0.0, 1.0, -1.0, 1 + info.eps, info.tiny / 2, -info.tiny, 1e-3]
        palette += [float("nan"), float("inf"), -float("inf"), info.max, info.min]
        palette = torch.tensor(palette, dtype=torch.float64).to(dtype)
        drawn = palette[torch.randint(len(palette), shape, generator=generator)]
        x = torch.where(torch.rand(shape, generator=generator) < 0.3, drawn, x)
    return x


@st.composite
def layouts(draw, x):
    """Draw x in another layout: dimensions in any order, gaps, an offset; or broadcast."""
    order = draw(st.permutations(range(x.dim())))
    steps = [draw(st.sampled_from([1, 1, 1, 2])) for _ in order]
    sizes = [x.shape[i] * step for i, step in zip(order, steps, strict=True)]
    offset = draw(st.integers(0, 3))
    memory = torch.full((offset + torch.Size(sizes).numel(),), float("nan"), dtype=x.dtype)
    view = memory[offset:].view(sizes)[tuple(slice(None, None, step) for step in steps)]
    view = view.permute([order.index(i) for i in range(x.dim())])
    view.copy_(x)
    for dim in range(x.dim()):
        if x.shape[dim] and draw(st.sampled_from([False, False, False, True])):
            view = view.narrow(dim, 0, 1).expand(x.shape)
    return view


@st.composite
def gradients(draw, m):
    """Draw (N, C, *spatial) of at most a few hundred groups of m, and a number of groups for it."""
    groups = draw(st.integers(1, 3))
    channels = groups * m * draw(st.integers(0, 2))
    spatial = draw(st.lists(st.integers(0, 4), max_size=3))
    shape = (draw(st.integers(0, 3)), channels, *spatial)
    kind = draw(st.sampled_from(["normal", "ties", "special"]))
    x = values(shape, draw(dtypes), kind, draw(seeds))
    return draw(layouts(x)), groups


# Networks


class Network(nn.Module):
    """Apply convolutions and linear layers, which go over the channels, one after the other.

    Args:
        residual: For each layer, whether its input is added to its output if they are alike.
    """

    def __init__(self, layers, functions, residual):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.functions = functions
        self.residual = residual

    def forward(self, x):
        steps = zip(self.layers, self.functions, self.residual, strict=True)
        for layer, function, residual in steps:
            y = function(apply(layer, x))
            x = x + y if residual and x.shape == y.shape else y
        return x


def apply(layer, x):
    return layer(x.movedim(1, -1)).movedim(-1, 1) if isinstance(layer, nn.Linear) else layer(x)


CONVOLUTIONS = {
    False: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    True: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}


@st.composite
def convolutions(draw, channels, sizes, m):
    """Draw a convolution of (N, channels, *sizes) whose result is not empty."""
    transposed = draw(st.booleans())
    groups = draw(st.sampled_from([g for g in (1, 2, 4, channels) if channels % g == 0]))
    per_group = draw(st.sampled_from([c for c in (m, 2 * m, 1, 3) if groups * c <= 48]))
    stride = draw(st.sampled_from([1, 2] if max(sizes) < 8 else [1]))
    dilation, padding, rest = draw(st.sampled_from([1, 1, 2])), draw(st.integers(0, 2)), {}
    if transposed:
        rest["output_padding"] = draw(st.integers(0, max(stride, dilation) - 1))
        shortest = 1 + max(0, -(((min(sizes) - 1) * stride - 2 * padding) // dilation))
        kernels = range(shortest, shortest + 3)
    elif stride == 1 and draw(st.booleans()):
        padding, kernels = "same", range(1, 4)
    else:
        kernels = range(1, 1 + min(3, 1 + (min(sizes) + 2 * padding - 1) // dilation))
    return CONVOLUTIONS[transposed][len(sizes) - 1](
        channels,
        groups * per_group,
        draw(st.sampled_from(kernels)),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        **rest,
    )


@st.composite
def networks(draw, m, exact=False):
    """Draw a network of two to five layers, and an input.

    Args:
        exact: Draw two or three layers, and small integers in float32, whose sums need no rounding.
    """
    dims = draw(st.integers(1, 3))
    shape = (draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, m])))
    x = torch.randn(*shape, *[draw(st.integers(2, 6)) for _ in range(dims)])
    result, layers, repeatable = x, [], False
    for _ in range(draw(st.integers(2, 3 if exact else 5))):
        channels, *sizes = result.shape[1:]
        kind = draw(st.sampled_from(["conv", "conv", "linear", "again"]))
        if kind == "again" and repeatable:
            layers.append(layers[-1])
        elif kind == "linear":
            features = draw(st.sampled_from([m, 2 * m, 3]))
            layers.append(nn.Linear(channels, features, bias=draw(st.booleans())))
        else:
            layers.append(draw(convolutions(channels, sizes, m)))
        before, result = result, apply(layers[-1], result)
        repeatable = result.shape == before.shape
    functions = [torch.relu, torch.clone, *([] if exact else [torch.tanh])]
    network = Network(layers, draw(each(layers, functions)), draw(each(layers, [False, True])))
    for layer, trained in zip(layers, draw(each(layers, [True, True, True, False])), strict=True):
        layer.requires_grad_(trained)
    dtype = torch.float32 if exact else draw(dtypes)
    if exact:
        for parameter in network.parameters():
            parameter.data.normal_().round_()
        x = x.round()
    if dims > 1 and draw(st.booleans()):
        formats = {2: torch.channels_last, 3: torch.channels_last_3d}
        network, x = network.to(memory_format=formats[dims]), x.to(memory_format=formats[dims])
    return network.to(dtype), x.to(dtype).requires_grad_(draw(st.booleans()))


def each(layers, values):
    """Draw one of values for each layer."""
    return st.lists(st.sampled_from(values), min_size=len(layers), max_size=len(layers))

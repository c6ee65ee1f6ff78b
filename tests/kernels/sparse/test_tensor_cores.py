"""Test the products of sparse tensor cores: their results in the emulator, and their machine code.

The emulator runs what TileLang generates for a GPU; see tests/emulation.
"""

import pytest
import torch

pytest.importorskip("tilelang", reason="needs TileLang, which is not on every platform")
pytest.importorskip("triton", reason="needs Triton")

from sdgp_fx.kernels import reference
from sdgp_fx.kernels.sparse import cuda
from sdgp_fx.kernels.sparse.binaries import Binary
from sdgp_fx.kernels.sparse.op import PRUNED_INPUT_GRAD
from sdgp_fx.kernels.sparse.packed import pack
from sdgp_fx.kernels.sparse.problem import Problem, empty_result
from sdgp_fx.kernels.sparse.tensor_cores import Product, tiles

from ...helpers import emulated_product
from ...helpers.input_grads import SEED, channels_last, make_case

ARCHITECTURES = ["sm_80", "sm_90"]

# Sums are float32 and rounded once to the result's dtype: half a step, and a little for the order.
TOLERANCES = {
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-2},
    torch.float16: {"rtol": 2**-10, "atol": 2e-3},
}

SHAPES = {
    "3x3": Product("bfloat16", 5, 7, 64, 64, (3, 3), (1, 1)),
    "1x1": Product("float16", 1, 1, 96, 160, (1, 1), (1, 1)),
    "5x3, dilated": Product("float16", 9, 6, 32, 32, (5, 3), (1, 2)),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


def operands(product, batch):
    """Draw a pruned gradient, whose positions are the result's without padding, and a weight."""
    dtype = getattr(torch, product.dtype)
    halo = [d * (k - 1) for d, k in zip(product.dilation, product.kernel, strict=True)]
    size = [s - h for s, h in zip((product.height, product.width), halo, strict=True)]
    gradient = torch.randn(batch, product.out_channels, *size).to(dtype)
    weight = torch.randn(product.out_channels, product.in_channels, *product.kernel) / 8
    pruned = reference.prune_nm(gradient, None, 2, 4, "magnitude", "group")
    return pruned, channels_last(weight.to(dtype)), halo


def input_grad(product, pruned, weight):
    size = (len(pruned), product.in_channels, product.height, product.width)
    double = pruned.double(), weight.double()
    return torch.nn.grad.conv2d_input(size, double[1], double[0], dilation=product.dilation)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", SHAPES)
def test_every_tile_gives_the_input_gradient(name, architecture, folder, monkeypatch):
    product, batch = SHAPES[name], 131 if name == "1x1" else 3
    pruned, weight, halo = operands(product, batch)
    expected = input_grad(product, pruned, weight).to(pruned.dtype)
    for tile in tiles(product, architecture):
        kernel = emulated_product.lower(product, tile, architecture)
        monkeypatch.setattr(
            "sdgp_fx.kernels.sparse.driver.launch",
            lambda binary, device, *rest: emulated_product.launch(binary.kernel, folder, *rest),
        )
        out = channels_last(torch.full_like(expected, float("nan")))
        cuda.multiply(Binary(kernel, b""), product, pack(pruned, halo), weight, out)
        torch.testing.assert_close(out, expected, **TOLERANCES[pruned.dtype])

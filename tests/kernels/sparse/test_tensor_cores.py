"""Test the products of sparse tensor cores: their results in the emulator, and their machine code.

The emulator runs what TileLang generates for a GPU; see tests/emulation.
"""

import re

import pytest
import torch

pytest.importorskip("tilelang", reason="needs TileLang, which is not on every platform")
pytest.importorskip("triton", reason="needs Triton")

from sdgp_fx.kernels import reference
from sdgp_fx.kernels.sparse import cuda
from sdgp_fx.kernels.sparse.binaries import Binary, why_no_compiler
from sdgp_fx.kernels.sparse.op import PRUNED_INPUT_GRAD
from sdgp_fx.kernels.sparse.packed import pack
from sdgp_fx.kernels.sparse.problem import Problem
from sdgp_fx.kernels.sparse.tensor_cores import Product, tiles

from ...emulation.emulator import EmulationError
from ...helpers import emulated_product, machine_code
from ...helpers.input_grads import channels_last, make_case

ARCHITECTURES = ["sm_80", "sm_90"]

# Sums are float32 and rounded once to the result's dtype: half a step, and a little for the order.
TOLERANCES = {
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-2},
    torch.float16: {"rtol": 2**-10, "atol": 2e-3},
}

MATRICES = Product("float16", 1, 1, 256, 256, (1, 1), (1, 1))
SHAPES = {
    "3x3": Product("bfloat16", 5, 7, 64, 64, (3, 3), (1, 1)),
    "1x1": MATRICES,
    "5x3, dilated": Product("float16", 9, 6, 64, 32, (5, 3), (1, 2)),
}


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", SHAPES)
def test_every_tile_gives_the_input_gradient(
    name, architecture, dtype, emulator_folder, monkeypatch
):
    product, batch = SHAPES[name]._replace(dtype=dtype), 131 if name == "1x1" else 3
    # Narrower ones than the widest are left to the other shapes.
    fitting = tiles(product, architecture)
    widest = [tile for tile in fitting if tile.columns == max(tile.columns for tile in fitting)]
    pruned, weight, halo = operands(product, batch)
    expected = input_grad(product, pruned, weight).to(pruned.dtype)

    def launch(binary, device, *rest):
        emulated_product.launch(binary.kernel, emulator_folder, *rest)

    monkeypatch.setattr("sdgp_fx.kernels.sparse.driver.launch", launch)
    for tile in widest:
        kernel = emulated_product.lower(product, tile, architecture)
        out = channels_last(torch.full_like(expected, float("nan")))
        cuda.launch(Binary(kernel, b""), product, pack(pruned, halo), weight, out)
        torch.testing.assert_close(out, expected, **TOLERANCES[pruned.dtype])


WAIT = r" *(?:tl::cp_async_wait<\d+>\(\)|mbarrier\[step_1.*?\.wait\(.*?\));\n"
FENCE = r" *tl::fence_proxy_async\(\);\n"
BROKEN = {
    "no wait": (WAIT, ""),
    "no fence": (FENCE, ""),
    "a fence ahead of the wait": (f"({WAIT})({FENCE})", r"\2\1"),
    "an index": (r"&\(places\[", "&(places[4 + "),
}


@pytest.mark.parametrize("specialized", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_seen(name, specialized, emulator_folder):
    """Break a kernel: the emulator objects, or the result is wrong."""
    product = MATRICES
    tile = next(
        t for t in tiles(product, "sm_90") if t.specialized == specialized and t.depth == 64
    )
    kernel = emulated_product.lower(product, tile, "sm_90")
    source, changes = re.subn(*BROKEN[name], kernel.source)
    assert changes
    pruned, weight, halo = operands(product, 100)
    expected = input_grad(product, pruned, weight).half()
    tensors = {**pack(pruned, halo)._asdict(), "weight": weight}

    def run(kernel):
        out = channels_last(torch.full_like(expected, float("nan")))
        blocks = product.in_channels // tile.columns
        emulated_product.launch(kernel, emulator_folder, blocks, {**tensors, "out": out}, 100)
        torch.testing.assert_close(out, expected, **TOLERANCES[torch.float16])

    run(kernel)
    with pytest.raises((EmulationError, AssertionError)):
        run(kernel._replace(source=source))


LAYERS = {
    "3x3": {"kernel": (3, 3), "size": (4, 6), "padding": 1},
    "1 dimension, padded less": {"kernel": (5,), "size": (9,), "padding": 1, "dilation": 2},
    "1x1": {"kernel": (1, 1), "size": (3, 5)},
    "linear": {"kernel": (), "size": ()},
}


@pytest.fixture
def emulated(emulator_folder, monkeypatch):
    """Let the sparse product of GPUs run on the CPU: Triton interprets, the emulator multiplies."""

    def find(product, device):
        tile = tiles(product, "sm_90")[0]
        return Binary(emulated_product.lower(product, tile, "sm_90"), b"")

    def launch(binary, device, *rest):
        emulated_product.launch(binary.kernel, emulator_folder, *rest)

    monkeypatch.setattr(cuda, "binary_of", find)
    monkeypatch.setattr("sdgp_fx.kernels.sparse.driver.launch", launch)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_operator(layer, last, emulated, nan_filled_empty):
    # Triton's interpreter does not round to bfloat16.
    case = make_case(32, 64, **LAYERS[layer], dtype=torch.float16)
    if last:
        last_memory = {
            name: channels_last(getattr(case, name)) for name in ("grad_output", "weight")
        }
        case = case.replace(**last_memory)
    problem = Problem(*case.arguments(1, 4, "rescaled_magnitude"))
    assert cuda.why_not_covered(problem) == ""
    result = cuda.pruned_input_grad(problem)
    pruned = reference.prune_nm(case.grad_output, None, 1, 4, "rescaled_magnitude", "group")
    expected = case.input_grad(pruned).half()
    torch.testing.assert_close(result, expected, **TOLERANCES[torch.float16])
    assert result.stride() == PRUNED_INPUT_GRAD(*problem).stride()


GOOD = {"kernel": (3, 3), "size": (6, 6), "padding": 1, "dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "pattern", "why"),
    [
        ({}, (2, 4, "rescaled_magnitude", "group"), ""),
        ({}, (1, 2, "random", "feature_map"), ""),
        ({}, (2, 16, "mvue", "group"), ""),
        ({}, (3, 8, "magnitude", "group"), "keeps more than two of four channels"),
        ({}, (2, 4, "rescaled_magnitude", "channel"), "rescales by groups alone"),
        ({"stride": 2}, (2, 4, "magnitude", "group"), "stride 1 alone"),
        ({"groups": 2}, (2, 4, "magnitude", "group"), "no sparse product of this form"),
        ({"transposed": True}, (2, 4, "magnitude", "group"), "no sparse product of this form"),
        ({"padding": 3}, (2, 4, "magnitude", "group"), "padded by more than the kernel reaches"),
    ],
)
def test_what_is_covered(changes, pattern, why):
    problem = Problem(*make_case(32, 64, **GOOD | changes).arguments(*pattern))
    found = cuda.why_not_covered(problem)
    assert why in found if why else found == ""


@pytest.mark.parametrize("channels", [(16, 64), (64, 32), (48, 64), (32, 96)])
def test_channels_that_fill_no_instruction_are_not_covered(channels):
    problem = Problem(*make_case(*channels, **GOOD).arguments())
    assert cuda.why_not_covered(problem) == "C_out is no multiple of 64, or C_in of 32"


def matrix_instructions(kernel, architecture, folder):
    """Return the matrix instructions of a kernel, which must not spill registers."""
    names = machine_code.instructions(kernel, architecture, folder)
    assert not [name for name in names if name.startswith(("LDL", "STL"))]
    return [name for name in names if "MMA" in name]


@pytest.mark.slow
@pytest.mark.skipif(bool(why_no_compiler()), reason="needs nvcc")
@pytest.mark.parametrize(
    ("architecture", "sparse", "dense"),
    [
        ("sm_80", "HMMA.SP.16832.F32.BF16", "HMMA.16816.F32.BF16"),
        ("sm_89", "HMMA.SP.16832.F32.BF16", None),
        ("sm_90", "HGMMA.SP.64x128x32.F32.BF16", None),
        ("sm_120", "HMMA.SP.16832.F32.BF16", None),
    ],
)
def test_machine_code(architecture, sparse, dense, tmp_path):
    """An instruction makes the multiply-adds of two dense ones, which are of half the depth."""
    product = MATRICES._replace(dtype="bfloat16")
    tile = tiles(product, architecture)[0]
    kernel = emulated_product.lower(product, tile, architecture)
    found = matrix_instructions(kernel, architecture, tmp_path)
    assert set(found) == {sparse}
    if dense:
        twin = machine_code.lower_dense_twin(product, tile, architecture, kernel)
        of_twin = matrix_instructions(twin, architecture, tmp_path)
        assert set(of_twin) == {dense}
        assert 2 * len(found) == len(of_twin)

"""Test the kernel that prunes and packs against the references: on a GPU, else interpreted."""

import pytest
import torch

from sdgp_fx.kernels import reference

from ...conftest import HAS_GPU
from ...helpers.gradients import as_channels_last, special

pytest.importorskip("triton", reason="needs Triton")

from sdgp_fx.kernels import triton_prune
from sdgp_fx.kernels.sparse import triton_pack
from sdgp_fx.kernels.sparse.packed import pack

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow):Warning")

FUNCTIONS = ["random", "magnitude", "rescaled_magnitude", "mvue"]
PATTERNS = [(torch.bfloat16, *p) for p in ((1, 2), (2, 4), (1, 4), (2, 8), (1, 16), (2, 32))]
PATTERNS += [(torch.float16, 2, 4), (torch.float16, 2, 32)]


@pytest.fixture
def seed(device):
    return torch.tensor([-6148914691236517206], device=device)


def same_bits(a, b):
    """Compare in bits, but any NaN with any other: torch.gather on a CPU changes their bits."""
    return ((a.view(torch.int16) == b.view(torch.int16)) | (a.isnan() & b.isnan())).all()


def compare(x, seed, n, m, prune, halo):
    """Compare kernel and references on the same gradient, made channels-last."""
    x = as_channels_last(x)
    if x.dtype == torch.bfloat16 and not HAS_GPU and prune in ("rescaled_magnitude", "mvue"):
        # Triton's interpreter (3.6 to 3.9) turns 1e-39 into 6e-39 on the way from float32.
        x = torch.where(x.abs() < torch.finfo(x.dtype).tiny, 0, x)
    expected = pack(reference.prune_nm(x, seed, n, m, prune, "group"), halo)
    result = triton_pack.prune_and_pack(x, seed, n, m, prune, halo)
    for got, wanted in zip(result, expected, strict=True):
        assert (got.dtype, got.shape, got.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
    assert torch.equal(result.places, expected.places), "kept other values"
    if prune in ("random", "magnitude"):
        assert same_bits(result.values, expected.values)
    else:
        # Triton's interpreter truncates to bfloat16 where a GPU rounds, and a GPU divides to two
        # units of float32.
        rtol, atol, _ = reference.TOLERANCES[x.dtype]
        torch.testing.assert_close(
            result.values, expected.values, rtol=rtol, atol=atol, equal_nan=True
        )


@pytest.mark.parametrize(("dtype", "n", "m"), PATTERNS)
@pytest.mark.parametrize("prune", FUNCTIONS)
def test_every_function_and_pattern(dtype, n, m, prune, device, seed, nan_filled_empty):
    compare(special((3, 32, 1, 5), dtype).to(device), seed, n, m, prune, (1, 0))


@pytest.mark.parametrize(
    ("shape", "halo"),
    [
        ((1, 16), ()),
        ((300, 48), ()),  # Several programs, the last one partly full.
        ((3, 16, 7), (2,)),
        ((3, 48, 5, 3), (2, 0)),
        ((3, 48, 5, 3), (0, 2)),
        ((1, 256, 3, 5), (1, 1)),
        ((3, 16, 7, 7), (0, 0)),
        ((2, 16, 1, 1), (3, 3)),
        ((2, 16, 0, 3), (1, 1)),
        ((0, 16, 3, 3), (1, 1)),
    ],
)
def test_shapes_and_halos(shape, halo, device, nan_filled_empty):
    compare(special(shape, torch.bfloat16).to(device), None, 2, 4, "magnitude", halo)


def test_zeros_of_both_signs(device):
    """In every place, kept or not: they pack as positive zeros where nothing else is kept."""
    group = torch.tensor([0.0, -0.0, 1.0, -2.0]).bfloat16()
    x = torch.cartesian_prod(group, group, group, group).view(-1, 16).to(device)
    compare(x, None, 2, 4, "magnitude", ())


@pytest.mark.parametrize("prune", ["random", "mvue"])
def test_random_numbers_of_every_program(prune, device, seed):
    compare(torch.randn(2, 48, 5, 7).half().to(device), seed, 2, 8, prune, (1, 1))


@pytest.mark.parametrize("prune", ["rescaled_magnitude", "mvue"])
def test_same_bits_as_pruned_apart(prune, device, seed):
    """Where rounding comes into play, too, packing changes nothing of the other kernel's result."""
    x = as_channels_last(torch.randn(1, 32, 5, 7).bfloat16()).to(device)
    expected = pack(triton_prune.prune_nm(x, seed, 2, 4, prune, "group"), (0, 1))
    result = triton_pack.prune_and_pack(x, seed, 2, 4, prune, (0, 1))
    assert same_bits(result.values, expected.values)
    assert torch.equal(result.places, expected.places)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(2, 16, 3, 5).bfloat16()}, "grad_output: expected channels-last"),
        ({"dtype": torch.float32}, "grad_output: expected one of"),
        ({"shape": (2, 24, 3, 5)}, "gradient: expected a multiple of 16"),
        ({"shape": (2, 48, 3, 5), "m": 32}, "groups: expected"),
        ({"shape": (2, 16, 3, 5, 2)}, "grad_output: expected .* at most two dimensions"),
        ({"halo": (1,)}, "halo: expected"),
        ({"n": 3}, "n, m: expected at most two"),
        ({"n": 2, "m": 2}, "n, m: expected at most two"),
        ({"prune": "best"}, "prune: expected"),
        ({"prune": "random", "seed": None}, "seed: expected"),
    ],
)
def test_arguments_that_do_not_fit(change, named, seed):
    given = {"shape": (2, 16, 3, 5), "dtype": torch.bfloat16, "x": None, "seed": seed}
    given |= {"n": 2, "m": 4, "prune": "magnitude", "halo": (1, 1), **change}
    x, shape, dtype = given.pop("x"), given.pop("shape"), given.pop("dtype")
    if x is None:
        x = as_channels_last(torch.zeros(shape).to(dtype))
    with pytest.raises(ValueError, match=f"^{named}"):
        triton_pack.prune_and_pack(x, **given)


@pytest.mark.gpu
def test_more_than_two_to_the_31_values():
    x = torch.zeros(2**31 // 64 + 5, 1, 1, 64, device="cuda", dtype=torch.bfloat16).movedim(-1, 1)
    x[-1] = torch.arange(64, device="cuda").view(64, 1, 1)
    result = triton_pack.prune_and_pack(x, None, 2, 4, "magnitude", (0, 1))
    pruned = reference.prune_nm(x[-1:], None, 2, 4, "magnitude", "group")
    for got, expected in zip(result, pack(pruned, (0, 1)), strict=True):
        assert torch.equal(got[-1:], expected)


def test_these_tests_ran_the_kernel():
    """The kernel did run: in the interpreter or on a GPU, never compiled on a CPU."""
    interpreted = type(triton_pack._prune_and_pack_kernel).__name__ == "InterpretedFunction"
    assert interpreted != HAS_GPU

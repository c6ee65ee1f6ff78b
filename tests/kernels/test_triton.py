"""Test the Triton kernels against the reference: on a GPU, else in the interpreter on the CPU."""

import pytest
import torch

from sdgp_fx.kernels import reference

from ..conftest import HAS_GPU
from ..helpers import by_hand
from ..helpers.gradients import as_channels_last, special

pytest.importorskip("triton", reason="needs Triton")
import triton

from sdgp_fx.kernels import triton_prune

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow):Warning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATTERNS = [(1, 2), (3, 8), (5, 16), (16, 32)]


@triton.jit
def _count(out_ptr, n):
    for i in range(n):
        triton.language.store(out_ptr, i)


def can_loop():
    """Return whether a loop can end at an argument.

    Triton 3.6's interpreter can't take the end of a range from an argument with numpy >= 2.4.
    """
    try:
        _count[(1,)](torch.zeros(1, dtype=torch.int32, device="cuda" if HAS_GPU else "cpu"), 3)
    except triton.runtime.errors.InterpreterError:
        return False
    return True


needs_loops = pytest.mark.skipif(
    not can_loop(), reason="this Triton's interpreter has no loops with this numpy"
)


each_pattern = pytest.mark.parametrize(
    ("n", "m", "dtype"),
    [*((2, 4, dtype) for dtype in DTYPES), *((n, m, torch.float32) for n, m in PATTERNS)],
)

SCOPES = ["group", *(pytest.param(s, marks=needs_loops) for s in ("feature_map", "channel"))]


def compare(x, seed, n, m, prune, rescale):
    """Compare kernel and reference on the same gradient."""
    if x.dtype == torch.bfloat16 and not HAS_GPU and prune in ("rescaled_magnitude", "mvue"):
        # Triton's interpreter (3.6 to 3.9) turns 1e-39 into 6e-39 on the way from float32.
        x = torch.where(x.abs() < torch.finfo(x.dtype).tiny, 0, x)
    expected = reference.prune_nm(x, seed, n, m, prune, rescale)
    result = triton_prune.prune_nm(x, seed, n, m, prune, rescale)
    assert (result.dtype, result.stride()) == (expected.dtype, expected.stride())
    assert torch.equal(result != 0, expected != 0), "kept other values"
    if prune in ("random", "magnitude"):
        integer = torch.int32 if x.dtype == torch.float32 else torch.int16
        assert torch.equal(result.view(integer), expected.view(integer))
    else:
        # Triton's interpreter truncates to bfloat16 where a GPU rounds: one unit as well.
        rtol, atol, _ = reference.TOLERANCES[x.dtype]
        torch.testing.assert_close(result, expected, rtol=rtol, atol=atol, equal_nan=True)


def compare_factors(x, n, m):
    """Compare factors: float32 sums in another order, for every dtype of the gradient."""
    expected = reference.channel_factor(x, n, m)
    result = triton_prune.channel_factor(x, n, m)
    assert result.dtype == expected.dtype == torch.float32
    rtol = reference.TOLERANCES[torch.float32].rtol
    torch.testing.assert_close(result, expected, rtol=rtol, atol=0)


@pytest.fixture
def seed(device):
    return torch.tensor([-6148914691236517206], device=device)


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, as_channels_last])
@each_pattern
@pytest.mark.parametrize("prune", ["random", "magnitude", "rescaled_magnitude", "mvue"])
def test_scope_group(layout, dtype, n, m, prune, device, seed, nan_filled_empty):
    x = special((3, 2 * m, 5, 7), dtype)
    compare(layout(x).to(device), seed, n, m, prune, "group")


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, as_channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (16, 32)])
@pytest.mark.parametrize("rescale", ["feature_map", "channel"])
@needs_loops
def test_wider_scopes(layout, dtype, n, m, rescale, device, nan_filled_empty):
    x = special((2, 2 * m, 3, 5), dtype)
    compare(layout(x).to(device), None, n, m, "rescaled_magnitude", rescale)


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, as_channels_last])
@each_pattern
@needs_loops
def test_channel_factor(layout, dtype, n, m, device, nan_filled_empty):
    x = special((3, 3 * m, 5, 7), dtype)
    compare_factors(layout(x).to(device), n, m)


@needs_loops
def test_channel_factor_of_other_strides_and_sizes(device, nan_filled_empty):
    """Cover gaps, a broadcast, another order, and several programs along both axes.

    The last programs along an axis are only partly full.
    """
    x = torch.randn(2, 8, 3, 5).to(device)
    compare_factors(torch.stack([x, x], -1)[..., 0], 2, 4)
    compare_factors(x[:1].expand(4, 8, 3, 5), 2, 4)
    compare_factors(x.permute(3, 1, 0, 2), 2, 4)
    compare_factors(x[:0], 2, 4)
    for layout in (torch.Tensor.contiguous, as_channels_last):
        compare_factors(layout(torch.randn(2, 72, 23, 29)).to(device), 2, 4)


@needs_loops
def test_no_channel_factor_is_below_one(device):
    """Not even by rounding: the two sums may add up the programs' parts in different orders."""
    x = torch.rand(32, 28, 1) + 1
    x[:, torch.arange(28) % 4 > 1] = 0
    factor = triton_prune.channel_factor(x.to(device), 2, 4)
    assert (factor >= 1).all()
    compare_factors(x.to(device), 2, 4)


@pytest.mark.parametrize("shape", [(2, 8, 11), (1, 4, 1, 1), (2, 8, 3, 5, 2), (5, 4, 1), (7, 40)])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, as_channels_last])
@pytest.mark.parametrize("rescale", SCOPES)
def test_dimensions(shape, layout, rescale, device, nan_filled_empty):
    x = layout(torch.randn(shape)).to(device)
    compare(x, None, 2, 4, "rescaled_magnitude", rescale)


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, as_channels_last])
@pytest.mark.parametrize("rescale", SCOPES)
def test_more_than_one_program(layout, rescale, device, nan_filled_empty):
    """Cover several tiles along every axis of the grids, with the last ones only partly full."""
    x = layout(torch.randn(2, 72, 23, 29)).to(device)
    compare(x, None, 2, 4, "rescaled_magnitude", rescale)


@pytest.mark.parametrize("prune", ["random", "mvue"])
def test_random_numbers_of_every_program(prune, device, seed, nan_filled_empty):
    x = torch.randn(2, 8, 23, 29)
    compare(x.to(device), seed, 2, 4, prune, "group")
    compare(as_channels_last(x).to(device), seed, 2, 4, prune, "group")


@pytest.mark.parametrize("dtype", DTYPES)
def test_nans_of_different_bits_are_equal(dtype, device):
    x = torch.tensor([1.0, float("nan"), float("nan"), 2.0]).to(dtype).view(1, 4, 1)
    x.view(torch.int32 if dtype == torch.float32 else torch.int16)[0, 2] += 1
    compare(x.to(device), None, 1, 4, "magnitude", "group")


@pytest.mark.parametrize("number", [by_hand.SMALLEST_UNIFORM, by_hand.LARGEST_UNIFORM])
def test_mvue_at_the_ends_of_the_random_numbers(number, device):
    """Where rounding could keep one more or less than n."""
    seed = torch.tensor([number], device=device)
    for x in torch.randn(16, 1, 8, 1).exp():
        compare(x.to(device), seed, 3, 8, "mvue", "group")


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, as_channels_last])
@pytest.mark.parametrize("rescale", SCOPES)
def test_what_is_finite_stays_finite(layout, rescale, device, seed):
    x = torch.tensor([[0.6, -0.6, 0.5, 0.5], [0.5, 0.5, 0.6, -0.6]]).T * 65504
    x = x.half().view(1, 4, 2)
    x = layout(x).to(device)
    for prune in ("rescaled_magnitude", "mvue"):
        result = triton_prune.prune_nm(x, seed, 2, 4, prune, rescale)
        assert result[result != 0].abs().tolist() == [65504.0] * 4
        compare(x, seed, 2, 4, prune, rescale)


def test_other_strides_are_copied(device, nan_filled_empty):
    x = torch.randn(2, 8, 3, 5).to(device)
    compare(torch.stack([x, x], -1)[..., 0], None, 2, 4, "magnitude", "group")
    compare(x[:1].expand(4, 8, 3, 5), None, 2, 4, "magnitude", "group")
    compare(x.permute(3, 1, 0, 2), None, 2, 4, "magnitude", "group")


def test_zero_sized(device):
    x = torch.empty(0, 8, 3, 5, device=device)
    assert triton_prune.prune_nm(x, None, 2, 4, "magnitude", "group").shape == x.shape


@pytest.mark.parametrize("rescale", ["group", "feature_map"])
def test_an_unknown_function_is_refused(rescale, device, seed):
    with pytest.raises(ValueError, match="the Triton kernels have no pruning function 'best'"):
        triton_prune.prune_nm(torch.randn(2, 8, 3, device=device), seed, 2, 4, "best", rescale)


@pytest.mark.gpu
@pytest.mark.parametrize("prune", ["random", "magnitude", "rescaled_magnitude", "mvue"])
def test_operator_uses_the_kernels_on_a_gpu(prune, seed):
    x = torch.randn(2, 8, 3, 5, device="cuda").bfloat16()
    result = torch.ops.sdgp.prune_nm(x, seed, 2, 4, prune, "group", 1)
    expected = triton_prune.prune_nm(x, seed, 2, 4, prune, "group")
    assert torch.equal(result, expected)


@pytest.mark.gpu
def test_channel_factor_uses_the_kernel_on_a_gpu():
    x = torch.randn(2, 8, 3, 5, device="cuda").bfloat16()
    expected = triton_prune.channel_factor(x, 2, 4)
    assert torch.equal(torch.ops.sdgp.channel_factor(x, 2, 4), expected)


@pytest.mark.gpu
def test_more_than_two_to_the_31_values():
    x = torch.zeros(2**31 // 64 + 5, 64, 1, 1, device="cuda", dtype=torch.bfloat16)
    x[-1] = torch.arange(64, device="cuda").view(64, 1, 1)
    result = triton_prune.prune_nm(x, None, 2, 4, "magnitude", "group")
    assert torch.equal(result[-1], reference.prune_nm(x[-1:], None, 2, 4, "magnitude", "group")[0])


def test_these_tests_ran_the_kernels():
    """The kernels did run: in the interpreter or on a GPU, never compiled on a CPU."""
    interpreted = type(triton_prune._prune_kernel).__name__ == "InterpretedFunction"
    assert interpreted != HAS_GPU

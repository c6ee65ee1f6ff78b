"""Test the C++ kernel of sdgp::prune_nm against the reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdgp_fx.config import PRUNING_FUNCTIONS
from sdgp_fx.kernels import cpp_prune, reference

from ..helpers import by_hand, strategies
from ..helpers.input_grads import channels_last

SEED = torch.tensor([2**40 + 7])


def assert_is_the_reference(x, n, m, prune, rescale):
    expected = reference.prune_nm(x, SEED, n, m, prune, rescale)
    pruned = cpp_prune.prepare(x, n, m, prune, rescale)(x, SEED)
    is_wide = prune == "rescaled_magnitude" and rescale != "group"
    tolerance = reference.TOLERANCES[x.dtype]
    rtol, atol = (tolerance.rtol, tolerance.atol) if is_wide else (0, 0)
    torch.testing.assert_close(pruned, expected, rtol=rtol, atol=atol, equal_nan=True)
    assert ((pruned == 0) == (expected == 0)).all()
    assert pruned.stride() == expected.stride()


def test_it_is_compiled():
    assert not cpp_prune.why_not_compiled()


@given(st.data(), strategies.settings())
def test_is_the_reference_to_the_last_bit(data, setting):
    n, m, prune, rescale = setting
    spatial = data.draw(st.lists(st.integers(1, 9), max_size=3))
    shape = (data.draw(st.integers(1, 5)), m * data.draw(st.integers(1, 5)), *spatial)
    kind = data.draw(st.sampled_from(["normal", "ties", "special"]))
    x = strategies.values(shape, data.draw(st.sampled_from(cpp_prune.DTYPES)), kind, 3)
    x = channels_last(x) if data.draw(st.booleans()) else data.draw(strategies.layouts(x))
    assert_is_the_reference(x, n, m, prune, rescale)


@pytest.mark.parametrize("dtype", cpp_prune.DTYPES)
@pytest.mark.parametrize("m", [2, 4, 8, 16, 32])
def test_large_gradients_by_several_threads(m, dtype, nan_filled_empty):
    """With and without a last tile that is not full, and memory that can be taken flat or not."""
    for shape in ((3, 96, 17, 19), (4, 32, 16, 16), (3, 32, 11, 7), (1024, 64)):
        x = torch.randn(shape).round(decimals=1).to(dtype)
        for prune in PRUNING_FUNCTIONS:
            assert_is_the_reference(channels_last(x), m // 2, m, prune, "group")
        assert_is_the_reference(x, 1, m, "rescaled_magnitude", "group")
        assert_is_the_reference(channels_last(x), 1, m, "rescaled_magnitude", "feature_map")


@pytest.mark.parametrize("dtype", cpp_prune.DTYPES)
def test_selection_of_neighbouring_and_equal_values(dtype):
    """All groups of four, and some of eight, of a few values that are hard to tell apart."""
    info = torch.finfo(dtype)
    values = [0.0, -0.0, info.tiny * info.eps, 1.0, -1 - info.eps, float("inf"), float("nan")]
    fours = torch.cartesian_prod(*[torch.tensor(values, dtype=dtype)] * 4)
    eights = torch.cat([fours, fours[torch.randperm(len(fours))]], 1)
    for m, groups, ns in ((4, fours, (1, 2, 3)), (8, eights, (3, 4, 6))):
        for n in ns:
            assert_is_the_reference(groups.unsqueeze(-1), n, m, "magnitude", "group")


def test_mvue_at_the_ends_of_the_random_numbers():
    """Where rounding could keep one more or less than n."""
    for number in (by_hand.SMALLEST_UNIFORM, by_hand.LARGEST_UNIFORM):
        for x in torch.randn(40, 8).exp():
            x, seed = x.view(1, 8, 1), torch.tensor([number])
            pruned = cpp_prune.prepare(x, 3, 8, "mvue", "group")(x, seed)
            assert torch.equal(pruned, reference.prune_nm(x, seed, 3, 8, "mvue", "group"))


def test_a_gradient_with_gaps_is_not_taken_flat(nan_filled_empty):
    wide = torch.randn(4, 5, 6, 96)
    x = wide[..., 32:64].movedim(-1, 1)
    assert_is_the_reference(x, 2, 4, "rescaled_magnitude", "group")
    assert_is_the_reference(wide[:, ::2].movedim(-1, 1), 2, 4, "mvue", "group")


def test_what_is_not_covered_has_a_reason():
    assert "dtype" in cpp_prune.why_not(torch.float64, 4, "random")
    assert "dimensions" in cpp_prune.why_not(torch.float32, 6, "random")
    assert "function" in cpp_prune.why_not(torch.float32, 4, "best")
    x = torch.randn(2, 8, 1, 2, 1, 3)
    expected = reference.prune_nm(x, None, 2, 4, "magnitude", "group")
    assert torch.equal(torch.ops.sdgp.prune_nm(x, None, 2, 4, "magnitude", "group", 1), expected)


def test_an_unknown_function_is_refused():
    with pytest.raises(ValueError, match="have no pruning function 'best'"):
        cpp_prune.prepare(torch.randn(1, 8, 3), 2, 4, "best", "group")

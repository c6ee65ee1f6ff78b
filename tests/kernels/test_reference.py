"""Test the reference against the words of the paper, written out once more in plain Python.

Its means are tested in test_statistics.
"""

import itertools
import math

import pytest
import torch

from sdgp_fx.kernels import reference

from ..helpers import by_hand

SEED = torch.tensor([1234567890123456789])


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 8), (16, 32)])
def test_magnitude_keeps_the_n_largest(n, m):
    x = torch.randn(2, 32, 3, 3)
    x[:, : 2 * m] = x[:, : 2 * m].round()  # ties, zeros among them
    pruned = reference.prune_nm(x, None, n, m, "magnitude", "group")
    expected = [by_hand.magnitude(row, n) for row in by_hand.groups(x, m).tolist()]
    assert by_hand.groups(pruned, m).tolist() == expected


def test_tie_goes_to_the_lower_channel():
    x = torch.tensor([1.0, -1.0, 1.0, 1.0]).view(1, 4, 1)
    pruned = reference.prune_nm(x, None, 2, 4, "magnitude", "group")
    assert pruned.flatten().tolist() == [1.0, -1.0, 0.0, 0.0]


def test_rescaled_magnitude_keeps_the_l1_norm_of_each_group():
    x = torch.randn(2, 8, 5, 5)
    pruned = reference.prune_nm(x, None, 2, 4, "rescaled_magnitude", "group")
    for row, result in zip(
        by_hand.groups(x, 4).tolist(), by_hand.groups(pruned, 4).tolist(), strict=True
    ):
        kept = by_hand.magnitude(row, 2)
        factor = sum(map(abs, row)) / sum(map(abs, kept))
        assert result == pytest.approx([value * factor for value in kept], rel=1e-6)


@pytest.mark.parametrize(("scope", "dims"), [("feature_map", (2, 3)), ("channel", (0, 2, 3))])
def test_rescale_scopes_keep_the_l1_norm_of_the_scope(scope, dims):
    x = torch.randn(3, 8, 5, 7)
    pruned = reference.prune_nm(x, None, 2, 4, "rescaled_magnitude", scope)
    torch.testing.assert_close(pruned.abs().sum(dims), x.abs().sum(dims))
    kept = reference.prune_nm(x, None, 2, 4, "magnitude", "group")
    factor = x.abs().sum(dims, keepdim=True) / kept.abs().sum(dims, keepdim=True)
    torch.testing.assert_close(pruned, kept * factor)


@pytest.mark.parametrize("scope", ["group", "feature_map", "channel"])
def test_nothing_kept_means_factor_one(scope):
    """Channel 1 is never among the largest: its kept sum is 0, and its gradient stays finite."""
    x = torch.tensor([2.0, 1.0]).view(1, 2, 1, 1).repeat(2, 1, 3, 3)
    x[0] = 0
    pruned = reference.prune_nm(x, None, 1, 2, "rescaled_magnitude", scope)
    assert pruned.isfinite().all()
    assert (pruned[:, 1] == 0).all()
    assert (pruned[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small_gradients_are_not_shrunk(dtype):
    smallest = torch.finfo(dtype).smallest_normal / 4
    x = torch.tensor([4.0, 4.0, 4.0, 4.0], dtype=dtype).view(1, 4, 1) * smallest
    pruned = reference.prune_nm(x, None, 2, 4, "rescaled_magnitude", "group")
    assert pruned.flatten().tolist() == [8 * smallest, 8 * smallest, 0.0, 0.0]


@pytest.mark.parametrize("prune", ["magnitude", "rescaled_magnitude", "mvue"])
@pytest.mark.parametrize("scope", ["group", "feature_map", "channel"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_kept(prune, scope, bad):
    x = torch.randn(2, 8, 3, 3)
    x[1, 6, 2, 1] = bad
    pruned = reference.prune_nm(x, SEED, 2, 4, prune, scope)
    assert not pruned[1, 6, 2, 1].isfinite()
    assert pruned.isfinite().sum() == pruned.numel() - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("prune", ["random", "magnitude", "rescaled_magnitude", "mvue"])
@pytest.mark.parametrize("scope", ["group", "feature_map", "channel"])
def test_what_is_finite_stays_finite(prune, scope, dtype):
    """Values are too large for float16 once scaled, and their sums for the other dtypes."""
    largest = torch.finfo(dtype).max
    x = torch.tensor([[0.6, -0.6, 0.5, 0.5], [0.5, 0.5, 0.6, -0.6]], dtype=torch.float64)
    x = (x.T * largest).to(dtype).unsqueeze(0)
    pruned = reference.prune_nm(x, SEED, 2, 4, prune, scope)
    assert pruned.isfinite().all()
    assert ((pruned != 0).sum(1) == 2).all()
    scaled = dtype == torch.float16 and prune in ("rescaled_magnitude", "mvue")
    assert ((pruned.abs() == largest).sum() == 4) == scaled
    assert (pruned * x >= 0).all()


def test_a_float32_that_rounding_takes_beyond_the_largest_stays_finite():
    """The group's sum is the largest number, and its quotient by the kept value is rounded up."""
    largest = torch.finfo(torch.float32).max
    first = torch.tensor(0.875 * largest)
    x = torch.stack([first, largest - first])
    assert not (first * (x.sum() / first)).isfinite()
    pruned = reference.prune_nm(x.view(1, 2, 1), None, 1, 2, "rescaled_magnitude", "group")
    assert pruned.flatten().tolist() == [largest, 0.0]


def test_an_unknown_function_is_refused():
    with pytest.raises(ValueError, match="the reference has no pruning function 'best'"):
        reference.prune_nm(torch.randn(2, 8, 3), SEED, 2, 4, "best", "group")


@pytest.mark.parametrize("prune", ["random", "mvue"])
def test_a_missing_seed_is_refused(prune):
    with pytest.raises(ValueError, match=f"seed: expected one int64 for prune = '{prune}'"):
        reference.prune_nm(torch.randn(2, 8, 3), None, 2, 4, prune, "group")


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (7, 8), (16, 32)])
def test_mvue_keeps_n_or_all_that_are_not_zero(n, m):
    """The ends of the range of uniform numbers are where rounding could keep one more or less."""
    values = torch.cat([torch.randn(500, m), torch.ones(4, m), torch.eye(m), torch.zeros(2, m)])
    values = torch.cat([values, torch.randn(500, m).exp() ** 8])
    for number in (0, 1, 2**23, 2**24 - 1):
        result = reference.mvue(values, torch.full((len(values),), number), n)
        assert torch.equal((result != 0).sum(1), (values != 0).sum(1).clamp(max=n))
        assert result.isfinite().all()


def test_mvue_of_at_most_n_nonzeros_is_exact():
    x = torch.zeros(4, 8, 9)
    x[:, 1], x[:, 6] = 3.0, -0.125
    assert torch.equal(reference.prune_nm(x, SEED, 2, 8, "mvue", "group"), x)


def test_philox_known_answer():
    """Check Random123's test vector for a zero key and a zero counter."""
    words = reference.philox(torch.tensor([0]), torch.tensor(0), 0)
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_seeds_of_the_smallest_and_the_largest_uniform_number():
    one = torch.Size([1])
    for seed, number in ((by_hand.SMALLEST_UNIFORM, 0), (by_hand.LARGEST_UNIFORM, 2**24 - 1)):
        assert reference.uniform(one, torch.tensor([seed])).tolist() == [number]


def test_philox_uses_all_of_seed_index_and_block():
    def words(seed, index, block):
        return [int(w) for w in reference.philox(torch.tensor([seed]), torch.tensor(index), block)]

    cases = [(1, 1, 0), (1 + 2**40, 1, 0), (1, 2, 0), (1, 1 + 2**40, 0), (1, 1, 1)]
    for a, b in itertools.combinations(cases, 2):
        assert words(*a) != words(*b)


@pytest.mark.parametrize("prune", ["random", "mvue"])
def test_numbers_do_not_depend_on_strides(prune):
    x = torch.randn(2, 8, 4, 6)
    a = reference.prune_nm(x, SEED, 2, 4, prune, "group")
    b = reference.prune_nm(x.to(memory_format=torch.channels_last), SEED, 2, 4, prune, "group")
    assert torch.equal(a, b)


def test_float64_is_summed_in_float64():
    x = torch.randn(1, 4, 50, dtype=torch.float64)
    pruned = reference.prune_nm(x, None, 2, 4, "rescaled_magnitude", "group")
    torch.testing.assert_close(pruned.abs().sum(1), x.abs().sum(1), rtol=1e-14, atol=0)


def test_bfloat16_is_summed_in_float32():
    """In bfloat16 1 + 2**-9 is 1: a sum of the 255 small gradients onto 1 would lose them all."""
    x = torch.zeros(1, 4, 256, dtype=torch.bfloat16)
    x[0, 0], x[0, 1] = 2**-9, 2**-8
    x[0, 0, 0] = 1
    pruned = reference.prune_nm(x, None, 1, 4, "rescaled_magnitude", "channel")
    assert pruned[0, 0, 0].item() == pytest.approx(1 + 255 * 2**-9, abs=2**-8)

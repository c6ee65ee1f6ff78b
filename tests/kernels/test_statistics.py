"""Test the means of "random" and "mvue" against probabilities computed by hand.

`helpers.frequencies` says how far frequencies may be off.
"""

import itertools
import math

import pytest
import torch

from sdgp_fx.kernels import reference

from ..helpers import by_hand
from ..helpers.frequencies import (
    CASES,
    DRAWS,
    PATTERNS,
    THRESHOLD,
    assert_frequencies,
    gradients,
    probabilities,
)

SEED = torch.tensor([1234567890123456789])


def draws(row, n, prune, seed=SEED, dtype=torch.float32):
    """Prune a group DRAWS times without bias, and return a row for each."""
    m = len(row)
    x = torch.tensor(row, dtype=dtype).view(1, m, 1).expand(1, m, DRAWS)
    pruned = by_hand.groups(reference.prune_nm(x, seed, n, m, prune, "group"), m)
    return pruned * (m / n) if prune == "random" else pruned


@pytest.mark.parametrize(("n", "m", "kind"), CASES)
@pytest.mark.parametrize("prune", ["random", "mvue"])
def test_unbiased(prune, n, m, kind):
    """A value g that is kept with probability p becomes g / p, so that its mean is g."""
    row = gradients(m)[kind]
    result, pi = draws(row, n, prune), probabilities(row, n, prune)
    kept = result != 0
    for i, (g, p) in enumerate(zip(row, pi, strict=True)):
        values = result[kept[:, i], i]
        if len(values):
            torch.testing.assert_close(values, torch.full_like(values, g / p), rtol=1e-5, atol=0)
    assert_frequencies(kept, pi)
    if prune == "mvue":
        assert (kept.sum(1) == min(n, sum(g != 0 for g in row))).all()
    elif kind == "ties":
        assert (kept.sum(1) == n).all()


def test_probabilities_are_those_of_the_stored_values():
    """The stored values count: in bfloat16 1 + 2**-9 is 1, and g / p is rounded."""
    row = [1 + 2**-9, -1.0, 3.0, 0.5]
    kept = draws(row, 2, "mvue", dtype=torch.bfloat16) != 0
    assert_frequencies(kept, probabilities([1.0, 1.0, 3.0, 0.5], 2, "mvue"))


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (3, 8)])
def test_random_draws_every_set_equally_often(n, m):
    kept = draws([1.0] * m, n, "random") != 0
    codes = (kept * 2 ** torch.arange(m)).sum(1)
    sets = [sum(2**i for i in chosen) for chosen in itertools.combinations(range(m), n)]
    assert set(codes.tolist()) <= set(sets)
    assert_frequencies(codes.unsqueeze(1) == torch.tensor(sets), [1 / len(sets)] * len(sets))


@pytest.mark.parametrize(("n", "m"), [(5, 16), (16, 32)])
def test_random_keeps_every_pair_equally_often(n, m):
    kept = draws([1.0] * m, n, "random") != 0
    pairs = list(itertools.combinations(range(m), 2))
    both = torch.stack([kept[:, i] & kept[:, j] for i, j in pairs], 1)
    assert_frequencies(both, [n * (n - 1) / (m * (m - 1))] * len(pairs))


@pytest.mark.parametrize("prune", ["random", "mvue"])
def test_groups_and_seeds_are_independent(prune):
    """The mean over a batch gains from the right mean of every group if groups are independent."""
    n, m = 3, 8
    row = gradients(m)["normal"]
    pi = torch.tensor(probabilities(row, n, prune), dtype=torch.float64)
    kept = draws(row, n, prune) != 0
    of_next_seed = draws(row, n, prune, SEED + 1) != 0
    for one, other in ((kept[::2], kept[1::2]), (kept, of_next_seed)):
        both = one.unsqueeze(2) & other.unsqueeze(1)
        assert_frequencies(both, (pi.unsqueeze(1) * pi).flatten().tolist())


# Variance


def variance(row, pi):
    """Compute the variance of an unbiased estimate that keeps g with probability pi."""
    return sum(g * g * (1 / p - 1) for g, p in zip(row, pi, strict=True) if g)


def other_probabilities(row, n):
    """Yield those of other unbiased estimates that keep n on average: none 0, none above 1."""
    yield probabilities([1.0] * len(row), n, "random")
    generator = torch.Generator().manual_seed(5)
    for exponent in (0.5, 0.9, 1.1, 2.0):
        yield probabilities([abs(g) ** exponent for g in row], n, "mvue")
    for _ in range(20):
        weights = torch.rand(len(row), generator=generator).add(0.01).tolist()
        yield probabilities(weights, n, "mvue")


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("kind", ["normal", "zeros", "ties", "two sizes"])
def test_no_other_unbiased_estimate_has_less_variance(kind, n, m):
    row = gradients(m)[kind]
    result, pi = draws(row, n, "mvue"), probabilities(row, n, "mvue")
    errors = (result - torch.tensor(row)).double().square().sum(1)
    largest = sum(g * g * max(1, 1 / p - 1) ** 2 for g, p in zip(row, pi, strict=True) if g)
    chance = largest * math.sqrt(THRESHOLD / (2 * DRAWS))  # Hoeffding
    for other in other_probabilities(row, n):
        assert errors.mean() <= variance(row, other) * (1 + 1e-6) + chance
    assert abs(errors.mean() - variance(row, pi)) <= chance

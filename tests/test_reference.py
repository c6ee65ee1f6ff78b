"""The oracle against the words of the paper, written out once more in plain Python."""

import itertools
import math

import pytest
import torch

from sdgp_fx.kernels import reference

SEED = torch.tensor([1234567890123456789])


def groups(tensor, m):
    """(number of groups, m), a row for every group."""
    return tensor.movedim(1, -1).reshape(-1, m)


def magnitude_by_hand(row, n):
    order = sorted(range(len(row)), key=lambda i: (-abs(row[i]), i))
    return [row[i] if i in order[:n] else 0.0 for i in range(len(row))]


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 8), (16, 32)])
def test_magnitude_keeps_the_n_largest(n, m):
    x = torch.randn(2, 32, 3, 3)
    x[:, : 2 * m] = x[:, : 2 * m].round()  # ties, zeros among them
    pruned = reference.prune_nm(x, None, n, m, "magnitude", "group")
    expected = [magnitude_by_hand(row, n) for row in groups(x, m).tolist()]
    assert groups(pruned, m).tolist() == expected


def test_tie_goes_to_the_lower_channel():
    x = torch.tensor([1.0, -1.0, 1.0, 1.0]).view(1, 4, 1)
    pruned = reference.prune_nm(x, None, 2, 4, "magnitude", "group")
    assert pruned.flatten().tolist() == [1.0, -1.0, 0.0, 0.0]


def test_rescaled_magnitude_keeps_the_l1_norm_of_each_group():
    x = torch.randn(2, 8, 5, 5)
    pruned = reference.prune_nm(x, None, 2, 4, "rescaled_magnitude", "group")
    for row, result in zip(groups(x, 4).tolist(), groups(pruned, 4).tolist(), strict=True):
        kept = magnitude_by_hand(row, 2)
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
    """Channel 1 is never among the largest: its kept sum is 0, its gradient stays finite."""
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


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4)])
def test_random_draws_every_set_equally_often(n, m):
    x = torch.ones(50, m, 1000)
    pruned = reference.prune_nm(x, SEED, n, m, "random", "group")
    codes = (groups(pruned, m) * 2 ** torch.arange(m)).sum(1).long()
    counts = codes.bincount(minlength=2**m).tolist()
    sets = math.comb(m, n)
    deviation = math.sqrt(50_000 / sets * (1 - 1 / sets))
    for code, count in enumerate(counts):
        if code.bit_count() == n:
            assert abs(count - 50_000 / sets) < 5 * deviation
        else:
            assert count == 0


@pytest.mark.parametrize(("n", "m"), [(3, 8), (4, 16), (16, 32)])
def test_random_keeps_n_at_positions_equally_often(n, m):
    kept = groups(reference.prune_nm(torch.ones(4, m, 5000), SEED, n, m, "random", "group"), m)
    assert (kept.sum(1) == n).all()
    deviation = math.sqrt(n / m * (1 - n / m) / 20_000)
    assert (kept.mean(0) - n / m).abs().max() < 5 * deviation


def keep_probabilities(row, n):
    """pi_i = min(1, c |g_i|) with sum n, by bisection on c."""
    low, high = 0.0, 1e9
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if sum(min(1, c * abs(g)) for g in row) < n else (low, c)
    return [min(1, c * abs(g)) for g in row]


@pytest.mark.parametrize(
    ("row", "n"),
    [
        ([1.0, -2.0, 3.0, 0.5], 2),
        ([10.0, 1.0, -1.0, 1.0], 2),
        ([8.0, -4.0, 2.0, 1.0, 0.5, 0.25, -16.0, 32.0], 3),
        ([0.0, 3.0, 0.0, -1.0], 1),
    ],
)
def test_mvue_is_unbiased_with_the_probabilities_of_minimum_variance(row, n):
    draws, m = 40_000, len(row)
    x = torch.tensor(row).view(1, m, 1).expand(40, m, draws // 40)
    result = groups(reference.prune_nm(x, SEED, n, m, "mvue", "group"), m)
    pi = torch.tensor(keep_probabilities(row, n))
    assert ((result != 0).sum(1) == min(n, sum(g != 0 for g in row))).all()
    deviation = (pi * (1 - pi) / draws).sqrt()
    assert ((result != 0).float().mean(0) - pi).abs().le(5 * deviation + 1e-7).all()
    for i, g in enumerate(row):
        kept = result[:, i][result[:, i] != 0]
        if g:
            torch.testing.assert_close(kept, torch.full_like(kept, g / pi[i]), rtol=1e-5, atol=0)
    error = (result.mean(0) - torch.tensor(row)).abs()
    assert error.le(5 * deviation * torch.tensor(row).abs() / pi.clamp(min=1e-9) + 1e-5).all()


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (7, 8), (16, 32)])
def test_mvue_never_keeps_more_than_n(n, m):
    """At the ends of the range of uniform numbers, where rounding could keep one more."""
    values = torch.cat([torch.randn(500, m), torch.ones(4, m), torch.eye(m), torch.zeros(2, m)])
    values = torch.cat([values, torch.randn(500, m).exp() ** 8])
    for number in (0, 1, 2**23, 2**24 - 1):
        result = reference.mvue(values, torch.full((len(values),), number), n)
        assert ((result != 0).sum(1) <= n).all()
        assert result.isfinite().all()


def test_mvue_of_at_most_n_nonzeros_is_exact():
    x = torch.zeros(4, 8, 9)
    x[:, 1], x[:, 6] = 3.0, -0.125
    assert torch.equal(reference.prune_nm(x, SEED, 2, 8, "mvue", "group"), x)


def test_philox_known_answer():
    """Random123's test vector for a zero key and a zero counter."""
    words = reference.philox(torch.tensor([0]), torch.tensor(0), 0)
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


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

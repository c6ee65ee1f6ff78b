"""Test norms and factors of whole channels, and what `select_channels` refuses.

Its choice is tested with the pass.
"""

import pytest
import torch

from sdgp_fx.config import PRUNING_FUNCTIONS
from sdgp_fx.kernels.channels import channel_norms, scale_channels, select_channels
from sdgp_fx.kernels.op import STOCHASTIC

NORMS = torch.arange(8.0)


def test_an_unknown_function_is_refused():
    with pytest.raises(ValueError, match="whole channels have no pruning function 'best'"):
        select_channels(NORMS, 2, 4, "best", torch.arange(8))


@pytest.mark.parametrize("prune", STOCHASTIC)
def test_missing_random_numbers_are_refused(prune):
    with pytest.raises(ValueError, match=f"draw: expected random numbers for prune = '{prune}'"):
        select_channels(NORMS, 2, 4, prune)


@pytest.mark.parametrize("prune", PRUNING_FUNCTIONS)
def test_every_function_is_known(prune):
    count = {"random": 8, "mvue": 2}.get(prune, 0)
    index, _ = select_channels(NORMS, 2, 4, prune, torch.zeros(count, dtype=torch.int64))
    assert index.shape == (4,)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_mvue_of_norms_without_a_finite_sum_is_by_magnitude(bad):
    norms = torch.tensor([1.0, bad, 3.0, 2.0]).repeat(50)
    draw = torch.randint(2**63 - 1, (50,))
    index, factor = select_channels(norms, 2, 4, "mvue", draw)
    assert sorted(index.tolist()) == [4 * i + place for i in range(50) for place in (1, 2)]
    assert factor.tolist() == [1.0] * 100


def test_mvue_at_the_end_of_the_random_numbers():
    """Rounding may choose the channel of zeros, and no factor may make NaN of these."""
    norms = torch.tensor([1.0, 1.0, 1.0, 0.0])
    index, factor = select_channels(norms, 2, 4, "mvue", torch.tensor([2**63 - 2]))
    assert len(set(index.tolist())) == 2
    assert factor.isfinite().all()


def test_mvue_gives_small_norms_their_share():
    """Which rounding to float32 would make zero: a norm of 1 would be certain."""
    norms = torch.tensor([1.0, 2.0**-27, 2.0**-27, 2.0**-27])
    index, factor = select_channels(norms, 1, 4, "mvue", torch.tensor([2**63 - 2]))
    assert index.tolist() == [3]
    assert factor.item() == pytest.approx(2**27 + 3)


def test_mvue_of_fewer_channels_than_n_that_are_not_zero():
    norms = torch.tensor([0.0, 5.0, 0.0, 0.0])
    index, factor = select_channels(norms, 3, 4, "mvue", torch.tensor([2**62]))
    assert len(set(index.tolist())) == 3
    assert 1 in index
    assert factor.tolist() == [1.0] * 3


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 40000.0), (torch.bfloat16, 1.0)])
def test_norms_are_summed_in_float32(dtype, value, dim):
    """A row's sum overflows in float16, and stops at 256 in bfloat16."""
    shape = [300, 300, 300]
    shape[dim] = 2
    x = torch.full(shape, -value, dtype=dtype)
    norms = channel_norms(x, dim)
    assert norms.dtype == torch.float32
    assert norms.tolist() == [90_000 * value] * 2


def test_norms_of_one_row_and_of_float64():
    x = torch.tensor([[1.0, -2.0], [2.0**-30, 4.0]], dtype=torch.float64)
    assert channel_norms(x, 1).tolist() == [1 + 2.0**-30, 6.0]
    assert channel_norms(x.half(), 0).tolist() == [3.0, 4.0]


@pytest.mark.parametrize("dim", [1, 2])
def test_scaled_channels_stay_finite_where_they_were(dim):
    x = torch.tensor([[40000.0, 3.0], [-40000.0, float("nan")], [1.0, -float("inf")]]).half()
    x = x.unsqueeze(3 - dim).transpose(0, dim)
    scaled = scale_channels(x, torch.tensor([2.0, 2.0, 1.0]), dim)
    assert scaled.dtype == torch.float16
    expected = [[65504.0, 6.0], [-65504.0, float("nan")], [1.0, -float("inf")]]
    expected = torch.tensor(expected).half().unsqueeze(3 - dim).transpose(0, dim)
    torch.testing.assert_close(scaled, expected, rtol=0, atol=0, equal_nan=True)

"""Test what `select_channels` refuses; its choice of whole channels is tested with the pass."""

import pytest
import torch

from sdgp_fx.config import PRUNING_FUNCTIONS
from sdgp_fx.kernels.channels import select_channels
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

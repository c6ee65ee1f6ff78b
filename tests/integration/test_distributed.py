"""Test two processes against one with the whole batch; no scale affects which values are kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ..helpers import train_distributed
from ..helpers.train_distributed import PRUNED, SETUPS

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Train on two processes, in every setup."""
    file = tmp_path_factory.mktemp("distributed") / "seen.pt"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*launcher, "-m", "tests.helpers.train_distributed", str(file)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return torch.load(file)


def test_two_processes_train_as_one(seen):
    model = train_distributed.make()
    losses = train_distributed.train(model, train_distributed.compiled(model))
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for setup in SETUPS:
        # The batch is summed in another order.
        torch.testing.assert_close(seen[setup]["losses"], losses, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(seen[setup]["state"], state, rtol=1e-4, atol=1e-5)


def test_every_setup_prunes_the_same_layers(seen):
    for setup in SETUPS:
        # Regions are models of their own, from which names start.
        parts = ["first", "head", "hidden", "second"]
        assert seen[setup]["pruned"] == (parts if setup == "fsdp of regions" else PRUNED), setup

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


@pytest.mark.parametrize("setup", SETUPS)
def test_two_processes_train_as_one(setup, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*launcher, "-m", "tests.helpers.train_distributed", setup, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    seen = torch.load(tmp_path / "seen.pt")

    model = train_distributed.make()
    losses = train_distributed.train(model, train_distributed.compiled(model))
    # The batch is summed in another order.
    torch.testing.assert_close(seen["losses"], losses, rtol=1e-5, atol=1e-6)
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    torch.testing.assert_close(seen["state"], expected, rtol=1e-4, atol=1e-5)
    if "fsdp" in setup:  # FSDP's hooks make graphs of the parts.
        assert seen["pruned"] == ["first", "head", "hidden", "second"]
    else:
        assert seen["pruned"] == PRUNED

"""Run the tests of benchmarks on one thread."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Use one thread: tensors this small gain nothing from more."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

"""Set up all tests: how Triton runs, a clean compiler, recorded graphs, and small data."""

import hashlib
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # Every core has its own process: threads, and processes that compile, would only add to them.
    # Must be set before torch is imported.
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

import numpy as np
import torch

# Examples are the same every time. For others, and more: --hypothesis-profile=search.
settings.register_profile(
    "ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "search", settings.get_profile("ci"), derandomize=False, max_examples=10_000
)
settings.load_profile("ci")

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Must be set before triton is imported for the first time.
    os.environ["TRITON_INTERPRET"] = "1"


# To measure its guards, Dynamo empties the processor's caches: 30 ms in each compilation.
torch._dynamo.guards.profile_guard_manager = lambda *arguments: 0.0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call():
    """Detach pytest from torch's own traces: whoever listens has every graph printed for them."""
    logging.getLogger("torch.__trace").handlers.clear()


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _clean_compiler():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def nan_filled_empty():
    """Fill memory from torch.empty with NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def emulator_folder(tmp_path_factory):
    """Return a folder for what the emulator compiles, which all workers share."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "emulated"


@pytest.fixture
def device():
    """Return where the Triton kernels run: a GPU, or Triton's interpreter on CPU tensors."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def timed(monkeypatch):
    """Call what is to be timed once, as if it took a millisecond; return what is, in order."""
    from sdgp_fx.measurement import timing

    seen = []

    def sample(functions, device, seconds, clock=None):
        for function in functions.values():
            function()
        seen.append(list(functions))
        return {name: [0.5e-3, 0.5e-3, 1e-3, 2e-3, 2e-3] for name in functions}

    def measure(functions, device, seconds, calls=1):
        return {name: timing.summarize(s) for name, s in sample(functions, device, seconds).items()}

    monkeypatch.setattr(timing, "sample", sample)
    monkeypatch.setattr(timing, "measure", measure)
    return seen


@pytest.fixture
def rewritten(monkeypatch):
    """Record the graphs that go through the pass, as (graph, decisions), in order."""
    from sdgp_fx import graph_pass

    seen = []
    report = graph_pass._report

    def spy(graph, decisions):
        seen.append((graph, decisions))
        report(graph, decisions)

    monkeypatch.setattr(graph_pass, "_report", spy)
    return seen


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Return a folder with a small data set in the format of CIFAR-10, and its training images."""
    CIFAR10 = pytest.importorskip("torchvision.datasets", reason="needs torchvision").CIFAR10
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    random = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch():
        images = random.integers(0, 256, (8, 3 * 32 * 32), dtype=np.uint8)
        return {"data": images, "labels": random.integers(0, 10, 8).tolist()}

    content = {f"data_batch_{i}": batch() for i in range(1, 6)}
    monkeypatch.setattr(CIFAR10, "train_list", [write(*item) for item in content.items()])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch())])
    _, md5 = write("batches.meta", {"label_names": [str(i) for i in range(10)]})
    monkeypatch.setitem(CIFAR10.meta, "md5", md5)
    return tmp_path, np.concatenate([part["data"] for part in content.values()])


def compiled_apart(module):
    """Return the JSON that a module of tests.helpers prints, in a process where Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", f"tests.helpers.{module}"],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)

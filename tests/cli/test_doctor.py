"""Test `python -m sdgp_fx doctor`: what it finds, and what it says of missing things."""

import importlib
import importlib.metadata
import re
import sys

import pytest
import torch
import torch._inductor.config

from sdgp_fx import backend, graph_pass
from sdgp_fx.cli import doctor
from sdgp_fx.cli.main import main
from sdgp_fx.kernels.sparse import binaries, cpu, cuda


@pytest.fixture(autouse=True)
def _without_code(monkeypatch):
    """Use aot_eager, whatever this machine can compile, and only the settings that a test makes."""
    for name in ("N", "M", "PRUNE", "EXCLUDE", "INCLUDE", "TARGETS", "RESCALE"):
        monkeypatch.delenv(f"SDGP_{name}", raising=False)
    monkeypatch.setenv("SDGP_INNER", "aot_eager")


def states(out):
    """Return the finding on each thing: (state, text) by name."""
    found = re.findall(r"^(ok|MISSING) +(.*?): (.*)$", out, re.M)
    return {name: (state, text) for state, name, text in found}


def test_everything_is_there(capsys, monkeypatch):
    monkeypatch.setenv("SDGP_N", "1")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    found = states(out)
    assert {state for state, _ in found.values()} == {"ok"}
    assert found["torch"][1] == torch.__version__
    assert found["entry point"][1].startswith("sdgp_fx.backend:sdgp")
    assert set(found["environment"][1].split(", ")) == {"SDGP_N=1", "SDGP_INNER=aot_eager"}
    assert found["sparse product"][1].startswith("skips the zeros on the CPU; compiled or found in")
    assert "SDGP_INNER" in found["will be used"][1]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert f"training step with aot_eager on {device}" in found
    assert out.endswith("everything needed is there\n")


def missing(capsys):
    """Run doctor where something is missing; return the remedy of each missing thing."""
    with pytest.raises(SystemExit) as exit_:
        main(["doctor"])
    assert exit_.value.code == 1
    out = capsys.readouterr().out
    names = [name for name, (state, _) in states(out).items() if state == "MISSING"]
    assert out.endswith(f"{len(names)} of these must be put right\n")
    remedies = re.findall(r"^ +-> (.*)$", out, re.M)
    assert len(remedies) == len(names)
    return dict(zip(names, remedies, strict=True))


@torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
def test_a_compiler_that_is_not_there(capsys, monkeypatch, tmp_path):
    """A C++ compiler is needed only with inductor, on the CPU."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert doctor.find_cpp("aot_eager").remedy == ""
    finding = doctor.find_cpp("inductor")
    assert finding.found == "without a C++ compiler"
    if not torch.cuda.is_available():
        assert finding.remedy.startswith("install a C++ compiler, or set SDGP_INNER=aot_eager")
    monkeypatch.setattr(doctor, "find_training", lambda inner: doctor.Finding("step", "left out"))
    assert main(["doctor"]) == 0
    capsys.readouterr()
    if not torch.cuda.is_available():
        monkeypatch.setenv("SDGP_INNER", "inductor")
        assert list(missing(capsys)) == ["C++ compiler"]


def test_without_a_sparse_product(monkeypatch):
    monkeypatch.setattr(cpu, "why_not_compiled", lambda: "no C++ compiler")
    finding = doctor.find_sparse_product()
    assert finding.found == "no C++ compiler: pruned gradients are multiplied as dense ones"
    assert not finding.remedy


@pytest.mark.parametrize(
    ("compiler", "library", "gpu", "found"),
    [
        ("no TileLang", False, "", "no TileLang: pruned gradients are multiplied as dense ones"),
        ("no TileLang", True, "", "no TileLang: on GPUs, pruned gradients of linear layers and"),
        ("", True, "", "TileLang "),
        ("", True, "no sparse product for compute capability 7.5", "no sparse product for comp"),
    ],
)
def test_products_on_sparse_tensor_cores(monkeypatch, compiler, library, gpu, found):
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: library)
    monkeypatch.setattr(binaries, "why_no_compiler", lambda: compiler)
    monkeypatch.setattr(cuda, "why_no_architecture", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpu))
    finding = doctor.find_sparse_tensor_cores()
    assert finding.found.startswith(found)
    assert not finding.remedy


def test_headers_that_are_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(doctor, "cpp_compiler", lambda: "g++")
    assert doctor.missing_for_cpp() == f"Python's headers ({tmp_path / 'Python.h'})"


def test_no_entry_point(capsys, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **which: [])
    assert "backend=sdgp_fx.sdgp" in missing(capsys)["entry point"]


@pytest.mark.parametrize("version", ["2.10.1", "2.16.0.dev20260101+cu130", "3.0"])
def test_a_torch_that_is_too_old_or_too_new(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert 'pip install "torch==2.15.*"' in doctor.find_torch().remedy


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.15.2"])
def test_a_torch_that_works(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert doctor.find_torch() == doctor.Finding("torch", version)


def test_no_torch_at_all(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(doctor, "version", lambda package: "")
    assert list(missing(capsys)) == ["torch"]


def test_triton_is_needed_with_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: exec("raise ImportError('none')"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.find_triton() == doctor.Finding("Triton", "can't be imported: none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "pip install" in doctor.find_triton().remedy


@pytest.mark.parametrize(
    ("capability", "sparse"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)]
)
def test_sparse_tensor_cores(capability, sparse, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found = doctor.find_gpu().found
    assert found.startswith(f"Some GPU, compute capability {capability[0]}.{capability[1]}")
    assert ("has sparse" in found, "has no sparse" in found) == (sparse, not sparse)


def test_a_setting_that_is_wrong(capsys, monkeypatch):
    monkeypatch.setenv("SDGP_N", "9")
    assert list(missing(capsys)) == ["environment"]


def test_a_compiler_that_fails(capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of order\nand so on")

    monkeypatch.setattr(backend, "aot_eager", broken)
    (name,) = missing(capsys)
    assert name.startswith("training step")


def test_a_step_that_prunes_nothing_is_noticed(monkeypatch):
    monkeypatch.setattr(graph_pass, "prune_input_grads", lambda *args: [])
    with pytest.warns(UserWarning, match="pruned nothing"):
        found = doctor.find_training("aot_eager")
    assert found.found == "no gradient was pruned"
    assert found.remedy

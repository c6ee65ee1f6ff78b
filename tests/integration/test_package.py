"""What users and maintainers rely on besides the numbers: imports, names, README, CI."""

import ast
import dataclasses
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sdgp_fx

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sdgp_fx"
README = (ROOT / "README.md").read_text()

# Who may import whom, so that imports run one way.
ALLOWED = {
    "__init__": {
        "backend",
        "config",
        "inspection.capture",
        "inspection.explain",
        "inspection.monitor",
        "inspection.report",
        "kernels.op",
    },
    "__main__": {"cli.main"},
    "cli.main": {
        "cli.arguments",
        "cli.demo",
        "cli.doctor",
        "cli.networks",
        "cli.profile",
        "config",
        "inspection.explain",
    },
    "cli.arguments": {"config"},
    "cli.demo": {"cli.doctor", "cli.networks", "inspection.explain", "passes.decisions"},
    "cli.doctor": {"backend", "config"},
    "cli.profile": {
        "backend",
        "cli.networks",
        "config",
        "measurement.convolutions",
        "measurement.timing",
    },
    "cli.networks": set(),
    "measurement.convolutions": {"measurement.timing"},
    "measurement.timing": set(),
    "inspection.explain": {
        "backend",
        "config",
        "inspection.dry_run",
        "inspection.report",
        "passes.decisions",
        "passes.layers",
        "passes.module_names",
        "passes.prune_input_grads",
    },
    "inspection.dry_run": {"inspection.report"},
    "inspection.report": {"config", "passes.decisions"},
    "inspection.monitor": {"backend", "kernels.record", "passes.statistics"},
    "backend": {
        "config",
        "graph_pass",
        "inductor.lowering",
        "inspection.capture",
        "passes.module_names",
    },
    "graph_pass": {
        "config",
        "inspection.capture",
        "passes.decisions",
        "passes.prune_input_grads",
        "passes.statistics",
    },
    "inspection.capture": {"passes.decisions", "passes.layers"},
    "passes.prune_input_grads": {
        "config",
        "kernels.op",
        "passes.channels",
        "passes.convolutions",
        "passes.decisions",
        "passes.elements",
        "passes.graph",
        "passes.layers",
        "passes.linears",
    },
    "passes.decisions": {"config", "kernels.op", "passes.channels", "passes.layers"},
    "passes.elements": {
        "config",
        "kernels.op",
        "passes.graph",
        "passes.layers",
        "passes.linears",
    },
    "passes.channels": {"config", "kernels.channels", "passes.graph", "passes.layers"},
    "passes.convolutions": {"passes.graph", "passes.layers"},
    "passes.linears": {"passes.graph", "passes.layers"},
    "passes.statistics": {
        "kernels.op",
        "kernels.record",
        "kernels.reference",
        "passes.graph",
        "passes.module_names",
    },
    "passes.layers": {"kernels.op", "passes.module_names"},
    "passes.graph": set(),
    "passes.module_names": set(),
    "inductor.lowering": {"inductor.pruning_functions", "inductor.scheduler_patch", "kernels.op"},
    "inductor.pruning_functions": {"config", "kernels.reference"},
    "inductor.scheduler_patch": set(),
    "kernels.channels": {"kernels.reference"},
    "kernels.op": {"config", "kernels.reference", "kernels.triton_prune"},
    "kernels.record": set(),
    "kernels.reference": set(),
    "kernels.triton_prune": set(),
    "config": set(),
}


def relative_imports(path):
    """The modules of this package that a file imports, without the package's name."""
    here = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                imported = (*base, alias.name)
                is_module = PACKAGE.joinpath(*imported).with_suffix(".py").exists()
                yield ".".join(imported if is_module else base)


def test_imports_run_one_way():
    files = [path for path in PACKAGE.rglob("*.py") if path.read_text().strip()]
    found = {}
    for path in files:
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name] = set(relative_imports(path))
    assert found.keys() == ALLOWED.keys()
    for name, imports in found.items():
        assert imports <= ALLOWED[name], name
    assert found["kernels.op"] == ALLOWED["kernels.op"]  # The search does find imports.


def run_python(code, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, **kwargs
    )


def test_importing_the_package_imports_nothing_heavy():
    code = "import sdgp_fx, sys; print(sorted({'torch', 'triton', 'timm'} & set(sys.modules)))"
    assert run_python(code).stdout.strip() == "[]"


def test_the_pass_on_the_cpu_does_not_import_triton_kernels():
    code = """
import sys, torch, sdgp_fx
sdgp_fx.prune(torch.randn(1, 4, 2))
assert "sdgp_fx.kernels.op" in sys.modules
print("sdgp_fx.kernels.triton_prune" in sys.modules)
"""
    assert run_python(code).stdout.strip() == "False"


def test_public_names():
    names = ["Explanation", "SDGPConfig", "capture", "explain", "monitor", "prune", "sdgp"]
    assert sorted(sdgp_fx.__all__) == names
    for name in sdgp_fx.__all__:
        assert callable(getattr(sdgp_fx, name))
        assert getattr(sdgp_fx, name).__doc__
    assert set(sdgp_fx.__all__) <= set(dir(sdgp_fx))
    with pytest.raises(AttributeError, match="no attribute 'prone'"):
        _ = sdgp_fx.prone


def test_entry_point():
    (entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="sdgp")
    assert entry.load() is sdgp_fx.sdgp


def test_marked_as_typed():
    assert (PACKAGE / "py.typed").exists()


def test_readme_lists_every_option_with_its_default():
    rows = re.findall(r"^\| (`sdgp\..*?) \| (.*?) \|", README, re.M)
    listed = {}
    for names, defaults in rows:
        for name, default in zip(names.split(", "), defaults.split(", "), strict=True):
            listed[name.strip("`").removeprefix("sdgp.")] = default.strip("`")
    defaults = dataclasses.asdict(sdgp_fx.SDGPConfig())
    defaults |= {name: ",".join(defaults[name]) for name in ("targets", "include")}
    defaults |= {"exclude": "none"}
    assert listed == {name: str(value) for name, value in defaults.items()}


def test_ci_runs_the_readmes_test_command():
    commands = re.findall(r"^.*python -m pytest.*$", README, re.M)
    assert commands == [
        "python3 -m venv .venv && . .venv/bin/activate && "
        'pip install -e ".[test]" && python -m pytest'
    ]
    assert "grep -m 1 'python -m pytest' README.md" in (ROOT / ".ci" / "run").read_text()

"""Test what users and maintainers rely on besides the numbers: imports, names, README, CI."""

import ast
import dataclasses
import graphlib
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

# The other parts that each part may import, so that imports run one way:
# cli -> {inspection, measurement} -> backend -> {graph_pass -> passes, inductor} -> kernels,
# and config may be imported by all. Command lines, the benchmarks' too, share `arguments`.
PASSES = {"config", "kernels"}
GRAPH_PASS = {*PASSES, "passes"}
BACKEND = {*GRAPH_PASS, "graph_pass", "inductor"}
TOOLS = {*BACKEND, "backend", "errors"}
MAY_IMPORT = {
    "config": set(),
    "errors": set(),
    "arguments": {"config"},
    "kernels": {"config"},
    "inductor": {"config", "kernels"},
    "passes": PASSES,
    "graph_pass": GRAPH_PASS,
    "backend": BACKEND,
    "inspection": TOOLS,
    "measurement": TOOLS,
    "cli": {*TOOLS, "arguments", "inspection", "measurement"},
    "__main__": {"cli"},
    "__init__": {"backend", "config", "inspection", "kernels"},
}


def relative_imports(path):
    """Yield the modules of this package that a file imports, without the package's name."""
    here = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                imported = (*base, alias.name)
                is_module = PACKAGE.joinpath(*imported).with_suffix(".py").exists()
                yield ".".join(imported if is_module else base)


def part(module):
    return module.partition(".")[0]


def find_imports():
    """Return the other modules of this package that each of its modules imports."""
    files = [path for path in PACKAGE.rglob("*.py") if path.read_text().strip()]
    names = {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in files}
    return {
        name.removesuffix(".__init__"): set(relative_imports(path)) for path, name in names.items()
    }


def test_imports_run_one_way():
    found = find_imports()
    assert {part(name) for name in found} == MAY_IMPORT.keys()
    for name, imports in found.items():
        assert {part(other) for other in imports} <= {part(name), *MAY_IMPORT[part(name)]}, name
    assert list(graphlib.TopologicalSorter(found).static_order())  # CycleError if there is one.
    # The search does find imports, even inside functions.
    assert found["kernels.op"] >= {"config", "kernels.reference", "kernels.triton_prune"}


def test_implementations_do_not_import_each_other():
    """The reference and the fast kernels, which are compared with it, are independent."""
    found = find_imports()
    assert found["kernels.reference"] == set()
    assert "kernels.reference" not in found["kernels.triton_prune"]
    assert "kernels.triton_prune" not in found["inductor.lowering"]


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
    defaults["exclude"] = "none"
    assert listed == {name: str(value) for name, value in defaults.items()}


def test_ci_runs_the_readmes_test_command():
    commands = re.findall(r"^.*python -m pytest.*$", README, re.M)
    assert commands == [
        "python3 -m venv .venv && . .venv/bin/activate && "
        'pip install -e ".[test]" && python -m pytest'
    ]
    assert "grep -m 1 'python -m pytest' README.md" in (ROOT / ".ci" / "run").read_text()

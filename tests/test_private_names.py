"""Look up the private names of PyTorch that this project builds on in the installed torch.

This is the one place that says on which versions they were checked. What the pass reads of a
graph's metadata is tested where it is read.
"""

import ast
import contextlib
import inspect
import itertools
import pkgutil
from pathlib import Path

import pytest
import torch

from sdgp_fx.cli import doctor

ROOT = Path(__file__).parents[1]

SUPPORTED = "torch 2.11 to 2.15"

CHECKED_ON = "torch 2.11, 2.14 and 2.15"

# Names of each module or class that sdgp_fx or benchmarks use, all looked up on each torch in
# CHECKED_ON.
PRIVATE = {
    "torch": "_cslt_compress _cslt_sparse_mm _cslt_sparse_mm_search _TorchCompileInductorWrapper",
    "torch._C": (
        "_conv_determine_backend_memory_format _cuda_exchangeDevice _cuda_getCurrentRawStream "
        "_cuda_getDevice _cuda_maybeExchangeDevice _cuda_setDevice _select_conv_backend"
    ),
    "torch._C._ConvBackend": "Cudnn",
    "torch._C._dynamo.eval_frame": "_debug_get_cache_entry_list reset_code",
    "torch._C._nn": "linear",
    "torch._decomp.decompositions_for_rng.PhiloxStateTracker": "reset",
    "torch._dynamo": "reset",
    "torch._dynamo.backends.common": "aot_autograd",
    "torch._dynamo.backends.debugging": "boxed_nop",
    "torch._dynamo.compiled_autograd": "in_compiled_autograd_region",
    "torch._dynamo.config": "patch recompile_limit",
    "torch._dynamo.convert_frame": "register_bytecode_hook",
    "torch._dynamo.device_interface.CudaInterface": (
        "current_device get_compute_capability get_device_properties is_available"
    ),
    "torch._dynamo.device_interface.CudaInterface.Worker": "current_device get_device_properties",
    "torch._dynamo.eval_frame": "OptimizeContext OptimizedModule",
    "torch._dynamo.eval_frame.cached_backends": "clear update",
    "torch._dynamo.exc.ShortenTraceback": "__init__",
    "torch._dynamo.symbolic_convert.InstructionTranslator": "current_tx",
    "torch._dynamo.utils": "get_metrics_context",
    "torch._dynamo.utils.counters": "clear update",
    "torch._functorch._aot_autograd.descriptors": "PlainAOTInput",
    "torch._functorch.config": (
        "enable_autograd_cache enable_remote_autograd_cache force_non_lazy_backward_lowering patch"
    ),
    "torch._functorch.eager_transforms": "_autograd_grad",
    "torch._functorch.partitioners": "min_cut_rematerialization_partition",
    "torch._inductor": "list_mode_options utils",
    "torch._inductor.codecache": "cache_dir",
    "torch._inductor.codecache.CppCodeCache": "load",
    "torch._inductor.compile_fx": "compile_fx compile_fx_inner",
    "torch._inductor.config": "compile_threads fx_graph_cache joint_custom_pre_pass patch triton",
    "torch._inductor.cpp_builder": "get_cpp_compiler",
    "torch._inductor.custom_graph_pass": "CustomGraphPass get_hash_for_files",
    "torch._inductor.decomposition": "is_gpu select_decomp_table",
    "torch._inductor.dependencies": "Dep StarDep WeakDep",
    "torch._inductor.exc": "CppCompileError InvalidCxxCompiler",
    "torch._inductor.graph": "GraphLowering",
    "torch._inductor.graph.GraphLowering": "_compile_to_module",
    "torch._inductor.ir": (
        "ComputedBuffer FallbackKernel FixedLayout get_stride_order Sort StorageBox"
    ),
    "torch._inductor.ir.FlexibleLayout": "stride_ordered",
    "torch._inductor.ir.TensorBox": "create",
    "torch._inductor.lowering": "fallback_handler register_lowering",
    "torch._inductor.memory": "estimate_peak_memory prepare_planning_info",
    "torch._inductor.runtime.hints.ReductionHint": "OUTER_TINY",
    "torch._inductor.scheduler": (
        "BaseSchedulerNode ExternKernelSchedulerNode NopKernelSchedulerNode"
    ),
    "torch._inductor.scheduler.SchedulerNode": "recompute_size_and_body",
    "torch._inductor.utils": "fresh_cache",
    "torch._inductor.virtualized.V": "current_node",
    "torch._inductor.virtualized.V.graph": (
        "additional_buffer_deps env name_to_users register_buffer register_operation"
    ),
    "torch._inductor.virtualized.V.graph.sizevars": "shape_env statically_known_equals",
    "torch._inductor.virtualized.ops": (
        "abs add bitwise_and bitwise_or bitwise_right_shift bitwise_xor constant eq ge gt "
        "index_expr logical_and lt maximum minimum mul ne neg reduction store sub "
        "to_dtype to_dtype_bitcast truediv where"
    ),
    "torch._logging": "trace_structured",
    "torch._ops": "HigherOrderOperator OpOverload",
    "torch._subclasses.fake_tensor": (
        "DataDependentOutputException DynamicOutputShapeException FakeCopyMode FakeTensor "
        "FakeTensorMode UnsupportedFakeTensorException UnsupportedOperatorException "
        "init_gpu_context unset_fake_temporarily"
    ),
    "torch.nn.init": "_no_grad_trunc_normal_",
    "torch.nn.modules.conv": "_ConvNd",
    "torch.ops.aten._unsafe_index": "Tensor",
    "torch.utils": "_triton",
    "torch.utils._ordered_set": "OrderedSet",
    "torch.utils._python_dispatch": "TorchDispatchMode",
    "torch.utils._pytree": "tree_leaves tree_map",
    "torch.utils._sympy.functions": "FloorDiv ModularIndexing",
}

# Names that can't be followed by attributes: a handler that is set while Inductor compiles, and
# one that answers to every name.
STAND_INS = {
    "torch._inductor.virtualized.V.graph.sizevars": "torch._inductor.sizevars.SizeVarAllocator",
    "torch._inductor.virtualized.V.graph": "torch._inductor.graph.GraphLowering",
    "torch._inductor.virtualized.ops": "torch._inductor.ops_handler.OpsHandler",
}


def is_private(name):
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def torch_names(source):
    """Find all dotted names of torch in a file: imported, read, patched by a string or keyword."""
    tree = ast.parse(source)
    imported, found = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.add(alias.name)
                root = alias.name.split(".")[0]
                imported |= {alias.asname: alias.name} if alias.asname else {root: root}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            imported |= names
            found |= set(names.values())

    def dotted(node):
        if isinstance(node, ast.Attribute):
            return (owner := dotted(node.value)) and f"{owner}.{node.attr}"
        return imported.get(node.id, "") if isinstance(node, ast.Name) else ""

    for node in ast.walk(tree):
        found.add(dotted(node))
        listed = node.args if isinstance(node, ast.Call) else getattr(node, "elts", [])
        for owner, name in itertools.pairwise(listed):
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and dotted(owner):
                found.add(f"{dotted(owner)}.{name.value}")
        if isinstance(node, ast.Call) and dotted(node.func).endswith("config.patch"):
            owner = dotted(node.func).removesuffix(".patch")
            found |= {f"{owner}.{keyword.arg}" for keyword in node.keywords if keyword.arg}
    return {name for name in found if name.startswith("torch.")}


def private_names(source):
    """Find the private ones of torch_names, without the modules and classes that contain them."""
    names = {name for name in torch_names(source) if is_private(name)}
    return {name for name in names if not any(other.startswith(f"{name}.") for other in names)}


def has(name):
    """Return whether torch has a dotted name."""
    for start, stand_in in STAND_INS.items():
        if name.startswith(f"{start}."):
            name = stand_in + name.removeprefix(start)
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        with contextlib.suppress(ImportError, AttributeError):
            value = pkgutil.resolve_name(".".join(parts[:count]))
            break
    if count == len(parts):
        return True
    # Otherwise every instance of a class may have it.
    bases = inspect.getmro(value)[:-1] if inspect.isclass(value) else ()
    return any(f"self.{parts[count]}" in inspect.getsource(base) for base in bases)


def missing(names, users):
    """Return messages about those of names that the installed torch lacks.

    Args:
        users: The files that use each name.
    """
    return [
        f"torch {torch.__version__} has no {name}, used in {', '.join(users[name])}; "
        f"sdgp_fx works with {SUPPORTED}"
        for name in names
        if not has(name)
    ]


def find_users():
    """Return the files of the package and of the benchmarks that use each private name."""
    users = {}
    for folder in ("sdgp_fx", "benchmarks"):
        for path in sorted(ROOT.glob(f"{folder}/**/*.py")):
            for name in private_names(path.read_text()):
                users.setdefault(name, []).append(str(path.relative_to(ROOT)))
    return users


USERS = find_users()


@pytest.mark.parametrize("owner", PRIVATE)
def test_torch_has(owner):
    names = [f"{owner}.{name}" for name in PRIVATE[owner].split()]
    absent = missing([name for name in names if name in USERS], USERS)
    assert not absent, "\n".join(absent)


def test_the_table_is_complete():
    assert {f"{o}.{name}" for o, names in PRIVATE.items() for name in names.split()} == set(USERS)


def test_a_name_that_is_gone_is_missed():
    gone = ["ir.Sorted", "no_module.name", "virtualized.ops.no_such", "virtualized.V.graph.no_such"]
    gone = [f"torch._inductor.{name}" for name in gone]
    gone.append("torch._no_such")
    users = {name: ["a.py", "b.py"] for name in gone}
    first, *others = missing(["torch._inductor.ir.Sort", *gone], users)
    assert first == (
        f"torch {torch.__version__} has no torch._inductor.ir.Sorted, used in a.py, b.py; "
        "sdgp_fx works with torch 2.11 to 2.15"
    )
    assert len(others) == len(gone) - 1


def test_names_are_found_in_every_form():
    source = """
import torch._a.b as b, torch._c
from torch._d import e as f
from torch import _g
mock.patch.object(f, "h")
pairs = [(f.i, "j", 1)]
torch._a.config.patch(k=1)
b.l().m
"""
    assert private_names(source) == {
        "torch._a.b.l", "torch._a.config.patch", "torch._a.config.k", "torch._c",
        "torch._d.e.h", "torch._d.e.i.j", "torch._g",
    }  # fmt: skip


def test_the_versions_are_those_of_the_readme_and_the_package():
    assert SUPPORTED in (ROOT / "README.md").read_text()
    first, last = SUPPORTED.removeprefix("torch ").split(" to ")
    assert CHECKED_ON.startswith(f"torch {first}, ")
    assert CHECKED_ON.endswith(f" and {last}")
    major, minor = last.split(".")
    assert tuple(map(int, first.split("."))) == doctor.OLDEST_TORCH
    assert (int(major), int(minor)) == doctor.NEWEST_TORCH
    required = f'"torch>={first},<{major}.{int(minor) + 1}"'
    assert required in (ROOT / "pyproject.toml").read_text()

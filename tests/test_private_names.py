"""The private names of PyTorch that this project builds on, each looked up in the torch at hand.

What the pass reads of a graph's metadata is tested where it is read.
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

# File -> module or class -> names that the file uses. All checked on torch 2.11, 2.14 and 2.15.
PRIVATE = {
    "sdgp_fx/backend.py": {
        "torch": "_TorchCompileInductorWrapper",
        "torch._dynamo.backends.common": "aot_autograd",
        "torch._dynamo.backends.debugging": "boxed_nop",
        "torch._dynamo.exc.ShortenTraceback": "__init__",
        "torch._functorch.partitioners": "min_cut_rematerialization_partition",
        "torch._inductor.config": "joint_custom_pre_pass",
    },
    "sdgp_fx/graph_pass.py": {
        "torch._inductor.custom_graph_pass": "CustomGraphPass get_hash_for_files",
    },
    "sdgp_fx/cli/doctor.py": {
        "torch._inductor.cpp_builder": "get_cpp_compiler",
        "torch._inductor.exc": "InvalidCxxCompiler",
    },
    "sdgp_fx/cli/networks.py": {
        "torch.nn.init": "_no_grad_trunc_normal_",
        "torch.utils._python_dispatch": "TorchDispatchMode",
    },
    "sdgp_fx/inductor/lowering.py": {
        "torch._inductor.config": "triton",
        "torch._inductor.ir": (
            "ComputedBuffer FixedLayout Loops Pointwise Sort StorageBox get_stride_order"
        ),
        "torch._inductor.ir.FlexibleLayout": "stride_ordered",
        "torch._inductor.ir.TensorBox": "create",
        "torch._inductor.lowering": "fallback_handler register_lowering",
        "torch._inductor.ops_handler": "DefaultHandler",
        "torch._inductor.runtime.hints.ReductionHint": "OUTER_TINY",
        "torch._inductor.virtualized.V": "current_node set_ops_handler",
        "torch._inductor.virtualized.V.graph": (
            "additional_buffer_deps env name_to_users register_buffer register_operation"
        ),
        "torch._inductor.virtualized.V.graph.no_fuse_buffer_names": "add",
        "torch._inductor.virtualized.V.graph.sizevars": "shape_env statically_known_equals",
        "torch._inductor.virtualized.ops": (
            "abs add bitwise_and bitwise_or bitwise_right_shift bitwise_xor constant eq ge gt "
            "identity index_expr logical_and logical_or lt minimum mul neg reduction store "
            "sub to_dtype to_dtype_bitcast truediv where"
        ),
        "torch.utils._sympy.functions": "FloorDiv ModularIndexing",
    },
    "sdgp_fx/inductor/scheduler_patch.py": {
        "torch._inductor.dependencies": "Dep StarDep WeakDep",
        "torch._inductor.scheduler.SchedulerNode": "recompute_size_and_body",
        "torch.utils._ordered_set": "OrderedSet",
    },
    "sdgp_fx/inspection/capture.py": {
        "torch._functorch.config": "enable_autograd_cache enable_remote_autograd_cache patch",
        "torch._logging": "trace_structured",
    },
    "sdgp_fx/inspection/dry_run.py": {
        "torch._C._dynamo.eval_frame": "_debug_get_cache_entry_list reset_code",
        "torch._dynamo.convert_frame": "register_bytecode_hook",
        "torch._dynamo.utils.counters": "clear update",
        "torch._subclasses.fake_tensor": (
            "DataDependentOutputException DynamicOutputShapeException FakeCopyMode FakeTensorMode"
        ),
        "torch.utils._pytree": "tree_map_only",
    },
    "sdgp_fx/kernels/channels.py": {
        "torch.ops.aten._unsafe_index": "Tensor",
    },
    "sdgp_fx/measurement/convolutions.py": {
        "torch.utils._python_dispatch": "TorchDispatchMode",
    },
    "sdgp_fx/passes/graph.py": {
        "torch._inductor.decomposition": "select_decomp_table",
    },
    "sdgp_fx/passes/linears.py": {
        "torch._C._nn": "linear",
        "torch._functorch.eager_transforms": "_autograd_grad",
    },
    "benchmarks/architectures.py": {
        "torch._subclasses.fake_tensor": "FakeCopyMode FakeTensorMode",
        "torch.utils._pytree": "tree_leaves",
    },
    "benchmarks/correctness.py": {
        "torch._dynamo": "reset",
    },
    "benchmarks/gpu_codegen.py": {
        "torch._C._ConvBackend": "Cudnn",
        "torch._C": (
            "_conv_determine_backend_memory_format _cuda_exchangeDevice "
            "_cuda_getCurrentRawStream _cuda_getDevice _cuda_maybeExchangeDevice "
            "_cuda_setDevice _select_conv_backend"
        ),
        "torch._dynamo.device_interface.CudaInterface.Worker": (
            "current_device get_device_properties"
        ),
        "torch._dynamo.device_interface.CudaInterface": (
            "current_device get_compute_capability get_device_properties is_available"
        ),
        "torch._functorch.config": "enable_autograd_cache force_non_lazy_backward_lowering patch",
        "torch._inductor.compile_fx": "compile_fx compile_fx_inner",
        "torch._inductor.config": "compile_threads fx_graph_cache patch",
        "torch._inductor.decomposition": "is_gpu",
        "torch._inductor.graph.GraphLowering": "_compile_to_module",
        "torch._inductor": "utils",
        "torch._subclasses.fake_tensor": "FakeCopyMode FakeTensorMode init_gpu_context",
        "torch.utils._pytree": "tree_map",
        "torch.utils": "_triton",
    },
    "benchmarks/sparse_mm.py": {
        "torch": "_cslt_compress _cslt_sparse_mm _cslt_sparse_mm_search",
    },
    "benchmarks/timm_sweep.py": {
        "torch._dynamo": "reset",
        "torch._dynamo.utils.counters": "clear",
        "torch.nn.modules.conv": "_ConvNd",
    },
    "benchmarks/traffic.py": {
        "torch._inductor.dependencies": "Dep",
        "torch._inductor.graph": "GraphLowering",
        "torch._inductor.ir": "FallbackKernel",
        "torch._inductor.memory": "prepare_planning_info",
        "torch._inductor.scheduler": (
            "BaseSchedulerNode ExternKernelSchedulerNode NopKernelSchedulerNode"
        ),
        "torch._ops": "OpOverload",
        "torch.utils._ordered_set": "OrderedSet",
    },
    "benchmarks/train_step.py": {
        "torch._dynamo": "reset",
        "torch._inductor": "list_mode_options",
        "torch._inductor.utils": "fresh_cache",
    },
    "benchmarks/whole_channels.py": {
        "torch._dynamo": "reset",
        "torch._dynamo.config": "patch recompile_limit",
    },
}

# What can't be followed by attributes: a handler that is set while Inductor compiles, and one
# that answers to every name.
STAND_INS = {
    "torch._inductor.virtualized.V.graph.sizevars": "torch._inductor.sizevars.SizeVarAllocator",
    "torch._inductor.virtualized.V.graph": "torch._inductor.graph.GraphLowering",
    "torch._inductor.virtualized.ops": "torch._inductor.ops_handler.OpsHandler",
}


def is_private(name):
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def torch_names(source):
    """All dotted names of torch in a file: imported, read, patched by a string or a keyword."""
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
    """Those of torch_names that are private, without the modules and classes that they are in."""
    names = {name for name in torch_names(source) if is_private(name)}
    return {name for name in names if not any(other.startswith(f"{name}.") for other in names)}


def has(name):
    """Whether torch has what a dotted name says."""
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
    # Or every instance of a class has it.
    bases = inspect.getmro(value)[:-1] if inspect.isclass(value) else ()
    return any(f"self.{parts[count]}" in inspect.getsource(base) for base in bases)


def missing(names, path):
    """What to tell who runs a torch without some of names."""
    torch_has_no, works = f"torch {torch.__version__} has no", f"sdgp_fx works with {SUPPORTED}"
    return [f"{torch_has_no} {name}, which {path} uses; {works}" for name in names if not has(name)]


def listed(path):
    return [f"{o}.{name}" for o, names in PRIVATE[path].items() for name in names.split()]


@pytest.mark.parametrize("path", PRIVATE)
def test_torch_has(path):
    if path == "sdgp_fx/inductor/lowering.py":
        pytest.importorskip("triton")
    absent = missing(listed(path), path)
    assert not absent, "\n".join(absent)


def test_the_table_is_complete():
    files = [
        path for folder in ("sdgp_fx", "benchmarks") for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    used = {str(path.relative_to(ROOT)): private_names(path.read_text()) for path in files}
    used = {path: names for path, names in used.items() if names}
    assert {path: set(listed(path)) for path in PRIVATE} == used


def test_a_name_that_is_gone_is_missed():
    gone = ["ir.Sorted", "no_module.name", "virtualized.ops.no_such", "virtualized.V.graph.no_such"]
    gone = [f"torch._inductor.{name}" for name in gone]
    first, *others = missing(["torch._inductor.ir.Sort", *gone, "torch._no_such"], "a.py")
    assert first == (
        f"torch {torch.__version__} has no torch._inductor.ir.Sorted, which a.py uses; "
        "sdgp_fx works with torch 2.11 to 2.15"
    )
    assert len(others) == len(gone)


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
    major, minor = last.split(".")
    assert tuple(map(int, first.split("."))) == doctor.OLDEST_TORCH
    assert (int(major), int(minor)) == doctor.NEWEST_TORCH
    required = f'"torch>={first},<{major}.{int(minor) + 1}"'
    assert required in (ROOT / "pyproject.toml").read_text()

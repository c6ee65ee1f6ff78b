"""`python -m sdgp_fx doctor`: check what the backend needs, and say what it will use."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

from ..config import SDGPConfig
from ..errors import first_line

# As in pyproject.toml, which an installation need not have at hand.
OLDEST_TORCH, NEWEST_TORCH = (2, 11), (2, 15)
SPARSE_TENSOR_CORES = (8, 0)
OPTIONAL = {"timm": "explain, profile and demo", "matplotlib": "pictures", "rich": "tables"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of looking for one thing.

    Attributes:
        found: What was found.
        remedy: What to do about it, if it has to be there and is not.
    """

    name: str
    found: str
    remedy: str = ""


def run() -> int:
    """Print findings as they are made; return 1 if something that is needed is missing."""
    missing = 0
    for finding in examine():
        state = "MISSING" if finding.remedy else "ok"
        print(f"{state:8}{finding.name}: {finding.found}", flush=True)
        if finding.remedy:
            missing += 1
            print(f"{'':8}-> {finding.remedy}", flush=True)
    print(f"{missing} of these must be put right" if missing else "everything needed is there")
    return int(missing > 0)


def examine() -> Iterator[Finding]:
    """Yield all findings; without torch, those that need none."""
    yield Finding("python", platform.python_version())
    package = Path(__file__).parents[1]
    yield Finding("sdgp_fx", f"{version('sdgp_fx') or 'not installed'}, {package}")
    torch = find_torch()
    yield torch
    for name, use in OPTIONAL.items():
        without = f'not installed; {use} would need it: pip install "sdgp_fx[demo]"'
        yield Finding(name, version(name) or without)
    yield find_entry_point()
    try:
        config, _ = SDGPConfig.from_options()
    except ValueError as error:
        yield Finding("environment", str(error), "unset or correct the variable")
        return
    variables = [f"{name}={value}" for name, value in os.environ.items() if is_ours(name, value)]
    yield Finding("environment", ", ".join(variables) or "no variable changes a default")
    if torch.remedy and not version("torch"):
        return
    yield find_gpu()
    yield find_triton()
    yield find_cpp(config.inner)
    yield find_sparse_product()
    yield find_sparse_tensor_cores()
    yield find_plan(config.inner)
    yield find_training(config.inner)


def version(package: str) -> str:
    """Return the installed version of a package; "" if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def is_ours(name: str, value: str) -> bool:
    """Return whether an environment variable is one of `SDGPConfig`, and set."""
    fields = {f"SDGP_{field.name.upper()}" for field in dataclasses.fields(SDGPConfig)}
    return name in fields and bool(value)


def find_torch() -> Finding:
    """Look for a torch that this package works with."""
    oldest, newest = (".".join(map(str, v)) for v in (OLDEST_TORCH, NEWEST_TORCH))
    remedy = f'sdgp_fx works with torch {oldest} to {newest}: pip install "torch=={newest}.*"'
    try:
        import torch
    except ImportError as error:
        return Finding("torch", f"can't be imported: {first_line(error)}", remedy)
    numbers = torch.__version__.split(".")[:2]
    works = OLDEST_TORCH <= tuple(map(int, numbers)) <= NEWEST_TORCH
    return Finding("torch", torch.__version__, "" if works else remedy)


def find_entry_point() -> Finding:
    """Look for what makes torch.compile know the name "sdgp"."""
    name, group = "entry point", "torch_dynamo_backends"
    found = list(importlib.metadata.entry_points(group=group, name="sdgp"))
    if found:
        return Finding(name, f'{found[0].value}, for torch.compile(model, backend="sdgp")')
    remedy = "install the package, or write torch.compile(model, backend=sdgp_fx.sdgp)"
    return Finding(name, f'no "sdgp" in {group}: torch.compile does not know the name', remedy)


def find_gpu() -> Finding:
    """Look for a GPU."""
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", "none that torch finds; models run on the CPU")
    capability = torch.cuda.get_device_capability()
    has = "has" if capability >= SPARSE_TENSOR_CORES else "has no"
    found = f"{torch.cuda.get_device_name()}, compute capability {'.'.join(map(str, capability))}"
    return Finding("GPU", f"{found}, which {has} sparse tensor cores (2:4)")


def find_triton() -> Finding:
    """Look for Triton, which is needed with a GPU alone."""
    import torch

    needed = torch.cuda.is_available()
    try:
        importlib.import_module("triton.language")
    except Exception as error:  # Of a broken installation, anything.
        found = f"can't be imported: {first_line(error)}"
        remedy = f'pip install --force-reinstall "torch=={torch.__version__}", which brings its own'
        return Finding("Triton", found, remedy if needed else "")
    use = "compiles the kernels on the GPU" if needed else "not used without a GPU"
    return Finding("Triton", f"{version('triton')}; {use}")


def find_cpp(inner: str) -> Finding:
    """Look for what Inductor compiles with for the CPU."""
    import torch

    missing = missing_for_cpp()
    name = "C++ compiler"
    if not missing:
        return Finding(name, cpp_compiler())
    needed = inner == "inductor" and not torch.cuda.is_available()
    remedy = f"install {missing}, or set SDGP_INNER=aot_eager, which generates no code"
    return Finding(name, f"without {missing}", remedy if needed else "")


def missing_for_cpp() -> str:
    """Name what Inductor lacks to compile C++; "" if it lacks nothing."""
    from torch._inductor.exc import InvalidCxxCompiler

    header = Path(sysconfig.get_path("include"), "Python.h")
    try:
        cpp_compiler()
    except InvalidCxxCompiler:
        return "a C++ compiler"
    return "" if header.exists() else f"Python's headers ({header})"


def cpp_compiler() -> str:
    """Return the compiler that Inductor uses."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    return get_cpp_compiler()


def find_sparse_product() -> Finding:
    """Compile what skips the zeros of pruned gradients on the CPU, or find it compiled."""
    from ..kernels.sparse.cpu import why_not_compiled

    name, begin = "sparse product", perf_counter()
    reason = why_not_compiled()
    if reason:
        return Finding(name, f"{reason}: pruned gradients are multiplied as dense ones")
    seconds = perf_counter() - begin
    return Finding(name, f"skips the zeros on the CPU; compiled or found in {seconds:.1f} s")


def find_sparse_tensor_cores() -> Finding:
    """Look for what skips the zeros of pruned gradients on the GPU."""
    import torch

    from ..kernels.sparse.binaries import why_no_compiler
    from ..kernels.sparse.cuda import why_no_architecture

    name, dense = "sparse tensor cores", "pruned gradients are multiplied as dense ones on GPUs"
    if torch.cuda.is_available() and (why := why_no_architecture(torch.device("cuda"))):
        return Finding(name, f"{why}: {dense}")
    if why := why_no_compiler():
        if torch.backends.cusparselt.is_available():
            dense = (
                "on GPUs, pruned gradients of linear layers and 1x1 convolutions are multiplied by "
                "cuSPARSELt, others as dense ones"
            )
        return Finding(name, f'{why}: {dense}; pip install "sdgp_fx[sparse]" brings both')
    found = f"TileLang {version('tilelang')} and nvcc compile products that skip the zeros"
    return Finding(name, found)


def find_plan(inner: str) -> Finding:
    """Say what `torch.compile(model, backend="sdgp")` will use here."""
    import torch

    if inner == "aot_eager":
        plan = "aot_eager, as SDGP_INNER says: the pruned graph is run operator by operator"
    elif torch.cuda.is_available():
        plan = "Inductor with Triton: gradients are pruned in the kernels that compute them"
    else:
        plan = "Inductor with C++, as there is no GPU: the operators' own C++ prunes the gradients"
    return Finding("will be used", plan)


def find_training(inner: str) -> Finding:
    """Compile a training step, and see that a gradient is pruned."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, begin = f"training step with {inner} on {device}", perf_counter()
    remedy = (
        "with SDGP_INNER=aot_eager no code is generated; if that works, the compiler is at fault"
    )
    try:
        wrong = train(inner, device)
    except Exception as error:  # Of compilers and drivers, anything.
        return Finding(name, f"{type(error).__name__}: {first_line(error)}", remedy)
    if wrong:
        return Finding(name, wrong, remedy)
    return Finding(name, f"compiled and run in {perf_counter() - begin:.0f} s")


def train(inner: str, device: str) -> str:
    """Train a small network; say what is wrong with its gradients, "" if nothing is."""
    import torch
    from torch import nn

    from ..backend import sdgp

    first, second, last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last).to(device)
    images = torch.randn(2, 3, 12, 12, device=device)
    # All options, as those of the environment may leave everything dense.
    config = dataclasses.asdict(SDGPConfig(inner=inner))
    options = {f"sdgp.{key}": value for key, value in config.items()}

    def gradients(network: Any) -> tuple[torch.Tensor, ...]:
        loss = network(images).square().mean()
        return torch.autograd.grad(loss, (first.weight, last.weight))

    dense = gradients(model)
    pruned = gradients(torch.compile(model, backend=sdgp, options=options))
    if not all(gradient.isfinite().all() for gradient in pruned):
        return "gradients are not finite"
    # TF32 products, which a GPU may take, have 10 bits.
    if not torch.allclose(pruned[1], dense[1], rtol=1e-2, atol=1e-3):
        return "the last layer's weight gradient, which is never pruned, has changed"
    if torch.allclose(pruned[0], dense[0]):
        return "no gradient was pruned"
    return ""

"""Generate Inductor's code for a training step on a GPU, on a machine that need not have one.

Until it launches a kernel, Inductor asks a GPU for nothing but its properties. With these
answered, a training step is traced with fake tensors (shapes, no values), and lowered, scheduled
and written as code as it would be there. Nothing is run, nothing is timed.

Nearly everything here that stands in for the GPU is private to torch.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn
from unittest import mock

import torch
import torch._dynamo.device_interface as device_interface
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
import torch._inductor.utils as inductor_utils
import torch.nn.functional as F
import torch.utils._triton as triton_utils
import triton
from torch import Tensor, fx, nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, decomposition
from torch._inductor.graph import GraphLowering
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget

from ..config import SDGPConfig
from ..graph_pass import PruneInputGrads
from ..inductor import lowering  # noqa: F401  (Importing it registers it.)
from ..kernels.sparse import cuda

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
# An H100's or H200's. The sizes of caches and memory decide no code.
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    total_memory=141 << 30,
    L2_cache_size=50 << 20,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    clock_rate=1980000,
    memory_clock_rate=3201000,
    memory_bus_width=6144,
    is_integrated=0,
    is_multi_gpu_board=0,
    gcnArchName="",
)


class _Generated(Exception):
    """All code has been generated; there is nothing to run it on."""


def generate(
    network: nn.Module,
    images: Tensor,
    config: SDGPConfig | None,
    inspect: Callable[[GraphLowering, str], None],
    monitor: str | None = None,
) -> None:
    """Compile a training step of network (forward, cross entropy, backward) for a GPU.

    Args:
        network: On the CPU, maps images to logits (N, classes). It is copied, without its values.
        images: (N, 3, H, W), on any device, "meta" too. Dtypes and strides of both are kept.
        config: How sdgp prunes; None for stock Inductor. Layers have the product that they have on
            the GPU, but "auto" measures nothing there and leaves all dense.
        inspect: Called with each graph, the forward's before the backward's, and its code, after
            the code has been generated and in the graph's context (V.graph).
        monitor: As for `PruneInputGrads`.
    """
    # The joint graph is made on the CPU, as autograd asks a GPU's driver for streams. The pass sees
    # it on the GPU, so that it decides what it decides there.
    options: dict[str, Any] = {}
    if config is not None:
        if config.product == "auto":
            config = dataclasses.replace(config, product="dense")
        prune = PruneInputGrads(config, monitor=monitor)

        def rewrite(graph: fx.Graph) -> None:
            with imitated_gpu():
                _move(graph, GPU)
                prune(graph)
            _move(graph, CPU)

        options["joint_custom_pre_pass"] = rewrite
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        network = copy.deepcopy(network)
    with mode:
        images = torch.empty_strided(images.shape, images.stride(), dtype=images.dtype)
        labels = torch.empty(len(images), dtype=torch.int64)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(network(images).float(), labels)

    def compile_inner(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        with gpu_codegen(inspect):
            return compile_fx.compile_fx_inner(*on_gpu(gm, inputs), **kwargs)

    compile_graph = functools.partial(compile_fx.compile_fx, inner_compile=compile_inner)
    with (
        mode,
        mock.patch.object(compile_fx, "compile_fx", compile_graph),
        mock.patch.object(decomposition, "is_gpu", return_value=True),
        functorch_config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False),
        inductor_config.patch(fx_graph_cache=False, compile_threads=1),
        contextlib.suppress(_Generated),
    ):
        torch.compile(loss, options=options)(images, labels)


def on_gpu(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[Any]]:
    """Copy a graph and its fake inputs, with all their tensors on the GPU."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    _move(graph, GPU)
    return fx.GraphModule(gm, graph), [_moved(value, GPU) for value in inputs]


def _move(graph: fx.Graph, device: torch.device) -> None:
    """Have all tensors of a graph on a device."""
    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = tree_map(functools.partial(_moved, device=device), node.meta["val"])
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}


def _moved(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.new_empty_strided(value.shape, value.stride(), device=device)


@contextlib.contextmanager
def gpu_codegen(inspect: Callable[[GraphLowering, str], None]) -> Iterator[None]:
    """Have Inductor write code for a GPU, and give that to inspect in place of running it."""

    def keep_code(graph: GraphLowering) -> Any:
        inspect(graph, graph.codegen()[0].value)
        module = types.ModuleType("generated")
        module.__file__ = __file__
        module.call = _stop  # type: ignore[attr-defined]
        return module

    with imitated_gpu(), mock.patch.object(GraphLowering, "_compile_to_module", keep_code):
        yield


@contextlib.contextmanager
def imitated_gpu() -> Iterator[None]:
    """Answer what torch, Triton and this package ask a GPU before they launch anything."""
    state = torch.zeros(16, dtype=torch.uint8)
    cudnn = torch._C._ConvBackend.Cudnn  # type: ignore[attr-defined]
    capability = f"{PROPERTIES.major}{PROPERTIES.minor}"
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": PROPERTIES,
        "get_device_capability": (PROPERTIES.major, PROPERTIES.minor),
        "set_device": None,
        "synchronize": None,
        "is_initialized": False,
        "is_current_stream_capturing": False,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_rng_state": state,
        "set_rng_state": None,
        "current_stream": types.SimpleNamespace(cuda_stream=0),
    }
    replaced: list[tuple[Any, str, Any]] = [
        (torch.cuda, name, _answer(value)) for name, value in answers.items()
    ]
    replaced += [
        (torch.cuda.random, "get_rng_state", _answer(state)),
        (torch.cuda.random, "set_rng_state", _answer(None)),
        (fake_tensor, "init_gpu_context", _answer(None)),
        (torch._C, "_cuda_getDevice", _answer(0)),
        (torch._C, "_cuda_setDevice", _answer(None)),
        (torch._C, "_cuda_exchangeDevice", _answer(0)),
        (torch._C, "_cuda_maybeExchangeDevice", _answer(0)),
        (torch._C, "_cuda_getCurrentRawStream", _answer(0)),
        (torch._C, "_select_conv_backend", _answer(cudnn)),
        (torch._C, "_conv_determine_backend_memory_format", _cudnn_memory_format),
        (CudaInterface, "is_available", staticmethod(_answer(True))),
        (CudaInterface, "current_device", staticmethod(_answer(0))),
        (CudaInterface, "get_compute_capability", staticmethod(_answer(capability))),
        (CudaInterface, "get_device_properties", staticmethod(_answer(PROPERTIES))),
        (CudaInterface.Worker, "get_device_properties", staticmethod(_answer(PROPERTIES))),
        (CudaInterface.Worker, "current_device", staticmethod(_answer(0))),
        (triton.runtime.driver, "_active", _Driver()),
        (triton.runtime.driver, "_default", _Driver()),
        # Whether this machine can compile a kernel says nothing of one with a GPU.
        (cuda, "why_not", cuda.why_not_covered),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        _forget_devices()
        stack.callback(_forget_devices)
        yield


class _Driver:
    """Triton's driver of a GPU that isn't there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * PROPERTIES.major + PROPERTIES.minor, PROPERTIES.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return GPU


def _answer(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _stop(*_: Any) -> NoReturn:
    raise _Generated


def _forget_devices() -> None:
    """Clear what torch has remembered of the devices that there are."""
    for module in (triton_utils, inductor_utils, device_interface):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def _cudnn_memory_format(input: Any, weight: Any, backend: Any) -> torch.memory_format:
    """Choose as cuDNN does, which answers channels-last with channels-last."""
    wanted = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.dim())
    if wanted and any(t.is_contiguous(memory_format=wanted) for t in (input, weight)):
        return wanted
    return torch.contiguous_format

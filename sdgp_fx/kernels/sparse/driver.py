"""Launch compiled kernels by CUDA's driver."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .binaries import Binary

# Of CUfunction_attribute.
MAX_DYNAMIC_SHARED_BYTES = 8


class _TensorMap(ctypes.Structure):
    """CUtensorMap: 128 bytes, of which the driver asks that they are aligned to 64."""

    _fields_ = (("bytes", ctypes.c_ubyte * (128 + 64)),)

    @property
    def address(self) -> int:
        return -(-ctypes.addressof(self) // 64) * 64


def launch(
    binary: Binary,
    device: torch.device,
    blocks: int,
    tensors: Mapping[str, torch.Tensor],
    batch: int,
) -> None:
    """Launch a kernel on the current stream of a device.

    Args:
        tensors: By the names of the kernel's arguments; "weight" is also read through its tensor
            map. They have to live until the stream is done, as torch sees to for its own.

    Raises:
        RuntimeError: The driver refuses.
    """
    kernel = binary.kernel
    values: list[Any] = []
    for name in kernel.arguments:
        if name == "batch":
            values.append(ctypes.c_int32(batch))
        elif name == "weight_desc":
            values.append(_encode(kernel.tensor_map or (), tensors["weight"].data_ptr()))
        else:
            values.append(ctypes.c_void_p(tensors[name].data_ptr()))
    pointers = [
        value.address if isinstance(value, _TensorMap) else ctypes.addressof(value)
        for value in values
    ]
    addresses = (ctypes.c_void_p * len(pointers))(*pointers)
    with torch.cuda.device(device):
        function = _load(binary, torch.cuda.current_device())
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        shape = (blocks, 1, 1, kernel.threads, 1, 1, kernel.shared_bytes)
        _call("cuLaunchKernel", function, *map(ctypes.c_uint, shape), stream, addresses, None)


@functools.cache
def _load(binary: Binary, device: int) -> ctypes.c_void_p:
    """Load a kernel into the context of a device, which is the current one."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _call("cuModuleLoadData", ctypes.byref(module), binary.cubin)
    name = binary.kernel.entry.encode()
    _call("cuModuleGetFunction", ctypes.byref(function), module, name)
    limit = (ctypes.c_int(MAX_DYNAMIC_SHARED_BYTES), ctypes.c_int(binary.kernel.shared_bytes))
    _call("cuFuncSetAttribute", function, *limit)
    return function


def _encode(tensor_map: Sequence[Any], address: int) -> _TensorMap:
    """Describe a tensor for bulk copies, as `Kernel.tensor_map` says."""
    kind, rank, sizes, strides, box, steps, *modes = tensor_map
    result = _TensorMap()
    _call(
        "cuTensorMapEncodeTiled",
        ctypes.c_void_p(result.address),
        ctypes.c_int(kind),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*steps),
        *map(ctypes.c_int, modes),
    )
    return result


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the driver."""
    status = getattr(_driver(), name)(*arguments)
    if status:
        message = ctypes.c_char_p()
        _driver().cuGetErrorString(ctypes.c_int(status), ctypes.byref(message))
        raise RuntimeError(f"{name}: {(message.value or b'unknown error').decode()} ({status})")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")

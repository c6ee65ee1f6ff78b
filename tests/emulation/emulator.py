"""Run CUDA source that TileLang generated, for sm_80 or sm_90, on the CPU: a fiber a thread.

The emulator follows the hardware's rules, not the generated code's intentions, and where a rule
leaves room it does the worst that the rule allows:

- A warp goes as far as it can before the next one moves.
- A copy by cp.async or TMA destroys (with NaN) what it will overwrite when it is issued, and lands
  when a wait makes it land: a wait of the thread for its groups, or somebody's wait for the phase
  of an mbarrier that the copy takes part in, once no thread can go on without it.
- wgmma reads shared memory and registers when its warpgroup waits for it and no thread can go on
  without it. Until then its accumulators are NaN. Metadata is taken when it is issued.
- What ordinary stores and cp.async wrote to shared memory must be fenced (fence.proxy.async) before
  wgmma or a TMA store reads it: the fence must come after the write and before the read along the
  barriers that order the threads, and each warp that reads must be behind such a fence. It is
  looked up by vector clocks, for every two bytes.

Errors, with block and thread: metadata whose two places of a group do not ascend; cp.async, TMA,
ldmatrix or wgmma outside of memory or misaligned; an access past a tensor's ends, or a store to a
const tensor (tensors are fenced off by pages; what shares a page with a tensor is NaN); more
arrivals at an mbarrier than a phase has; an mbarrier that is not initialized, or not yet for this
thread or for TMA; a batch of wgmma with no wgmma.fence before it, and accumulators that are written
while it is under way; TMA stores that a thread ends without waiting for; threads that do not agree
on a collective; and a deadlock, with what each thread waits for.

Not emulated: clusters, multicast, TMA reductions, dense and 8-bit tensor cores, float16 sums, and
`__shared__` arrays but mbarriers. Not seen: a race of plain loads and stores that one order of
warps happens to hide (the first goes first, in every other block the last); a store of the value
that is there already; registers written between wgmma.fence and wgmma; plain stores that only
cp.async.mbarrier.arrive would order; and instructions that the source's architecture lacks.
"""

import ctypes
import hashlib
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent
_COMPILE = ["g++", "-O2", "-std=c++20", "-fPIC", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-w"]


class EmulationError(Exception):
    """What the hardware would have done wrong, or left undefined."""


@dataclass
class TensorMap:
    """How TMA goes through a tensor: a CUtensorMap. The innermost dimension comes first.

    Attributes:
        tensor: The tensor's name among those that the kernel is run on.
        element: Bytes of an element.
        size: Elements by dimension.
        stride: Bytes from one element to the next, by dimension.
        box: Elements that one instruction copies, by dimension.
        swizzle: Bytes of a row of shared memory that is swizzled: 0, 32, 64 or 128.
    """

    tensor: str
    element: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int = 0

    def __post_init__(self):
        rank, row = len(self.size), self.box[0] * self.element
        if not (1 <= rank <= 5 and len(self.stride) == rank and len(self.box) == rank):
            raise ValueError(f"size, stride and box need the same length, of 1 to 5: got {self}")
        if self.stride[0] != self.element or any(stride % 16 for stride in self.stride[1:]):
            raise ValueError(f"strides must be multiples of 16, the first dense: got {self.stride}")
        if row % 16 or any(not 1 <= box <= 256 for box in self.box):
            raise ValueError(f"box needs rows of 16 bytes and 1 to 256 elements: got {self.box}")
        if self.swizzle and row != self.swizzle:
            raise ValueError(f"box needs rows of the swizzle's {self.swizzle} bytes: got {row}")


class _Map(ctypes.Structure):
    _fields_ = [
        ("tensor", ctypes.c_ssize_t),
        *((name, ctypes.c_int64) for name in ("element", "rank", "swizzle")),
        *((name, ctypes.c_int64 * 5) for name in ("size", "stride", "box")),
    ]


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_int64), ("written", ctypes.c_int64)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("tensors", ctypes.POINTER(_Tensor)),
        ("maps", ctypes.POINTER(_Map)),
        ("scalars", ctypes.POINTER(ctypes.c_int64)),
        ("tensor_count", ctypes.c_int),
        ("map_count", ctypes.c_int),
        ("grid", ctypes.c_int * 3),
        ("threads", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
        ("stores_matter", ctypes.c_int),
    ]


def emulate(source, cache_dir):
    """Compile a kernel's generated source with g++ and return a function that runs it on the CPU.

    Args:
        source: What TileLang generated for one kernel.
        cache_dir: A folder for what is compiled; the same source is compiled once.

    Returns:
        A function of (grid, threads, shared_bytes, maps=None, **arguments): up to three numbers of
        blocks, threads of a block, bytes of dynamic shared memory, TensorMaps by the name of their
        parameter, and the kernel's other arguments by name: contiguous CPU tensors, those that
        only a map refers to included, and ints. It writes to the tensors in place, and raises
        EmulationError, with no tensor changed, where the kernel is wrong.
    """
    kernel, parameters = _signature(source)
    pointers, maps_, scalars, calls = [], [], [], []
    for type_, name in parameters:
        if "CUtensorMap" in type_:
            calls.append(f"arguments.maps[{len(maps_)}]")
            maps_.append(name)
        elif "*" in type_:
            calls.append(f"({type_})arguments.tensors[{len(pointers)}]")
            pointers.append(name)
        else:
            calls.append(f"({type_})arguments.scalars[{len(scalars)}]")
            scalars.append(name)
    written = {name for type_, name in parameters if "*" in type_ and "const" not in type_}
    stored = [name for name in maps_ if re.search(rf"tma_store(<[^>]*>)?\({name}\b", source)]
    library = _compile(_translate(source, f"{kernel}({', '.join(calls)})"), Path(cache_dir))
    library.emulate.restype = ctypes.c_char_p
    # A plain store is of interest where something reads shared memory behind the threads' backs.
    stores_matter = "wgmma" in source or "tma_store" in source

    def run(grid, threads, shared_bytes, maps=None, **arguments):
        if threads % 32 or ("wgmma" in source and threads % 128):
            raise ValueError(f"threads must be whole warps, or warpgroups for wgmma: got {threads}")
        # The source numbers the kernel's pointers; others follow, which only a map refers to.
        names = pointers + [name for name in arguments if name not in pointers + scalars]
        writable = written | {maps[name].tensor for name in stored}
        tensors = (_Tensor * len(names))()
        for name, tensor in zip(names, tensors, strict=True):
            value = arguments[name]
            if not (value.is_contiguous() and value.device.type == "cpu"):
                raise ValueError(f"{name} must be a contiguous CPU tensor")
            tensor.data, tensor.bytes = value.data_ptr(), value.nbytes
            tensor.written = name in writable
        call = _Launch(
            tensors,
            (_Map * len(maps_))(*(_map(maps[name], names) for name in maps_)),
            (ctypes.c_int64 * len(scalars))(*(arguments[name] for name in scalars)),
            len(names),
            len(maps_),
            (ctypes.c_int * 3)(*grid, *[1] * (3 - len(grid))),
            threads,
            shared_bytes,
            stores_matter,
        )
        error = library.emulate(ctypes.byref(call))
        if error:
            raise EmulationError(error.decode())

    return run


def _map(map_, tensors):
    def padded(numbers):
        return (ctypes.c_int64 * 5)(*numbers)

    return _Map(
        tensors.index(map_.tensor),
        map_.element,
        len(map_.size),
        map_.swizzle,
        padded(map_.size),
        padded(map_.stride),
        padded(map_.box),
    )


def _signature(source):
    """Return the kernel's name and its parameters' types and names."""
    bounds = r"(?:__launch_bounds__\([^)]*\) )?"
    match = re.search(rf'extern "C" __global__ void {bounds}(\w+)\((.*?)\)', source)
    parameters = [p.replace("__restrict__", "").rsplit(None, 1) for p in match[2].split(",")]
    return match[1], [(type_.strip(), name) for type_, name in parameters]


def _translate(source, call):
    lines = [line for line in source.splitlines() if not line.startswith("#") or "pragma" in line]
    text = re.sub(
        r"extern __shared__ [^;]*?(\w+)\[\];", r"uchar* \1 = emulated::shared;", "\n".join(lines)
    )
    return f"""#include "runtime.h"
namespace emulated {{ extern uchar *shared; }}
{text}
extern "C" const char *emulate(const emulated::Launch *launch) {{
  return emulated::run(*launch, [](const emulated::Arguments &arguments) {{ {call}; }});
}}
"""


def _compile(text, folder):
    headers = sorted(_HERE.glob("*.h"))
    runtime = _HERE / "runtime.cpp"
    contents = b"".join(path.read_bytes() for path in [*headers, runtime])
    folder.mkdir(parents=True, exist_ok=True)

    def built(name, suffix, *arguments):
        path = folder / f"{name}{suffix}"
        if not path.exists():
            # Others may compile the same: what has the name is whole.
            part = folder / f"{name}-{os.getpid()}{suffix}"
            subprocess.run([*_COMPILE, f"-I{_HERE}", *arguments, "-o", part], check=True)
            part.rename(path)
        return path

    object_ = built(hashlib.sha256(contents).hexdigest()[:16], ".o", "-c", runtime)
    name = hashlib.sha256(contents + text.encode()).hexdigest()[:16]
    source = folder / f"{name}.cpp"
    source.write_text(text)
    return ctypes.CDLL(built(name, ".so", "-shared", source, object_))

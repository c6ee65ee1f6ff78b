"""Run the product of sparse tensor cores on the CPU, in the emulator."""

import functools

from sdgp_fx.kernels.sparse.tilelang_kernel import lower

from ..emulation.emulator import TensorMap, emulate

# Of CUtensorMapSwizzle, in bytes.
SWIZZLES = (0, 32, 64, 128)


@functools.cache
def compile_for_cpu(kernel, folder):
    return emulate(kernel.source, folder)


lower = functools.cache(lower)


def launch(kernel, folder, blocks, tensors, batch):
    """Launch a kernel as `driver.launch` does, on tensors of the CPU."""
    maps = {}
    if kernel.tensor_map:
        _, _, sizes, strides, box, steps, interleave, swizzle, _, fill = kernel.tensor_map
        assert (set(steps), interleave, fill) == ({1}, 0, 0)
        element = tensors["weight"].itemsize
        strides = (element, *strides)
        maps["weight_desc"] = TensorMap("weight", element, sizes, strides, box, SWIZZLES[swizzle])
    # As they lie in memory.
    tensors |= {name: tensors[name].movedim(1, -1) for name in ("weight", "out")}
    run = compile_for_cpu(kernel, folder)
    run((blocks,), kernel.threads, kernel.shared_bytes, maps, batch=batch, **tensors)

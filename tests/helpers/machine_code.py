"""Compile products of sparse tensor cores, and dense twins, to machine code without a GPU."""

import re
import subprocess
from pathlib import Path

import tilelang
import tilelang.language as T
import triton
import tvm

from sdgp_fx.kernels.sparse.tilelang_kernel import compile_cubin

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def dense_twin(product, tile):
    """Write the product of a 1x1 layer with a gradient that is not packed, in the same tiles."""
    N = T.dynamic("batch")
    dtype = getattr(T, product.dtype)
    C, F = product.out_channels, product.in_channels
    rows, columns, depth, stages, threads, _ = tile

    @T.prim_func
    def input_grad(
        gradient: T.Tensor((N, C), dtype),
        weight: T.Tensor((C, F), dtype),
        out: T.Tensor((N, F), dtype),
    ):
        with T.Kernel(T.ceildiv(F, columns), T.ceildiv(N, rows), threads=threads) as (bx, by):
            a = T.alloc_shared((rows, depth), dtype)
            b = T.alloc_shared((depth, columns), dtype)
            c = T.alloc_fragment((rows, columns), T.float32)
            T.clear(c)
            for step in T.Pipelined(C // depth, num_stages=stages):
                T.copy(gradient[by * rows, step * depth], a)
                T.copy(weight[step * depth, bx * columns], b)
                T.gemm(a, b, c)
            T.copy(c, out[by * rows, bx * columns])

    return input_grad


def lower_dense_twin(product, tile, architecture, kernel):
    """Return kernel, with the source of its dense twin."""
    target = tvm.target.Target({"kind": "cuda", "arch": architecture})
    with tvm.transform.PassContext(), target:
        source = tilelang.lower(dense_twin(product, tile), target=target).kernel_source
    return kernel._replace(source=source)


def instructions(kernel, architecture, folder):
    """Compile a kernel; return the names of its instructions in SASS, in order."""
    path = folder / f"{architecture}.cubin"
    path.write_bytes(compile_cubin(kernel, architecture))
    text = subprocess.run([CUOBJDUMP, "-sass", path], capture_output=True, text=True, check=True)
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)", text.stdout, re.M)
    return [name.rstrip(";") for name in names]

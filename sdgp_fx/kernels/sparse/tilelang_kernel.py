"""The product on sparse tensor cores, in TileLang, lowered and compiled without a GPU.

Importing this needs TileLang. Annotations are evaluated by TileLang, so they are no strings here.
"""

import re
from typing import Any

import tilelang
import tilelang.language as T
import tvm
from tilelang import PassConfigKey as Key
from tilelang.contrib import nvcc
from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH

from .tensor_cores import Kernel, Product, Tile


def lower(product: Product, tile: Tile, architecture: str) -> Kernel:
    """Lower the product to CUDA."""
    target = tvm.target.Target({"kind": "cuda", "arch": architecture})
    function = _input_grad(product, tile, wgmma=architecture == "sm_90")
    options = (
        [] if tile.specialized else [Key.TL_DISABLE_WARP_SPECIALIZED, Key.TL_DISABLE_TMA_LOWER]
    )
    config = {option.value: True for option in options}
    with tvm.transform.PassContext(config=config), target:
        artifact = tilelang.lower(function, target=target)
    calls = _packed_calls(artifact.host_mod)
    (entry,) = (name for name in calls if not name.startswith("__"))
    *operands, _, _, threads, _, _, shared_bytes = calls[entry]
    tensor_map = None
    if "__tvm_tensormap_create_tiled" in calls:
        _, kind, rank, _, *rest = map(_plain, calls["__tvm_tensormap_create_tiled"])
        # The innermost stride is one element, which the driver is not told.
        sizes, strides, box, steps = (tuple(rest[i * rank : (i + 1) * rank]) for i in range(4))
        tensor_map = (kind, rank, sizes, strides[1:], box, steps, *rest[4 * rank :])
    return Kernel(
        source=_fence_after_waits(artifact.kernel_source),
        entry=entry,
        arguments=tuple(map(_plain, operands)),
        tile=tile,
        threads=_plain(threads),
        shared_bytes=_plain(shared_bytes),
        tensor_map=tensor_map,
    )


def _fence_after_waits(source: str) -> str:
    """Move each proxy fence behind the waits that follow it.

    wgmma.sp reads shared memory by another proxy than the copies write it. TileLang puts the fence
    that the kernel asks for ahead of the wait for the copies, where it orders none of them.
    """
    fence = r"( *tl::fence_proxy_async\(\);\n)"
    wait = r" *(?:tl::cp_async_wait<\d+>\(\)|mbarrier\[[^;]*\.wait\([^;]*\));\n"
    return re.sub(f"{fence}((?:{wait})+)", r"\2\1", source)


def compile_cubin(kernel: Kernel, architecture: str) -> bytes:
    """Compile a kernel to machine code, by nvcc."""
    # wgmma is of this architecture alone, not of later ones.
    accurate = {"sm_90": "sm_90a"}.get(architecture, architecture)
    options = ["-std=c++20", f"-I{TILELANG_TEMPLATE_PATH}", f"-I{CUTLASS_INCLUDE_DIR}"]
    return bytes(nvcc.compile_cuda(kernel.source, "cubin", [f"-arch={accurate}"], options=options))


def _packed_calls(module: Any) -> dict[str, list[Any]]:
    """Return the arguments of the functions that a host module calls, by their names."""
    calls: dict[str, list[Any]] = {}

    def visit(node: Any) -> None:
        if isinstance(node, tvm.tirx.Call) and "call_packed" in str(node.op):
            name, *arguments = node.args
            calls[str(name.value)] = arguments

    for function in module.functions.values():
        tvm.tirx.stmt_functor.post_order_visit(function.body, visit)
    return calls


def _plain(value: Any) -> Any:
    """Return a number, or the name of a variable."""
    return int(value.value) if hasattr(value, "value") else str(value.name)


def _input_grad(product: Product, tile: Tile, wgmma: bool) -> Any:
    """Write the product in TileLang.

    The packed gradient is gathered row by row from its halo, so that no load has a condition; rows
    past the last repeat it. Taps are the kernel's in reverse order.
    """
    N = T.dynamic("batch")
    dtype = getattr(T, product.dtype)
    C, F, W = product.out_channels, product.in_channels, product.width
    positions = product.height * W
    kh, kw = product.kernel
    dh, dw = product.dilation
    padded = product.padded
    rows, columns, depth, stages, threads, specialized = tile
    # Neighbours read the same rows. Only one dimension takes more than 65535 blocks.
    across = F // columns
    # A warpgroup of wgmma.sp takes whole rows of tiles, a warp of mma.sp a square.
    policy = T.GemmWarpPolicy.FullRow if wgmma else T.GemmWarpPolicy.Square

    def position_of(row: Any, tap: Any) -> tuple[Any, Any, Any]:
        """Return where the packed gradient has what a row of the result reads for a tap."""
        at = T.min(row, N * positions - 1)
        return at // positions, at % positions // W + tap // kw * dh, at % W + tap % kw * dw

    @T.prim_func
    def input_grad(
        values: T.Tensor((N, *padded, C // 2), dtype),
        places: T.Tensor((N, *padded, C // 16), T.int16),
        weight: T.Tensor((C, kh * kw, F), dtype),
        out: T.Tensor((N * positions, F), dtype),
    ) -> None:
        with T.Kernel(across * T.ceildiv(N * positions, rows), threads=threads) as block:
            bx = block % across
            by = block // across
            a = T.alloc_shared((rows, depth // 2), dtype)
            e = T.alloc_shared((rows, depth // 16), T.int16)
            b = T.alloc_shared((depth, columns), dtype)
            c = T.alloc_fragment((rows, columns), T.float32)
            result = T.alloc_shared((rows, columns), dtype)
            if specialized:
                # Of each pair of threads' 256 registers: as many as neither spills with.
                T.annotate_producer_reg_dealloc(72)
                T.annotate_consumer_reg_alloc(184)
            T.clear(c)
            for step in T.Pipelined(kh * kw * (C // depth), num_stages=stages):
                tap = step // (C // depth)
                part = step % (C // depth)
                for i, j in T.Parallel(rows, depth // 2):
                    at = position_of(by * rows + i, tap)
                    a[i, j] = values[at[0], at[1], at[2], part * (depth // 2) + j]
                for i, j in T.Parallel(rows, depth // 16):
                    at = position_of(by * rows + i, tap)
                    e[i, j] = places[at[0], at[1], at[2], part * (depth // 16) + j]
                T.copy(
                    weight[
                        part * depth : (part + 1) * depth,
                        kh * kw - 1 - tap,
                        bx * columns : (bx + 1) * columns,
                    ],
                    b,
                )
                if wgmma:
                    T.fence_proxy_async()
                T.gemm_sp(a, e, b, c, policy=policy)
            T.copy(c, result)
            T.copy(result, out[by * rows, bx * columns], disable_tma=True)

    return input_grad

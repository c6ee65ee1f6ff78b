"""Compile the Triton kernels for a GPU that need not be there; print the results as JSON.

Run `python -m tests.helpers.compile_kernels` without TRITON_INTERPRET. It prints one object for
each kernel, with the bytes of its global accesses in the PTX, and the registers and the memory for
spilled ones of the machine code.
"""

import json
import re
import subprocess
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sdgp_fx.kernels import triton_prune
from sdgp_fx.kernels.sparse import triton_pack

CHANNELS = 256


def compile_kernel(kernel, arguments, constants, capability, sizes="multiples"):
    """Compile as Triton does for a call with such arguments.

    Args:
        arguments: Triton types by name.
        sizes: "multiples" of 16, which pointers are too; "odd" ones; "wide", of 64 bits; or
            "position", odd ones with the spatial size 1, which Triton makes a constant.
    """
    if sizes == "wide":
        arguments = {k: "i64" if kind == "i32" else kind for k, kind in arguments.items()}
    if sizes == "position":
        arguments = {k: kind for k, kind in arguments.items() if k != "spatial"}
        constants = {**constants, "spatial": 1}
    signature = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in arguments.items()
        if name != "seed_ptr" and (sizes == "multiples" or kind.startswith("*"))
    }
    return triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": triton_prune._WARPS, "enable_fp_fusion": False},
    )


def prune_kernel(dtype, n, m, prune, channels_last, capability, scope="group", **kwargs):
    arguments = {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
    arguments |= {"size": "i32", "channels": "i32", "spatial": "i32"}
    constants = {"N": n, "M": m, "PRUNE": prune, "CHANNELS_LAST": channels_last}
    wide = kwargs.get("sizes") == "wide"
    constants |= {"BLOCK": triton_prune.group_block(m, channels_last, wide)}
    for name, kind, used in (
        ("seed_ptr", "*i64", prune in ("random", "mvue")),
        ("factor_ptr", "*fp32", scope == "channel"),
    ):
        if used:
            arguments[name] = kind
        else:
            constants[name] = None
    return compile_kernel(triton_prune._prune_kernel, arguments, constants, capability, **kwargs)


def scope_kernel(kernel, dtype, n, m, channels_last, capability, **kwargs):
    arguments = {"x_ptr": f"*{dtype}", "channels": "i32", "spatial": "i32"}
    if kernel is triton_prune._feature_map_kernel:
        arguments["out_ptr"] = f"*{dtype}"
    else:
        arguments |= {"sums_ptr": "*fp32", "chunk": "i32"}
    rows, columns = triton_prune.scope_tile(m, CHANNELS, channels_last)
    constants = {"N": n, "M": m, "CHANNELS_LAST": channels_last, "ROWS": rows, "COLUMNS": columns}
    return compile_kernel(kernel, arguments, constants, capability, **kwargs)


def pack_kernel(n, m, prune, capability, sizes):
    arguments = {"x_ptr": "*bf16", "values_ptr": "*bf16", "places_ptr": "*i16"}
    arguments |= dict.fromkeys(("size", "runs", "height", "width"), "i32")
    constants = {"seed_ptr": None, "HALO_H": 1, "HALO_W": 1, "N": n, "M": m, "PRUNE": prune}
    constants |= {"RUN": max(16, m), "BLOCK": triton_prune.THREADS}
    kernel = triton_pack._prune_and_pack_kernel
    return compile_kernel(kernel, arguments, constants, capability, sizes=sizes)


class Driver:
    """Answer what Triton asks before it compiles for a launch, for a GPU that isn't there."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def launched_kernels():
    """Compile every kernel that the launchers launch, with the same arguments, and run none."""
    triton.runtime.driver._active = triton.runtime.driver._default = Driver()
    compiled = {}
    label = None
    names = {torch.channels_last: "channels_last", torch.contiguous_format: "nchw"}

    def launch(kernel, grid):
        def record(*args, **kwargs):
            compiled[f"{label} {kernel.fn.__name__}"] = kernel.warmup(*args, grid=grid, **kwargs)

        return record

    type(triton_prune._prune_kernel).__getitem__ = launch
    seed = torch.tensor([3])
    for layout in names:
        x = torch.randn(4, 64, 16, 16).bfloat16().to(memory_format=layout)
        for prune in ("random", "magnitude", "rescaled_magnitude", "mvue"):
            for rescale in ("group", "feature_map", "channel"):
                if rescale == "group" or prune == "rescaled_magnitude":
                    label = f"launched sm_90 {names[layout]} bf16 2:4 {prune} {rescale}"
                    triton_prune.prune_nm(x, seed, 2, 4, prune, rescale)
    for prune in ("random", "rescaled_magnitude"):
        label = f"packed sm_90 bf16 2:4 {prune}"
        x = torch.randn(4, 16, 16, 64).bfloat16().movedim(-1, 1)
        triton_pack.prune_and_pack(x, seed, 2, 4, prune, (1, 1))
    return compiled


def describe(compiled):
    ptx = compiled.asm["ptx"]
    accesses = re.findall(r"(ld|st)\.global\S*?(?:\.v(\d))?\.[bfus](\d+)", ptx)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
    return {
        "loads": [
            int(vector or 1) * int(bits) // 8 for kind, vector, bits in accesses if kind == "ld"
        ],
        "stores": [
            int(vector or 1) * int(bits) // 8 for kind, vector, bits in accesses if kind == "st"
        ],
        "spills": int(stack) + int(local),  # Bytes.
        "registers": int(registers),
        "shared": compiled.metadata.shared,
    }


def main():
    kernels = {}
    for prune in ("random", "magnitude", "rescaled_magnitude", "mvue"):
        # The launchers compile the others of NCHW, for sm_90.
        for layout in ("channels_last", "nchw") if prune == "magnitude" else ("channels_last",):
            kernels[f"sm_80 {layout} bf16 2:4 {prune} group _prune_kernel"] = prune_kernel(
                "bf16", 2, 4, prune, layout == "channels_last", 80
            )
    kernels["sm_80 channels_last bf16 2:4 rescaled_magnitude channel _prune_kernel"] = prune_kernel(
        "bf16", 2, 4, "rescaled_magnitude", True, 80, scope="channel"
    )
    for scope, name in (
        ("feature_map", "_feature_map_kernel"),
        ("channel", "_channel_sums_kernel"),
    ):
        kernels[f"sm_80 channels_last bf16 2:4 rescaled_magnitude {scope} {name}"] = scope_kernel(
            getattr(triton_prune, name), "bf16", 2, 4, True, 80
        )
    for dtype, n, m in (("fp32", 2, 4), ("fp16", 2, 4), ("bf16", 4, 8), ("fp32", 16, 32)):
        kernels[f"sm_90 channels_last {dtype} {n}:{m} rescaled_magnitude group"] = prune_kernel(
            dtype, n, m, "rescaled_magnitude", True, 90
        )
    for sizes, layout in (
        ("odd", "nchw"),
        ("wide", "channels_last"),
        ("position", "channels_last"),
    ):
        channels_last = layout == "channels_last"
        kernels[f"{layout} {sizes} mvue"] = prune_kernel(
            "bf16", 2, 4, "mvue", channels_last, 90, sizes=sizes
        )
        for name in ("feature_map", "channel_sums"):
            kernel = getattr(triton_prune, f"_{name}_kernel")
            kernels[f"{layout} {sizes} {name}"] = scope_kernel(
                kernel, "bf16", 2, 4, channels_last, 90, sizes=sizes
            )
    # The case with the most registers: 32 values of float32, their keys and two sums for each.
    # Of NCHW, which takes 16 registers less, compiling takes 20 seconds.
    kernels["sm_90 channels_last fp32 16:32 feature_map"] = scope_kernel(
        triton_prune._feature_map_kernel, "fp32", 16, 32, True, 90
    )
    for n, m, prune, sizes in (
        (2, 4, "rescaled_magnitude", "odd"),
        (2, 32, "magnitude", "odd"),
        (2, 4, "magnitude", "wide"),
    ):
        kernels[f"packed sm_80 bf16 {n}:{m} {prune} {sizes}_sizes"] = pack_kernel(
            n, m, prune, 80, sizes
        )
    # Most of what is compiled for sm_80 above is among what the launchers compile for sm_90.
    kernels |= launched_kernels()
    print(json.dumps({name: describe(kernel) for name, kernel in kernels.items()}, indent=1))


if __name__ == "__main__":
    main()

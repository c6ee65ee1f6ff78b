"""Compile fused kernels that Inductor generates for a GPU that need not be there; print JSON.

Run `python -m tests.helpers.compile_fused` without TRITON_INTERPRET. The layer is one of
ResNet-18's at batch 256, and so is the producer of its gradient: the backward of batch
normalisation and ReLU.
"""

import json
import re
import tempfile
from pathlib import Path

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import sdgp_fx

from .compile_kernels import describe
from .generated import generate, kernels

# (XBLOCK, warps) of the largest tile that Inductor tries, with only contiguous reads and otherwise.
TILES = [(128, 2), (128, 4)]


class Block(nn.Module):
    """A convolution of ResNet-18's first stage."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64, 1, 1))  # Its gradient needs that of conv's input.
        self.conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(64)

    def forward(self, x):
        return self.bn(self.conv(x * self.scale)).relu().mean((2, 3))


def fused_kernels(prune, folder):
    """Return the kernels of Block's backward that prune what they produce."""
    codes = []
    model = Block().bfloat16().to(memory_format=torch.channels_last)
    images = torch.empty(256, 64, 56, 56, dtype=torch.bfloat16, device="meta")
    images = images.contiguous(memory_format=torch.channels_last)
    generate(
        model,
        images,
        sdgp_fx.SDGPConfig(prune=prune),
        lambda graph, code: codes.append(code) if graph.is_backward else None,
    )
    torch._dynamo.reset()
    (code,) = codes
    found = [k for k in kernels(code, folder) if re.search(r"r0_numel = 4$", k.body, re.M)]
    return {kernel.name: kernel for kernel in found}


def compile_kernel(kernel, xblock, warps):
    function = kernel.function
    signature = {name: kernel.signature.get(name, "constexpr") for name in function.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if signature[name].startswith("*") or name == "xnumel"
    }
    return triton.compile(
        ASTSource(function, signature, {"XBLOCK": xblock}, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps},
    )


def main():
    compiled = {}
    with tempfile.TemporaryDirectory() as folder:
        for prune in ("magnitude", "rescaled_magnitude", "random", "mvue"):
            for i, kernel in enumerate(fused_kernels(prune, Path(folder)).values()):
                for xblock, warps in TILES:
                    result = compile_kernel(kernel, xblock, warps)
                    shuffles = len(re.findall(r"\bshfl\b", result.asm["ptx"]))
                    facts = {**describe(result), "shuffles": shuffles, "xblock": xblock}
                    facts |= {"warps": warps, "writes": kernel.body.count("tl.store(")}
                    compiled[f"{prune} {i} {xblock} {warps}"] = facts
    print(json.dumps(compiled, indent=1))


if __name__ == "__main__":
    main()

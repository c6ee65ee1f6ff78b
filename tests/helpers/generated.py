"""Take code that Inductor generates for a GPU apart: its kernels, to be run or compiled."""

import ast
import importlib.util
import re

import torch
from torch._inductor import compile_fx
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sdgp_fx.inspection.gpu_codegen import generate, gpu_codegen, on_gpu  # noqa: F401

HEADER = """\
import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math
"""


def gpu_code(function, *inputs):
    """Return Inductor's code for function(*inputs) on a GPU; nothing is run."""
    codes = []
    with FakeTensorMode() as mode:
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for x in inputs]
        graph = make_fx(function)(*fakes)
    with (
        mode,
        inductor_config.patch(fx_graph_cache=False, compile_threads=1),
        gpu_codegen(lambda lowered, code: codes.append(code)),
    ):
        compile_fx.compile_fx_inner(*on_gpu(graph, fakes))
    (code,) = codes
    return code


class Kernel:
    """A generated kernel.

    Attributes:
        signature: The Triton type of each argument.
        blocks: Names of the other arguments, the sizes of a program's tile.
    """

    def __init__(self, text, folder):
        self.name = re.search(r"^def (triton_\w+)", text, re.M).group(1)
        signature = ast.literal_eval(re.search(r"'signature': (\{.*?\})", text).group(1))
        self.signature = {k: v for k, v in signature.items() if v != "constexpr"}
        self.blocks = [k for k, v in signature.items() if v == "constexpr"]
        self.body = re.search(r"^def triton_.*?(?=^''')", text, re.M | re.S).group(0)
        self.path = folder / f"{self.name}.py"
        self.path.write_text(f"{HEADER}\n@triton.jit\n{self.body}")

    @property
    def function(self):
        spec = importlib.util.spec_from_file_location(self.name, self.path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, self.name)

    def size(self, name):
        """xnumel or r0_numel."""
        return int(re.search(rf"^    {name} = (\d+)$", self.body, re.M).group(1))

    def run(self, inputs, outputs, block=16):
        """Launch it in the interpreter; inputs and outputs in the order of the graph's."""
        inputs, outputs = iter(inputs), iter(outputs)
        arguments = {}
        for name in self.signature:
            pointers = inputs if name.startswith("in_ptr") else outputs
            arguments[name] = next(pointers) if "ptr" in name else self.size(name)
        grid = [-(-self.size(f"{name[0].lower()}numel") // block) for name in self.blocks]
        self.function[tuple(grid)](**arguments, **dict.fromkeys(self.blocks, block))


def kernels(code, folder):
    """Return the kernels in code, written to files in folder, where Triton can read them."""
    parts = re.split(r"^@triton_heuristics\.", code, flags=re.M)[1:]
    return [Kernel(part, folder) for part in parts]

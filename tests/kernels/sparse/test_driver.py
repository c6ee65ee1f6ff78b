"""Test what the CUDA driver is told, by a library that has its functions and writes down calls."""

import contextlib
import ctypes
import json
import subprocess

import pytest
import torch

from sdgp_fx.kernels.sparse import driver
from sdgp_fx.kernels.sparse.binaries import Binary
from sdgp_fx.kernels.sparse.tensor_cores import Kernel, Tile

# Of CUtensorMap: what was encoded, in its first bytes.
SOURCE = r"""
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
static std::string log;
static void line(const char *format, auto... values) {
  char text[400];
  snprintf(text, sizeof text, format, values...);
  log += text;
}
extern "C" {
const char *calls() { return log.c_str(); }
int cuModuleLoadData(void **module, const char *cubin) {
  line("[\"load\", \"%s\"],", cubin);
  *module = (void *)0x10;
  return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
  line("[\"function\", %d, \"%s\"],", int(uintptr_t(module)), name);
  *function = (void *)0x20;
  return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
  line("[\"attribute\", %d, %d, %d],", int(uintptr_t(function)), attribute, value);
  return value > 200000 ? 1 : 0;
}
int cuGetErrorString(int, const char **text) {
  *text = "invalid argument";
  return 0;
}
int cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, void *address, uint64_t *sizes,
                           uint64_t *strides, uint32_t *box, uint32_t *steps, int a, int b, int c,
                           int d) {
  line("[\"encode\", %d, %d, %d, %u, %lu, %lu, %lu, %lu,", int(uintptr_t(map) % 64),
       int(uintptr_t(address)), type, rank, sizes[0], sizes[1], sizes[2], strides[0]);
  line("%lu, %u, %u, %u, %u, %u, %u, %d, %d, %d, %d],", strides[1], box[0], box[1], box[2],
       steps[0], steps[1], steps[2], a, b, c, d);
  memcpy(map, "encoded", 8);
  return 0;
}
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned,
                   unsigned, unsigned shared, void *stream, void **arguments, void **extra) {
  line("[\"launch\", %d, %u, %u, %u, %u, %u, %d,", int(uintptr_t(function)), x, y, z, threads,
       shared, int(uintptr_t(stream)));
  line("%d, \"%s\", %d],", int(uintptr_t(*(void **)arguments[0])), (char *)arguments[1],
       *(int *)arguments[2]);
  return 0;
}
}
"""

KERNEL = Kernel(
    source="",
    entry="input_grad_kernel",
    arguments=("out", "weight_desc", "batch"),
    tile=Tile(128, 64, 64, 3, 128),
    threads=256,
    shared_bytes=52224,
    tensor_map=(9, 3, (96, 64, 9), (1728, 192), (32, 64, 1), (1, 1, 1), 0, 2, 2, 0),
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.cpp").write_text(SOURCE)
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "driver.cpp", "-o", "driver.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "driver.so"))
    library.calls.restype = ctypes.c_char_p
    return library


class Stream:
    cuda_stream = 77


@pytest.fixture
def launch(library, monkeypatch):
    """Launch, without a GPU; return all calls that were made since the library was loaded."""
    monkeypatch.setattr(driver, "_driver", lambda: library)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)

    def run(kernel, tensors, batch):
        before = len(library.calls())
        driver.launch(Binary(kernel, b"cubin"), torch.device("cuda"), 70_000, tensors, batch)
        return json.loads(b"[" + library.calls()[before:].rstrip(b",") + b"]")

    return run


def low(tensor):
    """Return an address as the library prints it."""
    return ctypes.c_int(tensor.data_ptr()).value


def test_a_launch(launch):
    tensors = {name: torch.empty(8) for name in ("out", "weight", "values")}
    encode = ["encode", 0, low(tensors["weight"]), 9, 3, 96, 64, 9, 1728, 192, 32, 64, 1]
    encode += [1, 1, 1, 0, 2, 2, 0]
    again = [
        encode,
        ["launch", 32, 70_000, 1, 1, 256, 52224, 77, low(tensors["out"]), "encoded", 6],
    ]
    first = [
        encode,
        ["load", "cubin"],
        ["function", 16, "input_grad_kernel"],
        ["attribute", 32, 8, 52224],
        again[1],
    ]
    assert launch(KERNEL, tensors, 6) == first
    # It is loaded once.
    assert launch(KERNEL, tensors, 6) == again


def test_what_the_driver_refuses(launch):
    tensors = {name: torch.empty(8) for name in ("out", "weight")}
    with pytest.raises(RuntimeError, match=r"cuFuncSetAttribute: invalid argument \(1\)"):
        launch(KERNEL._replace(shared_bytes=300_000), tensors, 1)

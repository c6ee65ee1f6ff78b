"""Compiled kernels for sparse tensor cores.

A kernel that is in the store needs neither TileLang nor nvcc: it may have been compiled on another
machine, from which its file was copied.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.util
import json
import logging
from pathlib import Path
from typing import NamedTuple

from . import store
from .tensor_cores import Kernel, Product, Tile

log = logging.getLogger(__name__)


class Binary(NamedTuple):
    """A compiled kernel, with what it takes to call it."""

    kernel: Kernel
    cubin: bytes


def path_of(product: Product, tile: Tile, architecture: str) -> Path:
    """Return where the binary is kept, if it has been compiled."""
    identity = repr((store.version(), tuple(product), tuple(tile)))
    digest = hashlib.sha256(identity.encode()).hexdigest()[:32]
    return store.folder() / f"{architecture}-{digest}.json"


def find(product: Product, tile: Tile, architecture: str) -> Binary | None:
    """Return a binary, compiling it if need be; None if it is not there and cannot be compiled."""
    path = path_of(product, tile, architecture)
    if path.exists():
        return read(path)
    if why_no_compiler():
        return None
    try:
        return build(product, tile, architecture)
    except Exception as error:  # Of a compiler in Python and one in C++, anything.
        log.warning("%s does not compile for %s: %s", product, architecture, error)
        return None


def build(product: Product, tile: Tile, architecture: str) -> Binary:
    """Compile a kernel, and keep it; needs TileLang and nvcc, no GPU, and seconds."""
    from .tilelang_kernel import compile_cubin, lower

    kernel = lower(product, tile, architecture)
    binary = Binary(kernel, compile_cubin(kernel, architecture))
    path = path_of(product, tile, architecture)
    cubin = base64.b64encode(binary.cubin).decode()
    store.write(path, json.dumps({**kernel._asdict(), "cubin": cubin}))
    log.info("Compiled %s for %s, kept in %s", product, architecture, path)
    return binary


def read(path: Path) -> Binary:
    """Read a binary from the store."""
    content = json.loads(path.read_text())
    cubin = base64.b64decode(content.pop("cubin"))
    content["tile"] = Tile(*content["tile"])
    content["arguments"] = tuple(content["arguments"])
    if content["tensor_map"]:
        content["tensor_map"] = tuple(
            tuple(value) if isinstance(value, list) else value for value in content["tensor_map"]
        )
    return Binary(Kernel(**content), cubin)


@functools.cache
def why_no_compiler() -> str:
    """Return why no kernel can be compiled here; "" if one can."""
    if importlib.util.find_spec("tilelang") is None:
        return "TileLang is not installed"
    from tilelang.contrib import nvcc

    try:
        nvcc.get_nvcc_compiler()
    except Exception:  # Of a search for a toolkit, anything.
        return "TileLang finds no nvcc"
    return ""

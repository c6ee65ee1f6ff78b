"""The folder of what is compiled and measured for GPUs, which is Inductor's."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from pathlib import Path

# A change of what is written there makes other kernels, which take another time.
TEXTS = ("tilelang_kernel.py", "triton_pack.py", "tensor_cores.py")


def folder() -> Path:
    """Return the folder; it need not be there."""
    from torch._inductor.codecache import cache_dir

    return Path(cache_dir()) / "sdgp"


@functools.cache
def version() -> str:
    """Identify the kernels."""
    texts = [Path(__file__).with_name(name).read_bytes() for name in TEXTS]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]


def write(path: Path, text: str) -> None:
    """Write a file of which other processes see all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)

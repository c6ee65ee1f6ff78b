"""`python -m benchmarks.compile_products`: compile products for a GPU that is elsewhere."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from sdgp_fx.kernels.sparse import binaries, cuda
from sdgp_fx.kernels.sparse.tensor_cores import ARCHITECTURES, Product, tiles
from sdgp_fx.measurement.workload import Workload

from .harness import command
from .harness.input_gradients import problem_without_values
from .harness.terminal import progress


def products_of(workloads: Iterable[Workload]) -> list[Product]:
    """Return the distinct products that the layers of networks need."""
    products = {}
    for workload in workloads:
        for layer in workload.count_convolutions():
            problem = problem_without_values(layer, workload.torch_dtype, 2, 4, "magnitude")
            if layer.is_prunable(4) and not cuda.why_not_covered(problem):
                products[cuda.product_of(problem)] = True
    return list(products)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in argv, sys.argv by default; return the exit code."""
    parser = command.Parser(
        "compile_products",
        description="Compile the products on sparse tensor cores that networks need into a folder, "
        "for a machine without TileLang: gpu_suite --kernels takes the folder there. Needs no GPU. "
        "The batch size is left open.",
        example="--architecture sm_90 --model resnet18 --out kernels",
    )
    add = parser.add_argument
    architectures = list(ARCHITECTURES.values())
    add("--architecture", choices=architectures, default="sm_90", help="(%(default)s)")
    parser.add_models(("resnet18", "resnet50"))
    parser.add_dtype(("bfloat16", "float16"), "bfloat16")
    add("--every-tile", action="store_true", help="not only the tile that is expected to be best")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the kernels")
    args = parser.parse_args(argv)
    if why := binaries.why_no_compiler():
        parser.error(f"cannot compile here: {why}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        products = products_of(
            Workload(model, args.batch, args.size, args.dtype) for model in args.models
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    kernels = [
        (product, tile)
        for product in products
        for tile in tiles(product, args.architecture)[: None if args.every_tile else 1]
    ]
    with progress(len(kernels)) as begin:
        for product, tile in kernels:
            begin(str(product))
            path = binaries.path_of(product, tile, args.architecture)
            if not path.exists():
                binaries.build(product, tile, args.architecture)
            shutil.copy(path, args.out)
    print(f"{len(kernels)} kernels for {args.architecture} in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

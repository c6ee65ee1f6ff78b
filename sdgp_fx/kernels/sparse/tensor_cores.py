"""Products on sparse tensor cores: what a kernel is compiled for, and how it is cut into tiles.

The input gradient of a convolution with stride 1 is a matrix product: a row for each position of
the result, a column for each input channel, and a sum over taps and output channels. Of every four
output channels two are stored and multiplied, by mma.sp or wgmma.sp; see `packed` for the format.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# Of mma.sp (wgmma.sp on sm_90), by compute capability.
ARCHITECTURES = {
    (8, 0): "sm_80",
    (8, 6): "sm_86",
    (8, 9): "sm_89",
    (9, 0): "sm_90",
    (12, 0): "sm_120",
}

# Output channels come in the shortest steps, input channels in the narrowest tiles. With shorter
# steps TileLang copies places by plain stores, which nothing orders before their reads on sm_90.
OUT_CHANNELS, IN_CHANNELS = 64, 32


class Product(NamedTuple):
    """What a kernel is compiled for. The batch size is an argument.

    Attributes:
        dtype: "bfloat16" or "float16", of all operands and the result; sums are float32.
        height, width: Of the input gradient.
        out_channels, in_channels: Multiples of OUT_CHANNELS and IN_CHANNELS.
        kernel, dilation: For height and width.
    """

    dtype: str
    height: int
    width: int
    out_channels: int
    in_channels: int
    kernel: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of the packed gradient with its halo."""
        (rows, columns), (of_rows, of_columns) = self.kernel, self.dilation
        return self.height + of_rows * (rows - 1), self.width + of_columns * (columns - 1)


class Tile(NamedTuple):
    """What one block of threads computes.

    Attributes:
        rows, columns: Of the result.
        depth: Output channels of one step, of which half are stored.
        stages: Steps whose operands are in shared memory at the same time.
        threads: That multiply.
        specialized: Whether as many threads more copy.
    """

    rows: int
    columns: int
    depth: int
    stages: int
    threads: int
    specialized: bool = False


class Kernel(NamedTuple):
    """A lowered kernel.

    Attributes:
        source: CUDA.
        entry: Name of the function.
        arguments: Names of its parameters, in order: "values", "places", "weight" and "out" are
            pointers, "weight_desc" is the tensor map of the weight, "batch" an int.
        tile: What a block computes; blocks go through columns first.
        threads: Of a block.
        shared_bytes: Dynamic shared memory of a block.
        tensor_map: Arguments of cuTensorMapEncodeTiled after the address: data type, rank, sizes,
            strides in bytes without the innermost, box, element strides, interleave, swizzle, L2
            promotion and fill; None if no argument is a tensor map.
    """

    source: str
    entry: str
    arguments: tuple[str, ...]
    tile: Tile
    threads: int
    shared_bytes: int
    tensor_map: tuple[Any, ...] | None


# For wgmma.sp, in the order of their times on an H200, of an earlier version of the kernel. The
# others are a guess: wide tiles read the gradient less often, narrow ones leave registers to
# another block.
HOPPER = (
    Tile(256, 128, 128, 3, 256, specialized=True),
    Tile(256, 128, 64, 4, 256, specialized=True),
    Tile(128, 128, 64, 3, 128),
    Tile(128, 64, 64, 3, 128),
    Tile(128, 32, 64, 3, 128),
)
OTHERS = (
    Tile(128, 128, 64, 3, 256),
    Tile(128, 128, 64, 3, 128),
    Tile(128, 64, 64, 3, 128),
    Tile(128, 32, 64, 3, 128),
)


def tiles(product: Product, architecture: str) -> list[Tile]:
    """Return the tiles that a product may be computed in, the one expected to be best first."""
    return [
        tile
        for tile in (HOPPER if architecture == "sm_90" else OTHERS)
        if product.out_channels % tile.depth == 0 and product.in_channels % tile.columns == 0
    ]

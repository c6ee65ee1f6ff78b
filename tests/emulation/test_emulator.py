"""Test the emulator: generated kernels give right results, and broken ones never do.

The kernels in data/ are TileLang 0.1.15's, of a 3x3 convolution's input gradient at 5x7, from 64
channels whose gradients are pruned to 2:4 to 128: for sm_80, and for sm_90 with the kept values
from shared memory (ss) or registers (rs).
"""

import re
from pathlib import Path

import pytest
import torch

from sdgp_fx.kernels.reference import prune_nm
from sdgp_fx.kernels.sparse.packed import pack

from .emulator import EmulationError, TensorMap, emulate

DATA = Path(__file__).parent / "data"
HEIGHT, WIDTH, OUT_CHANNELS, IN_CHANNELS, BATCH = 5, 7, 64, 128, 3
# The relative error of a result that is rounded once; the rest is float32's, and far smaller.
TOLERANCES = {torch.bfloat16: 2**-8, torch.float16: 2**-11}

CONSUMER_WAITS = r"mbarrier\[\(tap_1 & 1\)\]\.wait\([^;]*;"
PRODUCER_WAITS = r"mbarrier\[\(\(tap & 1\) \+ 2\)\]\.wait\([^;]*;"
CONSUMER_ARRIVES = r"mbarrier\[\(\(tap_1 & 1\) \+ 2\)\]\.arrive\(\);"
FENCE = "tl::fence_proxy_async();"


def read(name):
    return (DATA / f"{name}.cu").read_text()


def replace(source, pattern, replacement):
    changed, count = re.subn(pattern, replacement, source)
    assert count
    return changed


def fenced(source):
    """Put the proxy fence that TileLang leaves out where wgmma reads what cp.async wrote."""
    return replace(source, f"({CONSUMER_WAITS})", rf"\1 {FENCE}")


SOURCES = {
    "sm_80": read("sm_80"),
    "sm_90 ss": fenced(read("sm_90_ss")),
    "sm_90 rs": read("sm_90_rs"),
}


def pruned_gradient(batch, dtype):
    """Return a gradient pruned to 2:4, and the kernels' values and places of what is kept."""
    gradient = torch.randn(batch, OUT_CHANNELS, HEIGHT, WIDTH).to(dtype)
    pruned = prune_nm(gradient, None, 2, 4, "magnitude", "group")
    return pruned, *pack(pruned, (1, 1))


def error_of(source, emulator_folder, batch=BATCH, dtype=torch.bfloat16, change_places=None):
    """Run a kernel and return how far its result is from a convolution's, relative to that."""
    run = emulate(source, emulator_folder)
    pruned, values, places = pruned_gradient(batch, dtype)
    if change_places:
        change_places(places)
    weight = torch.randn(OUT_CHANNELS, IN_CHANNELS, 3, 3).div(24).to(dtype)
    size = (batch, IN_CHANNELS, HEIGHT, WIDTH)
    expected = torch.nn.grad.conv2d_input(size, weight.float(), pruned.float(), padding=1)
    out = torch.full((batch * HEIGHT * WIDTH, IN_CHANNELS), torch.nan, dtype=dtype)
    rows = 9 * IN_CHANNELS * 2
    weight_map = TensorMap(
        tensor="weight",
        element=2,
        size=(IN_CHANNELS, OUT_CHANNELS, 9),
        stride=(2, rows, IN_CHANNELS * 2),
        box=(64, 64, 1),
        swizzle=128,
    )
    run(
        grid=(2, -(-out.shape[0] // 64)),
        threads=256 if "wgmma" in source else 128,
        shared_bytes=25600,
        maps={"weight_desc": weight_map} if "weight_desc" in source else {},
        values=values,
        places=places,
        weight=weight.flatten(2).transpose(1, 2).contiguous(),
        out=out,
        N=batch,
    )
    result = out.float().view(batch, HEIGHT, WIDTH, IN_CHANNELS).permute(0, 3, 1, 2)
    return ((result - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kernel", SOURCES)
def test_results(kernel, dtype, emulator_folder):
    source = SOURCES[kernel]
    if dtype == torch.float16:
        for name, other in {
            "__float22bfloat162_rn": "__float22half2_rn",
            "__nv_bfloat162": "half2",
            "bfloat16_t": "half_t",
            "kBFloat16": "kFloat16",
        }.items():
            source = source.replace(name, other)
    for batch in (1, BATCH):
        assert error_of(source, emulator_folder, batch, dtype) < TOLERANCES[dtype]


WRONG = None
MUTATIONS = {
    # Copies
    "copies nobody waits for": ("sm_80", r"tl::cp_async_wait<1>\(\);", "", "do not ascend"),
    "a wait for too few copies": ("sm_80", "cp_async_wait<1>", "cp_async_wait<2>", "do not ascend"),
    "no barrier after the wait": (
        "sm_80",
        r"(cp_async_wait<1>\(\);\s*)__syncthreads\(\);",
        r"\1",
        "do not ascend",
    ),
    "a stage overwritten while others read it": (
        "sm_80",
        r"(tap < 8; \+\+tap\) \{\s*)__syncthreads\(\);",
        r"\1",
        "do not ascend",
    ),
    "an arrival before its copies": (
        "sm_90 rs",
        r"tl::mbarrier_cp_async_arrive_noinc\((.*?)\);",
        r"\1.arrive();",
        "do not ascend",
    ),
    "a phase that expects too little": ("sm_90 rs", r"\(8192\);", "(4096);", "-4096 bytes"),
    # Barriers
    "a consumer that does not wait": ("sm_90 rs", CONSUMER_WAITS, "", "do not ascend"),
    "a producer that does not wait": ("sm_90 rs", PRODUCER_WAITS, "", "nobody waited"),
    "a consumer that never arrives": ("sm_90 rs", CONSUMER_ARRIVES, "", "no thread can go on"),
    "a consumer that arrives too early": (
        "sm_90 ss",
        rf"(tl::warpgroup_wait<0>\(\);)(.*?)({CONSUMER_ARRIVES})",
        r"\3 \1 \2",
        WRONG,
    ),
    "barriers TMA may not see": ("sm_90 rs", r"tl::fence_barrier_init\(\);", "", "not fenced"),
    "barriers others may not see": (
        "sm_90 rs",
        r"__syncthreads\(\);",
        "",
        "no barrier between its initialization",
    ),
    # wgmma
    "no fence of registers": ("sm_90 rs", r"tl::warpgroup_arrive\(\);", "", "no wgmma.fence"),
    "sums nobody waits for": ("sm_90 rs", r"tl::warpgroup_wait<0>\(\);", "", WRONG),
    "a wait for all but the last": ("sm_90 rs", "warpgroup_wait<0>", "warpgroup_wait<1>", WRONG),
    "a wrong stride": ("sm_90 rs", "descriptor<1, 0, 64>", "descriptor<1, 0, 32>", WRONG),
    "a wrong swizzle": ("sm_90 ss", "descriptor<2, 1, 32>", "descriptor<1, 1, 32>", WRONG),
    # Proxies
    "no proxy fence": (
        "sm_90 ss",
        rf"({CONSUMER_WAITS}) {re.escape(FENCE)}",
        r"\1",
        "wgmma reads what cp.async wrote",
    ),
    "a proxy fence before the wait": (
        "sm_90 ss",
        rf"({CONSUMER_WAITS}) {re.escape(FENCE)}",
        rf"{FENCE} \1",
        "wgmma reads what cp.async wrote",
    ),
    # Addresses and sums
    "a wrong row of metadata": ("sm_80", r"= \(\(short\*\)e\)\[", r"\g<0>32 ^ ", WRONG),
    "a wrong tap": ("sm_90 rs", r"\(8 - tap\)", "(7 - tap)", WRONG),
    "an unaligned row": ("sm_80", r"x4\(\(&\(\(\(bfloat16_t\*\)a\)\[", r"\g<0>1 + ", "not aligned"),
    "a copy past the end": ("sm_80", r"&\(weight\[", r"\g<0>8192 + ", "outside of every tensor"),
    "a store past the end": ("sm_80", r"\(uint1\*\)\(out \+ ", r"\g<0>8192 + ", "past the end"),
    "a store to an input": ("sm_80", r"\(uint1\*\)\(out \+ ", "(uint1*)(values + ", "const"),
    "sums that start anywhere": ("sm_80", r"= make_float4\(", "; make_float4(", WRONG),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation(mutation, emulator_folder):
    kernel, pattern, replacement, message = MUTATIONS[mutation]
    source = replace(SOURCES[kernel], re.compile(pattern, re.DOTALL), replacement)
    if message:
        with pytest.raises(EmulationError, match=message):
            error_of(source, emulator_folder)
    else:
        # NaN is not less.
        assert not error_of(source, emulator_folder) < 0.1


@pytest.mark.parametrize("kernel", SOURCES)
def test_metadata_must_ascend(kernel, emulator_folder):
    def swap(places):
        places[0, 2, 3, 1] = 0x4441

    with pytest.raises(EmulationError, match="places 1 and 0, which do not ascend"):
        error_of(SOURCES[kernel], emulator_folder, change_places=swap)


def test_every_half(emulator_folder):
    """float16 to and from float32, for all of float16 and halfway between any two."""
    run = emulate(
        'extern "C" __global__ void convert(float* up, half_t* down, half_t* middle, '
        "const half_t* in) {\n"
        "  for (int i = 0; i < 65535; ++i) {\n"
        "    up[i] = in[i];\n"
        "    down[i] = (half_t)up[i];\n"
        "    middle[i] = (half_t)((up[i] + float(in[i + 1])) * 0.5f);\n"
        "  }\n"
        "}\n",
        emulator_folder,
    )
    halves = torch.arange(65536).to(torch.int16).view(torch.float16)
    exact = halves[:-1].float()
    up, down, middle = torch.empty(65535), *torch.empty(2, 65535, dtype=torch.float16)
    tensors = {"up": up, "down": down, "middle": middle, "in": halves}
    run(grid=(1,), threads=32, shared_bytes=0, **tensors)
    expected = (exact + halves[1:].float()).mul(0.5).to(torch.float16)
    for result, right in ((up, exact), (down, halves[:-1]), (middle, expected)):
        torch.testing.assert_close(result, right, rtol=0, atol=0, equal_nan=True)


STORE = """
extern "C" __global__ void store(__grid_constant__ const CUtensorMap out_desc) {
  extern __shared__ __align__(1024) uchar buf_dyn_shmem[];
  float* tile = (float*)buf_dyn_shmem;
  int thread = (int)threadIdx.x;
  tile[thread] = thread < 32 ? -1 : thread;
  __syncthreads();
  // In between
  if (thread < 32) tile[thread] = thread;
  __syncthreads();
  if (tl::tl_shuffle_elect<0>()) {
    tl::fence_proxy_async();
    tl::tma_store(out_desc, tile, 0, ((int)blockIdx.y) * 8);
    tl::tma_store_arrive();
    tl::tma_store_wait<0, true>();
  }
  __syncthreads();
  tile[thread] = -1;
}
"""
NOT_FENCED = "a TMA store reads what a store wrote"
STORE_MUTATIONS = {
    "no fence": ({FENCE: ""}, NOT_FENCED),
    "fences before the last stores": ({FENCE: "", "// In between": FENCE}, NOT_FENCED),
    "a fence beside the last stores": (
        {FENCE: "", "// In between": f"if (thread == 63) {FENCE}"},
        NOT_FENCED,
    ),
    "no group": ({"tl::tma_store_arrive();": ""}, "ends before its TMA store has read"),
    "no wait": ({"tl::tma_store_wait<0, true>();": ""}, "ends before its TMA store has read"),
}


def store(source, emulator_folder):
    out = torch.full((11, 8), torch.nan)
    out_map = TensorMap("out", element=4, size=(8, 11), stride=(4, 32), box=(8, 8))
    run = emulate(source, emulator_folder)
    run(grid=(1, 2), threads=64, shared_bytes=256, maps={"out_desc": out_map}, out=out)
    return out


def test_tma_store(emulator_folder):
    expected = torch.arange(64.0).view(8, 8).repeat(2, 1)[:11]
    torch.testing.assert_close(store(STORE, emulator_folder), expected, rtol=0, atol=0)


@pytest.mark.parametrize("mutation", STORE_MUTATIONS)
def test_tma_store_mutation(mutation, emulator_folder):
    changes, message = STORE_MUTATIONS[mutation]
    source = STORE
    for old, new in changes.items():
        source = source.replace(old, new)
    with pytest.raises(EmulationError, match=message):
        store(source, emulator_folder)


@pytest.mark.parametrize(
    "change", [{"box": (64,)}, {"stride": (2, 24)}, {"box": (4, 4)}, {"swizzle": 64}]
)
def test_tensor_map_hardware_refuses(change):
    good = {"element": 2, "size": (64, 8), "stride": (2, 128), "box": (64, 8), "swizzle": 128}
    TensorMap("weight", **good)
    with pytest.raises(ValueError, match=r"need|must"):
        TensorMap("weight", **good | change)

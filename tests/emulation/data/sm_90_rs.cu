#if defined(_MSC_VER) && !defined(__clang__) && _MSC_VER < 1940
#define _tl_orig_alignas alignas
#define alignas(N) _tl_orig_alignas((N) <= 64 ? (N) : 64)
#include <cuda.h>
#undef alignas
#define alignas _tl_orig_alignas
#endif
#include <tl_templates/cuda/instruction/wgmma_sp.h>
#include <tl_templates/cuda/intrin.h>
#include <tl_templates/cuda/barrier.h>
#include <tl_templates/cuda/copy.h>
#include <tl_templates/cuda/copy_sm90.h>
#include <tl_templates/cuda/reduce.h>
#include <tl_templates/cuda/scan.h>
#include <tl_templates/cuda/ldsm.h>
#include <tl_templates/cuda/threadblock_swizzle.h>
#include <tl_templates/cuda/debug.h>
#ifdef ENABLE_BF16
#include <tl_templates/cuda/cuda_bf16_fallbacks.cuh>
#endif

extern "C" __global__ void kernel_kernel(bfloat16_t* __restrict__ out, const short* __restrict__ places, const bfloat16_t* __restrict__ values, __grid_constant__ const CUtensorMap weight_desc, int N);
extern "C" __global__ void __launch_bounds__(256, 1) kernel_kernel(bfloat16_t* __restrict__ out, const short* __restrict__ places, const bfloat16_t* __restrict__ values, __grid_constant__ const CUtensorMap weight_desc, int N) {
  extern __shared__ __align__(1024) uchar buf_dyn_shmem[];
  void* b = ((void*)((char*)buf_dyn_shmem + 0));
  void* a = ((void*)((char*)buf_dyn_shmem + 16384));
  void* e = ((void*)((char*)buf_dyn_shmem + 24576));
  __shared__ __align__(16) uint64_t mbarrier_mem[4];
  auto mbarrier = reinterpret_cast<Barrier*>(mbarrier_mem);
  float c[32];
  bfloat16_t ar[16];
  if (tl::tl_shuffle_elect<0>()) {
    tl::prefetch_tma_descriptor(weight_desc);
  }
  if (tl::tl_shuffle_elect<0>()) {
    mbarrier[0].init(128);
    mbarrier[1].init(128);
    mbarrier[2].init(128);
    mbarrier[3].init(128);
  }
  tl::fence_barrier_init();
  __syncthreads();
  if (((int)threadIdx.x) < 128) {
    for (int tap = 0; tap < 9; ++tap) {
      mbarrier[((tap & 1) + 2)].wait((((tap & 3) >> 1) ^ 1));
      #pragma unroll
      for (int i = 0; i < 2; ++i) {
        tl::cp_async_gs_conditional<16>((&(((bfloat16_t*)a)[((((tap & 1) * 2048) + (i * 1024)) + (((int)threadIdx.x) * 8))])), (&(values[(((((((((min((((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)i) * (int64_t)32)) + (((int64_t)((int)threadIdx.x)) >> (int64_t)2)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) / (int64_t)35) * (int64_t)2016) + (((min((((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)i) * (int64_t)32)) + (((int64_t)((int)threadIdx.x)) >> (int64_t)2)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)35) >> (int64_t)63) * (int64_t)2016)) + (((((int64_t)35 & ((min((((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)i) * (int64_t)32)) + (((int64_t)((int)threadIdx.x)) >> (int64_t)2)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)35) >> (int64_t)63)) + (min((((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)i) * (int64_t)32)) + (((int64_t)((int)threadIdx.x)) >> (int64_t)2)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)35)) / (int64_t)7) * (int64_t)288)) + ((((int64_t)tap) / (int64_t)3) * (int64_t)288)) + (((int64_t)7 & ((min((((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)i) * (int64_t)32)) + (((int64_t)((int)threadIdx.x)) >> (int64_t)2)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)7) >> (int64_t)63)) * (int64_t)32)) + ((min((((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)i) * (int64_t)32)) + (((int64_t)((int)threadIdx.x)) >> (int64_t)2)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)7) * (int64_t)32)) + ((((int64_t)tap) % (int64_t)3) * (int64_t)32)) + ((((int64_t)((int)threadIdx.x)) & (int64_t)3) * (int64_t)8))])), (1 <= N));
      }
      tl::cp_async_gs_conditional<4>((&(((short*)e)[(((tap & 1) * 256) + (((int)threadIdx.x) * 2))])), (&(places[(((((((((min(((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)((int)threadIdx.x)) >> (int64_t)1)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) / (int64_t)35) * (int64_t)252) + (((min(((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)((int)threadIdx.x)) >> (int64_t)1)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)35) >> (int64_t)63) * (int64_t)252)) + (((((int64_t)35 & ((min(((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)((int)threadIdx.x)) >> (int64_t)1)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)35) >> (int64_t)63)) + (min(((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)((int)threadIdx.x)) >> (int64_t)1)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)35)) / (int64_t)7) * (int64_t)36)) + ((((int64_t)tap) / (int64_t)3) * (int64_t)36)) + (((int64_t)7 & ((min(((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)((int)threadIdx.x)) >> (int64_t)1)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)7) >> (int64_t)63)) * (int64_t)4)) + ((min(((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)((int)threadIdx.x)) >> (int64_t)1)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)7) * (int64_t)4)) + ((((int64_t)tap) % (int64_t)3) * (int64_t)4)) + ((((int64_t)((int)threadIdx.x)) & (int64_t)1) * (int64_t)2))])), (1 <= N));
      tl::cp_async_commit();
      if (tl::tl_shuffle_elect<128>()) {
        mbarrier[(tap & 1)].expect_transaction(8192);
        tl::fence_proxy_async();
        tl::tma_load(weight_desc, mbarrier[(tap & 1)], (&(((bfloat16_t*)b)[((tap & 1) * 4096)])), (((int)blockIdx.x) * 64), 0, (8 - tap));
      }
      tl::mbarrier_cp_async_arrive_noinc(mbarrier[(tap & 1)]);
    }
  } else {
    #pragma unroll
    for (int i_1 = 0; i_1 < 8; ++i_1) {
      float broadcast_var = 0x0p+0f/*0.000000e+00*/;
      *(float4*)(c + (i_1 * 4)) = make_float4(broadcast_var, broadcast_var, broadcast_var, broadcast_var);
    }
    for (int tap_1 = 0; tap_1 < 9; ++tap_1) {
      mbarrier[(tap_1 & 1)].wait(((tap_1 & 3) >> 1));
      #pragma unroll
      for (int i_2 = 0; i_2 < 8; ++i_2) {
        *(uint1*)(ar + (i_2 * 2)) = *(uint1*)(((bfloat16_t*)a) + ((((((((tap_1 & 1) * 2048) + ((((int)threadIdx.x) >> 5) * 512)) + ((i_2 & 1) * 256)) + (((((int)threadIdx.x) & 31) >> 2) * 32)) + ((i_2 >> 1) * 8)) + ((((int)threadIdx.x) & 3) * 2)) - 2048));
      }
      {
        tl::GmmaDescriptor desc_b;
        short E_local[4];
        tl::initialize_wgmma_descriptor<1, 0, 64>(desc_b, (&(((bfloat16_t*)b)[0])));
        tl::increase_descriptor_offset<int>(desc_b, ((tap_1 & 1) * 8192));
        #pragma unroll
        for (int ki = 0; ki < 2; ++ki) {
          for (int j = 0; j < 2; ++j) {
            E_local[((ki * 2) + j)] = ((short*)e)[(((((((tap_1 & 1) * 256) + (((((int)threadIdx.x) & 127) >> 5) * 64)) + (j * 32)) + (((((int)threadIdx.x) & 31) >> 2) * 4)) + (ki * 2)) + (((int)threadIdx.x) & 1))];
          }
        }
        tl::warpgroup_fence_operand(reinterpret_cast<uint32_t*>(ar + 0), 8);
        tl::warpgroup_fence_operand(reinterpret_cast<float*>(c + 0), 32);
        tl::warpgroup_arrive();
        #pragma unroll
        for (int ki_1 = 0; ki_1 < 2; ++ki_1) {
          tl::wgmma_sp_rs<tl::DataType::kBFloat16, tl::DataType::kBFloat16, tl::DataType::kFloat32, 64, 64, 32, false, true, 1, 1, cute::SM90::GMMA::SparseSel::Zero>(reinterpret_cast<const uint32_t*>(ar + (ki_1 * 8)), uint64_t(desc_b + ((ki_1 * 4096) >> 4)), reinterpret_cast<uint32_t*>(c) + 0, 1, *reinterpret_cast<uint32_t*>(E_local + (ki_1 * 2)));
        }
        tl::warpgroup_commit_batch();
        tl::warpgroup_wait<0>();
        tl::warpgroup_fence_operand(reinterpret_cast<float*>(c + 0), 32);
        tl::warpgroup_fence_operand(reinterpret_cast<uint32_t*>(ar + 0), 8);
      }
      mbarrier[((tap_1 & 1) + 2)].arrive();
    }
    #pragma unroll
    for (int i_3 = 0; i_3 < 16; ++i_3) {
      bfloat16_t out_local_cast[2];
      if (((((((int)blockIdx.y) * 64) + ((((int)threadIdx.x) >> 5) * 16)) + ((i_3 & 1) * 8)) + ((((int)threadIdx.x) & 31) >> 2)) < ((N * 35) + 64)) {
        uint1 __1;
        float2 v_ = *(float2*)(c + (i_3 * 2));
        (reinterpret_cast<__nv_bfloat162*>(&__1))[0] = __float22bfloat162_rn(((float2*)(&v_))[0]);
        *(uint1*)(out_local_cast + 0) = __1;
        *(uint1*)(out + ((((((((((int64_t)((int)blockIdx.y)) * (int64_t)8192) + ((((int64_t)((int)threadIdx.x)) >> (int64_t)5) * (int64_t)2048)) + ((((int64_t)i_3) & (int64_t)1) * (int64_t)1024)) + (((((int64_t)((int)threadIdx.x)) & (int64_t)31) >> (int64_t)2) * (int64_t)128)) + (((int64_t)((int)blockIdx.x)) * (int64_t)64)) + ((((int64_t)i_3) >> (int64_t)1) * (int64_t)8)) + ((((int64_t)((int)threadIdx.x)) & (int64_t)3) * (int64_t)2)) - (int64_t)8192)) = *(uint1*)(out_local_cast + 0);
      }
    }
  }
}

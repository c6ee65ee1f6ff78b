#if defined(_MSC_VER) && !defined(__clang__) && _MSC_VER < 1940
#define _tl_orig_alignas alignas
#define alignas(N) _tl_orig_alignas((N) <= 64 ? (N) : 64)
#include <cuda.h>
#undef alignas
#define alignas _tl_orig_alignas
#endif
#include <tl_templates/cuda/instruction/mma_sp.h>
#include <tl_templates/cuda/copy.h>
#include <tl_templates/cuda/reduce.h>
#include <tl_templates/cuda/scan.h>
#include <tl_templates/cuda/ldsm.h>
#include <tl_templates/cuda/threadblock_swizzle.h>
#include <tl_templates/cuda/debug.h>
#ifdef ENABLE_BF16
#include <tl_templates/cuda/cuda_bf16_fallbacks.cuh>
#endif

extern "C" __global__ void kernel_kernel(bfloat16_t* __restrict__ out, const short* __restrict__ places, const bfloat16_t* __restrict__ values, const bfloat16_t* __restrict__ weight, int N);
extern "C" __global__ void __launch_bounds__(128, 1) kernel_kernel(bfloat16_t* __restrict__ out, const short* __restrict__ places, const bfloat16_t* __restrict__ values, const bfloat16_t* __restrict__ weight, int N) {
  extern __shared__ __align__(1024) uchar buf_dyn_shmem[];
  void* a = ((void*)((char*)buf_dyn_shmem + 0));
  void* e = ((void*)((char*)buf_dyn_shmem + 8192));
  void* b = ((void*)((char*)buf_dyn_shmem + 9216));
  float c[32];
  #pragma unroll
  for (int i = 0; i < 8; ++i) {
    float broadcast_var = 0x0p+0f/*0.000000e+00*/;
    *(float4*)(c + (i * 4)) = make_float4(broadcast_var, broadcast_var, broadcast_var, broadcast_var);
  }
  #pragma unroll
  for (int i_1 = 0; i_1 < 2; ++i_1) {
    tl::cp_async_gs_conditional<16>((&(((bfloat16_t*)a)[((((i_1 * 1024) + ((((int)threadIdx.x) >> 2) * 32)) + (((((((int)threadIdx.x) & 31) >> 4) + ((((int)threadIdx.x) & 3) >> 1)) & 1) * 16)) + (((((((int)threadIdx.x) & 15) >> 3) + (((int)threadIdx.x) & 1)) & 1) * 8))])), (&(values[(((((((min((((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)i_1) * (int64_t)32)) + (((int64_t)((int)threadIdx.x)) >> (int64_t)2)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) / (int64_t)35) * (int64_t)2016) + (((min((((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)i_1) * (int64_t)32)) + (((int64_t)((int)threadIdx.x)) >> (int64_t)2)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)35) >> (int64_t)63) * (int64_t)2016)) + (((((int64_t)35 & ((min((((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)i_1) * (int64_t)32)) + (((int64_t)((int)threadIdx.x)) >> (int64_t)2)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)35) >> (int64_t)63)) + (min((((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)i_1) * (int64_t)32)) + (((int64_t)((int)threadIdx.x)) >> (int64_t)2)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)35)) / (int64_t)7) * (int64_t)288)) + (((int64_t)7 & ((min((((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)i_1) * (int64_t)32)) + (((int64_t)((int)threadIdx.x)) >> (int64_t)2)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)7) >> (int64_t)63)) * (int64_t)32)) + ((min((((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)i_1) * (int64_t)32)) + (((int64_t)((int)threadIdx.x)) >> (int64_t)2)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)7) * (int64_t)32)) + ((((int64_t)((int)threadIdx.x)) & (int64_t)3) * (int64_t)8))])), (1 <= N));
  }
  tl::cp_async_gs_conditional<4>((&(((short*)e)[(((int)threadIdx.x) * 2)])), (&(places[(((((((min(((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)((int)threadIdx.x)) >> (int64_t)1)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) / (int64_t)35) * (int64_t)252) + (((min(((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)((int)threadIdx.x)) >> (int64_t)1)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)35) >> (int64_t)63) * (int64_t)252)) + (((((int64_t)35 & ((min(((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)((int)threadIdx.x)) >> (int64_t)1)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)35) >> (int64_t)63)) + (min(((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)((int)threadIdx.x)) >> (int64_t)1)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)35)) / (int64_t)7) * (int64_t)36)) + (((int64_t)7 & ((min(((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)((int)threadIdx.x)) >> (int64_t)1)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)7) >> (int64_t)63)) * (int64_t)4)) + ((min(((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)((int)threadIdx.x)) >> (int64_t)1)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)7) * (int64_t)4)) + ((((int64_t)((int)threadIdx.x)) & (int64_t)1) * (int64_t)2))])), (1 <= N));
  #pragma unroll
  for (int i_2 = 0; i_2 < 4; ++i_2) {
    tl::cp_async_gs<16>((&(((bfloat16_t*)b)[(((((i_2 * 1024) + ((((int)threadIdx.x) >> 3) * 64)) + (((((((int)threadIdx.x) & 63) >> 5) + ((((int)threadIdx.x) & 7) >> 2)) & 1) * 32)) + (((((((int)threadIdx.x) & 31) >> 4) + ((((int)threadIdx.x) & 3) >> 1)) & 1) * 16)) + (((((((int)threadIdx.x) & 15) >> 3) + (((int)threadIdx.x) & 1)) & 1) * 8))])), (&(weight[(((((i_2 * 18432) + ((((int)threadIdx.x) >> 3) * 1152)) + (((int)blockIdx.x) * 64)) + ((((int)threadIdx.x) & 7) * 8)) + 1024)])));
  }
  tl::cp_async_commit();
  for (int tap = 0; tap < 8; ++tap) {
    __syncthreads();
    #pragma unroll
    for (int i_3 = 0; i_3 < 2; ++i_3) {
      tl::cp_async_gs_conditional<16>((&(((bfloat16_t*)a)[(((((((tap + 1) & 1) * 2048) + (i_3 * 1024)) + ((((int)threadIdx.x) >> 2) * 32)) + (((((((int)threadIdx.x) & 31) >> 4) + ((((int)threadIdx.x) & 3) >> 1)) & 1) * 16)) + (((((((int)threadIdx.x) & 15) >> 3) + (((int)threadIdx.x) & 1)) & 1) * 8))])), (&(values[(((((((((min((((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)i_3) * (int64_t)32)) + (((int64_t)((int)threadIdx.x)) >> (int64_t)2)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) / (int64_t)35) * (int64_t)2016) + (((min((((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)i_3) * (int64_t)32)) + (((int64_t)((int)threadIdx.x)) >> (int64_t)2)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)35) >> (int64_t)63) * (int64_t)2016)) + (((((int64_t)35 & ((min((((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)i_3) * (int64_t)32)) + (((int64_t)((int)threadIdx.x)) >> (int64_t)2)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)35) >> (int64_t)63)) + (min((((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)i_3) * (int64_t)32)) + (((int64_t)((int)threadIdx.x)) >> (int64_t)2)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)35)) / (int64_t)7) * (int64_t)288)) + (((((int64_t)tap) + (int64_t)1) / (int64_t)3) * (int64_t)288)) + (((int64_t)7 & ((min((((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)i_3) * (int64_t)32)) + (((int64_t)((int)threadIdx.x)) >> (int64_t)2)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)7) >> (int64_t)63)) * (int64_t)32)) + ((min((((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)i_3) * (int64_t)32)) + (((int64_t)((int)threadIdx.x)) >> (int64_t)2)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)7) * (int64_t)32)) + (((((int64_t)tap) + (int64_t)1) % (int64_t)3) * (int64_t)32)) + ((((int64_t)((int)threadIdx.x)) & (int64_t)3) * (int64_t)8))])), (1 <= N));
    }
    tl::cp_async_gs_conditional<4>((&(((short*)e)[((((tap + 1) & 1) * 256) + (((int)threadIdx.x) * 2))])), (&(places[(((((((((min(((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)((int)threadIdx.x)) >> (int64_t)1)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) / (int64_t)35) * (int64_t)252) + (((min(((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)((int)threadIdx.x)) >> (int64_t)1)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)35) >> (int64_t)63) * (int64_t)252)) + (((((int64_t)35 & ((min(((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)((int)threadIdx.x)) >> (int64_t)1)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)35) >> (int64_t)63)) + (min(((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)((int)threadIdx.x)) >> (int64_t)1)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)35)) / (int64_t)7) * (int64_t)36)) + (((((int64_t)tap) + (int64_t)1) / (int64_t)3) * (int64_t)36)) + (((int64_t)7 & ((min(((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)((int)threadIdx.x)) >> (int64_t)1)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)7) >> (int64_t)63)) * (int64_t)4)) + ((min(((((int64_t)((int)blockIdx.y)) * (int64_t)64) + (((int64_t)((int)threadIdx.x)) >> (int64_t)1)), ((((int64_t)N) * (int64_t)35) - (int64_t)1)) % (int64_t)7) * (int64_t)4)) + (((((int64_t)tap) + (int64_t)1) % (int64_t)3) * (int64_t)4)) + ((((int64_t)((int)threadIdx.x)) & (int64_t)1) * (int64_t)2))])), (1 <= N));
    #pragma unroll
    for (int i_4 = 0; i_4 < 4; ++i_4) {
      tl::cp_async_gs<16>((&(((bfloat16_t*)b)[((((((((tap + 1) & 1) * 4096) + (i_4 * 1024)) + ((((int)threadIdx.x) >> 3) * 64)) + (((((((int)threadIdx.x) & 63) >> 5) + ((((int)threadIdx.x) & 7) >> 2)) & 1) * 32)) + (((((((int)threadIdx.x) & 31) >> 4) + ((((int)threadIdx.x) & 3) >> 1)) & 1) * 16)) + (((((((int)threadIdx.x) & 15) >> 3) + (((int)threadIdx.x) & 1)) & 1) * 8))])), (&(weight[((((((i_4 * 18432) + ((((int)threadIdx.x) >> 3) * 1152)) + (((int)blockIdx.x) * 64)) + ((((int)threadIdx.x) & 7) * 8)) + 896) - (tap * 128))])));
    }
    tl::cp_async_commit();
    tl::cp_async_wait<1>();
    __syncthreads();
    {
      bfloat16_t A_local[16];
      short E_local[4];
      bfloat16_t B_local[32];
      for (int ki = 0; ki < 2; ++ki) {
        for (int i_5 = 0; i_5 < 2; ++i_5) {
          tl::ptx_ldmatrix_x4((&(((bfloat16_t*)a)[(((((((tap & 1) * 2048) + (((((int)threadIdx.x) & 63) >> 5) * 1024)) + (i_5 * 512)) + ((((int)threadIdx.x) & 15) * 32)) + (((((((int)threadIdx.x) & 7) >> 2) + ki) & 1) * 16)) + (((((((int)threadIdx.x) & 31) >> 4) + ((((int)threadIdx.x) & 3) >> 1)) & 1) * 8))])), (&(A_local[(i_5 * 8)])));
        }
        for (int i_6 = 0; i_6 < 2; ++i_6) {
          for (int j = 0; j < 2; ++j) {
            E_local[((i_6 * 2) + j)] = ((short*)e)[((((((((tap & 1) * 256) + (((((int)threadIdx.x) & 63) >> 5) * 128)) + (i_6 * 64)) + (j * 32)) + (((((int)threadIdx.x) & 31) >> 2) * 4)) + (ki * 2)) + (((int)threadIdx.x) & 1))];
          }
        }
        for (int i_7 = 0; i_7 < 2; ++i_7) {
          tl::ptx_ldmatrix_x4_trans((&(((bfloat16_t*)b)[(((((((tap & 1) * 4096) + (ki * 2048)) + ((((int)threadIdx.x) & 31) * 64)) + ((((((int)threadIdx.x) >> 6) + ((((int)threadIdx.x) & 7) >> 2)) & 1) * 32)) + (((((((int)threadIdx.x) & 3) >> 1) + i_7) & 1) * 16)) + ((((int)threadIdx.x) & 1) * 8))])), (&(B_local[(i_7 * 16)])));
          tl::ptx_ldmatrix_x4_trans((&(((bfloat16_t*)b)[(((((((tap & 1) * 4096) + (ki * 2048)) + ((((int)threadIdx.x) & 31) * 64)) + ((((((int)threadIdx.x) >> 6) + ((((int)threadIdx.x) & 7) >> 2)) & 1) * 32)) + (((((((int)threadIdx.x) & 3) >> 1) + i_7) & 1) * 16)) + ((((((int)threadIdx.x) & 1) + 1) & 1) * 8))])), (&(B_local[((i_7 * 16) + 8)])));
        }
        for (int i_8 = 0; i_8 < 2; ++i_8) {
          for (int j_1 = 0; j_1 < 2; ++j_1) {
            tl::mma_sp_sync<tl::DataType::kBFloat16, tl::DataType::kBFloat16, tl::DataType::kFloat32, 16, 8, 32, false, true, SM80::MMA::SparseSel::Zero>(reinterpret_cast<float*>(c + ((i_8 * 16) + (j_1 * 8))), reinterpret_cast<const unsigned*>(A_local + (i_8 * 8)), reinterpret_cast<const unsigned*>(B_local + (j_1 * 16)), reinterpret_cast<const uint32_t*>(E_local + (i_8 * 2)));
            tl::mma_sp_sync<tl::DataType::kBFloat16, tl::DataType::kBFloat16, tl::DataType::kFloat32, 16, 8, 32, false, true, SM80::MMA::SparseSel::Zero>(reinterpret_cast<float*>(c + (((i_8 * 16) + (j_1 * 8)) + 4)), reinterpret_cast<const unsigned*>(A_local + (i_8 * 8)), reinterpret_cast<const unsigned*>(B_local + ((j_1 * 16) + 8)), reinterpret_cast<const uint32_t*>(E_local + (i_8 * 2)));
          }
        }
      }
    }
  }
  tl::cp_async_wait<0>();
  __syncthreads();
  {
    bfloat16_t A_local_1[16];
    short E_local_1[4];
    bfloat16_t B_local_1[32];
    for (int ki_1 = 0; ki_1 < 2; ++ki_1) {
      for (int i_9 = 0; i_9 < 2; ++i_9) {
        tl::ptx_ldmatrix_x4((&(((bfloat16_t*)a)[(((((((((int)threadIdx.x) & 63) >> 5) * 1024) + (i_9 * 512)) + ((((int)threadIdx.x) & 15) * 32)) + (((((((int)threadIdx.x) & 7) >> 2) + ki_1) & 1) * 16)) + (((((((int)threadIdx.x) & 31) >> 4) + ((((int)threadIdx.x) & 3) >> 1)) & 1) * 8))])), (&(A_local_1[(i_9 * 8)])));
      }
      for (int i_10 = 0; i_10 < 2; ++i_10) {
        for (int j_2 = 0; j_2 < 2; ++j_2) {
          E_local_1[((i_10 * 2) + j_2)] = ((short*)e)[((((((((((int)threadIdx.x) & 63) >> 5) * 128) + (i_10 * 64)) + (j_2 * 32)) + (((((int)threadIdx.x) & 31) >> 2) * 4)) + (ki_1 * 2)) + (((int)threadIdx.x) & 1))];
        }
      }
      for (int i_11 = 0; i_11 < 2; ++i_11) {
        tl::ptx_ldmatrix_x4_trans((&(((bfloat16_t*)b)[(((((ki_1 * 2048) + ((((int)threadIdx.x) & 31) * 64)) + ((((((int)threadIdx.x) >> 6) + ((((int)threadIdx.x) & 7) >> 2)) & 1) * 32)) + (((((((int)threadIdx.x) & 3) >> 1) + i_11) & 1) * 16)) + ((((int)threadIdx.x) & 1) * 8))])), (&(B_local_1[(i_11 * 16)])));
        tl::ptx_ldmatrix_x4_trans((&(((bfloat16_t*)b)[(((((ki_1 * 2048) + ((((int)threadIdx.x) & 31) * 64)) + ((((((int)threadIdx.x) >> 6) + ((((int)threadIdx.x) & 7) >> 2)) & 1) * 32)) + (((((((int)threadIdx.x) & 3) >> 1) + i_11) & 1) * 16)) + ((((((int)threadIdx.x) & 1) + 1) & 1) * 8))])), (&(B_local_1[((i_11 * 16) + 8)])));
      }
      for (int i_12 = 0; i_12 < 2; ++i_12) {
        for (int j_3 = 0; j_3 < 2; ++j_3) {
          tl::mma_sp_sync<tl::DataType::kBFloat16, tl::DataType::kBFloat16, tl::DataType::kFloat32, 16, 8, 32, false, true, SM80::MMA::SparseSel::Zero>(reinterpret_cast<float*>(c + ((i_12 * 16) + (j_3 * 8))), reinterpret_cast<const unsigned*>(A_local_1 + (i_12 * 8)), reinterpret_cast<const unsigned*>(B_local_1 + (j_3 * 16)), reinterpret_cast<const uint32_t*>(E_local_1 + (i_12 * 2)));
          tl::mma_sp_sync<tl::DataType::kBFloat16, tl::DataType::kBFloat16, tl::DataType::kFloat32, 16, 8, 32, false, true, SM80::MMA::SparseSel::Zero>(reinterpret_cast<float*>(c + (((i_12 * 16) + (j_3 * 8)) + 4)), reinterpret_cast<const unsigned*>(A_local_1 + (i_12 * 8)), reinterpret_cast<const unsigned*>(B_local_1 + ((j_3 * 16) + 8)), reinterpret_cast<const uint32_t*>(E_local_1 + (i_12 * 2)));
        }
      }
    }
  }
  #pragma unroll
  for (int i_13 = 0; i_13 < 16; ++i_13) {
    bfloat16_t out_local_cast[2];
    if ((((((((int)blockIdx.y) * 64) + (((((int)threadIdx.x) & 63) >> 5) * 32)) + ((i_13 >> 3) * 16)) + ((i_13 & 1) * 8)) + ((((int)threadIdx.x) & 31) >> 2)) < (N * 35)) {
      uint1 __1;
      float2 v_ = *(float2*)(c + (i_13 * 2));
      (reinterpret_cast<__nv_bfloat162*>(&__1))[0] = __float22bfloat162_rn(((float2*)(&v_))[0]);
      *(uint1*)(out_local_cast + 0) = __1;
      *(uint1*)(out + (((((((((((int64_t)((int)blockIdx.y)) * (int64_t)8192) + (((((int64_t)((int)threadIdx.x)) & (int64_t)63) >> (int64_t)5) * (int64_t)4096)) + ((((int64_t)i_13) >> (int64_t)3) * (int64_t)2048)) + ((((int64_t)i_13) & (int64_t)1) * (int64_t)1024)) + (((((int64_t)((int)threadIdx.x)) & (int64_t)31) >> (int64_t)2) * (int64_t)128)) + (((int64_t)((int)blockIdx.x)) * (int64_t)64)) + ((((int64_t)((int)threadIdx.x)) >> (int64_t)6) * (int64_t)32)) + (((((int64_t)i_13) & (int64_t)7) >> (int64_t)1) * (int64_t)8)) + ((((int64_t)((int)threadIdx.x)) & (int64_t)3) * (int64_t)2))) = *(uint1*)(out_local_cast + 0);
    }
  }
}

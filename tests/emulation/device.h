// What a generated kernel's text names: CUDA's types and variables, and TileLang's functions. They
// hand over to the emulated hardware, whose rules are in runtime.cpp and the headers it includes.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// One block runs at a time, and all of its threads see the one array.
#define __shared__ static

struct dim3 {
  int x = 1, y = 1, z = 1;
};
// The scheduler sets these before it lets a thread go on.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);

inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t word = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

inline uint16_t float_to_bfloat16(float value) {
  if (value != value) return 0x7FFF;
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return uint16_t((word + 0x7FFF + ((word >> 16) & 1)) >> 16);
}

}  // namespace emulated

struct half_t {
  uint16_t bits;
  half_t() = default;
  explicit half_t(float value) : bits(emulated::float_to_half(value)) {}
  operator float() const { return emulated::half_to_float(bits); }
};

struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float value) : bits(emulated::float_to_bfloat16(value)) {}
  operator float() const { return emulated::bfloat16_to_float(bits); }
};

struct half2 {
  half_t x, y;
};
using __half2 = half2;
struct __nv_bfloat162 {
  bfloat16_t x, y;
};

#define VECTOR(type, scalar)                                           \
  struct type##1 { scalar x; };                                        \
  struct alignas(2 * sizeof(scalar)) type##2 { scalar x, y; };         \
  struct alignas(4 * sizeof(scalar)) type##4 { scalar x, y, z, w; };   \
  inline type##2 make_##type##2(scalar x, scalar y) { return {x, y}; } \
  inline type##4 make_##type##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
VECTOR(float, float)
VECTOR(int, int)
VECTOR(uint, uint)
VECTOR(short, short)
VECTOR(ushort, ushort)
#undef VECTOR

inline half2 __float22half2_rn(float2 pair) { return {half_t(pair.x), half_t(pair.y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 pair) {
  return {bfloat16_t(pair.x), bfloat16_t(pair.y)};
}
inline float2 __half22float2(half2 pair) { return {pair.x, pair.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 pair) { return {pair.x, pair.y}; }

template <class T> unsigned __pack_half2(T low, T high) {
  static_assert(sizeof(T) == 2);
  return low.bits | unsigned(high.bits) << 16;
}

template <class A, class B> std::common_type_t<A, B> min(A a, B b) { return a < b ? a : b; }
template <class A, class B> std::common_type_t<A, B> max(A a, B b) { return a > b ? a : b; }

// How a TMA instruction goes through a tensor in global memory. Dimensions: the innermost is first.
struct CUtensorMap {
  char *base;
  int64_t element, rank, swizzle;  // bytes of an element, dimensions, bytes of a swizzle's row or 0
  int64_t size[5], stride[5], box[5];  // elements, bytes, elements
};

namespace emulated {

int thread_index();

void synchronize(int barrier, int count);
void arrive(int barrier, int count);

void copy_async(void *to, const void *from, int size, bool read);
void commit_copies();
void wait_copies(int groups);
void wait_all_copies();

void barrier_init(const void *barrier, unsigned count);
void barrier_arrive(const void *barrier);
void barrier_arrive_after_copies(const void *barrier);
void barrier_expect(const void *barrier, unsigned bytes);
void barrier_wait(const void *barrier, unsigned parity);

void fence_async_proxy();
void fence_barriers();

void bulk_load(void *to, const void *from, const void *barrier, unsigned size);
void tensor_load(const CUtensorMap &map, const void *barrier, void *to, const int *at, int rank);
void tensor_store(const CUtensorMap &map, const void *from, const int *at, int rank);
void commit_stores();
void wait_stores(int groups);

void ldmatrix(const void *row, void *registers, int count, bool transpose);
void stmatrix(const void *row, const uint32_t *registers, int count, bool transpose);

enum class Element { bfloat16, float16 };

struct MmaSp {
  Element element;
  int selector;
  float *d;
  const uint32_t *a, *b;
  uint32_t metadata;
};
void mma_sp(const MmaSp &mma);

struct Wgmma {
  Element element;
  int n, selector;
  bool transpose_a, transpose_b;
  int scale_a, scale_b;
  bool accumulate;
  float *d;
  const uint32_t *a_registers;  // null: descriptor_a counts
  uint64_t descriptor_a, descriptor_b;
  uint32_t metadata;
};
void wgmma_sp(const Wgmma &wgmma);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups);

unsigned shared_address(const void *pointer);

}  // namespace emulated

inline void __syncthreads() { emulated::synchronize(0, blockDim.x * blockDim.y * blockDim.z); }

// Its 64 bits of shared memory are an address only: the emulator keeps the state elsewhere.
struct Barrier {
  uint64_t opaque;
  void init(unsigned count) const { emulated::barrier_init(this, count); }
  void arrive() const { emulated::barrier_arrive(this); }
  void expect_transaction(unsigned bytes) const { emulated::barrier_expect(this, bytes); }
  void arrive_and_expect_tx(unsigned bytes) const {
    expect_transaction(bytes);
    arrive();
  }
  void wait(unsigned parity) const { emulated::barrier_wait(this, parity); }
  // A test may take its time: who polls one waits.
  bool try_wait(unsigned parity) const { return wait(parity), true; }
  bool test_wait(unsigned parity, unsigned predicate = 1) const {
    return predicate ? (wait(parity), true) : false;
  }
};

namespace SM80::MMA {
enum class SparseSel { Zero, One };
}  // namespace SM80::MMA
namespace cute::SM90::GMMA {
enum class SparseSel { Zero, One };
}  // namespace cute::SM90::GMMA

namespace tl {

enum class DataType { kFloat16, kBFloat16, kFloat32 };

template <DataType A, DataType B, DataType C> constexpr emulated::Element element_of() {
  static_assert(A == B && (A == DataType::kFloat16 || A == DataType::kBFloat16));
  static_assert(C == DataType::kFloat32);
  return A == DataType::kFloat16 ? emulated::Element::float16 : emulated::Element::bfloat16;
}

template <int size> void cp_async_gs(const void *to, const void *from) {
  emulated::copy_async(const_cast<void *>(to), from, size, true);
}
template <int size> void cp_async_gs_conditional(const void *to, const void *from, bool read) {
  emulated::copy_async(const_cast<void *>(to), from, size, read);
}
inline void cp_async_commit() { emulated::commit_copies(); }
template <int groups> void cp_async_wait() {
  // TileLang writes the wait for no group as cp.async.wait_all, which needs no commit.
  if constexpr (groups == 0)
    emulated::wait_all_copies();
  else
    emulated::wait_copies(groups);
}

inline void __sync_thread_partial(int barrier, int count) { emulated::synchronize(barrier, count); }
inline void __named_barrier_arrive(int barrier, int count) { emulated::arrive(barrier, count); }

template <class T> void mbarrier_cp_async_arrive_noinc(T &barrier) {
  static_assert(!std::is_pointer_v<T>);
  emulated::barrier_arrive_after_copies(&barrier);
}
inline void fence_proxy_async() { emulated::fence_async_proxy(); }
inline void fence_barrier_init() { emulated::fence_barriers(); }

template <class T> void tma_load(void *to, const void *from, T &barrier, unsigned size) {
  emulated::bulk_load(to, from, &barrier, size);
}
template <class T, class... At>
void tma_load(const CUtensorMap &map, T &barrier, const void *to, At... coordinates) {
  const int at[] = {int(coordinates)...};
  emulated::tensor_load(map, &barrier, const_cast<void *>(to), at, sizeof...(coordinates));
}
template <class... At> void tma_store(const CUtensorMap &map, const void *from, At... coordinates) {
  const int at[] = {int(coordinates)...};
  emulated::tensor_store(map, from, at, sizeof...(coordinates));
}
inline void tma_store_arrive() { emulated::commit_stores(); }
template <int groups, bool read = true> void tma_store_wait() { emulated::wait_stores(groups); }
inline void prefetch_tma_descriptor(const CUtensorMap &) {}

// One thread of each `extent` threads: the first. 0: one thread of the block.
template <int extent> bool tl_shuffle_elect() {
  const int thread = emulated::thread_index();
  if constexpr (extent == 0)
    return thread == 0;
  else
    return thread % 32 == 0 && thread / 32 % ((extent + 31) / 32) == 0;
}

inline void ptx_ldmatrix_x1(const void *row, void *to) { emulated::ldmatrix(row, to, 1, false); }
inline void ptx_ldmatrix_x2(const void *row, void *to) { emulated::ldmatrix(row, to, 2, false); }
inline void ptx_ldmatrix_x4(const void *row, void *to) { emulated::ldmatrix(row, to, 4, false); }
inline void ptx_ldmatrix_x1_trans(const void *row, void *to) {
  emulated::ldmatrix(row, to, 1, true);
}
inline void ptx_ldmatrix_x2_trans(const void *row, void *to) {
  emulated::ldmatrix(row, to, 2, true);
}
inline void ptx_ldmatrix_x4_trans(const void *row, void *to) {
  emulated::ldmatrix(row, to, 4, true);
}

template <int count, bool transpose, class... Registers>
void stmatrix(const void *row, Registers... values) {
  static_assert(sizeof...(values) == count);
  const uint32_t registers[] = {uint32_t(values)...};
  emulated::stmatrix(row, registers, count, transpose);
}
template <class... R> void ptx_stmatrix_m8n8_x1(const void *row, R... v) {
  stmatrix<1, false>(row, v...);
}
template <class... R> void ptx_stmatrix_m8n8_x2(const void *row, R... v) {
  stmatrix<2, false>(row, v...);
}
template <class... R> void ptx_stmatrix_m8n8_x4(const void *row, R... v) {
  stmatrix<4, false>(row, v...);
}
template <class... R> void ptx_stmatrix_m8n8_x1_trans(const void *row, R... v) {
  stmatrix<1, true>(row, v...);
}
template <class... R> void ptx_stmatrix_m8n8_x2_trans(const void *row, R... v) {
  stmatrix<2, true>(row, v...);
}
template <class... R> void ptx_stmatrix_m8n8_x4_trans(const void *row, R... v) {
  stmatrix<4, true>(row, v...);
}

template <DataType A, DataType B, DataType C, int m, int n, int k, bool transpose_a,
          bool transpose_b, SM80::MMA::SparseSel selector = SM80::MMA::SparseSel::Zero>
void mma_sp_sync(float *d, const uint32_t *a, const uint32_t *b, const uint32_t *metadata) {
  static_assert(m == 16 && n == 8 && k == 32 && !transpose_a && transpose_b);
  emulated::mma_sp({element_of<A, B, C>(), int(selector), d, a, b, *metadata});
}

struct GmmaDescriptor {
  uint64_t bits = 0;
  // Only the lower half is added to, as the hardware's code does it.
  GmmaDescriptor operator+(uint32_t offset) const {
    return {(bits & ~uint64_t(0xFFFFFFFF)) | uint32_t(uint32_t(bits) + offset)};
  }
  operator uint64_t() const { return bits; }
};

template <int layout, int leading, int stride, class T>
void initialize_wgmma_descriptor(GmmaDescriptor &descriptor, T *start) {
  descriptor.bits = uint64_t((emulated::shared_address(start) >> 4) & 0x3FFF) |
                    uint64_t(leading & 0x3FFF) << 16 | uint64_t(stride & 0x3FFF) << 32 |
                    uint64_t(layout) << 62;
}
template <class T> void increase_descriptor_offset(GmmaDescriptor &descriptor, T offset) {
  descriptor = descriptor + uint32_t(offset >> 4);
}

template <DataType A, DataType B, DataType C, int m, int n, int k, bool transpose_a,
          bool transpose_b, int scale_a = 1, int scale_b = 1,
          cute::SM90::GMMA::SparseSel selector = cute::SM90::GMMA::SparseSel::Zero>
void wgmma_sp_ss(uint64_t a, uint64_t b, uint32_t *d, bool accumulate, uint32_t metadata) {
  static_assert(m == 64 && n % 8 == 0 && n >= 8 && n <= 256 && k == 32);
  emulated::wgmma_sp({element_of<A, B, C>(), n, int(selector), transpose_a, transpose_b, scale_a,
                      scale_b, accumulate, reinterpret_cast<float *>(d), nullptr, a, b, metadata});
}
template <DataType A, DataType B, DataType C, int m, int n, int k, bool transpose_a,
          bool transpose_b, int scale_a = 1, int scale_b = 1,
          cute::SM90::GMMA::SparseSel selector = cute::SM90::GMMA::SparseSel::Zero>
void wgmma_sp_rs(const uint32_t *a, uint64_t b, uint32_t *d, bool accumulate, uint32_t metadata) {
  static_assert(m == 64 && n % 8 == 0 && n >= 8 && n <= 256 && k == 32 && !transpose_a);
  emulated::wgmma_sp({element_of<A, B, C>(), n, int(selector), transpose_a, transpose_b, scale_a,
                      scale_b, accumulate, reinterpret_cast<float *>(d), a, 0, b, metadata});
}
inline void warpgroup_arrive() { emulated::wgmma_fence(); }
inline void warpgroup_commit_batch() { emulated::wgmma_commit(); }
template <int groups> void warpgroup_wait() { emulated::wgmma_wait(groups); }
template <int groups> void wait_wgmma() { emulated::wgmma_wait(groups); }
// These hold a real compiler back from moving registers, and change nothing.
template <class T> void warpgroup_fence_operand(T *, int) {}
template <unsigned count> void warpgroup_reg_alloc() {}
template <unsigned count> void warpgroup_reg_dealloc() {}

}  // namespace tl

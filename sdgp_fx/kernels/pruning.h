// Pruning on a CPU: what reference.py does, to the last bit. The first part of prune.cpp and of
// sparse/pruned_input_grad.cpp.
//
// A group is m vectors, one for each channel, of LANES positions side by side: all groups of a vector
// are pruned at once. Memory in which channels are adjacent is transposed on the way in and out.

#include <omp.h>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

// Vectors of the compiler, as wide as the machine has them.

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int LANES = 8, REGISTERS = 16;
#elif defined(__ARM_NEON)
constexpr int LANES = 4, REGISTERS = 32;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint64_t Longs __attribute__((vector_size(LANES * 8)));
typedef double Doubles __attribute__((vector_size(LANES * 8)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

// A distinct type, since uint16_t would be a number.
struct BFloat16 {
  uint16_t bits;
};

inline Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline Floats load(const BFloat16* from) {
  Halves x;
  std::memcpy(&x, from, sizeof x);
  return (Floats)(__builtin_convertvector(x, Words) << 16);
}

inline float number(float x) { return x; }

inline float number(BFloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

template <typename V>
inline void store(float* to, V x) {
  std::memcpy(to, &x, sizeof x);
}

// Numbers that bfloat16 has.
inline void store(BFloat16* to, Floats x) {
  Halves halves = __builtin_convertvector((Words)x >> 16, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

inline void set(float* to, float x) { *to = x; }

inline void set(BFloat16* to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  to->bits = bits >> 16;
}

inline Floats absolute(Floats x) { return (Floats)((Ints)x & 0x7FFFFFFF); }

inline Ints is_finite(Floats x) { return ((Ints)x & 0x7FFFFFFF) < 0x7F800000; }

// The nearest number with 8 bits, ties to even, as float.
inline Floats round_to_bfloat16(Floats x) {
  Words bits = (Words)x;
  Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000;
  Ints is_nan = ((Ints)x & 0x7FFFFFFF) > 0x7F800000;
  return (Floats)(is_nan ? (Ints)((bits | 0x400000) & 0xFFFF0000) : (Ints)rounded);
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// Transpose LANES vectors.
#if defined(__AVX2__) && !defined(__AVX512F__)

// Within the halves of vectors as long as that will do: what crosses them takes longer.
inline void transpose(Floats* x) {
  Floats y[LANES];
#pragma GCC unroll 4
  for (int i = 0; i < LANES; i += 2) {
    y[i] = SHUFFLE(x[i], x[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    y[i + 1] = SHUFFLE(x[i], x[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 4
  for (int i = 0; i < LANES / 2; i++) {
    int from = i / 2;
    Floats low, high;
    if (i % 2 == 0) {
      low = SHUFFLE(y[from], y[from + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      high = SHUFFLE(y[from + 4], y[from + 6], 0, 1, 8, 9, 4, 5, 12, 13);
    } else {
      low = SHUFFLE(y[from], y[from + 2], 2, 3, 10, 11, 6, 7, 14, 15);
      high = SHUFFLE(y[from + 4], y[from + 6], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    x[i] = SHUFFLE(low, high, 0, 1, 2, 3, 8, 9, 10, 11);
    x[i + LANES / 2] = SHUFFLE(low, high, 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

#else

inline Floats interleave_low(Floats a, Floats b) {
#if defined(__AVX512F__)
  return SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#else
  return SHUFFLE(a, b, 0, 4, 1, 5);
#endif
}

inline Floats interleave_high(Floats a, Floats b) {
#if defined(__AVX512F__)
  return SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
  return SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

// Every step rotates the bits of (vector, lane) by one.
inline void transpose(Floats* x) {
#pragma GCC unroll 4
  for (int step = 1; step < LANES; step *= 2) {
    Floats y[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) {
      y[2 * i] = interleave_low(x[i], x[i + LANES / 2]);
      y[2 * i + 1] = interleave_high(x[i], x[i + LANES / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) x[i] = y[i];
  }
}

#endif

inline Floats even(Floats a, Floats b) {
#if defined(__AVX512F__)
  return SHUFFLE(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30);
#elif defined(__AVX2__)
  return SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14);
#else
  return SHUFFLE(a, b, 0, 2, 4, 6);
#endif
}

inline Floats odd(Floats a, Floats b) {
#if defined(__AVX512F__)
  return SHUFFLE(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
#elif defined(__AVX2__)
  return SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
#else
  return SHUFFLE(a, b, 1, 3, 5, 7);
#endif
}

// Transpose blocks of four by four, of four vectors. Twice is nothing.
inline void transpose_fours(Floats* x) {
  for (int step = 0; step < 2; step++) {
    Floats y[] = {even(x[0], x[1]), even(x[2], x[3]), odd(x[0], x[1]), odd(x[2], x[3])};
    std::copy(y, y + 4, x);
  }
}

// The gradient: the struct of cpp_prune.py, field by field. Sizes of space have three dimensions, of
// which leading ones are 1.

enum Function { RANDOM, MAGNITUDE, RESCALED_MAGNITUDE, MVUE };
enum Scope { GROUP, FEATURE_MAP, CHANNEL };

struct Gradient {
  const void* grad_output;
  void* result;
  int64_t is_bfloat16, threads;
  int64_t seed, n, m, function, scope;
  int64_t samples, channels, output_size[3];
  int64_t grad_strides[5];    // sample, channel, space
  int64_t result_strides[5];  // sample, channel, space

  int64_t space() const { return output_size[0] * output_size[1] * output_size[2]; }

  float largest() const { return is_bfloat16 ? 0x1.FEp127f : 0x1.FFFFFEp127f; }

  bool is_by_group() const { return function == RESCALED_MAGNITUDE && scope == GROUP; }

  bool is_by_wider_scope() const { return function == RESCALED_MAGNITUDE && scope != GROUP; }
};

constexpr int MAX_M = 32;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A position of some samples with so much space.
struct Position {
  int64_t sample, at[3];

  Position(int64_t index, const int64_t* size) {
    for (int d = 2; d >= 0; d--) {
      // Most often there is nothing to divide, which takes longer than to look.
      int64_t quotient = index < size[d] ? 0 : size[d] == 1 ? index : index / size[d];
      at[d] = index - quotient * size[d];
      index = quotient;
    }
    sample = index;
  }

  void advance(const int64_t* size) {
    for (int d = 2; d >= 0; d--) {
      if (++at[d] < size[d]) return;
      at[d] = 0;
    }
    sample++;
  }
};

// Reading and writing.

// LANES positions, one after the other in the order of samples and space, of which count exist.
struct Tile {
  const Gradient& p;
  int64_t offset[LANES];  // In memory.
  int64_t sample[LANES];
  int64_t first;  // Of all positions of the batch.
  int count;
  bool adjacent;

  Tile(const Gradient& p, const int64_t* strides, int64_t first, int64_t end)
      : p(p), first(first), count(std::min<int64_t>(LANES, end - first)) {
    Position position(first, p.output_size);
    if (position.at[2] + LANES <= p.output_size[2]) {
      int64_t begin = position.sample * strides[0];
      for (int d = 0; d < 3; d++) begin += position.at[d] * strides[2 + d];
      for (int lane = 0; lane < LANES; lane++) {
        sample[lane] = position.sample;
        offset[lane] = begin + lane * strides[4];
      }
      adjacent = strides[4] == 1;
      return;
    }
    adjacent = true;
    for (int lane = 0; lane < LANES; lane++) {
      bool exists = lane < count;
      sample[lane] = exists ? position.sample : sample[0];
      offset[lane] = position.sample * strides[0];
      for (int d = 0; d < 3; d++) offset[lane] += position.at[d] * strides[2 + d];
      offset[lane] = exists ? offset[lane] : offset[0];
      adjacent &= offset[lane] == offset[0] + lane;
      position.advance(p.output_size);
    }
  }

  // Read channels of the gradient, for each a vector of positions.
  void read(int64_t channel, int64_t count, Floats* x) const {
    if (p.is_bfloat16) read_from(static_cast<const BFloat16*>(p.grad_output), channel, count, x);
    else read_from(static_cast<const float*>(p.grad_output), channel, count, x);
  }

  // Write channels of the result.
  void write(int64_t channel, int64_t count, Floats* x) const {
    if (p.is_bfloat16) write_to(static_cast<BFloat16*>(p.result), channel, count, x);
    else write_to(static_cast<float*>(p.result), channel, count, x);
  }

 private:
  template <typename T>
  __attribute__((noinline)) void read_from(const T* grad, int64_t channel, int64_t count, Floats* x) const {
    int64_t stride = p.grad_strides[1], c = 0;
    int64_t next = (offset[1] - offset[0]) * LANES;  // Most often, the tile after this one.
    grad += channel * stride;
    if (adjacent) {
      for (; c < count; c++) {
        __builtin_prefetch(grad + offset[0] + c * stride + next);
        x[c] = load(grad + offset[0] + c * stride);
      }
    } else if (stride == 1) {
      for (; c + LANES <= count; c += LANES) {
#pragma GCC unroll 16
        for (int lane = 0; lane < LANES; lane++) {
          __builtin_prefetch(grad + offset[lane] + c + next);
          x[c + lane] = load(grad + offset[lane] + c);
        }
        transpose(x + c);
      }
    }
    for (; c < count; c++) {
      for (int lane = 0; lane < LANES; lane++) x[c][lane] = number(grad[offset[lane] + c * stride]);
    }
  }

  template <typename T>
  __attribute__((noinline)) void write_to(T* result, int64_t channel, int64_t channels, Floats* x) const {
    int64_t stride = p.result_strides[1], c = 0;
    result += channel * stride;
    if (adjacent && count == LANES) {
      for (; c < channels; c++) store(result + offset[0] + c * stride, x[c]);
    } else if (stride == 1) {
      for (; c + LANES <= channels; c += LANES) {
        transpose(x + c);
        for (int lane = 0; lane < count; lane++) store(result + offset[lane] + c, x[c + lane]);
      }
    }
    for (; c < channels; c++) {
      for (int lane = 0; lane < count; lane++) set(result + offset[lane] + c * stride, x[c][lane]);
    }
  }
};

// Pruning: what reference.py does, to the last bit.

// What is larger is kept first: |x|, then infinity, and then NaN, all of them alike.
inline Ints magnitude_key(Floats x) {
  Ints bits = (Ints)x & 0x7FFFFFFF, nan = Ints{} + 0x7F800001;
  return bits < nan ? bits : nan;
}

// Four words of 32 random bits for each index, by Philox 4x32-10.
inline void philox(int64_t seed, const Longs& index, uint32_t block, Words* word) {
  auto narrow = [](Longs x) { return __builtin_convertvector(x, Words); };
  uint32_t key[2] = {uint32_t(seed), uint32_t(uint64_t(seed) >> 32)};
  word[0] = narrow(index), word[1] = narrow(index >> 32);
  word[2] = Words{} + block, word[3] = Words{};
  for (int round = 0; round < 10; round++) {
    Longs a = __builtin_convertvector(word[0], Longs) * 0xD2511F53u;
    Longs b = __builtin_convertvector(word[2], Longs) * 0xCD9E8D57u;
    Words next[4] = {narrow(b >> 32) ^ word[1] ^ key[0], narrow(b),
                     narrow(a >> 32) ^ word[3] ^ key[1], narrow(a)};
    std::copy(next, next + 4, word);
    key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
  }
}

// Make values unbiased, and keys that keep what has a value; see mvue of reference.py.
template <int M>
inline void mvue(int n, float largest, Words random, Floats* value, Ints* key) {
  Floats size[M], rest{}, all = Floats{} + float(n), room = all;
  Ints certain[M] = {};
  for (int i = 0; i < M; i++) size[i] = absolute(value[i]);
  rest = size[0];
  for (int i = 1; i < M; i++) rest += size[i];
  Ints finite = is_finite(rest);
  for (int round = 0; round < n; round++) {
    for (int i = 0; i < M; i++) certain[i] |= (size[i] > 0) & (room * size[i] >= rest);
    Floats left = all, sum{};
    for (int i = 0; i < M; i++) {
      left -= certain[i] ? Floats{} + 1 : Floats{};
      sum += certain[i] ? Floats{} : size[i];
    }
    room = left, rest = sum;
  }
  Floats density = room / (rest == 0 ? Floats{} + 1 : rest), prefix{};
  Floats step = rest / room, most = Floats{} + largest;
  step = step > most ? most : step;
  Ints uniform = (Ints)(random >> 8), before = -uniform >> 24;
  for (int i = 0; i < M; i++) {
    prefix += certain[i] ? Floats{} : size[i];
    Floats share = prefix * density;
    share = share < room ? share : room;
    share = prefix == rest ? room : share;
    share = finite & (rest != 0) ? share : Floats{};
    Ints passed = (__builtin_convertvector(share * 16777216.0f, Ints) - uniform) >> 24;
    Ints sampled = passed > before;
    before = passed;
    Ints sign = (Ints)value[i] & INT32_MIN;
    Floats unbiased = certain[i] ? value[i] : (Floats)(((Ints)step | sign) & sampled);
    key[i] = finite ? -(certain[i] | sampled) : magnitude_key(value[i]);
    value[i] = finite ? unbiased : value[i];
  }
}

// Draw keys, and for MVUE new values, for a group of LANES positions, whose numbers are first,
// first + step, ... Apart, since it needs the registers that the other functions do without.
template <int M>
__attribute__((noinline)) void draw(const Gradient& p, int64_t first, int64_t step, Floats* x,
                                    Ints* key) {
  Longs index;
  for (int lane = 0; lane < LANES; lane++) index[lane] = first + lane * step;
  Words word[4];
  if (p.function == MVUE) {
    philox(p.seed, index, 0, word);
    mvue<M>(p.n, p.largest(), word[0], x, key);
    return;
  }
  for (int i = 0; i < M; i++) {
    if (i % 4 == 0) philox(p.seed, index, i / 4, word);
    key[i] = (Ints)(word[i % 4] >> 6);
  }
}

// What is finite stays finite: the largest number of the gradient's dtype is the most.
inline Floats clamp(Floats x, Floats most) {
  x = x > most ? most : x;
  return x < -most ? -most : x;
}

// The factor of a group whose |x| add up to total, and whose kept |x| to kept.
struct Factor {
  Floats factor, most;

  Factor(Floats total, Floats kept, float largest) {
    factor = total / kept;
    // If it is finite, all values are.
    most = is_finite(factor) ? Floats{} + largest : Floats{} + __builtin_inff();
    factor = is_finite(factor) ? factor : Floats{} + 1;
  }

  Floats operator()(Floats value) const { return clamp(value * factor, most); }
};

// Groups of up to so many are searched by a tree, which takes registers.
constexpr int BY_TREE = REGISTERS == 32 ? 32 : 8;

// A pruning function, for groups of M channels of which N are kept; any number if 0.
template <int M, int N>
struct Pruning {
  const Gradient& p;
  int64_t groups;        // Of a position.
  const float* factors;  // Of the wider scopes, (samples, channels).

  int n() const { return N ? N : p.n; }

  // Find the n largest keys, of equal ones the first, each with its value and place. They are
  // marked by making them -1; the last one only if all marks are wanted.
  template <typename Keep>
  void choose(const Floats* value, Ints* key, Ints place, int width, bool mark, Keep keep) const {
    for (int k = 0; k < n(); k++) {
      Ints found;
      Floats kept;
      if constexpr (M <= BY_TREE) {
        // The largest, and then the first that is as large: little waits for what is before it.
        Ints most[M];
#pragma GCC unroll 32
        for (int i = 0; i < M; i++) most[i] = key[i];
#pragma GCC unroll 8
        for (int step = 1; step < M; step *= 2) {
#pragma GCC unroll 32
          for (int i = 0; i + step < M; i += 2 * step) {
            most[i] = most[i] > most[i + step] ? most[i] : most[i + step];
          }
        }
        Ints at = place + (M - 1) * width;
        found = at, kept = value[M - 1];
#pragma GCC unroll 32
        for (int i = M - 2; i >= 0; i--) {
          Ints is_largest = key[i] == most[0];
          at -= width;
          kept = is_largest ? value[i] : kept;
          found = is_largest ? at : found;
        }
      } else {
        Ints largest = key[0], at = place;
        found = place, kept = value[0];
        for (int i = 1; i < M; i++) {
          Ints larger = key[i] > largest;
          at += width;
          largest = larger ? key[i] : largest;
          kept = larger ? value[i] : kept;
          found = larger ? at : found;
        }
      }
      keep(k, kept, found);
      if (k + 1 == n() && !mark) return;
      Ints at = place;
      for (int i = 0; i < M; i++, at += width) key[i] |= found == at;  // -1, below every key.
    }
  }

  // Keys of a group, and for MVUE other values.
  void make_keys(const Tile& tile, int64_t channel, Floats* x, Ints* key) const {
    if (p.function == RANDOM || p.function == MVUE) {
      draw<M>(p, tile.first * groups + channel / M, groups, x, key);
    } else {
      for (int i = 0; i < M; i++) key[i] = magnitude_key(x[i]);
    }
  }

  Factor factor(Floats total, Floats kept) const { return Factor(total, kept, p.largest()); }

  // Scale a value by the factor of a wider scope.
  Floats scaled(Floats value, Floats factor) const {
    Floats scaled = value * factor;
    return is_finite(value) ? clamp(scaled, Floats{} + p.largest()) : scaled;
  }

  // Add up |x| and the kept |x| of a group, in lanes.
  void add(const Floats* x, Doubles* total, Doubles* kept) const {
    Ints key[M];
    for (int i = 0; i < M; i++) key[i] = magnitude_key(x[i]);
    choose(x, key, Ints{}, 1, true, [](int, Floats, Ints) {});
    for (int i = 0; i < M; i++) {
      Ints size = (Ints)absolute(x[i]);
      total[i] += __builtin_convertvector((Floats)size, Doubles);
      kept[i] += __builtin_convertvector((Floats)(size & key[i] >> 31), Doubles);
    }
  }
};

constexpr int64_t STEP = 32;  // Channels that are read at once: a multiple of every m and LANES.

// Sum |x| and the kept |x| of some channels over the space of a sample: sums (channels, 2).
template <int M, int N>
void sum_sample(const Gradient& p, int64_t sample, int64_t channel, double* sums) {
  Pruning<M, N> pruning{p, p.channels / M, nullptr};
  int64_t count = std::min(STEP, p.channels - channel), end = (sample + 1) * p.space();
  Floats x[STEP];
  Doubles total[STEP] = {}, kept[STEP] = {};
  for (int64_t first = sample * p.space(); first < end; first += LANES) {
    Tile(p, p.grad_strides, first, end).read(channel, count, x);
    for (int64_t lane = end - first; lane < LANES; lane++) {
      for (int64_t c = 0; c < count; c++) x[c][lane] = 0;
    }
    for (int64_t c = 0; c < count; c += M) pruning.add(x + c, total + c, kept + c);
  }
  for (int64_t c = 0; c < count; c++) {
    sums[2 * c] = sums[2 * c + 1] = 0;
    for (int lane = 0; lane < LANES; lane++) {
      sums[2 * c] += total[c][lane];
      sums[2 * c + 1] += kept[c][lane];
    }
  }
}

inline float quotient(double total, double kept) {
  float factor = float(total) / float(kept);
  uint32_t bits;
  std::memcpy(&bits, &factor, sizeof bits);
  return (bits & 0x7F800000) < 0x7F800000 ? factor : 1.0f;
}

// Turn the sums of each sample into factors (samples, channels).
void find_factors(const Gradient& p, const double* sums, float* factors) {
#pragma omp for schedule(static)
  for (int64_t c = 0; c < p.channels; c++) {
    double total = 0, kept = 0;
    for (int64_t b = 0; b < p.samples; b++) {
      const double* of_sample = sums + (b * p.channels + c) * 2;
      total += of_sample[0], kept += of_sample[1];
      factors[b * p.channels + c] = quotient(of_sample[0], of_sample[1]);
    }
    if (p.scope == CHANNEL) {
      float factor = quotient(total, kept);
      for (int64_t b = 0; b < p.samples; b++) factors[b * p.channels + c] = factor;
    }
  }
}

}  // namespace

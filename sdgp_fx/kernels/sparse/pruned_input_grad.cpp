// The input gradient of a layer from its output gradient, pruned n:m: prune, pack and multiply.
//
// For one position of the result, acc[ci] += value * weight[tap][co][ci] for the kept co alone: a
// broadcast, and a multiply-add with a memory operand for every vector of input channels.
//
//   gradient   packed position by position: n slots for each group of m channels, whose values come
//              first, and then their places: where their weights lie in a slab.
//   weight     packed in slabs of one tap, out_block output channels and one block of input
//              channels, which lie in the first-level cache while a block of positions uses them.
//   result     a block of positions and a block of input channels at a time, summed in float32.
//              One thread sums a value, in an order that depends on the layer's shape and the
//              gradient's layout alone, so that the bits are the same for any number of threads.
//
// The threads' parts are the same in every call, and where there are enough samples, a thread packs
// those that it multiplies. What one core has written takes long to read by another one, most of
// all by one that does not share its last-level cache.
//
// Where the machine multiplies bfloat16 by pairs, and two of four are kept, the two are one slot, of
// the same size, and a slab has a row for each pair of a group's four channels, six in all.
//
// What the pruning keeps is multiplied, zeros among it; what it drops, and padding, is skipped.
// Positions beyond the last, in the last tile, repeat the first of it, and are not read. Nor are
// slots beyond the last of a position.

// The second part of a file: the first is pruning.h, in the folder above.

#include <unistd.h>

namespace {

// SDGP_EMULATE_PAIRS is for tests: what a machine with AVX512-BF16 does, on any.
#if defined(__AVX512BF16__) || defined(SDGP_EMULATE_PAIRS)
constexpr bool HAS_PAIRS = true;
#else
constexpr bool HAS_PAIRS = false;
#endif

// Compilers may or may not make one instruction of it, and results must not depend on that.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__) && defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_NEON)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// Add the products of two pairs of bfloat16. The portable definition is Intel's of vdpbf16ps: two
// multiply-adds, each of which rounds, the upper halves first, and subnormal numbers are zeros.
inline Floats multiply_add_pairs(Words a, Words b, Floats c) {
#if defined(__AVX512BF16__) && !defined(SDGP_EMULATE_PAIRS)
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#else
  auto flush = [](Words x) { return (Floats)((x & 0x7F800000) == 0 ? x & 0x80000000 : x); };
  c = multiply_add(flush(a & 0xFFFF0000), flush(b & 0xFFFF0000), flush((Words)c));
  c = multiply_add(flush(a << 16), flush(b << 16), flush((Words)c));
  return flush((Words)c);
#endif
}

// Four values for every four lanes, of which spread makes each a vector of its own: fewer loads than
// one for each value.
inline Floats load_four(const float* from) {
#if defined(__AVX512F__)
  return _mm512_broadcast_f32x4(_mm_loadu_ps(from));
#elif defined(__AVX2__)
  return _mm256_broadcast_ps((const __m128*)from);
#else
  return load(from);
#endif
}

template <int K>
inline Floats spread(Floats four) {
#if defined(__AVX512F__)
  return _mm512_permute_ps(four, K * 0x55);
#elif defined(__AVX2__)
  return _mm256_permute_ps(four, K * 0x55);
#else
  return SHUFFLE(four, four, K, K, K, K);
#endif
}

// The problem: the struct of cpu.py, field by field. The result is the input gradient; out_channels and
// in_channels are those of one group of the convolution.

struct Problem : Gradient {
  const void* weight;
  int64_t groups, out_channels, in_channels, input_size[3];
  int64_t kernel[3], stride[3], padding[3], dilation[3], transposed;
  int64_t weight_strides[6];  // group, output channel, input channel, kernel
};

constexpr int BLOCK = 256;                // Positions of the result.
constexpr int64_t CHUNK_BYTES = 1 << 19;  // Of packed gradient, for each thread.
constexpr int AHEAD = 4;                  // Positions, whose slots are fetched before they are read.
constexpr int MAX_VECTORS = 8;            // Of a row of a slab.
static_assert(MAX_M / 4 * 6 * MAX_VECTORS * LANES * 4 < 1 << 16, "places have 16 bits");

// Two thirds of the first-level cache, where its size is known.
int64_t slab_bytes() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  static const int64_t cache = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#else
  constexpr int64_t cache = 0;
#endif
  return std::min<int64_t>(cache > 0 ? cache * 2 / 3 : 1 << 14, 1 << 15);
}

// Two channels of four, a and b above it, are pair number b * (b - 1) / 2 + a.
constexpr int PAIRS[6][2] = {{0, 1}, {0, 2}, {1, 2}, {0, 3}, {1, 3}, {2, 3}};

// Numbers that follow from a problem's shapes, and where things are in the workspace.
struct Plan {
  bool in_pairs;                       // Whether two values that are kept share a slot.
  int64_t group_slots, group_rows;     // Of m channels: slots, and rows of a slab.
  int64_t slots, position_floats;      // Of a position, in whole vectors; with their places.
  int64_t vectors, width, in_blocks;   // Of a row of a slab; floats of it; rows for each channel.
  int64_t out_block, taps, rows;       // Output channels of a slab; rows for each tap.
  bool splits_samples;                 // Whether each thread has samples of its own.
  int64_t chunk_samples, chunk_floats;  // A chunk of samples is packed at once.
  int64_t packed, sums, factors, accumulators, slabs, bytes;  // Offsets in bytes; all of it.

  Plan(const Problem& p) {
    in_pairs = HAS_PAIRS && p.is_bfloat16 && p.n == 2 && p.m == 4;
    group_slots = in_pairs ? 1 : p.n;
    group_rows = in_pairs ? 6 : p.m;
    slots = ceil_div(p.channels / p.m * group_slots, LANES) * LANES;
    position_floats = slots + slots / 2;
    rows = p.out_channels / p.m * group_rows;
    taps = p.kernel[0] * p.kernel[1] * p.kernel[2];

    // The fewest loads and stores: for each slot its place, its value and a row of weights, which
    // is padded; for each slab the sums, which come and go.
    int64_t needed = ceil_div(p.in_channels, LANES);
    double fewest = 1e300;
    for (int64_t v = 1; v <= MAX_VECTORS; v++) {
      int64_t row_bytes = v * LANES * 4, most_bytes = MAX_M / p.m * group_rows * row_bytes;
      int64_t outputs = std::max<int64_t>(slab_bytes() / most_bytes, 1) * MAX_M;
      double filled = double(std::min(outputs, p.out_channels) / p.m * group_slots);
      double moved = ceil_div(needed, v) * (v + 0.5 + (2 * v + 4) / filled);
      if (moved <= fewest) fewest = moved, vectors = v, out_block = outputs;
    }
    width = vectors * LANES;
    in_blocks = ceil_div(needed, vectors);

    // As many for each thread, with enough positions to make blocks, and not too much memory.
    int64_t sample_bytes = position_floats * 4 * p.space(), most = ceil_div(p.samples, p.threads);
    splits_samples = most * p.threads * 8 <= p.samples * 9 && most * p.space() >= 2 * BLOCK &&
                     sample_bytes <= CHUNK_BYTES;
    int64_t sharing = splits_samples ? 1 : p.threads;
    chunk_samples = std::clamp<int64_t>(CHUNK_BYTES * sharing / sample_bytes, 1,
                                        splits_samples ? most : p.samples);
    chunk_floats = ceil_div(chunk_samples * p.space(), LANES) * LANES * position_floats;

    bool wide = p.is_by_wider_scope();
    bytes = 0;
    auto take = [this](int64_t size) {
      int64_t begin = bytes;
      bytes += ceil_div(size, 64) * 64;
      return begin;
    };
    packed = take(p.threads / sharing * chunk_floats * 4);
    slabs = take(p.groups * in_blocks * taps * rows * width * 4);
    accumulators = take(p.threads * BLOCK * width * 4);
    sums = take(wide ? p.samples * p.channels * 16 : 0);
    factors = take(wide ? p.samples * p.channels * 4 : 0);
  }
};

// Slots of a tile: for each a vector of positions.
struct Slots {
  Floats value[LANES + STEP];
  Floats place[LANES + STEP];  // Bytes from the beginning of the slab, as integers.
};

// A pruning function that packs what it keeps in slots.
template <int M, int N>
struct Packing : Pruning<M, N> {
  using Base = Pruning<M, N>;
  using Base::n, Base::p;

  // Fill the n slots of a group from this one on. If it is rescaled, add up |x| and the kept |x|.
  void pack(Floats* x, const Tile& tile, int64_t channel, Ints place, int row_bytes, int64_t slot,
            Slots& slots, Floats& total, Floats& kept) const {
    Ints key[M];
    this->make_keys(tile, channel, x, key);
    // The sum of two does not depend on their order.
    bool mark = p.is_by_group() && n() > 2;
    this->choose(x, key, place, row_bytes, mark, [&](int k, Floats value, Ints found) {
      slots.value[slot + k] = value;
      slots.place[slot + k] = (Floats)found;
    });
    if (!p.is_by_group()) return;
    total = absolute(x[0]), kept = Floats{};
    for (int i = 1; i < M; i++) total += absolute(x[i]);
    if (mark) {
      for (int i = 0; i < M; i++) kept += (Floats)((Ints)absolute(x[i]) & key[i] >> 31);
    } else {
      for (int k = 0; k < n(); k++) kept += absolute(slots.value[slot + k]);
    }
  }

  bool is_finished() const {
    return p.function == RANDOM || p.function == MAGNITUDE || (p.function == MVUE && !p.is_bfloat16);
  }

  // Rescale and round what fills the slots of a group.
  void finish(const Tile& tile, int64_t channel, Ints place, int row_bytes, int64_t slot,
              Slots& slots, Floats total, Floats kept) const {
    Floats* value = slots.value + slot;
    if (p.is_by_group()) {
      Factor factor = this->factor(total, kept);
      for (int k = 0; k < n(); k++) value[k] = factor(value[k]);
    } else if (p.is_by_wider_scope()) {
      for (int k = 0; k < n(); k++) {
        Ints found = ((Ints)slots.place[slot + k] - place) / row_bytes;
        Floats factor;
        for (int lane = 0; lane < LANES; lane++) {
          factor[lane] = this->factors[tile.sample[lane] * p.channels + channel + found[lane]];
        }
        value[k] = this->scaled(value[k], factor);
      }
    }
    if (p.is_bfloat16) {
      for (int k = 0; k < n(); k++) value[k] = round_to_bfloat16(value[k]);
    }
  }
};

// Make one slot of the two of four channels, whose places are their numbers; the one's is that of
// the pair's row.
inline void join(const Slots& two, int64_t from, Ints place, int row_bytes, int64_t to, Slots& one) {
  Words value[2] = {(Words)two.value[from], (Words)two.value[from + 1]};
  Ints at[2] = {(Ints)two.place[from] - place, (Ints)two.place[from + 1] - place};
  Ints is_first_upper = at[0] > at[1];
  Ints lower = is_first_upper ? at[1] : at[0], upper = is_first_upper ? at[0] : at[1];
  Words of_lower = is_first_upper ? value[1] : value[0];
  Words of_upper = is_first_upper ? value[0] : value[1];
  one.value[to] = (Floats)(of_upper | of_lower >> 16);
  one.place[to] = (Floats)(((upper * (upper - 1) >> 1) + lower) * row_bytes + place);
}

// Write LANES slots, from this one on, to a tile's positions.
__attribute__((noinline)) void write_slots(const Plan& plan, Floats* value, Floats* place,
                                           int64_t slot, float* packed) {
  transpose(value);
  transpose(place);
  for (int lane = 0; lane < LANES; lane++) {
    float* position = packed + lane * plan.position_floats;
    store(position + slot, value[lane]);
    Halves halves = __builtin_convertvector((Words)place[lane], Halves);
    std::memcpy(position + plan.slots + slot / 2, &halves, sizeof halves);
  }
}

// Prune and pack a tile.
template <int M, int N>
void pack_tile(const Problem& p, const Plan& plan, const float* factors, int64_t first,
               int64_t end, float* packed) {
  Packing<M, N> pruning{p, p.channels / M, factors};
  Tile tile(p, p.grad_strides, first, end);
  Floats x[STEP], total[STEP / M], kept[STEP / M];
  Ints place[STEP / M];
  int64_t of_group = 0, of_slab = 0;  // Channels before this one.
  constexpr bool MAY_PAIR = HAS_PAIRS && M == 4 && N == 2;
  bool in_pairs = MAY_PAIR && plan.in_pairs;
  Slots slots = {}, single;
  Slots& to = in_pairs ? single : slots;
  int row_bytes = plan.width * 4, step_bytes = in_pairs ? 1 : row_bytes;
  int64_t written = 0, waiting = 0;  // Slots.
  auto write = [&](int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
      write_slots(plan, slots.value + i, slots.place + i, written + i, packed);
    }
    written += count;
  };
  for (int64_t begin = 0; begin < p.channels; begin += STEP) {
    int64_t count = std::min(STEP, p.channels - begin) / M;
    int64_t first_slot = in_pairs ? 0 : waiting;
    tile.read(begin, count * M, x);
    // One step for all groups after the other, since a step has to wait for the one before.
    for (int64_t i = 0; i < count; i++) {
      place[i] = Ints{} + int(of_slab / M * plan.group_rows * row_bytes);
      pruning.pack(x + i * M, tile, begin + i * M, place[i], step_bytes,
                   first_slot + i * pruning.n(), to, total[i], kept[i]);
      of_group += M, of_slab += M;
      if (of_group == p.out_channels) of_group = of_slab = 0;
      if (of_slab == plan.out_block) of_slab = 0;
    }
    for (int64_t i = 0; i < count && !pruning.is_finished(); i++) {
      pruning.finish(tile, begin + i * M, place[i], step_bytes, first_slot + i * pruning.n(), to,
                     total[i], kept[i]);
    }
    for (int64_t i = 0; i < count && in_pairs; i++) {
      join(single, i * pruning.n(), place[i], row_bytes, waiting + i, slots);
    }
    waiting += count * plan.group_slots;
    int64_t whole = waiting / LANES * LANES;
    write(whole);
    waiting -= whole;
    std::copy_n(slots.value + whole, whole ? waiting : 0, slots.value);
    std::copy_n(slots.place + whole, whole ? waiting : 0, slots.place);
  }
  write(waiting);
}

constexpr int FOURS = 4 * LANES;  // Channels of four vectors.

// Put groups that transpose_fours has made of FOURS channels in order.
inline Floats in_order(Floats x) {
#if defined(__AVX512F__)
  return SHUFFLE(x, x, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
#elif defined(__AVX2__)
  return SHUFFLE(x, x, 0, 4, 1, 5, 2, 6, 3, 7);
#else
  return x;
#endif
}

// Prune and pack a tile by magnitude, in groups of four adjacent channels. All groups of a vector are
// of one position, so that slots need not be moved to it.
template <int N, typename T>
void pack_fours(const Problem& p, const Plan& plan, int64_t first, int64_t end, float* packed) {
  Packing<4, N> pruning{p, 0, nullptr};
  Tile tile(p, p.grad_strides, first, end);
  const int64_t next = (tile.offset[1] - tile.offset[0]) * LANES;  // Most often, of the next tile.
  const int row_bytes = plan.width * 4, group_bytes = plan.group_rows * row_bytes;
  Ints order;
  for (int lane = 0; lane < LANES; lane++) order[lane] = lane % 4 * (LANES / 4) + lane / 4;
  for (int lane = 0; lane < tile.count; lane++) {
    const T* from = static_cast<const T*>(p.grad_output) + tile.offset[lane];
    float* values = packed + lane * plan.position_floats;
    char* places = reinterpret_cast<char*>(values + plan.slots);
    int64_t channels, of_group = 0, of_slab = 0;
    for (int64_t begin = 0; begin < p.channels; begin += channels, from += channels) {
      // As many as are in one slab.
      channels = std::min({int64_t(FOURS), p.out_channels - of_group, plan.out_block - of_slab});
      const Ints place = (order + int(of_slab / 4)) * group_bytes;
      Floats x[4], total, kept;
      if (channels == FOURS) {
        for (int i = 0; i < 4; i++) {
          __builtin_prefetch(from + next + i * LANES);
          x[i] = load(from + i * LANES);
        }
      } else {
        T some[FOURS] = {};
        std::copy_n(from, channels, some);
        for (int i = 0; i < 4; i++) x[i] = load(some + i * LANES);
      }
      transpose_fours(x);
      Slots slots;
      pruning.pack(x, tile, 0, place, row_bytes, 0, slots, total, kept);
      pruning.finish(tile, 0, place, row_bytes, 0, slots, total, kept);
      const int64_t groups = channels / 4;
      for (int k = 0; k < pruning.n(); k++, values += groups, places += groups * 2) {
        if (channels == FOURS) {
          store(values, slots.value[k]);
          Halves halves = __builtin_convertvector((Words)slots.place[k], Halves);
          std::memcpy(places, &halves, sizeof halves);
        } else {
          Floats value = in_order(slots.value[k]);
          Halves halves = __builtin_convertvector((Words)in_order(slots.place[k]), Halves);
          std::memcpy(values, &value, groups * 4);
          std::memcpy(places, &halves, groups * 2);
        }
      }
      of_group += channels, of_slab += channels;
      if (of_group == p.out_channels) of_group = of_slab = 0;
      if (of_slab == plan.out_block) of_slab = 0;
    }
  }
}

template <typename T>
inline void read_row(const T* from, int64_t stride, int64_t count, float* to) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
  }
  for (; i < count; i++) to[i] = number(from[i * stride]);
}

inline void read_row_of_pairs(const BFloat16* lower, const BFloat16* upper, int64_t stride,
                              int64_t count, float* to) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + LANES <= count; i += LANES) {
      store(to + i, (Words)load(upper + i) | (Words)load(lower + i) >> 16);
    }
  }
  for (; i < count; i++) {
    uint32_t pair = uint32_t(upper[i * stride].bits) << 16 | lower[i * stride].bits;
    std::memcpy(to + i, &pair, sizeof pair);
  }
}

// Slabs, (groups, in_blocks, taps, rows, width): rows of one output channel, or of two.
template <typename T>
void pack_weight(const Problem& p, const Plan& plan, const T* weight, float* slabs) {
#pragma omp for collapse(3) schedule(static) nowait
  for (int64_t group = 0; group < p.groups; group++) {
    for (int64_t block = 0; block < plan.in_blocks; block++) {
      for (int64_t row = 0; row < plan.rows; row++) {
        const int64_t* strides = p.weight_strides;
        const int* pair = PAIRS[row % 6];
        int64_t first = plan.in_pairs ? row / 6 * 4 + pair[0] : row;
        int64_t to_second = plan.in_pairs ? (pair[1] - pair[0]) * strides[1] : 0;
        const T* from = weight + group * strides[0] + first * strides[1] +
                        block * plan.width * strides[2];
        float* to = slabs + ((group * plan.in_blocks + block) * plan.taps * plan.rows + row) *
                                plan.width;
        int64_t count = std::min(plan.width, p.in_channels - block * plan.width);
        for (int64_t a = 0; a < p.kernel[0]; a++) {
          for (int64_t b = 0; b < p.kernel[1]; b++) {
            for (int64_t c = 0; c < p.kernel[2]; c++) {
              const T* tap = from + a * strides[3] + b * strides[4] + c * strides[5];
              if constexpr (HAS_PAIRS && std::is_same_v<T, BFloat16>) {
                if (plan.in_pairs) read_row_of_pairs(tap, tap + to_second, strides[2], count, to);
                else read_row(tap, strides[2], count, to);
              } else {
                read_row(tap, strides[2], count, to);
              }
              // Nobody reads their sums, but subnormal numbers would take time.
              std::fill(to + count, to + plan.width, 0.0f);
              to += plan.rows * plan.width;
            }
          }
        }
      }
    }
  }
}

// The product.

// A position of the result that a tap reaches, and where the gradient's values for it are.
struct Pair {
  const float* slots;
  float* accumulator;
};

// Add one slot's products, with the weights of a place of the slab.
template <int VECTORS, bool IN_PAIRS>
inline void add_products(Floats value, const float* slab, uint16_t place, Floats* sum) {
  const float* row = reinterpret_cast<const float*>(reinterpret_cast<const char*>(slab) + place);
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; v++) {
    Floats weight = load(row + v * LANES);
    if constexpr (IN_PAIRS) sum[v] = multiply_add_pairs((Words)value, (Words)weight, sum[v]);
    else sum[v] = multiply_add(value, weight, sum[v]);
  }
}

// Add what ROWS positions get through one slab, to nothing if it is their first.
template <int VECTORS, int ROWS, bool IN_PAIRS>
inline void multiply(const Plan& plan, const Pair* pairs, int64_t slot, int64_t kept,
                     const float* slab, bool is_first) {
  const float* values[ROWS];
  const char* places[ROWS];
  Floats sum[ROWS][VECTORS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
    values[r] = pairs[r].slots + slot;
    places[r] = reinterpret_cast<const char*>(pairs[r].slots + plan.slots) + slot * 2;
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) {
      sum[r][v] = is_first ? Floats{} : load(pairs[r].accumulator + v * LANES);
    }
  }
  int64_t k = 0;
#pragma GCC unroll 1
  for (; k + 4 <= kept; k += 4) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      Floats four = load_four(values[r] + k);
      uint64_t place;
      std::memcpy(&place, places[r] + k * 2, sizeof place);
      add_products<VECTORS, IN_PAIRS>(spread<0>(four), slab, place, sum[r]);
      add_products<VECTORS, IN_PAIRS>(spread<1>(four), slab, place >> 16, sum[r]);
      add_products<VECTORS, IN_PAIRS>(spread<2>(four), slab, place >> 32, sum[r]);
      add_products<VECTORS, IN_PAIRS>(spread<3>(four), slab, place >> 48, sum[r]);
    }
  }
#pragma GCC unroll 1
  for (; k < kept; k++) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      uint16_t place;
      std::memcpy(&place, places[r] + k * 2, sizeof place);
      // Minus zero: that changes no number, so that compilers make a load of it.
      add_products<VECTORS, IN_PAIRS>(values[r][k] - Floats{}, slab, place, sum[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) store(pairs[r].accumulator + v * LANES, sum[r][v]);
  }
}

template <int VECTORS, bool IN_PAIRS>
void multiply_all(const Plan& plan, const Pair* pairs, int count, int64_t slot, int64_t kept,
                  const float* slab, int64_t slab_floats, bool is_first) {
  // As many as registers hold, and no more than hide how long a multiply-add takes.
  constexpr int ROWS = std::clamp((REGISTERS == 32 ? 16 : 12) / VECTORS, 1, 4);
  // The next slab follows in memory. Fetch it on the way, a part with every step.
  const float* next = slab + slab_floats;
  int64_t part = ceil_div(ceil_div(slab_floats * ROWS, std::max(count, 1)), 16) * 16;
  int i = 0;
  for (; i + ROWS <= count; i += ROWS) {
    for (int64_t f = 0; f < part; f += 16) __builtin_prefetch(next + f);
    next += part;
    // What a later step reads: it is short, and far from what this one does.
    for (int r = 0; r < ROWS; r++) {
      const float* later = pairs[std::min(i + r + AHEAD, count - 1)].slots + slot;
      for (int64_t k = 0; k < kept; k += 16) __builtin_prefetch(later + k);
      later += plan.slots - slot / 2;
      for (int64_t k = 0; k < kept / 2; k += 16) __builtin_prefetch(later + k);
    }
    multiply<VECTORS, ROWS, IN_PAIRS>(plan, pairs + i, slot, kept, slab, is_first);
  }
  for (; i < count; i++) {
    multiply<VECTORS, 1, IN_PAIRS>(plan, pairs + i, slot, kept, slab, is_first);
  }
}

using MultiplyAll = void (*)(const Plan&, const Pair*, int, int64_t, int64_t, const float*, int64_t,
                             bool);
template <bool IN_PAIRS>
constexpr MultiplyAll MULTIPLY_ALL[] = {
    nullptr,
    multiply_all<1, IN_PAIRS>,
    multiply_all<2, IN_PAIRS>,
    multiply_all<3, IN_PAIRS>,
    multiply_all<4, IN_PAIRS>,
    multiply_all<5, IN_PAIRS>,
    multiply_all<6, IN_PAIRS>,
    multiply_all<7, IN_PAIRS>,
    multiply_all<8, IN_PAIRS>,
};

// Positions of the result that the same taps reach: one remainder by the stride in each dimension.
struct Class {
  struct Tap {
    int64_t index, shift;  // The gradient's coordinate is step * k + shift.
  };
  int64_t remainder[3], count[3];  // The result's coordinate is remainder + spacing * k.
  std::vector<Tap> taps[3];

  Class(const Problem& p, int64_t number) {
    for (int d = 2; d >= 0; d--) {
      int64_t spacing = p.transposed ? 1 : p.stride[d];
      int64_t remainders = std::min(spacing, p.input_size[d]);
      int64_t r = remainder[d] = number % remainders;
      number /= remainders;
      count[d] = ceil_div(p.input_size[d] - r, spacing);
      for (int64_t t = 0; t < p.kernel[d]; t++) {
        int64_t reach = r + p.padding[d] - t * p.dilation[d];
        if (p.transposed) taps[d].push_back({t, -p.padding[d] + t * p.dilation[d]});
        else if (reach % spacing == 0) taps[d].push_back({t, reach / spacing});
      }
      // First one that all positions reach, if there is one: it begins their sums.
      int64_t last = (p.transposed ? p.stride[d] : 1) * (count[d] - 1);
      auto reaches_all = [&](const Tap& tap) {
        return tap.shift >= 0 && last + tap.shift < p.output_size[d];
      };
      std::stable_partition(taps[d].begin(), taps[d].end(), reaches_all);
    }
  }

  int64_t size() const { return count[0] * count[1] * count[2]; }
  int64_t tap_count() const { return taps[0].size() * taps[1].size() * taps[2].size(); }
};

std::vector<Class> find_classes(const Problem& p) {
  int64_t number = 1;
  for (int d = 0; d < 3; d++) number *= p.transposed ? 1 : std::min(p.stride[d], p.input_size[d]);
  std::vector<Class> classes;
  for (int64_t i = 0; i < number; i++) classes.emplace_back(p, i);
  return classes;
}

// Positions of the result that follow one another in the last dimension.
struct Run {
  int first, count;   // In a block.
  int64_t at[3];      // The gradient's coordinates for the first, without a tap's shift.
  int64_t slots, to;  // Offsets of these in the packed gradient, and of the first in the result.
};

// Write the sums of a run, with so much from one position of the result to the next.
void write(const Problem& p, const Run& run, int64_t next, int64_t channels, const float* sums,
           int64_t width) {
  int64_t stride = p.result_strides[1];
  if (p.is_bfloat16) {
    BFloat16* result = static_cast<BFloat16*>(p.result) + run.to;
    for (int i = 0; i < run.count; i++) {
      for (int64_t c = 0; c < channels; c += LANES) {  // Rows are padded to whole vectors.
        Floats rounded = round_to_bfloat16(load(sums + i * width + c));
        int64_t lanes = std::min<int64_t>(LANES, channels - c);
        if (stride == 1 && lanes == LANES) {
          store(result + i * next + c, rounded);
          continue;
        }
        for (int64_t lane = 0; lane < lanes; lane++) {
          set(result + i * next + (c + lane) * stride, rounded[lane]);
        }
      }
    }
    return;
  }
  float* result = static_cast<float*>(p.result) + run.to;
  if (stride == 1) {
    for (int i = 0; i < run.count; i++) {
      std::memcpy(result + i * next, sums + i * width, channels * 4);
    }
    return;
  }
  for (int64_t c = 0; c < channels; c++) {
    for (int i = 0; i < run.count; i++) result[i * next + c * stride] = sums[i * width + c];
  }
}

// Compute a block of positions of a class, for one block of input channels of one group.
void multiply_block(const Problem& p, const Plan& plan, const Class& of, int64_t block,
                    int64_t first_sample, int64_t samples, int64_t group, int64_t in_block,
                    const float* packed, const float* slabs, float* accumulators) {
  const int64_t first = block * BLOCK;
  const int count = std::min<int64_t>(BLOCK, samples * of.size() - first);
  // From one position of the result to the next, as in Class.
  int64_t step[3], spacing[3];
  for (int d = 0; d < 3; d++) {
    step[d] = p.transposed ? p.stride[d] : 1, spacing[d] = p.transposed ? 1 : p.stride[d];
  }
  Run runs[BLOCK];
  int run_count = 0;
  Position position(first, of.count);
  for (int i = 0; i < count; i += runs[run_count++].count) {
    Run& run = runs[run_count];
    run.first = i, run.count = std::min<int64_t>(count - i, of.count[2] - position.at[2]);
    run.slots = position.sample;
    run.to = (first_sample + position.sample) * p.result_strides[0] +
             (group * p.in_channels + in_block * plan.width) * p.result_strides[1];
    for (int d = 0; d < 3; d++) {
      run.at[d] = step[d] * position.at[d];
      run.slots = run.slots * p.output_size[d] + run.at[d];
      run.to += (of.remainder[d] + spacing[d] * position.at[d]) * p.result_strides[2 + d];
    }
    run.slots *= plan.position_floats;
    position.at[2] += run.count - 1;
    position.advance(of.count);
  }
  // Sums lie in the result where its rows are whole vectors, if they are close together or are not
  // read again.
  const bool has_one_tap = of.tap_count() == 1;
  const bool in_place = !p.is_bfloat16 && p.result_strides[1] == 1 &&
                        p.in_channels % plan.width == 0 &&
                        (p.groups * plan.in_blocks == 1 ||
                         (has_one_tap && p.out_channels <= plan.out_block));
  const int64_t next_to = spacing[2] * p.result_strides[4];
  const int64_t next_sums = in_place ? next_to : plan.width;
  const int64_t next_slots = step[2] * plan.position_floats;
  auto sums_of = [&](const Run& run) {
    if (in_place) return static_cast<float*>(p.result) + run.to;
    return accumulators + run.first * plan.width;
  };
  bool is_first = true;
  auto clear = [&] {
    for (int r = 0; r < run_count; r++) {
      float* sums = sums_of(runs[r]);
      for (int i = 0; i < runs[r].count; i++) std::memset(sums + i * next_sums, 0, plan.width * 4);
    }
    is_first = false;
  };

  MultiplyAll multiply_all =
      (plan.in_pairs ? MULTIPLY_ALL<HAS_PAIRS> : MULTIPLY_ALL<false>)[plan.vectors];
  slabs += (group * plan.in_blocks + in_block) * plan.taps * plan.rows * plan.width;
  const int64_t first_slot = group * p.out_channels / p.m * plan.group_slots;
  auto is_inside = [&](int d, int64_t at) { return uint64_t(at) < uint64_t(p.output_size[d]); };
  // Most often, there is nothing to divide.
  auto steps = [&](int64_t far) { return step[2] == 1 ? far : ceil_div(far, step[2]); };
  Pair pairs[BLOCK];
  for (auto [index_0, shift_0] : of.taps[0]) {
    for (auto [index_1, shift_1] : of.taps[1]) {
      for (auto [index_2, shift_2] : of.taps[2]) {
        const int64_t shift = (shift_0 * p.output_size[1] + shift_1) * p.output_size[2] + shift_2;
        int reached = 0;
        for (int r = 0; r < run_count; r++) {
          const Run& run = runs[r];
          if (!is_inside(0, run.at[0] + shift_0) || !is_inside(1, run.at[1] + shift_1)) continue;
          const int64_t at = run.at[2] + shift_2;
          const int64_t begin = at < 0 ? steps(-at) : 0;
          const int64_t end = std::min<int64_t>(run.count, steps(p.output_size[2] - at));
          const float* slots = packed + run.slots + shift * plan.position_floats;
          float* sums = sums_of(run);
          for (int64_t i = begin; i < end; i++) {
            pairs[reached++] = {slots + i * next_slots, sums + i * next_sums};
          }
        }
        int64_t tap = (index_0 * p.kernel[1] + index_1) * p.kernel[2] + index_2;
        if (is_first && reached < count) clear();
        for (int64_t out = 0; out < p.out_channels; out += plan.out_block) {
          int64_t before = out / p.m;  // Groups of m channels.
          int64_t groups = std::min(plan.out_block, p.out_channels - out) / p.m;
          multiply_all(plan, pairs, reached, first_slot + before * plan.group_slots,
                       groups * plan.group_slots,
                       slabs + (tap * plan.rows + before * plan.group_rows) * plan.width,
                       groups * plan.group_rows * plan.width, is_first);
          is_first = false;
        }
      }
    }
  }
  if (is_first) clear();
  if (in_place) return;
  const int64_t channels = std::min(plan.width, p.in_channels - in_block * plan.width);
  for (int r = 0; r < run_count; r++) {
    write(p, runs[r], next_to, channels, sums_of(runs[r]), plan.width);
  }
}

// What depends on n and m.
struct PackingKernels {
  decltype(&pack_tile<1, 1>) pack_tile;
  decltype(&sum_sample<1, 1>) sum_sample;
  decltype(&pack_fours<1, float>) pack_fours = nullptr, pack_fours_of_bfloat16 = nullptr;
};

template <int M, int N>
PackingKernels packing() {
  PackingKernels kernels{pack_tile<M, N>, sum_sample<M, 0>};
  if constexpr (M == 4) {
    kernels.pack_fours = pack_fours<N, float>;
    kernels.pack_fours_of_bfloat16 = pack_fours<N, BFloat16>;
  }
  return kernels;
}

template <int M>
PackingKernels packing(int64_t n) {
  if (n == 1) return packing<M, 1>();
  if (n == 2) return packing<M, 2>();
  return packing<M, 0>();
}

PackingKernels packing(int64_t n, int64_t m) {
  switch (m) {
    case 1: return {pack_tile<1, 1>, sum_sample<1, 1>};
    case 2: return packing<2>(n);
    case 4: return packing<4>(n);
    case 8: return packing<8>(n);
    case 16: return packing<16>(n);
    default: return packing<32>(n);
  }
}

// The part of so many items that is a thread's own: always the same, so that its core's caches have
// what it has put there, in this call or in the one before.
struct Part {
  int64_t begin, end;

  Part(int64_t items, int64_t thread, int64_t threads)
      : begin(items * thread / threads), end(items * (thread + 1) / threads) {}
};

// Pack some samples, of which a thread has its part.
void pack_samples(const Problem& p, const Plan& plan, const PackingKernels& of_m,
                  const float* factors, int64_t sample, int64_t samples, int64_t thread,
                  int64_t threads, float* packed) {
  const bool is_by_magnitude = p.function == MAGNITUDE || p.is_by_group();
  // Fewer channels leave much of the vectors empty.
  const bool has_fours = p.grad_strides[1] == 1 && p.out_channels >= FOURS;
  const auto pack_fours = !has_fours || !is_by_magnitude || plan.in_pairs ? nullptr
                          : p.is_bfloat16 ? of_m.pack_fours_of_bfloat16
                                          : of_m.pack_fours;
  const int64_t first = sample * p.space(), end = (sample + samples) * p.space();
  const Part part(ceil_div(end - first, LANES), thread, threads);
  for (int64_t tile = part.begin; tile < part.end; tile++) {
    float* to = packed + tile * LANES * plan.position_floats;
    if (pack_fours) pack_fours(p, plan, first + tile * LANES, end, to);
    else of_m.pack_tile(p, plan, factors, first + tile * LANES, end, to);
  }
}

// Multiply some samples that are packed, of which a thread has its part.
void multiply_samples(const Problem& p, const Plan& plan, const std::vector<Class>& classes,
                      int64_t sample, int64_t samples, int64_t thread, int64_t threads,
                      const float* packed, const float* slabs, float* accumulators) {
  int64_t blocks = 0;
  std::vector<int64_t> first_block;
  for (const Class& of : classes) {
    first_block.push_back(blocks);
    blocks += ceil_div(samples * of.size(), BLOCK);
  }
  // One block of input channels after the other: its weights may stay in the second-level cache.
  const Part part(p.groups * plan.in_blocks * blocks, thread, threads);
  for (int64_t i = part.begin; i < part.end; i++) {
    int64_t block = i % blocks, product = i / blocks, group = product / plan.in_blocks;
    auto after = std::upper_bound(first_block.begin(), first_block.end(), block);
    int64_t number = after - first_block.begin() - 1;
    multiply_block(p, plan, classes[number], block - first_block[number], sample, samples, group,
                   product % plan.in_blocks, packed, slabs, accumulators);
  }
}

void run(const Problem& p, char* workspace) {
  const Plan plan(p);
  const PackingKernels of_m = packing(p.n, p.m);
  float* packed = reinterpret_cast<float*>(workspace + plan.packed);
  float* slabs = reinterpret_cast<float*>(workspace + plan.slabs);
  float* accumulators = reinterpret_cast<float*>(workspace + plan.accumulators);
  double* sums = reinterpret_cast<double*>(workspace + plan.sums);
  float* factors = reinterpret_cast<float*>(workspace + plan.factors);
  const std::vector<Class> classes = find_classes(p);
#pragma omp parallel num_threads(p.threads)
  {
    if (p.is_bfloat16) pack_weight(p, plan, static_cast<const BFloat16*>(p.weight), slabs);
    else pack_weight(p, plan, static_cast<const float*>(p.weight), slabs);
    if (p.is_by_wider_scope()) {
#pragma omp for collapse(2) schedule(static)
      for (int64_t sample = 0; sample < p.samples; sample++) {
        for (int64_t c = 0; c < p.channels; c += STEP) {
          of_m.sum_sample(p, sample, c, sums + (sample * p.channels + c) * 2);
        }
      }
      find_factors(p, sums, factors);
    }
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    // All threads have a part of each chunk, or one thread has all of its own chunks.
    const bool is_alone = plan.splits_samples;
    const int64_t member = is_alone ? 0 : thread, members = is_alone ? 1 : threads;
    const Part own = is_alone ? Part(p.samples, thread, threads) : Part(p.samples, 0, 1);
    float* chunk = packed + (is_alone ? thread * plan.chunk_floats : 0);
    float* sums_of_block = accumulators + thread * BLOCK * plan.width;
#pragma omp barrier
    for (int64_t sample = own.begin; sample < own.end; sample += plan.chunk_samples) {
      const int64_t samples = std::min(plan.chunk_samples, own.end - sample);
      pack_samples(p, plan, of_m, factors, sample, samples, member, members, chunk);
      if (!is_alone) {
#pragma omp barrier
      }
      multiply_samples(p, plan, classes, sample, samples, member, members, chunk, slabs,
                       sums_of_block);
      if (!is_alone) {
#pragma omp barrier
      }
    }
  }
}

}  // namespace

extern "C" int64_t sdgp_workspace_bytes(const Problem* problem) { return Plan(*problem).bytes; }

// All sizes are at least 1.
extern "C" void sdgp_pruned_input_grad(const Problem* problem, char* workspace) {
  run(*problem, workspace);
}

// ldmatrix, mma.sp and wgmma.sp: which lane holds what, where a descriptor points, and when wgmma
// reads and writes.
#pragma once
#include <array>
#include <bit>
#include <cmath>
#include <memory>

#include "memory.h"

namespace emulated {

float half_to_float(uint16_t bits) {
  const float magnitude = (bits & 0x7C00) == 0 ? std::ldexp(float(bits & 0x3FF), -24)
                          : (bits & 0x7C00) != 0x7C00
                              ? std::ldexp(float((bits & 0x3FF) | 0x400), ((bits >> 10) & 31) - 25)
                          : bits & 0x3FF ? NAN
                                         : INFINITY;
  return bits & 0x8000 ? -magnitude : magnitude;
}

// Round to the nearest, ties to even.
uint16_t float_to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7FFF;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return sign | 0x7C00;
  if (magnitude < std::ldexp(1.0f, -14))
    return sign | uint16_t(std::nearbyint(std::ldexp(magnitude, 24)));
  int exponent;
  const float fraction = std::frexp(magnitude, &exponent);  // in [0.5, 1)
  return sign | uint16_t(((exponent + 13) << 10) + int(std::nearbyint(std::ldexp(fraction, 11))));
}

inline float to_float(Element element, uint16_t bits) {
  return element == Element::bfloat16 ? bfloat16_to_float(bits) : half_to_float(bits);
}

// What a lane brings to ldmatrix or stmatrix: one row of a matrix, and its part of every matrix.
struct Rows {
  const void *row;
  uint16_t *registers;
};

// Call with two-byte elements of shared memory and of a lane's registers that belong together.
template <class Move>
void for_each_pair(const void *const *lanes, int count, bool transpose, const char *what,
                   Move move) {
  const auto rows = [&](int lane) { return static_cast<const Rows *>(lanes[lane]); };
  for (int i = 0; i < 8 * count; i++) shared_offset(rows(i)->row, 16, 16, what);
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 2 * count; i++) {
      int row = lane / 4, column = lane % 4 * 2 + i % 2;
      if (transpose) std::swap(row, column);
      const void *from = rows(i / 2 * 8 + row)->row;
      move(static_cast<uint16_t *>(const_cast<void *>(from))[column], rows(lane)->registers[i]);
    }
}

void ldmatrix(const void *row, void *registers, int count, bool transpose) {
  const Rows mine{row, static_cast<uint16_t *>(registers)};
  together("ldmatrix", &mine, [&](const void *const *lanes) {
    for_each_pair(lanes, count, transpose, "ldmatrix reads",
                  [](uint16_t &memory, uint16_t &lane) { lane = memory; });
  });
}

void stmatrix(const void *row, const uint32_t *registers, int count, bool transpose) {
  uint16_t copy[8];
  std::memcpy(copy, registers, 4 * count);
  const Rows mine{row, copy};
  together("stmatrix", &mine, [&](const void *const *lanes) {
    for_each_pair(lanes, count, transpose, "stmatrix writes",
                  [](uint16_t &memory, uint16_t &lane) { memory = lane; });
    note_stores();
  });
}

// Where a row of A has its stored values along K = 32: two places in each of eight groups of four.
struct Places {
  int at[16];
};

// Of the four lanes that share a row, selector 0 takes the first two's metadata and selector 1 the
// last two's. The first of a pair has columns 0 to 15 and the second 16 to 31; the lower half of
// its register is for row lane / 4 and the upper half for the row 8 below.
template <class Metadata> Places places(int row, int selector, Metadata metadata) {
  Places places;
  for (int group = 0; group < 8; group++) {
    const uint32_t word = metadata(row % 8 * 4 + selector * 2 + group / 4);
    const unsigned bits = word >> (16 * (row / 8) + 4 * (group % 4)) & 15;
    const int first = bits & 3, second = bits >> 2;
    if (first >= second)
      fail("metadata of group " + std::to_string(group) + " in row " + std::to_string(row) +
           " has places " + std::to_string(first) + " and " + std::to_string(second) +
           ", which do not ascend");
    places.at[2 * group] = 4 * group + first;
    places.at[2 * group + 1] = 4 * group + second;
  }
  return places;
}

// Which lane of a warp holds a stored value of A (16 by 16), and where among its eight.
inline int a_lane(int row, int column) { return row % 8 * 4 + column % 8 / 2; }
inline int a_register(int row, int column) { return column / 8 * 4 + row / 8 * 2 + column % 2; }

void mma_sp(const MmaSp &mine) {
  together("mma.sp", &mine, [](const void *const *lanes) {
    const auto lane = [&](int i) -> const MmaSp & { return *static_cast<const MmaSp *>(lanes[i]); };
    const auto half = [&](const uint32_t *registers, int i) {
      return to_float(lane(0).element, uint16_t(registers[i / 2] >> (16 * (i % 2))));
    };
    float b[32][8];
    for (int k = 0; k < 32; k++)
      for (int n = 0; n < 8; n++) b[k][n] = half(lane(n * 4 + k % 8 / 2).b, k / 8 * 2 + k % 2);
    for (int row = 0; row < 16; row++) {
      const Places k = places(row, lane(0).selector, [&](int i) { return lane(i).metadata; });
      float sums[8] = {};
      for (int i = 0; i < 16; i++) {
        const float a = half(lane(a_lane(row, i)).a, a_register(row, i));
        for (int n = 0; n < 8; n++) sums[n] += a * b[k.at[i]][n];
      }
      for (int n = 0; n < 8; n++) lane(row % 8 * 4 + n / 2).d[row / 8 * 2 + n % 2] += sums[n];
    }
  });
}

// A matrix in shared memory as a wgmma descriptor tells it: 16-byte units, bit by bit as PTX has
// it.
struct Matrix {
  unsigned start, leading, stride, swizzle;  // bytes; the swizzle's row, or 0
  bool k_major;

  Matrix(uint64_t descriptor, bool k_major)
      : start((descriptor & 0x3FFF) << 4),
        leading((descriptor >> 16 & 0x3FFF) << 4),
        stride((descriptor >> 32 & 0x3FFF) << 4),
        k_major(k_major) {
    if (descriptor & 0xC000C000C000)
      fail("a wgmma descriptor's address or offset overflows its 14 bits");
    if (descriptor >> 49 & 7) fail("a wgmma descriptor with a base offset, which is not emulated");
    swizzle = std::array{0u, 128u, 64u, 32u}[descriptor >> 62];
  }

  // Of the bytes of one element, along M or N and along K. Eight rows of `width` bytes are one
  // atom.
  size_t offset(int mn, int k) const {
    const unsigned width = swizzle ? swizzle : 16, elements = width / 2;
    unsigned address = start;
    if (k_major) {
      address += mn % 8 * width + mn / 8 * stride + k % elements * 2;
      if (swizzle && k >= int(elements)) fail("a wgmma operand whose K is wider than its swizzle");
      address += k / elements * leading;
    } else {
      address += mn % elements * 2 + k % 8 * width;
      address +=
          mn / elements * (swizzle ? leading : stride) + k / 8 * (swizzle ? stride : leading);
    }
    if (swizzle) address ^= (address >> 3) & (swizzle - 16);
    const size_t offset = address - shared_base;
    if (address < shared_base || offset + 2 > shared_bytes)
      fail("wgmma reads outside of shared memory");
    return offset;
  }
};

struct Issued {
  Wgmma wgmma;
  std::shared_ptr<const Clock> fenced;
};

// A thread's wgmmas, by its own count of them, and its accumulators that one of them owns.
struct Wgmmas {
  std::vector<Issued> issued;
  std::vector<size_t> groups;  // where each ends
  bool fenced = false;
  size_t waits_for = 0;  // that so many are done
  std::map<float *, std::vector<float>> accumulators;
};
inline std::vector<Wgmmas> wgmmas_of;
inline std::vector<size_t> wgmmas_done;  // by warpgroup

inline const float in_flight = std::bit_cast<float>(0x7FC0DEADu);

void wgmma_fence() { wgmmas_of[self->index].fenced = true; }

void wgmma_sp(const Wgmma &wgmma) {
  Wgmmas &mine = wgmmas_of[self->index];
  if (!mine.fenced) fail("a wgmma with no wgmma.fence since the last batch");
  note_stores();
  if (mine.issued.empty() || *mine.issued.back().fenced != self->order.fenced)
    mine.issued.push_back({wgmma, std::make_shared<Clock>(self->order.fenced)});
  else
    mine.issued.push_back({wgmma, mine.issued.back().fenced});
  const size_t count = wgmma.n / 2;
  for (const auto &[d, values] : mine.accumulators)
    if (d < wgmma.d + count && wgmma.d < d + values.size() &&
        (d != wgmma.d || values.size() != count))
      fail("accumulators of two wgmmas under way overlap");
  if (mine.accumulators.try_emplace(wgmma.d, wgmma.d, wgmma.d + count).second)
    std::fill_n(wgmma.d, count, in_flight);
}

void wgmma_commit() {
  Wgmmas &mine = wgmmas_of[self->index];
  mine.groups.push_back(mine.issued.size());
  mine.fenced = false;
}

void wgmma_wait(int pending) {
  Wgmmas &mine = wgmmas_of[self->index];
  if (int(mine.groups.size()) <= pending) return;
  const size_t until = mine.groups[mine.groups.size() - 1 - pending];
  const int group = self->index / 128;
  mine.waits_for = until;
  wait_until([group, until] { return wgmmas_done[group] >= until; }, "wgmma of a whole warpgroup");
  mine.waits_for = 0;
}

inline void compute_wgmma(int group, size_t index) {
  const auto thread = [&](int i) -> Issued & { return wgmmas_of[128 * group + i].issued[index]; };
  const Wgmma &all = thread(0).wgmma;
  const Order nothing(threads[0].order.seen.size());
  Clock fenced;
  for (int warp = 0; warp < 4; warp++) {
    Clock of_warp = nothing.fenced;
    for (int lane = 0; lane < 32; lane++) {
      const Issued &issued = thread(32 * warp + lane);
      const Wgmma &one = issued.wgmma;
      if (one.n != all.n || one.element != all.element || one.selector != all.selector ||
          one.descriptor_a != all.descriptor_a || one.descriptor_b != all.descriptor_b ||
          one.accumulate != all.accumulate || !one.a_registers != !all.a_registers)
        fail("the threads of a warpgroup do not agree on a wgmma");
      for (size_t i = 0; i < of_warp.size(); i++)
        of_warp[i] = std::max(of_warp[i], (*issued.fenced)[i]);
    }
    // Every warp reads for itself.
    if (warp == 0) fenced = of_warp;
    for (size_t i = 0; i < fenced.size(); i++) fenced[i] = std::min(fenced[i], of_warp[i]);
  }
  const auto read = [&](const Matrix &matrix, int mn, int k) {
    const size_t offset = matrix.offset(mn, k);
    check_visible_to_async_proxy(offset, 2, fenced, "wgmma");
    uint16_t bits;
    std::memcpy(&bits, shared + offset, 2);
    return to_float(all.element, bits);
  };

  std::vector<float> b(32 * all.n);
  const Matrix b_matrix(all.descriptor_b, !all.transpose_b);
  for (int k = 0; k < 32; k++)
    for (int n = 0; n < all.n; n++) b[k * all.n + n] = all.scale_b * read(b_matrix, n, k);

  const Matrix a_matrix(all.a_registers ? 0 : all.descriptor_a, !all.transpose_a);
  std::vector<float> sums(all.n);
  for (int row = 0; row < 64; row++) {
    const int warp = row / 16, in_warp = row % 16;
    const Places k = places(in_warp, all.selector,
                            [&](int lane) { return thread(32 * warp + lane).wgmma.metadata; });
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int i = 0; i < 16; i++) {
      float a;
      if (all.a_registers) {
        const int half = a_register(in_warp, i);
        const uint32_t word = thread(32 * warp + a_lane(in_warp, i)).wgmma.a_registers[half / 2];
        a = to_float(all.element, uint16_t(word >> (16 * (half % 2))));
      } else {
        a = read(a_matrix, row, i);
      }
      a *= all.scale_a;
      const float *from = b.data() + k.at[i] * all.n;
      for (int n = 0; n < all.n; n++) sums[n] += a * from[n];
    }
    for (int n = 0; n < all.n; n++) {
      const int lane = in_warp % 8 * 4 + n % 8 / 2;
      float *key = thread(32 * warp + lane).wgmma.d;
      float &d = wgmmas_of[128 * group + 32 * warp + lane].accumulators.at(
          key)[n / 8 * 4 + in_warp / 8 * 2 + n % 2];
      d = all.accumulate ? d + sums[n] : sums[n];
    }
  }
}

// Do what a whole warpgroup waits for.
inline bool complete_wgmmas() {
  for (size_t group = 0; group < wgmmas_done.size(); group++) {
    size_t until = SIZE_MAX;
    for (size_t i = 128 * group; i < 128 * (group + 1); i++)
      until = std::min(until, wgmmas_of[i].waits_for);
    if (until <= wgmmas_done[group]) continue;
    for (size_t &done = wgmmas_done[group]; done < until; done++) compute_wgmma(group, done);
    for (size_t i = 128 * group; i < 128 * (group + 1); i++) {
      Wgmmas &mine = wgmmas_of[i];
      std::erase_if(mine.accumulators, [&](const auto &entry) {
        const auto &[d, values] = entry;
        for (size_t later = until; later < mine.issued.size(); later++)
          if (mine.issued[later].wgmma.d == d) return false;
        for (size_t j = 0; j < values.size(); j++) {
          if (std::bit_cast<uint32_t>(d[j]) != std::bit_cast<uint32_t>(in_flight))
            fail("accumulators of a wgmma under way were written");
          d[j] = values[j];
        }
        return true;
      });
    }
    return true;
  }
  return false;
}

}  // namespace emulated

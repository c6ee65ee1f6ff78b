// Shared memory, what is copied to and from it while threads go on, and the barriers that tell.
//
// A copy destroys what it will overwrite when it is issued, and lands when a wait makes it: both
// are as far off as the hardware's rules allow, so that whoever reads too early or overwrites too
// early gets NaN.
#pragma once
#include "fibers.h"

namespace emulated {

constexpr unsigned shared_base = 1024;  // the driver keeps the first kilobyte
constexpr uint32_t by_async_proxy = 0xFFFFFFFF;

uchar *shared;
inline size_t shared_bytes;
inline bool stores_matter;                 // something reads shared memory through the async proxy
inline std::vector<uchar> without_stores;  // shared memory but for plain stores nobody noted yet

// Who wrote two bytes of shared memory last, and when by their clock.
struct Write {
  uint32_t agent = by_async_proxy, time = 0;
};
inline std::vector<Write> writes;

unsigned shared_address(const void *pointer) {
  return unsigned(static_cast<const uchar *>(pointer) - shared) + shared_base;
}

inline std::string at(size_t offset) {
  return " at byte " + std::to_string(offset) + " of shared memory";
}

inline size_t shared_offset(const void *pointer, size_t size, size_t alignment, const char *what) {
  const size_t offset = static_cast<const uchar *>(pointer) - shared;
  if (offset > shared_bytes || size > shared_bytes - offset)
    fail(std::string(what) + " outside of shared memory");
  if (offset % alignment)
    fail(std::string(what) + " not aligned to " + std::to_string(alignment) + at(offset));
  return offset;
}

inline void write_shared(size_t offset, const void *from, size_t size, Write write) {
  std::memcpy(shared + offset, from, size);
  if (!stores_matter) return;
  std::memcpy(without_stores.data() + offset, from, size);
  std::fill(writes.begin() + offset / 2, writes.begin() + (offset + size) / 2, write);
}

inline void destroy_shared(size_t offset, size_t size) {
  static const std::vector<uchar> nan(256, 0xFF);
  for (size_t i = 0; i < size; i += nan.size())
    write_shared(offset + i, nan.data(), std::min(nan.size(), size - i), {});
}

void note_stores() {
  if (!stores_matter) return;
  constexpr size_t step = 512;
  for (size_t from = 0; from < shared_bytes; from += step) {
    const size_t to = std::min(from + step, shared_bytes);
    if (!std::memcmp(shared + from, without_stores.data() + from, to - from)) continue;
    for (size_t i = from; i < to; i += 2)
      if (std::memcmp(shared + i, without_stores.data() + i, 2)) {
        std::memcpy(without_stores.data() + i, shared + i, 2);
        writes[i / 2] = {uint32_t(self->index), self->order.seen[self->index]};
      }
  }
}

void fence_async_proxy() {
  note_stores();
  self->order.fenced = self->order.seen;
  self->order.seen[self->index]++;
}

inline void check_visible_to_async_proxy(size_t offset, size_t size, const Clock &fenced,
                                         const char *what) {
  for (size_t i = offset / 2; i < (offset + size) / 2; i++)
    if (writes[i].agent != by_async_proxy && fenced[writes[i].agent] < writes[i].time)
      fail(std::string(what) + " reads what " +
           (writes[i].agent < threads.size() ? "a store" : "cp.async") +
           " wrote, with no async proxy fence between" + at(2 * i));
}

struct Tensor {
  char *begin, *end;
};
inline std::vector<Tensor> tensors;

inline void check_global(const void *pointer, size_t size, const char *what) {
  const char *begin = static_cast<const char *>(pointer);
  for (const Tensor &tensor : tensors)
    if (begin >= tensor.begin && begin + size <= tensor.end) return;
  fail(std::string(what) + " outside of every tensor");
}

struct TransactionBarrier;

// A thread's copies by cp.async, by its own count of them.
struct Copies {
  struct Copy {
    size_t to;
    const void *from;
    int size;
  };
  struct Arrival {
    TransactionBarrier *barrier;
    size_t issued;
  };
  std::vector<Copy> issued;
  std::vector<size_t> groups;  // where each ends
  size_t landed = 0;
  std::vector<Arrival> arrivals;  // that wait for copies
  uint32_t time = 0;
};
inline std::vector<Copies> copies_of;

void copy_async(void *to, const void *from, int size, bool read) {
  const size_t offset = shared_offset(to, size, size, "cp.async writes");
  if (read) {
    check_global(from, size, "cp.async reads");
    if (reinterpret_cast<uintptr_t>(from) % size)
      fail("cp.async reads global memory not aligned to its size");
  }
  destroy_shared(offset, size);
  copies_of[self->index].issued.push_back({offset, read ? from : nullptr, size});
}

inline void land(int thread, size_t until) {
  static const char zeros[16] = {};
  Copies &copies = copies_of[thread];
  if (copies.landed >= until) return;
  const Write write{uint32_t(threads.size() + thread), ++copies.time};
  for (; copies.landed < until; copies.landed++) {
    const auto &copy = copies.issued[copies.landed];
    write_shared(copy.to, copy.from ? copy.from : zeros, copy.size, write);
  }
}

struct TensorCopy {
  CUtensorMap map;
  size_t shared;
  int at[5];
};

struct Load {
  TensorCopy tensor;
  const void *linear;  // not null: `bytes` from there
  size_t bytes;
};

struct TransactionBarrier {
  int number;
  int count;
  long pending, transactions = 0, phase = 0;
  int initialized_by;
  uint32_t initialized_at;
  bool fenced = false;
  Order arrived, completed;
  std::vector<int> arrivals;  // threads whose copies are under way
  std::vector<Load> loads;

  long load_bytes() const {
    long bytes = 0;
    for (const Load &load : loads) bytes += load.bytes;
    return bytes;
  }
};
inline std::map<const void *, TransactionBarrier> barriers;

void barrier_init(const void *address, unsigned count) {
  if (reinterpret_cast<uintptr_t>(address) % 8) fail("an mbarrier not aligned to 8 bytes");
  if (count == 0) fail("an mbarrier of no arrivals");
  if (barriers.count(address)) fail("an mbarrier initialized twice");
  const Order nothing(self->order.seen.size());
  barriers[address] = {.number = int(barriers.size()),
                       .count = int(count),
                       .pending = int(count),
                       .initialized_by = self->index,
                       .initialized_at = self->order.seen[self->index],
                       .arrived = nothing,
                       .completed = nothing};
}

void fence_barriers() {
  for (auto &[address, barrier] : barriers)
    if (barrier.initialized_by == self->index) barrier.fenced = true;
}

inline TransactionBarrier &initialized(const void *address) {
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("an mbarrier used before it is initialized");
  TransactionBarrier &barrier = found->second;
  if (barrier.initialized_by != self->index &&
      self->order.seen[barrier.initialized_by] < barrier.initialized_at)
    fail("an mbarrier used with no barrier between its initialization and this thread");
  return barrier;
}

inline void complete(TransactionBarrier &barrier) {
  barrier.completed.join(barrier.arrived);
  barrier.pending = barrier.count;
  barrier.phase++;
}

inline void count_arrival(TransactionBarrier &barrier) {
  if (barrier.pending == 0) fail("an mbarrier gets more arrivals in a phase than its count");
  if (--barrier.pending == 0 && barrier.transactions == 0) complete(barrier);
}

inline std::string name(const TransactionBarrier &barrier) {
  return "mbarrier " + std::to_string(barrier.number) + " in phase " +
         std::to_string(barrier.phase);
}

inline void check_not_overrun(const TransactionBarrier &barrier) {
  if (long(barrier.arrivals.size()) >= barrier.pending)
    fail("an arrival at " + name(barrier) +
         ", all of whose arrivals are under way, and nobody waited for it");
}

void barrier_arrive(const void *address) {
  TransactionBarrier &barrier = initialized(address);
  check_not_overrun(barrier);
  release(barrier.arrived);
  count_arrival(barrier);
}

void barrier_expect(const void *address, unsigned bytes) {
  initialized(address).transactions += bytes;
}

// cp.async.mbarrier.arrive.noinc
void barrier_arrive_after_copies(const void *address) {
  TransactionBarrier &barrier = initialized(address);
  check_not_overrun(barrier);
  Copies &copies = copies_of[self->index];
  release(barrier.arrived);
  if (copies.landed == copies.issued.size()) return count_arrival(barrier);
  copies.arrivals.push_back({&barrier, copies.issued.size()});
  barrier.arrivals.push_back(self->index);
}

// Arrivals of this thread whose copies have all landed.
inline void settle_arrivals(int thread) {
  Copies &copies = copies_of[thread];
  std::erase_if(copies.arrivals, [&](const Copies::Arrival &arrival) {
    if (arrival.issued > copies.landed) return false;
    TransactionBarrier &barrier = *arrival.barrier;
    std::erase(barrier.arrivals, thread);
    uint32_t &seen = barrier.arrived.seen[threads.size() + thread];
    seen = std::max(seen, copies.time);
    count_arrival(barrier);
    return true;
  });
}

void commit_copies() {
  Copies &copies = copies_of[self->index];
  copies.groups.push_back(copies.issued.size());
}

inline void wait_landed(size_t until) {
  Copies &copies = copies_of[self->index];
  land(self->index, until);
  self->order.seen[threads.size() + self->index] = copies.time;
  settle_arrivals(self->index);
}

void wait_copies(int pending) {
  const auto &groups = copies_of[self->index].groups;
  if (int(groups.size()) > pending) wait_landed(groups[groups.size() - 1 - pending]);
}

void wait_all_copies() { wait_landed(copies_of[self->index].issued.size()); }

inline void check_tensor_copy(const CUtensorMap &map, int rank, const char *what) {
  if (rank != map.rank)
    fail(std::string(what) + ": the coordinates and the tensor map differ in rank");
}

// Call with each element's place in shared memory and in the tensor: null outside of it.
template <class Element> void for_each_element(const TensorCopy &copy, Element element) {
  const CUtensorMap &map = copy.map;
  int64_t rows = 1;
  for (int i = 1; i < map.rank; i++) rows *= map.box[i];
  const int64_t row_bytes = map.box[0] * map.element;
  for (int64_t r = 0; r < rows; r++) {
    char *base = map.base;
    bool inside = true;
    int64_t rest = r;
    for (int i = 1; i < map.rank; i++) {
      const int64_t coordinate = copy.at[i] + rest % map.box[i];
      rest /= map.box[i];
      inside = inside && coordinate >= 0 && coordinate < map.size[i];
      base += coordinate * map.stride[i];
    }
    for (int64_t byte = 0; byte < row_bytes; byte += map.element) {
      const int64_t column = copy.at[0] + byte / map.element;
      // Bits 4 to 6 of the address, as many as the swizzle has, take up those of the row.
      unsigned address = unsigned(copy.shared + r * row_bytes + byte) + shared_base;
      if (map.swizzle) address ^= (address >> 3) & unsigned(map.swizzle - 16);
      element(address - shared_base, inside && column >= 0 && column < map.size[0]
                                         ? base + column * map.element
                                         : nullptr);
    }
  }
}

inline size_t box_bytes(const CUtensorMap &map) {
  size_t bytes = map.element;
  for (int i = 0; i < map.rank; i++) bytes *= map.box[i];
  return bytes;
}

inline TransactionBarrier &barrier_of_load(const void *address) {
  TransactionBarrier &barrier = initialized(address);
  if (!barrier.fenced) fail("TMA signals an mbarrier whose initialization is not fenced");
  return barrier;
}

inline TensorCopy tensor_copy(const CUtensorMap &map, size_t offset, const int *at) {
  TensorCopy copy{map, offset, {}};
  std::copy(at, at + map.rank, copy.at);
  return copy;
}

void tensor_load(const CUtensorMap &map, const void *barrier, void *to, const int *at, int rank) {
  check_tensor_copy(map, rank, "a TMA load");
  const size_t bytes = box_bytes(map), offset = shared_offset(to, bytes, 128, "a TMA load writes");
  note_stores();
  barrier_of_load(barrier).loads.push_back({tensor_copy(map, offset, at), nullptr, bytes});
  destroy_shared(offset, bytes);
}

void bulk_load(void *to, const void *from, const void *barrier, unsigned bytes) {
  const size_t offset = shared_offset(to, bytes, 16, "a bulk copy writes");
  check_global(from, bytes, "a bulk copy reads");
  if (bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    fail("a bulk copy not aligned to 16 bytes");
  note_stores();
  barrier_of_load(barrier).loads.push_back({{{}, offset, {}}, from, bytes});
  destroy_shared(offset, bytes);
}

inline void land(const Load &load) {
  static const char zeros[8] = {};
  if (load.linear) return write_shared(load.tensor.shared, load.linear, load.bytes, {});
  for_each_element(load.tensor, [&](size_t offset, const char *from) {
    write_shared(offset, from ? from : zeros, load.tensor.map.element, {});
  });
}

inline std::vector<TransactionBarrier *> waits_at;  // by thread

void barrier_wait(const void *address, unsigned parity) {
  TransactionBarrier &barrier = initialized(address);
  if (parity > 1) fail("an mbarrier's parity is 0 or 1");
  waits_at[self->index] = &barrier;
  wait_until([&barrier, parity] { return (barrier.phase & 1) != parity; },
             "parity " + std::to_string(parity) + " of " + name(barrier));
  waits_at[self->index] = nullptr;
  self->order.join(barrier.completed);
}

// Complete the phase of one barrier somebody waits for, with all that is under way to it.
inline bool complete_a_barrier() {
  for (TransactionBarrier *barrier : waits_at) {
    if (!barrier || long(barrier->arrivals.size()) != barrier->pending ||
        barrier->transactions != barrier->load_bytes())
      continue;
    for (const Load &load : std::exchange(barrier->loads, {})) land(load);
    barrier->transactions = 0;
    const auto arrivals = barrier->arrivals;
    for (int thread : arrivals) {
      for (const auto &arrival : copies_of[thread].arrivals)
        if (arrival.barrier == barrier) land(thread, arrival.issued);
      settle_arrivals(thread);
    }
    if (arrivals.empty()) complete(*barrier);
    return true;
  }
  return false;
}

// A thread's TMA stores. They read shared memory when they are waited for.
struct Stores {
  std::vector<TensorCopy> issued;
  std::vector<Clock> fenced;
  std::vector<size_t> groups;
  size_t done = 0;
};
inline std::vector<Stores> stores_of;

void tensor_store(const CUtensorMap &map, const void *from, const int *at, int rank) {
  check_tensor_copy(map, rank, "a TMA store");
  const size_t offset = shared_offset(from, box_bytes(map), 128, "a TMA store reads");
  stores_of[self->index].issued.push_back(tensor_copy(map, offset, at));
  stores_of[self->index].fenced.push_back(self->order.fenced);
}

void commit_stores() {
  Stores &stores = stores_of[self->index];
  stores.groups.push_back(stores.issued.size());
}

void wait_stores(int pending) {
  note_stores();
  Stores &stores = stores_of[self->index];
  if (int(stores.groups.size()) <= pending) return;
  for (const size_t until = stores.groups[stores.groups.size() - 1 - pending]; stores.done < until;
       stores.done++) {
    const TensorCopy &copy = stores.issued[stores.done];
    for_each_element(copy, [&](size_t offset, char *to) {
      check_visible_to_async_proxy(offset, copy.map.element, stores.fenced[stores.done],
                                   "a TMA store");
      if (to) std::memcpy(to, shared + offset, copy.map.element);
    });
  }
}

inline void check_stores_done() {
  const Stores &stores = stores_of[self->index];
  if (stores.done < stores.issued.size())
    fail("a thread ends before its TMA store has read shared memory");
}

}  // namespace emulated

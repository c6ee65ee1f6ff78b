// The threads of a block as fibers, and what each knows of the others' writes.
#pragma once
#include <algorithm>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <ucontext.h>
#include <vector>

#include "device.h"

namespace emulated {

// Time by agent. Agents are the threads, and after them each thread's asynchronous copies.
using Clock = std::vector<uint32_t>;

// What happened before a thread's next step: writes it may see, and those among them that an async
// proxy fence has also made visible to TMA and wgmma.
struct Order {
  Clock seen, fenced;

  explicit Order(size_t agents = 0) : seen(agents), fenced(agents) {}

  void join(const Order &other) {
    for (size_t i = 0; i < seen.size(); i++) {
      seen[i] = std::max(seen[i], other.seen[i]);
      fenced[i] = std::max(fenced[i], other.fenced[i]);
    }
  }
};

struct Thread {
  ucontext_t context;
  int index;
  bool finished = false;
  std::function<bool()> ready;  // empty: it can go on
  std::string waits_for;
  Order order;
};

inline std::vector<Thread> threads;
inline Thread *self = nullptr;  // null: the scheduler runs
inline ucontext_t scheduler;
inline std::string failure;

// End the emulation. The fibers are left where they are.
[[noreturn]] inline void fail(const std::string &message) {
  failure = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
            std::to_string(blockIdx.z) + ")";
  if (self) failure += ", thread " + std::to_string(self->index);
  failure += ": " + message;
  if (self) setcontext(&scheduler);
  throw std::runtime_error(failure);
}

int thread_index() { return self->index; }

// Called before others may learn of this thread's plain stores to shared memory.
void note_stores();

template <class Ready> void wait_until(Ready ready, std::string what) {
  if (ready()) return;
  note_stores();
  self->ready = ready;
  self->waits_for = std::move(what);
  swapcontext(&self->context, &scheduler);
}

inline void resume(Thread &thread) {
  thread.ready = nullptr;
  self = &thread;
  threadIdx = {thread.index, 0, 0};
  swapcontext(&scheduler, &thread.context);
  self = nullptr;
  if (!failure.empty()) throw std::runtime_error(failure);
}

// Let each warp in turn go as far as it can, so that one is as far ahead of the next as it may be:
// the first, or in every other block the last.
inline bool run_ready(bool last_first) {
  bool moved = false;
  for (size_t turn = 0; turn < threads.size(); turn += 32)
    for (bool again = true; again;) {
      const size_t warp = last_first ? threads.size() - 32 - turn : turn;
      again = false;
      for (size_t i = warp; i < warp + 32; i++)
        if (!threads[i].finished && (!threads[i].ready || threads[i].ready())) {
          resume(threads[i]);
          again = moved = true;
        }
    }
  return moved;
}

// Give to `shared` what this thread knows; what it does from now on is later.
inline void release(Order &shared) {
  note_stores();
  shared.join(self->order);
  self->order.seen[self->index]++;
}

struct NamedBarrier {
  int count = 0, arrived = 0;
  long generation = 0;
  std::vector<Thread *> waiting;
  Order order;
};
inline std::map<int, NamedBarrier> named_barriers;

inline NamedBarrier &arrive_at(int id, int count) {
  if (id < 0 || id > 15) fail("there is no barrier " + std::to_string(id));
  if (count % 32) fail("a barrier's threads are not whole warps");
  NamedBarrier &barrier = named_barriers.try_emplace(id).first->second;
  if (barrier.arrived && barrier.count != count)
    fail("a barrier is used with two counts of threads");
  if (!barrier.arrived) barrier.order = Order(self->order.seen.size());
  barrier.count = count;
  barrier.arrived++;
  release(barrier.order);
  return barrier;
}

inline void pass_if_complete(NamedBarrier &barrier) {
  if (barrier.arrived < barrier.count) return;
  for (Thread *thread : barrier.waiting) thread->order.join(barrier.order);
  barrier.waiting.clear();
  barrier.arrived = 0;
  barrier.generation++;
}

void arrive(int id, int count) { pass_if_complete(arrive_at(id, count)); }

void synchronize(int id, int count) {
  NamedBarrier &barrier = arrive_at(id, count);
  barrier.waiting.push_back(self);
  const long generation = barrier.generation;
  pass_if_complete(barrier);
  wait_until([&barrier, generation] { return barrier.generation != generation; },
             "barrier " + std::to_string(id) + " of " + std::to_string(count) + " threads");
}

// What a warp does together. The last lane to come computes for all.
struct Warp {
  const char *what = nullptr;
  int arrived = 0;
  long generation = 0;
  const void *lanes[32];
};
inline std::vector<Warp> warps;

template <class Compute> void together(const char *what, const void *mine, Compute compute) {
  Warp &warp = warps[self->index / 32];
  if (warp.arrived && std::string(warp.what) != what)
    fail(std::string("the lanes of a warp do not agree: ") + warp.what + " and " + what);
  warp.what = what;
  warp.lanes[self->index % 32] = mine;
  const long generation = warp.generation;
  if (++warp.arrived == 32) {
    compute(warp.lanes);
    warp.arrived = 0;
    warp.generation++;
  }
  wait_until([&warp, generation] { return warp.generation != generation; },
             std::string(what) + " of a whole warp");
}

}  // namespace emulated

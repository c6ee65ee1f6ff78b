// Run a kernel, block by block, on tensors that are fenced off from all other memory.
#include <csignal>
#include <sys/mman.h>
#include <unistd.h>

#include "runtime.h"
#include "tensor_cores.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {
namespace {

constexpr size_t stack_bytes = 64 * 1024;

// Memory that ends where no access is allowed, as does what is before it.
class Guarded {
 public:
  char *begin;

  explicit Guarded(size_t size) {
    const size_t page = sysconf(_SC_PAGESIZE), pages = (size + page - 1) / page + 2;
    bytes_ = pages * page;
    mapping_ = static_cast<char *>(
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (mapping_ == MAP_FAILED) throw std::runtime_error("no memory");
    std::memset(mapping_, 0xFF, bytes_);
    mprotect(mapping_, page, PROT_NONE);
    mprotect(mapping_ + bytes_ - page, page, PROT_NONE);
    begin = mapping_ + bytes_ - page - size;
  }
  Guarded(const Guarded &) = delete;
  ~Guarded() { munmap(mapping_, bytes_); }

  void forbid_writes() {
    mprotect(mapping_ + sysconf(_SC_PAGESIZE), bytes_ - 2 * sysconf(_SC_PAGESIZE), PROT_READ);
  }

 private:
  char *mapping_;
  size_t bytes_;
};

std::function<void()> kernel;

void run_thread() {
  kernel();
  note_stores();
  check_stores_done();
  self->finished = true;
  setcontext(&scheduler);
}

void on_fault(int, siginfo_t *info, void *) {
  if (!self) {
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  const char *address = static_cast<const char *>(info->si_addr);
  std::string where = "nowhere near a tensor";
  for (size_t i = 0; i < tensors.size(); i++)
    if (address >= tensors[i].begin && address < tensors[i].end)
      where = "a store to tensor " + std::to_string(i) + ", which is const";
    else if (address >= tensors[i].end && address < tensors[i].end + 4096)
      where = "past the end of tensor " + std::to_string(i);
  fail("an access where it may not be: " + where);
}

void report_deadlock() {
  std::map<std::string, int> waiting;
  for (const Thread &thread : threads)
    if (!thread.finished) waiting[thread.waits_for]++;
  std::string message = "no thread can go on";
  for (const auto &[what, count] : waiting)
    message += "; " + std::to_string(count) + " wait for " + what;
  for (const auto &[address, barrier] : barriers)
    message += "; " + name(barrier) + " lacks " +
               std::to_string(barrier.pending - long(barrier.arrivals.size())) + " arrivals and " +
               std::to_string(barrier.transactions - barrier.load_bytes()) + " bytes";
  fail(message);
}

void run_block(int count, char *stacks) {
  // A thread's arrays are as undefined as shared memory is.
  std::memset(stacks, 0xFF, count * stack_bytes);
  std::memset(shared, 0xFF, shared_bytes);
  without_stores.assign(shared, shared + shared_bytes);
  writes.assign(shared_bytes / 2 + 1, {});
  named_barriers.clear();
  barriers.clear();
  warps.assign(count / 32, {});
  copies_of.assign(count, {});
  stores_of.assign(count, {});
  waits_at.assign(count, nullptr);
  wgmmas_of.assign(count, {});
  wgmmas_done.assign(count / 128, 0);
  threads = std::vector<Thread>(count);
  for (int i = 0; i < count; i++) {
    Thread &thread = threads[i];
    thread.index = i;
    thread.order = Order(2 * count);
    thread.order.seen[i] = 1;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stacks + i * stack_bytes;
    thread.context.uc_stack.ss_size = stack_bytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
  }
  const bool last_first = (blockIdx.x + blockIdx.y + blockIdx.z) % 2;
  const auto finished = [](const Thread &thread) { return thread.finished; };
  while (!std::all_of(threads.begin(), threads.end(), finished))
    if (!run_ready(last_first) && !complete_a_barrier() && !complete_wgmmas()) report_deadlock();
}

}  // namespace

const char *run(const Launch &launch, void (*entry)(const Arguments &)) {
  static std::string message;
  std::vector<std::unique_ptr<Guarded>> memory;
  std::vector<CUtensorMap> maps(launch.maps, launch.maps + launch.map_count);
  std::vector<char *> begins;
  tensors.clear();
  for (int i = 0; i < launch.tensor_count; i++) {
    const TensorArgument &tensor = launch.tensors[i];
    // A tensor begins where an allocation of the device would: what is left behind it is NaN.
    memory.push_back(std::make_unique<Guarded>((tensor.bytes + 15) / 16 * 16));
    std::memcpy(memory.back()->begin, tensor.data, tensor.bytes);
    if (!tensor.written) memory.back()->forbid_writes();
    tensors.push_back({memory.back()->begin, memory.back()->begin + tensor.bytes});
    begins.push_back(memory.back()->begin);
  }
  for (CUtensorMap &map : maps) map.base = begins[reinterpret_cast<intptr_t>(map.base)];

  Guarded shared_memory((launch.shared_bytes + 1023) / 1024 * 1024);
  shared = reinterpret_cast<uchar *>(shared_memory.begin);
  shared_bytes = launch.shared_bytes;
  stores_matter = launch.stores_matter;
  gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]};
  blockDim = {launch.threads, 1, 1};
  const Arguments arguments{begins.data(), maps.data(), launch.scalars};
  kernel = [&] { entry(arguments); };

  struct sigaction on_segv = {}, before;
  on_segv.sa_sigaction = on_fault;
  on_segv.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &on_segv, &before);
  const auto stacks = std::make_unique_for_overwrite<char[]>(launch.threads * stack_bytes);
  failure.clear();
  message.clear();
  try {
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
      for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++)
          run_block(launch.threads, stacks.get());
    for (int i = 0; i < launch.tensor_count; i++)
      if (launch.tensors[i].written)
        std::memcpy(launch.tensors[i].data, tensors[i].begin, launch.tensors[i].bytes);
  } catch (const std::runtime_error &error) {
    message = error.what();
  }
  sigaction(SIGSEGV, &before, nullptr);
  return message.empty() ? nullptr : message.c_str();
}

}  // namespace emulated

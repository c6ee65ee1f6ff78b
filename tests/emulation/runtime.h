// How the emulator is called.
#pragma once
#include "device.h"

namespace emulated {

struct TensorArgument {
  char *data;
  int64_t bytes, written;
};

// The base of a map is the number of its tensor.
struct Launch {
  const TensorArgument *tensors;
  const CUtensorMap *maps;
  const int64_t *scalars;
  int tensor_count, map_count, grid[3], threads, shared_bytes, stores_matter;
};

struct Arguments {
  char *const *tensors;
  const CUtensorMap *maps;
  const int64_t *scalars;
};

// Run the kernel that `entry` calls. Return null, or what went wrong.
const char *run(const Launch &launch, void (*entry)(const Arguments &));

}  // namespace emulated

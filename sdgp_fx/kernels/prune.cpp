// Prune an output gradient n:m. The second part of a file: the first is pruning.h.

namespace {

// A pruning function that leaves what it keeps where it is. The default one, in float32, does
// without the others' conditions.
template <int M, bool IS_DEFAULT>
struct InPlace : Pruning<M, 0> {
  using Base = Pruning<M, 0>;
  using Base::p;

  // Find which values are kept, all bits or none.
  void mask(const Floats* x, Ints* key, Ints* keep) const {
    if constexpr (M <= 4) {
      // Each pair is compared, and the first of equal ones is the larger.
      for (int i = 0; i < M; i++) keep[i] = Ints{} + int(p.n);
      for (int i = 0; i < M; i++) {
        for (int j = i + 1; j < M; j++) {
          Ints second_is_larger = key[j] > key[i];
          keep[i] += second_is_larger;
          keep[j] += ~second_is_larger;
        }
      }
      for (int i = 0; i < M; i++) keep[i] = keep[i] > 0;
    } else {
      this->choose(x, key, Ints{}, 1, true, [](int, Floats, Ints) {});
      for (int i = 0; i < M; i++) keep[i] = key[i] < 0;
    }
  }

  void rescale_by_group(Floats* x, const Ints* keep) const {
    Floats total = absolute(x[0]), kept = (Floats)((Ints)total & keep[0]);
    for (int i = 1; i < M; i++) {
      Floats size = absolute(x[i]);
      total += size, kept += (Floats)((Ints)size & keep[i]);
    }
    Factor factor = this->factor(total, kept);
    for (int i = 0; i < M; i++) x[i] = factor(x[i]);
  }

  void rescale_by_channel(const Tile& tile, int64_t channel, Floats* x) const {
    for (int i = 0; i < M; i++) {
      Floats factor;
      for (int lane = 0; lane < LANES; lane++) {
        factor[lane] = this->factors[tile.sample[lane] * p.channels + channel + i];
      }
      x[i] = this->scaled(x[i], factor);
    }
  }

  // Scale and round what is kept, and clear the rest.
  void finish(const Ints* keep, Floats* x) const {
    if (IS_DEFAULT || p.is_by_group()) rescale_by_group(x, keep);
    for (int i = 0; i < M && !IS_DEFAULT && p.is_bfloat16; i++) x[i] = round_to_bfloat16(x[i]);
    for (int i = 0; i < M; i++) x[i] = (Floats)((Ints)x[i] & keep[i]);
  }

  // Prune a group of a tile.
  void prune(const Tile& tile, int64_t channel, Floats* x) const {
    Ints key[M], keep[M];
    this->make_keys(tile, channel, x, key);
    mask(x, key, keep);
    if (p.is_by_wider_scope()) rescale_by_channel(tile, channel, x);
    finish(keep, x);
  }

  // Prune a group, wherever it is, by magnitude.
  void prune(Floats* x) const {
    Ints key[M], keep[M];
    for (int i = 0; i < M; i++) key[i] = magnitude_key(x[i]);
    mask(x, key, keep);
    finish(keep, x);
  }
};

// Prune a tile.
template <int M, bool IS_DEFAULT>
void prune_tile(const Gradient& p, const float* factors, int64_t first, int64_t end) {
  InPlace<M, IS_DEFAULT> pruning{{p, p.channels / M, factors}};
  Tile from(p, p.grad_strides, first, end), to(p, p.result_strides, first, end);
  Floats x[STEP];
  for (int64_t begin = 0; begin < p.channels; begin += STEP) {
    int64_t count = std::min(STEP, p.channels - begin);
    from.read(begin, count, x);
    for (int64_t c = 0; c < count; c += M) {
      if constexpr (IS_DEFAULT) pruning.prune(x + c);
      else pruning.prune(from, begin + c, x + c);
    }
    to.write(begin, count, x);
  }
}

// Prune memory without gaps, in groups of up to four, by magnitude. It does not matter which lane a
// group is in, and so much less has to be moved than for a tile.
template <int M, typename T>
void prune_fours(const Gradient& p, int64_t numel) {
  constexpr int64_t VALUES = 4 * LANES, LEAST = 128;
  const int64_t blocks = ceil_div(numel, VALUES);
  InPlace<M, false> pruning{{p, 0, nullptr}};
#pragma omp parallel for schedule(static) num_threads(std::clamp<int64_t>(blocks / LEAST, 1, p.threads))
  for (int64_t block = 0; block < blocks; block++) {
    const T* from = static_cast<const T*>(p.grad_output) + block * VALUES;
    T* to = static_cast<T*>(p.result) + block * VALUES;
    const int64_t count = std::min(VALUES, numel - block * VALUES);
    T last[VALUES] = {};
    Floats x[4];
    if (count < VALUES) from = std::copy(from, from + count, last) - count;
    for (int i = 0; i < 4; i++) x[i] = load(from + i * LANES);
    transpose_fours(x);
    for (int i = 0; i < 4; i += M) pruning.prune(x + i);
    transpose_fours(x);
    for (int i = 0; i < 4; i++) store((count < VALUES ? last : to) + i * LANES, x[i]);
    if (count < VALUES) std::copy(last, last + count, to);
  }
}

// What depends on m.
struct Kernels {
  decltype(&prune_tile<1, true>) prune_tile, prune_tile_by_default;
  decltype(&sum_sample<1, 0>) sum_sample;
  decltype(&prune_fours<1, float>) prune_fours = nullptr, prune_fours_of_bfloat16 = nullptr;
};

template <int M>
constexpr Kernels make_kernels() {
  Kernels of_m{prune_tile<M, false>, prune_tile<M, true>, sum_sample<M, 0>};
  if constexpr (M <= 4) {
    of_m.prune_fours = prune_fours<M, float>;
    of_m.prune_fours_of_bfloat16 = prune_fours<M, BFloat16>;
  }
  return of_m;
}

template <int M>
constexpr Kernels KERNELS = make_kernels<M>();

const Kernels& kernels(int64_t m) {
  switch (m) {
    case 1: return KERNELS<1>;
    case 2: return KERNELS<2>;
    case 4: return KERNELS<4>;
    case 8: return KERNELS<8>;
    case 16: return KERNELS<16>;
    default: return KERNELS<32>;
  }
}

// Whether gradient and result are memory without gaps in which channels are adjacent.
bool is_flat(const Gradient& p) {
  int64_t stride = p.channels;
  bool is_flat = true;
  auto check = [&](int dim, int64_t size, int64_t expected) {
    is_flat &= size == 1 || (p.grad_strides[dim] == expected && p.result_strides[dim] == expected);
  };
  check(1, p.channels, 1);
  for (int d = 2; d >= 0; d--) {
    check(2 + d, p.output_size[d], stride);
    stride *= p.output_size[d];
  }
  check(0, p.samples, stride);
  return is_flat;
}

// The same memory as positions of STEP channels, where nobody asks which channel of which sample a
// value is of.
Gradient flattened(Gradient p, int64_t numel) {
  p.samples = p.output_size[0] = p.output_size[1] = 1;
  p.channels = STEP;
  p.output_size[2] = numel / STEP;
  p.grad_strides[1] = p.result_strides[1] = 1;
  p.grad_strides[4] = p.result_strides[4] = STEP;
  return p;
}

constexpr int64_t TILES = 16;  // For each thread at least.

void prune_tiles(const Gradient& p, const Kernels& of_m) {
  const bool is_default = p.is_by_group() && !p.is_bfloat16;
  const auto prune_tile = is_default ? of_m.prune_tile_by_default : of_m.prune_tile;
  const int64_t positions = p.samples * p.space(), tiles = ceil_div(positions, LANES);
  const int64_t wide = p.is_by_wider_scope() ? p.samples * p.channels : 0;
  std::vector<double> sums(2 * wide);
  std::vector<float> factors(wide);
#pragma omp parallel num_threads(std::clamp<int64_t>(tiles / TILES, 1, p.threads))
  {
    if (wide) {
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t sample = 0; sample < p.samples; sample++) {
        for (int64_t c = 0; c < p.channels; c += STEP) {
          of_m.sum_sample(p, sample, c, &sums[(sample * p.channels + c) * 2]);
        }
      }
      find_factors(p, sums.data(), factors.data());
    }
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < tiles; tile++) {
      prune_tile(p, factors.data(), tile * LANES, positions);
    }
  }
}

void prune(const Gradient& p) {
  const Kernels& of_m = kernels(p.m);
  const int64_t numel = p.samples * p.space() * p.channels;
  const bool can_flatten = is_flat(p) && !p.is_by_wider_scope();
  const bool is_by_magnitude = p.function == MAGNITUDE || p.function == RESCALED_MAGNITUDE;
  const auto prune_fours = p.is_bfloat16 ? of_m.prune_fours_of_bfloat16 : of_m.prune_fours;
  if (can_flatten && is_by_magnitude && prune_fours) prune_fours(p, numel);
  else prune_tiles(can_flatten && numel % STEP == 0 ? flattened(p, numel) : p, of_m);
}

}  // namespace

// All sizes are at least 1.
extern "C" void sdgp_prune_nm(const Gradient* gradient) { prune(*gradient); }

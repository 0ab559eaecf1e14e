// y[n, r, c, o] = sum_(i, j, k) x[n, r + i - h/2, c + j - w/2, k] w[i, j, k, o]: maps [N, H, W, C], odd windows, stride 1, zeros outside.
//
// A task computes a strip of rows. It copies the rows that the strip reads, with their border of zeros, to a buffer that stays in
// cache; there the w K inputs under one row of the window are contiguous, so that each row of the window is a product of pixels
// [P, w K] with weights [w K, O]. About 24 vectors of 16 sums hold P pixels times up to 64 outputs, and no channel count is odd.
// float32 sums; bfloat16 inputs are multiplied in pairs where the machine can (AVX512-BF16), elsewhere they become float32.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kStrip = 8;  // rows of a task
using Vec = float __attribute__((vector_size(64)));

struct Bf16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

// What a sum advances by: one float32 input times a vector of weights.
struct Single {
  using Unit = float;
  static constexpr int64_t kInputs = 1;
  template <class In>
  static Unit unit(const In* x, int64_t, int64_t) { return widen(*x); }
  static inline void step(Vec& sum, const Unit* w, Unit x) {
    Vec weights;
    std::memcpy(&weights, w, sizeof weights);
    sum += weights * x;
  }
};

#if defined(__AVX512BF16__)
// A pair of bfloat16 inputs times a vector of pairs.
struct Pair {
  using Unit = uint32_t;
  static constexpr int64_t kInputs = 2;
  static Unit unit(const Bf16* x, int64_t stride, int64_t left) {
    return x[0].bits | (left > 1 ? static_cast<uint32_t>(x[stride].bits) << 16 : 0u);
  }
  static inline void step(Vec& sum, const Unit* w, Unit x) {
    const __m512i weights = _mm512_loadu_si512(w);
    sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(x));
  }
};
#endif

inline void store(float* y, const Vec& sums, int64_t count) {
  if (count == kLanes) {
    std::memcpy(y, &sums, sizeof sums);
  } else {
    for (int64_t i = 0; i < count; ++i) y[i] = sums[i];
  }
}

inline void store(Bf16* y, const Vec& sums, int64_t count) {  // rounds half to even
#if defined(__AVX512BF16__)
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  _mm256_mask_storeu_epi16(y, mask, (__m256i)_mm512_cvtneps_pbh((__m512)sums));
#else
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    const float value = sums[i];
    std::memcpy(&bits, &value, sizeof bits);
    y[i].bits = value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
#endif
}

struct Shape {
  int64_t batch, height, width, inputs, outputs, rows, columns;  // rows, columns: of the window
  int64_t vectors() const { return (outputs + kLanes - 1) / kLanes; }
};

// Sums of P pixels and V vectors of outputs; pixel p begins `pixel` units after the one before.
template <class T, int P, int V, class Out>
void tile(const typename T::Unit* x, int64_t row, int64_t pixel, int64_t rows, int64_t depth, const typename T::Unit* w, Out* y,
          int64_t outputs, int64_t pixels, int64_t left) {
  Vec sums[P][V] = {};
  for (int64_t i = 0; i < rows; ++i, x += row) {
    for (int64_t k = 0; k < depth; ++k, w += V * kLanes) {
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) T::step(sums[p][v], w + v * kLanes, x[p * pixel + k]);
      }
    }
  }
  for (int64_t p = 0; p < pixels; ++p)
    for (int v = 0; v < V; ++v) store(y + p * outputs + v * kLanes, sums[p][v], std::min(kLanes, left - v * kLanes));
}

// One row of the result for V vectors of outputs.
template <class T, int P, int V, class Out>
void row_of_tiles(const Shape& s, const typename T::Unit* x, int64_t row, int64_t units, const typename T::Unit* w, Out* y, int64_t left) {
  for (int64_t c = 0; c < s.width; c += P)
    tile<T, P, V>(x + c * units, row, units, s.rows, s.columns * units, w, y + c * s.outputs, s.outputs, std::min<int64_t>(P, s.width - c), left);
}

constexpr int64_t kMaxPixels = 12;

template <class T, class Out>
void result_row(const Shape& s, const typename T::Unit* x, int64_t row, int64_t units, const typename T::Unit* w, Out* y) {
  const int64_t taps = s.rows * s.columns * units * kLanes;
  for (int64_t v = 0; v < s.vectors(); v += 4) {
    const int64_t left = s.outputs - v * kLanes;
    const auto *weights = w + v * taps;
    Out* to = y + v * kLanes;
    switch (std::min<int64_t>(4, s.vectors() - v)) {
      case 1: row_of_tiles<T, 12, 1>(s, x, row, units, weights, to, left); break;
      case 2: row_of_tiles<T, 12, 2>(s, x, row, units, weights, to, left); break;
      case 3: row_of_tiles<T, 8, 3>(s, x, row, units, weights, to, left); break;
      default: row_of_tiles<T, 6, 4>(s, x, row, units, weights, to, left);
    }
  }
}

// Weights in the order in which `tile` reads them: groups of at most 4 vectors, then window, units, vectors, lanes.
template <class T, class In>
std::vector<typename T::Unit> packed(const Shape& s, const In* w, int64_t units) {
  std::vector<typename T::Unit> out;
  out.reserve(s.vectors() * s.rows * s.columns * units * kLanes);
  for (int64_t v = 0; v < s.vectors(); v += 4) {
    const int64_t last = std::min(v + 4, s.vectors()) * kLanes;
    for (int64_t tap = 0; tap < s.rows * s.columns; ++tap)
      for (int64_t u = 0; u < units; ++u)
        for (int64_t o = v * kLanes; o < last; ++o) {
          const int64_t k = u * T::kInputs;
          const In* from = w + (tap * s.inputs + k) * s.outputs + o;
          out.push_back(o < s.outputs ? T::unit(from, s.outputs, s.inputs - k) : typename T::Unit{});
        }
  }
  return out;
}

// Row `r` of an image as units between zeros; all zeros outside of the image.
template <class T, class In>
void copy_row(const Shape& s, const In* image, int64_t r, int64_t units, int64_t row, typename T::Unit* to) {
  std::fill(to, to + row, typename T::Unit{});
  if (r < 0 || r >= s.height) return;
  const In* from = image + r * s.width * s.inputs;
  to += s.columns / 2 * units;
  if (units * T::kInputs == s.inputs && sizeof(In) * T::kInputs == sizeof(*to)) {
    std::memcpy(to, from, s.width * s.inputs * sizeof(In));
    return;
  }
  for (int64_t c = 0; c < s.width; ++c, from += s.inputs)
    for (int64_t u = 0; u < units; ++u) *to++ = T::unit(from + u * T::kInputs, 1, s.inputs - u * T::kInputs);
}

template <class T, class In>
void strip(const Shape& s, const In* x, const std::vector<typename T::Unit>& w, int64_t units, int64_t index, In* y) {
  const int64_t per_image = (s.height + kStrip - 1) / kStrip;
  const int64_t image = index / per_image, first = index % per_image * kStrip, last = std::min(first + kStrip, s.height);
  const int64_t row = (s.width + kMaxPixels + s.columns) * units;
  static thread_local std::vector<typename T::Unit> buffer;
  buffer.resize((last - first + s.rows - 1) * row);
  x += image * s.height * s.width * s.inputs;
  y += (image * s.height + first) * s.width * s.outputs;
  for (int64_t r = 0; r < last - first + s.rows - 1; ++r) copy_row<T>(s, x, first - s.rows / 2 + r, units, row, &buffer[r * row]);
  for (int64_t r = 0; r < last - first; ++r) result_row<T>(s, &buffer[r * row], row, units, w.data(), y + r * s.width * s.outputs);
}

// Tasks 0 .. n - 1 on the pool's threads and this one; threads that come too late find nothing left.
void parallel(ffi::ThreadPool& pool, int64_t n, const std::function<void(int64_t)>& work) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  auto drain = [shared, n, &work] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < n; shared->done.fetch_add(1, std::memory_order_release)) work(i);
  };
  for (int64_t t = 1; t < std::min<int64_t>(n, pool.num_threads()); ++t) pool.Schedule([drain] { drain(); });
  drain();
  while (shared->done.load(std::memory_order_acquire) < n) std::this_thread::yield();
}

template <class T, class In>
void convolve(ffi::ThreadPool& pool, const Shape& s, const void* x, const void* w, void* y) {
  const int64_t units = (s.inputs + T::kInputs - 1) / T::kInputs;
  const auto weights = packed<T>(s, static_cast<const In*>(w), units);
  const int64_t strips = s.batch * ((s.height + kStrip - 1) / kStrip);
  parallel(pool, strips, [&](int64_t i) { strip<T>(s, static_cast<const In*>(x), weights, units, i, static_cast<In*>(y)); });
}

ffi::Error run(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> y) {
  const auto a = x.dimensions(), k = w.dimensions();
  if (a.size() != 4 || k.size() != 4 || k[2] != a[3] || k[0] % 2 == 0 || k[1] % 2 == 0 || w.element_type() != x.element_type())
    return ffi::Error::InvalidArgument("expected x [N, H, W, I] and a kernel [h, w, I, O] of one dtype, h and w odd");
  const Shape shape{a[0], a[1], a[2], a[3], k[3], k[0], k[1]};
  switch (x.element_type()) {
    case ffi::F32:
      convolve<Single, float>(pool, shape, x.untyped_data(), w.untyped_data(), y->untyped_data());
      return ffi::Error::Success();
    case ffi::BF16:
#if defined(__AVX512BF16__)
      convolve<Pair, Bf16>(pool, shape, x.untyped_data(), w.untyped_data(), y->untyped_data());
#else
      convolve<Single, Bf16>(pool, shape, x.untyped_data(), w.untyped_data(), y->untyped_data());
#endif
      return ffi::Error::Success();
    default:
      return ffi::Error::InvalidArgument("expected float32 or bfloat16");
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Convolution, run,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());

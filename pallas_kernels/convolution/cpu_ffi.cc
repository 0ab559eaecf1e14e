// y[n, r, c, o] = join(act(sum_(i, j, k) x[n, r + i - h/2, c + j - w/2, k] w[i, j, k, o] + bias[o]), z[n, r, c, o]): maps
// [N, H, W, C], odd windows, stride 1, zeros outside. x is made of ranges of channels of one or several maps, side by side; every
// range but the last has an even number of channels, so that pairs do not straddle two.
//
// A task computes a strip of rows. It copies the rows that the strip reads, with their border of zeros, to a buffer that stays in
// cache; there the ranges stand side by side and the w K inputs under one row of the window are contiguous, so that each row of
// the window is a product of pixels [P, w K] with weights [w K, O]. About 24 vectors of 16 sums hold P pixels times 32 to 64
// outputs, and no channel count is odd.
// float32 sums; bfloat16 inputs are multiplied in pairs where the machine can (AVX512-BF16), elsewhere they become float32.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "cpu_vectors.cc"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kCachedWeights = 11264;  // units, 44 KiB: what a core keeps beside a tile
constexpr int64_t kStrip = 8;  // rows of a task

// Channels [start, start + width) of a map of `channels`.
struct View {
  const void* map;
  int64_t channels, start, width;
};

struct Shape {
  int64_t batch, height, width, inputs, outputs, rows, columns;  // rows, columns: of the window
  int64_t vectors() const { return (outputs + kLanes - 1) / kLanes; }
  // Vectors of outputs that are computed at once: 2 where the weights of more would not stay in the first cache.
  int64_t group(int64_t units) const {
    return rows * columns * units * std::min<int64_t>(4, vectors()) * kLanes > kCachedWeights ? 2 : 4;
  }
};

// Results of P pixels and V vectors from `output` on; pixel p begins `pixel` units after the one before. `at`: of the first
// result.
template <class T, int P, int V, class Out>
void tile(const Shape& s, const typename T::Unit* x, int64_t row, int64_t pixel, const typename T::Unit* w, Out* y, int64_t at,
          int64_t output, int64_t pixels, const Epilogue<Out>& epilogue) {
  const int64_t depth = s.columns * pixel;
  Vec sums[P][V] = {};
  for (int64_t i = 0; i < s.rows; ++i, x += row) {
    for (int64_t k = 0; k < depth; ++k, w += V * kLanes) {
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) T::step(sums[p][v], w + v * kLanes, x[p * pixel + k]);
      }
    }
  }
  for (int64_t p = 0; p < pixels; ++p, at += s.outputs) {
    for (int v = 0; v < V; ++v) {
      const int64_t count = std::min(kLanes, s.outputs - output - v * kLanes);
      store(y + at + v * kLanes, epilogue(sums[p][v], output + v * kLanes, at + v * kLanes, count), count);
    }
  }
}

// One row of the result for V vectors of outputs.
template <class T, int P, int V, class Out>
void row_of_tiles(const Shape& s, const typename T::Unit* x, int64_t row, int64_t units, const typename T::Unit* w, Out* y,
                  int64_t at, int64_t output, const Epilogue<Out>& epilogue) {
  for (int64_t c = 0; c < s.width; c += P)
    tile<T, P, V>(s, x + c * units, row, units, w, y, at + c * s.outputs, output, std::min<int64_t>(P, s.width - c), epilogue);
}

constexpr int64_t kMaxPixels = 12;

template <class T, class Out>
void result_row(const Shape& s, const typename T::Unit* x, int64_t row, int64_t units, const typename T::Unit* w, Out* y,
                int64_t at, const Epilogue<Out>& epilogue) {
  const int64_t taps = s.rows * s.columns * units * kLanes;
  for (int64_t v = 0; v < s.vectors(); v += s.group(units)) {
    const int64_t output = v * kLanes;
    const auto *weights = w + v * taps;
    switch (std::min(s.group(units), s.vectors() - v)) {
      case 1: row_of_tiles<T, 12, 1>(s, x, row, units, weights, y, at + output, output, epilogue); break;
      case 2: row_of_tiles<T, 12, 2>(s, x, row, units, weights, y, at + output, output, epilogue); break;
      case 3: row_of_tiles<T, 8, 3>(s, x, row, units, weights, y, at + output, output, epilogue); break;
      default: row_of_tiles<T, 6, 4>(s, x, row, units, weights, y, at + output, output, epilogue);
    }
  }
}

// Weights in the order in which `tile` reads them: groups of at most 4 vectors, then window, units, vectors, lanes.
template <class T, class In>
std::vector<typename T::Unit> packed(const Shape& s, const In* w, int64_t units) {
  std::vector<typename T::Unit> out;
  out.reserve(s.vectors() * s.rows * s.columns * units * kLanes);
  for (int64_t v = 0; v < s.vectors(); v += s.group(units)) {
    const int64_t last = std::min(v + s.group(units), s.vectors()) * kLanes;
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

// A range of channels of `width` pixels as units, `units` apart.
template <class T, class In>
void copy_view(const In* from, const View& view, int64_t width, int64_t units, typename T::Unit* to) {
  constexpr int64_t kBlock = 32;
  const int64_t bytes = view.width * sizeof(In);
  const bool whole = view.width % T::kInputs == 0 && sizeof(In) * T::kInputs == sizeof(*to);
  if (whole && view.width == view.channels && view.width == units * T::kInputs) {
    std::memcpy(to, from, width * bytes);
    return;
  }
  for (int64_t c = 0; c < width; ++c, from += view.channels, to += units) {
    if (whole) {
      auto *target = reinterpret_cast<char*>(to);
      const auto *source = reinterpret_cast<const char*>(from);
      int64_t b = 0;
      for (; b + kBlock <= bytes; b += kBlock) std::memcpy(target + b, source + b, kBlock);
      std::memcpy(target + b, source + b, bytes - b);
    } else {
      for (int64_t k = 0; k < view.width; k += T::kInputs) to[k / T::kInputs] = T::unit(from + k, 1, view.width - k);
    }
  }
}

// Row `r` of image `n` as units between zeros; all zeros outside of the image.
template <class T, class In>
void copy_row(const Shape& s, const std::vector<View>& views, int64_t n, int64_t r, int64_t units, int64_t row,
              typename T::Unit* to) {
  typename T::Unit* const end = to + row;
  if (r >= 0 && r < s.height) {
    to = std::fill_n(to, s.columns / 2 * units, typename T::Unit{});
    int64_t before = 0;
    for (const View& view : views) {
      const In* from = static_cast<const In*>(view.map) + (n * s.height + r) * s.width * view.channels + view.start;
      copy_view<T>(from, view, s.width, units, to + before / T::kInputs);
      before += view.width;
    }
    to += s.width * units;
  }
  std::fill(to, end, typename T::Unit{});
}

// Whether the units of a map can be read where they are: one pixel's window, one whole map, and units as they are in memory.
template <class T, class In>
bool in_place(const Shape& s, const std::vector<View>& views, int64_t units) {
  return s.rows * s.columns == 1 && views.size() == 1 && views[0].width == views[0].channels &&
         views[0].width == units * T::kInputs && sizeof(In) * T::kInputs == sizeof(typename T::Unit);
}

template <class T, class In>
void strip(const Shape& s, const std::vector<View>& views, const std::vector<typename T::Unit>& w, int64_t units, int64_t index,
           In* y, const Epilogue<In>& epilogue) {
  const int64_t per_image = (s.height + kStrip - 1) / kStrip;
  const int64_t image = index / per_image, first = index % per_image * kStrip, last = std::min(first + kStrip, s.height);
  const int64_t pixel = (image * s.height + first) * s.width;
  const int64_t end = pixel + (last - first) * s.width;
  if (in_place<T, In>(s, views, units) && end + kMaxPixels <= s.batch * s.height * s.width) {  // tiles read beyond a row
    const auto *in = static_cast<const typename T::Unit*>(views[0].map);
    for (int64_t p = pixel; p < end; p += s.width)
      result_row<T>(s, in + p * units, 0, units, w.data(), y, p * s.outputs, epilogue);
    return;
  }
  const int64_t row = (s.width + kMaxPixels + s.columns) * units;
  static thread_local std::vector<typename T::Unit> buffer;
  buffer.resize((last - first + s.rows - 1) * row);
  for (int64_t r = 0; r < last - first + s.rows - 1; ++r)
    copy_row<T, In>(s, views, image, first - s.rows / 2 + r, units, row, &buffer[r * row]);
  for (int64_t r = 0; r < last - first; ++r)
    result_row<T>(s, &buffer[r * row], row, units, w.data(), y, (pixel + r * s.width) * s.outputs, epilogue);
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

// What an FFI call says about its epilogue and views.
struct Request {
  std::vector<View> views;
  Activation activation;
  Join join;
  float slope;
  const void *bias, *other;
};

template <class T, class In>
void convolve(ffi::ThreadPool& pool, const Shape& s, const Request& request, const void* w, void* y) {
  const int64_t units = (s.inputs + T::kInputs - 1) / T::kInputs;
  const auto weights = packed<T>(s, static_cast<const In*>(w), units);
  const auto *bias = static_cast<const In*>(request.bias);
  Epilogue<In> epilogue{request.activation, request.join, request.slope, {}, static_cast<const In*>(request.other)};
  epilogue.bias.resize(s.vectors() * kLanes);
  for (int64_t o = 0; o < s.outputs; ++o) epilogue.bias[o] = widen(bias[o]);
  const int64_t strips = s.batch * ((s.height + kStrip - 1) / kStrip);
  parallel(pool, strips, [&](int64_t i) { strip<T>(s, request.views, weights, units, i, static_cast<In*>(y), epilogue); });
}

using Ints = ffi::Span<const int64_t>;

// maps: those of the views, and the other map if there is one.
ffi::Error run(ffi::ThreadPool pool, ffi::AnyBuffer w, ffi::AnyBuffer bias, ffi::RemainingArgs maps,
               ffi::Result<ffi::AnyBuffer> y, Ints starts, Ints widths, int32_t activation, int32_t join, float slope) {
  const auto k = w.dimensions(), out = y->dimensions();
  const bool joined = join != kNone;
  if (k.size() != 4 || out.size() != 4 || k[0] % 2 == 0 || k[1] % 2 == 0 || bias.element_count() != k[3] || out[3] != k[3] ||
      starts.size() != widths.size() || maps.size() != starts.size() + joined || w.element_type() != bias.element_type())
    return ffi::Error::InvalidArgument("expected a kernel [h, w, I, O], h and w odd, a bias [O] and one map for every range");
  Request request{{}, static_cast<Activation>(activation), static_cast<Join>(join), slope, bias.untyped_data(), nullptr};
  int64_t inputs = 0;
  for (size_t i = 0; i < maps.size(); ++i) {
    const auto map = *maps.get<ffi::AnyBuffer>(i);
    const auto a = map.dimensions();
    const bool other = i == starts.size();
    if (a.size() != 4 || a[0] != out[0] || a[1] != out[1] || a[2] != out[2] || map.element_type() != w.element_type() ||
        (other ? a[3] != out[3] : starts[i] < 0 || widths[i] < 1 || starts[i] + widths[i] > a[3] || inputs % 2))
      return ffi::Error::InvalidArgument("expected maps [N, H, W, C] of the kernel's dtype that hold their ranges of channels");
    if (other) {
      request.other = map.untyped_data();
    } else {
      request.views.push_back({map.untyped_data(), a[3], starts[i], widths[i]});
      inputs += widths[i];
    }
  }
  if (inputs != k[2]) return ffi::Error::InvalidArgument("expected ranges of as many channels as the kernel has inputs");
  const Shape shape{out[0], out[1], out[2], inputs, k[3], k[0], k[1]};
  switch (w.element_type()) {
    case ffi::F32:
      convolve<Single, float>(pool, shape, request, w.untyped_data(), y->untyped_data());
      return ffi::Error::Success();
    case ffi::BF16:
#if defined(__AVX512BF16__)
      convolve<Pair, Bf16>(pool, shape, request, w.untyped_data(), y->untyped_data());
#else
      convolve<Single, Bf16>(pool, shape, request, w.untyped_data(), y->untyped_data());
#endif
      return ffi::Error::Success();
    default:
      return ffi::Error::InvalidArgument("expected float32 or bfloat16");
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Convolution, run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<Ints>("starts")
                                  .Attr<Ints>("widths")
                                  .Attr<int32_t>("activation")
                                  .Attr<int32_t>("join")
                                  .Attr<float>("slope"));

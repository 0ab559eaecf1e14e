// The XLA call of the convolution of `cpu_layer.cc`: checks, threads, memory.
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../threads.cc"
#include "cpu_layer.cc"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Asks for huge pages, those at the ends included: a result is often fresh memory, and in a block that it shares with others;
// faults of small pages would take a tenth of a network's time.
void use_huge_pages(void* start, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 1 << 21;
  if (bytes < static_cast<int64_t>(kPage)) return;
  const uintptr_t first = reinterpret_cast<uintptr_t>(start) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(start) + bytes + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// What an FFI call says about its epilogue and views.
struct Request {
  std::vector<View> views;
  Activation activation;
  Join join;
  float slope;
  const void *bias, *other;
  int64_t other_height, other_width;
};

template <class T, class In>
void convolve(ffi::ThreadPool& pool, const Shape& s, const Request& request, const void* w, void* y) {
  const bool resized = request.join == kAddResized;
  const int64_t pixel = s.outputs, row = request.other_width * pixel, image = request.other_height * row;
  Epilogue<In> epilogue{request.activation, request.join, request.slope, static_cast<const In*>(request.other), image, row, pixel};
  if (resized) epilogue.rows = stretched(request.other_height, s.height, row);
  if (resized) epilogue.columns = stretched(request.other_width, s.width, pixel);
  use_huge_pages(y, s.batch * s.height * s.width * s.outputs * sizeof(In));
  const auto *weights = static_cast<const In*>(w), *bias = static_cast<const In*>(request.bias);
  const Layer<T, In> layer(s, request.views, weights, bias, std::move(epilogue), static_cast<In*>(y));
  const auto tasks = strips(s, std::max<int64_t>(1, pool.num_threads()));
  parallel(pool, tasks.size(), [&](int64_t i) { layer.compute(tasks[i]); });
}

using Ints = ffi::Span<const int64_t>;

// Whether the last window of a dimension begins inside the map, and the first ends there.
bool fits(int64_t map, int64_t window, int64_t before, int64_t stride, int64_t out) {
  return window > 0 && out > 0 && stride > 0 && before >= 0 && before < window && (out - 1) * stride - before < map;
}

// maps: those of the views, and the other map if there is one; padding: zeros above and left of the maps.
ffi::Error run(ffi::ThreadPool pool, ffi::AnyBuffer w, ffi::AnyBuffer bias, ffi::RemainingArgs maps,
               ffi::Result<ffi::AnyBuffer> y, Ints starts, Ints widths, int64_t stride, Ints padding, int32_t activation,
               int32_t join, float slope) {
  const auto k = w.dimensions(), out = y->dimensions();
  const bool joined = join != kNone;
  if (k.size() != 4 || out.size() != 4 || padding.size() != 2 || bias.element_count() != k[3] || out[3] != k[3] ||
      starts.size() < 1 || starts.size() != widths.size() || maps.size() != starts.size() + joined ||
      w.element_type() != bias.element_type())
    return ffi::Error::InvalidArgument("expected a kernel [h, w, I, O], a bias [O] and one map for every range");
  Shape shape{out[0], out[1], out[2], 0, k[3], k[0], k[1], 0, 0, stride, padding[0], padding[1]};
  Request request{{}, static_cast<Activation>(activation), static_cast<Join>(join), slope, bias.untyped_data()};
  for (size_t i = 0; i < maps.size(); ++i) {
    const auto map = *maps.get<ffi::AnyBuffer>(i);
    const auto a = map.dimensions();
    if (a.size() != 4 || a[0] != out[0] || map.element_type() != w.element_type())
      return ffi::Error::InvalidArgument("expected maps [N, H, W, C] of the kernel's dtype");
    if (i == starts.size()) {
      const bool resized = join == kAddResized && a[1] > 0 && a[2] > 0;
      if (a[3] != out[3] || !(resized || (a[1] == out[1] && a[2] == out[2])))
        return ffi::Error::InvalidArgument("expected the other map to have the shape of the result");
      request.other = map.untyped_data(), request.other_height = a[1], request.other_width = a[2];
      continue;
    }
    if (i == 0) shape.map_height = a[1], shape.map_width = a[2];
    if (a[1] != shape.map_height || a[2] != shape.map_width || starts[i] < 0 || widths[i] < 1 ||
        starts[i] + widths[i] > a[3] || shape.inputs % 2)
      return ffi::Error::InvalidArgument("expected maps of one size that hold their ranges of channels");
    request.views.push_back({map.untyped_data(), a[3], starts[i], widths[i]});
    shape.inputs += widths[i];
  }
  if (shape.inputs != k[2] || !fits(shape.map_height, k[0], padding[0], stride, out[1]) ||
      !fits(shape.map_width, k[1], padding[1], stride, out[2]))
    return ffi::Error::InvalidArgument("expected ranges of as many channels as the kernel has inputs, and windows in the maps");
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
                                  .Attr<int64_t>("stride")
                                  .Attr<Ints>("padding")
                                  .Attr<int32_t>("activation")
                                  .Attr<int32_t>("join")
                                  .Attr<float>("slope"));

// y[n, r, c, o] = join(act(sum_(i, j, k) x[n, s r + i - top, s c + j - left, k] w[i, j, k, o] + bias[o]), z[n, r, c, o]): maps
// [N, H, W, C], stride s, zeros outside. x is made of ranges of channels of one or several maps, side by side; every range but
// the last has an even number of channels, so that pairs do not straddle two.
//
// A task computes a strip of rows, a tile the sums of P pixels times up to 64 outputs, held in about 24 vectors of 16. Its inner
// loop multiplies the P pixels under one element of the window, read where they are in the map, with a vector of weights per 16
// outputs; up to 4 outputs beyond 48 take a vector for every 4 pixels. Copied are only pixels at the left and right border, with
// zeros around them, and maps that are no units of the sums or are made of several ranges under a larger window: whole rows.
// What a tile will join and overwrite, and what a later tile will read first, is fetched ahead: the maps of a network are larger
// than caches, and hardware does not foresee that a range of channels skips a part of every pixel.
// float32 sums; bfloat16 inputs are multiplied in pairs where the machine can (AVX512-BF16), elsewhere they become float32.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu_epilogue.cc"

namespace {

constexpr int64_t kStrip = 8;       // rows of a task, at most
constexpr int64_t kGroup = 4;       // vectors of outputs that are computed at once, at most
constexpr int64_t kMaxPixels = 12;  // of a tile
constexpr int64_t kAhead = 16;      // pixels from a tile to the input that is fetched meanwhile
constexpr int64_t kShort = 64;      // steps of a tile; in fewer, a line that is written does not arrive from memory by itself
constexpr int64_t kRest = 4;        // outputs beyond whole vectors that share one vector with those of other pixels, at most

// Channels [start, start + width) of a map of `channels`.
struct View {
  const void* map;
  int64_t channels, start, width;
};

// height, width: of the result; rows, columns: of the window; top, left: zeros before the map, fewer than the window has.
struct Shape {
  int64_t batch, height, width, inputs, outputs, rows, columns, map_height, map_width, stride, top, left;
  int64_t vectors() const { return (outputs + kLanes - 1) / kLanes; }
  int64_t taps() const { return rows * columns; }
};

// Rows [first, last) of an image.
struct Strip {
  int64_t image, first, last;
};

// What a row of the window reads, or a part of it, for the pixel at the left end: `depth` units on end. `row`, `pixel`: units
// from one row and from one pixel of the map to the next; `fetched`: units of a pixel that are fetched ahead.
template <class Unit>
struct Part {
  const Unit* x;
  int64_t row, pixel, depth, fetched;
};

template <class Unit>
using Source = std::vector<Part<Unit>>;

// Of P pixels: V vectors each, and a last one where a rest is spread to; before that, a vector holds the rests of kRest pixels.
template <int P, int V, bool Rest>
struct Sums {
  Vec whole[P][V + Rest], rests[P / kRest];
};

template <class T, class In>
class Layer {
 public:
  using Unit = typename T::Unit;

  Layer(const Shape& shape, const std::vector<View>& views, const In* w, const In* bias, Epilogue<In> epilogue, In* y)
      : s(shape), views(views), units((s.inputs + T::kInputs - 1) / T::kInputs), weights(packed(w)), biases(widened(bias)),
        epilogue(std::move(epilogue)), y(y) {
    constexpr bool as_in_memory = sizeof(In) * T::kInputs == sizeof(Unit);
    in_place = as_in_memory && (views.size() == 1 || s.taps() == 1);
    for (const View& view : views) in_place = in_place && view.channels % T::kInputs == 0 && view.width % T::kInputs == 0;
  }

  void compute(const Strip& strip) const {
    Source<Unit> source = in_place ? maps(strip) : copied(strip);
    for (int64_t r = strip.first; r < strip.last; ++r) {
      for (int64_t v = 0; v < s.vectors(); v += kGroup) {
        switch (std::min(kGroup, s.vectors() - v)) {
          case 1: row<12, 1>(source, strip.image, r, v); break;
          case 2: row<12, 2>(source, strip.image, r, v); break;
          case 3: row<8, 3>(source, strip.image, r, v); break;
          default: has_rest(v) ? row<8, 3, true>(source, strip.image, r, v) : row<6, 4>(source, strip.image, r, v);
        }
      }
      for (Part<Unit>& part : source) part.x += s.stride * part.row;
    }
  }

 private:
  const Shape s;
  const std::vector<View>& views;
  const int64_t units;  // of a pixel
  const Aligned<Unit> weights;
  const Aligned<Vec> biases;
  const Epilogue<In> epilogue;
  In* const y;
  bool in_place;

  // Whether the last of four vectors from v on would hold at most kRest outputs.
  bool has_rest(int64_t v) const {
    const int64_t left = s.outputs - (v + kGroup - 1) * kLanes;
    return left > 0 && left <= kRest;
  }

  // One row of the result for V vectors of outputs from v on, and the rest behind them.
  template <int P, int V, bool Rest = false>
  void row(const Source<Unit>& source, int64_t image, int64_t r, int64_t v) const {
    for (int64_t c = 0; c < s.width; c += P) {
      const int64_t begin = c * s.stride - s.left;
      if (!in_place || (begin >= 0 && begin + (P - 1) * s.stride + s.columns <= s.map_width)) {
        tile<P, V, Rest>(source.data(), source.data() + source.size(), c, image, r, c, v);
      } else {
        const Part<Unit> part = border(image, r, begin, (P - 1) * s.stride + s.columns);
        tile<P, V, Rest>(&part, &part + 1, 0, image, r, c, v);
      }
    }
  }

  // `first`: of the tile's pixels, counted from the one where the parts [begin, end) begin.
  template <int P, int V, bool Rest>
  void tile(const Part<Unit>* begin, const Part<Unit>* end, int64_t first, int64_t image, int64_t r, int64_t c, int64_t v) const {
    const int64_t at = ((image * s.height + r) * s.width + c) * s.outputs;
    fetch<P>(begin, end, first * s.stride, at);
    Sums<P, V, Rest> sums;
    multiply(begin, end, first, r, v, sums);
    finish(sums, {image, r, c, std::min<int64_t>(P, s.width - c), v * kLanes}, y + at + v * kLanes);
  }

  // Not inlined, so that the sums have all registers for themselves.
  template <int P, int V, bool Rest>
  __attribute__((noinline)) void multiply(const Part<Unit>* begin, const Part<Unit>* end, int64_t first, int64_t r, int64_t v,
                                          Sums<P, V, Rest>& found) const {
    constexpr int64_t kStep = (V + Rest) * kLanes;
    const int64_t outside = s.top - r * s.stride;  // rows of the window above the map
    const int64_t top = std::max<int64_t>(0, outside), bottom = std::min(s.rows, s.map_height + outside);
    const Unit* w = &weights[v * s.taps() * units * kLanes + top * s.columns * units * kStep];
    Vec sums[P][V], rests[P / kRest], mixed;
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int q = 0; q < V; ++q) sums[p][q] = biases[v + q];
#pragma GCC unroll 4
    for (int i = 0; Rest && i < P / kRest; ++i) rests[i] = biases[v + V];
    for (int64_t i = top; i < bottom; ++i) {
      for (const Part<Unit>* part = begin; part < end; ++part) {
        const int64_t step = part->pixel * s.stride, depth = part->depth;
        const Unit* x = part->x + i * part->row + first * step;
        for (int64_t k = 0; k < depth; ++k, w += kStep) {
#pragma GCC unroll 16
          for (int p = 0; p < P; ++p) {
            const Vec input = T::spread(x[p * step + k]);
#pragma GCC unroll 4
            for (int q = 0; q < V; ++q) T::step(sums[p][q], w + q * kLanes, input);
            if (Rest) {
              mixed = p % kRest ? with_quarter(mixed, input, p % kRest) : input;
              if (p % kRest == kRest - 1) T::step(rests[p / kRest], w + V * kLanes, mixed);
            }
          }
        }
      }
    }
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int q = 0; q < V; ++q) found.whole[p][q] = sums[p][q];
#pragma GCC unroll 4
    for (int i = 0; Rest && i < P / kRest; ++i) found.rests[i] = rests[i];
  }

  // Activates, joins and stores the sums of a tile.
  template <int P, int V, bool Rest>
  void finish(Sums<P, V, Rest>& sums, Place place, In* to) const {
    constexpr int kVectors = V + Rest;
    const bool join_first = epilogue.join == kAddFirst;
    for (int p = 0; p < P && !join_first; ++p) epilogue.activate(sums.whole[p], V);
    if (Rest) {
      if (!join_first) epilogue.activate(sums.rests, P / kRest);
      for (int p = 0; p < P; ++p) sums.whole[p][V] = quarter(sums.rests[p / kRest], p % kRest);
    }
    place.last = std::min(kLanes, s.outputs - place.output - (kVectors - 1) * kLanes);
    epilogue.combine(sums.whole, place);
    for (int64_t p = 0; p < place.pixels; ++p, to += s.outputs) {
      if (join_first) epilogue.activate(sums.whole[p], kVectors);
      for (int q = 0; q < kVectors; ++q) store(to + q * kLanes, sums.whole[p][q], q < kVectors - 1 ? kLanes : place.last);
    }
  }

  // Asks for the lines that a tile joins and writes from element `at` on, and for the last row of a later tile's window. Must be
  // inlined: a compiler may drop a call that only prefetches.
  template <int P>
  __attribute__((always_inline)) void fetch(const Part<Unit>* begin, const Part<Unit>* end, int64_t first, int64_t at) const {
    constexpr int64_t kLine = 64;
    for (int64_t i = 0; i < P * s.outputs; i += kLine / sizeof(In)) {
      if (s.taps() * units < kShort) __builtin_prefetch(y + at + i, 1);
      if (epilogue.join != kNone && epilogue.join != kAddResized) __builtin_prefetch(epilogue.other + at + i);
    }
    for (const Part<Unit>* part = begin; part < end; ++part) {
      const Unit* x = part->x + (s.rows - 1) * part->row + (first + kAhead * s.stride) * part->pixel;
      for (int64_t p = 0; p < P * s.stride; ++p, x += part->pixel)
        for (int64_t k = 0; k < part->fetched; k += kLine / sizeof(Unit)) __builtin_prefetch(x + k);
    }
  }

  // The maps themselves, from the window of the strip's first row on.
  Source<Unit> maps(const Strip& strip) const {
    Source<Unit> source;
    for (const View& view : views) {
      const int64_t pixel = view.channels / T::kInputs, row = s.map_width * pixel;
      const int64_t first = (strip.image * s.map_height + strip.first * s.stride - s.top) * row - s.left * pixel;
      const auto *x = reinterpret_cast<const Unit*>(static_cast<const In*>(view.map) + view.start) + first;
      const bool contiguous = pixel == units;  // from column to column of the window
      const int64_t parts = contiguous ? 1 : s.columns, depth = view.width / T::kInputs;
      for (int64_t j = 0; j < parts; ++j)
        source.push_back({x + j * pixel, row, pixel, contiguous ? s.columns * depth : depth, depth == pixel || j ? 0 : depth});
    }
    return source;
  }

  // The rows that a strip reads, with their border.
  Source<Unit> copied(const Strip& strip) const {
    static thread_local std::vector<Unit> buffer;
    const int64_t first = strip.first * s.stride - s.top, rows = (strip.last - strip.first - 1) * s.stride + s.rows;
    const int64_t pixels = (s.width + kMaxPixels) * s.stride + s.columns;
    buffer.resize(rows * pixels * units);
    for (int64_t r = 0; r < rows; ++r) copy_pixels(strip.image, first + r, -s.left, pixels, &buffer[r * pixels * units]);
    return {{buffer.data(), pixels * units, units, s.columns * units, 0}};
  }

  // The pixels that a tile at the border reads, from column c of the map on.
  Part<Unit> border(int64_t image, int64_t r, int64_t c, int64_t pixels) const {
    static thread_local std::vector<Unit> buffer;
    buffer.resize(s.rows * pixels * units);
    for (int64_t i = 0; i < s.rows; ++i)
      copy_pixels(image, r * s.stride + i - s.top, c, pixels, &buffer[i * pixels * units]);
    return {buffer.data(), pixels * units, units, s.columns * units, 0};
  }

  // Pixels [c, c + count) of row r, zeros beside the image; nothing of a row outside of it, which nobody reads.
  void copy_pixels(int64_t image, int64_t r, int64_t c, int64_t count, Unit* to) const {
    if (r < 0 || r >= s.map_height) return;
    const int64_t first = std::max<int64_t>(c, 0), last = std::min(c + count, s.map_width);
    Unit* const inside = std::fill_n(to, (first - c) * units, Unit{});
    int64_t before = 0;
    for (const View& view : views) {
      const int64_t pixel = (image * s.map_height + r) * s.map_width + first;
      const In* from = static_cast<const In*>(view.map) + pixel * view.channels + view.start;
      copy_view(from, view, last - first, inside + before / T::kInputs);
      before += view.width;
    }
    std::fill(inside + (last - first) * units, to + count * units, Unit{});
  }

  // A range of channels of some pixels.
  void copy_view(const In* from, const View& view, int64_t pixels, Unit* to) const {
    constexpr int64_t kBlock = 32;
    const int64_t bytes = view.width * sizeof(In);
    const bool whole = view.width % T::kInputs == 0 && sizeof(In) * T::kInputs == sizeof(Unit);
    for (int64_t c = 0; c < pixels; ++c, from += view.channels, to += units) {
      __builtin_prefetch(from + 16 * view.channels);
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

  // The output that lane `o % kLanes` of a vector stands for: the vector of a rest holds it once for each pixel that it serves.
  int64_t output(int64_t o) const {
    const int64_t v = o / kLanes;
    return v % kGroup == kGroup - 1 && has_rest(v - v % kGroup) ? v * kLanes + o % kRest : o;
  }

  Aligned<Vec> widened(const In* bias) const {
    Aligned<Vec> out(s.vectors());
    for (int64_t o = 0; o < s.vectors() * kLanes; ++o)
      out[o / kLanes][o % kLanes] = output(o) < s.outputs ? widen(bias[output(o)]) : 0.f;
    return out;
  }

  // Weights in the order in which `tile` reads them: groups of vectors, then window, units, vectors, lanes.
  Aligned<Unit> packed(const In* w) const {
    Aligned<Unit> out;
    out.reserve(s.vectors() * s.taps() * units * kLanes);
    for (int64_t v = 0; v < s.vectors(); v += kGroup) {
      const int64_t last = std::min(v + kGroup, s.vectors()) * kLanes;
      for (int64_t tap = 0; tap < s.taps(); ++tap)
        for (int64_t u = 0; u < units; ++u)
          for (int64_t o = v * kLanes; o < last; ++o) {
            const int64_t k = u * T::kInputs, column = output(o);
            const In* from = w + (tap * s.inputs + k) * s.outputs + column;
            out.push_back(column < s.outputs ? T::unit(from, s.outputs, s.inputs - k) : Unit{});
          }
    }
    return out;
  }
};

// All rows of all images; strips become thin towards the end, so that the threads finish together.
std::vector<Strip> strips(const Shape& s, int64_t threads) {
  std::vector<Strip> found;
  for (int64_t n = 0; n < s.batch; ++n) {
    for (int64_t r = 0, last; r < s.height; r = last) {
      const int64_t left = (s.batch - n) * s.height - r;
      last = std::min(s.height, r + std::clamp<int64_t>(left / (2 * threads), 1, kStrip));
      found.push_back({n, r, last});
    }
  }
  return found;
}

}  // namespace

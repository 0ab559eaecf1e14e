// What happens to the sums of some pixels before they are rounded: activation, and a map that is joined.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu_vectors.cc"

namespace {

// Where a place of a line that is stretched to another length lies between two of its own: (1 - t) * first + t * second.
struct Between {
  int64_t first, second;
  float t;
};

// All places of a line of `size` that is stretched to `length`, in units of `step`: centres at half pixels, ends repeated.
inline std::vector<Between> stretched(int64_t size, int64_t length, int64_t step) {
  std::vector<Between> places;
  for (int64_t i = 0; i < length; ++i) {
    const double x = std::clamp((i + 0.5) * size / length - 0.5, 0.0, size - 1.0);
    const auto first = static_cast<int64_t>(x);
    places.push_back({first * step, std::min(first + 1, size - 1) * step, static_cast<float>(x - first)});
  }
  return places;
}

enum Activation : int32_t { kIdentity, kLeakyRelu, kSigmoid };
enum Join : int32_t { kNone, kAdd, kMultiply, kAddFirst, kAddResized };

// Pixels of a row of the result, and the outputs of each that are meant: the last of their vectors holds `last`.
struct Place {
  int64_t image, row, column, pixels, output, last;
};

// The other map has the shape of the result, or is resized to it.
template <class Out>
struct Epilogue {
  Activation activation;
  Join join;
  float slope;
  const Out* other;
  int64_t other_image, other_row, other_pixel;  // elements of the other map
  std::vector<Between> rows, columns;           // of the other map, if it is resized

  void activate(Vec* y, int64_t vectors) const {
    if (activation == kLeakyRelu)
      for (int64_t i = 0; i < vectors; ++i) y[i] = y[i] < 0.f ? (slope == 0.f ? Vec{} : y[i] * slope) : y[i];
    if (activation == kSigmoid)
      for (int64_t i = 0; i < vectors; ++i) y[i] = sigmoid(y[i]);
  }

  template <int V>
  void combine(Vec (*y)[V], const Place& place) const {
    switch (join) {
      case kNone: return;
      case kAdd:
      case kAddFirst: return each(y, place, [](Vec& sum, Vec z) { sum += z; });
      case kMultiply: return each(y, place, [](Vec& sum, Vec z) { sum *= z; });
      case kAddResized: return add_resized(y, place);
    }
  }

 private:
  template <int V, class F>
  void each(Vec (*y)[V], const Place& place, F f) const {
    const Out* z = other + place.image * other_image + place.row * other_row + place.column * other_pixel + place.output;
    for (int64_t p = 0; p < place.pixels; ++p, z += other_pixel)
      for (int q = 0; q < V; ++q) f(y[p][q], load(z + q * kLanes, q < V - 1 ? kLanes : place.last));
  }

  // Bilinear; what lies between two rows is kept from pixel to pixel.
  template <int V>
  void add_resized(Vec (*y)[V], const Place& place) const {
    const Between& row = rows[place.row];
    for (int q = 0; q < V; ++q) {
      const int64_t output = place.output + q * kLanes, count = q < V - 1 ? kLanes : place.last;
      const Out* const z = other + place.image * other_image + output;
      const auto mixed = [&](int64_t column) {
        const Vec above = load(z + row.first + column, count);
        return above + (load(z + row.second + column, count) - above) * row.t;
      };
      int64_t held = -1;
      Vec left, step;
      for (int64_t p = 0; p < place.pixels; ++p) {
        const Between& column = columns[place.column + p];
        if (column.first != held) left = mixed(column.first), step = mixed(column.second) - left, held = column.first;
        y[p][q] += left + step * column.t;
      }
    }
  }
};

}  // namespace

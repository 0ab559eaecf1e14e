// Vectors of 16 float32 sums: how inputs are multiplied into them, and what happens to them before they are stored.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kLanes = 16;
using Vec = float __attribute__((vector_size(64)));

// Storage whose vectors never straddle two cache lines.
template <class U>
struct LineAllocator {
  using value_type = U;
  U* allocate(size_t n) { return static_cast<U*>(::operator new(n * sizeof(U), std::align_val_t(sizeof(Vec)))); }
  void deallocate(U* p, size_t) { ::operator delete(p, std::align_val_t(sizeof(Vec))); }
};
template <class U>
using Aligned = std::vector<U, LineAllocator<U>>;

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
  static inline Vec spread(Unit x) { return x - Vec{}; }
  static inline void step(Vec& sum, const Unit* w, Vec x) {
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
  static inline Vec spread(Unit x) { return (Vec)_mm512_set1_epi32(x); }
  static inline void step(Vec& sum, const Unit* w, Vec x) {
    sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(w), (__m512bh)x);
  }
};
#endif

// x with quarter `index` of y.
inline Vec with_quarter(Vec x, Vec y, int index) {
  using Ints = int32_t __attribute__((vector_size(64)));
  constexpr Ints kQuarter = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  return kQuarter == index ? y : x;
}

// Quarter `index` of x, then zeros.
inline Vec quarter(const Vec& x, int64_t index) {
  Vec y = {};
  std::memcpy(&y, reinterpret_cast<const float*>(&x) + 4 * index, 4 * sizeof(float));
  return y;
}

inline Vec load(const float* x, int64_t count) {
  Vec y = {};
  if (count == kLanes) {
    std::memcpy(&y, x, sizeof y);
  } else {
    for (int64_t i = 0; i < count; ++i) y[i] = x[i];
  }
  return y;
}

inline Vec load(const Bf16* x, int64_t count) {
#if defined(__AVX512BF16__)
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16);
#else
  Vec y = {};
  for (int64_t i = 0; i < count; ++i) y[i] = widen(x[i]);
  return y;
#endif
}

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

// 1 / (1 + exp(-x)): exp by its Taylor polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2] and a power of two.
inline Vec sigmoid(Vec x) {
  using Ints = int32_t __attribute__((vector_size(64)));
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: what is added to it becomes an integer
  x = x > 87.f ? Vec{} + 87.f : x < -87.f ? Vec{} - 87.f : x;
  const Vec power = (x * -1.44269504f + kRound) - kRound;
  const Vec r = (power * -0.693359375f - x) + power * 2.12194440e-4f;
  Vec e = r * (1.f / 720) + 1.f / 120;
  e = e * r + 1.f / 24;
  e = e * r + 1.f / 6;
  e = e * r + 0.5f;
  e = (e * r + 1.f) * r + 1.f;
  return 1.f / (1.f + e * (Vec)((__builtin_convertvector(power, Ints) + 127) << 23));
}

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

// A pixel of the result; `at`: of its first channel.
struct Pixel {
  int64_t image, row, column, at;
};

// What happens to sums before they are rounded; the other map has the shape of the result, or is resized to it.
template <class Out>
struct Epilogue {
  Activation activation;
  Join join;
  float slope;
  std::vector<float> bias;  // filled with zeros to whole vectors
  const Out* other;
  int64_t other_image;  // elements of one image of the other map
  std::vector<Between> rows, columns;  // of the other map, if it is resized

  inline Vec operator()(Vec y, const Pixel& pixel, int64_t output, int64_t count) const {
    const Out* const z = other + pixel.at + output;
    y += load(&bias[output], kLanes);
    if (join == kAddFirst) y += load(z, count);
    if (activation == kLeakyRelu) y = y < 0.f ? (slope == 0.f ? Vec{} : y * slope) : y;
    if (activation == kSigmoid) y = sigmoid(y);
    if (join == kAdd) y += load(z, count);
    if (join == kMultiply) y *= load(z, count);
    if (join == kAddResized) y += resized(pixel, output, count);
    return y;
  }

  // The other map at a pixel of the result, bilinear.
  inline Vec resized(const Pixel& pixel, int64_t output, int64_t count) const {
    const Between &row = rows[pixel.row], &column = columns[pixel.column];
    const Out* const z = other + pixel.image * other_image + output;
    const auto mixed = [&](const Out* line) {
      const Vec left = load(line + column.first, count);
      return left + (load(line + column.second, count) - left) * column.t;
    };
    const Vec above = mixed(z + row.first);
    return above + (mixed(z + row.second) - above) * row.t;
  }
};

}  // namespace

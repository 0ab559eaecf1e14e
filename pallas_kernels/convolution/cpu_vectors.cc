// Vectors of 16 float32 sums: how inputs are multiplied into them, how they are read and stored.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__AVX512F__)
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

#if defined(__AVX512F__)
inline __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
#endif

inline Vec load(const float* x, int64_t count) {
  Vec y = {};
  if (count == kLanes) {
    std::memcpy(&y, x, sizeof y);
    return y;
  }
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps(first(count), x);
#else
  for (int64_t i = 0; i < count; ++i) y[i] = x[i];
  return y;
#endif
}

inline Vec load(const Bf16* x, int64_t count) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), x)), 16);
#else
  Vec y = {};
  for (int64_t i = 0; i < count; ++i) y[i] = widen(x[i]);
  return y;
#endif
}

inline void store(float* y, const Vec& sums, int64_t count) {
  if (count == kLanes) {
    std::memcpy(y, &sums, sizeof sums);
    return;
  }
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(y, first(count), (__m512)sums);
#else
  for (int64_t i = 0; i < count; ++i) y[i] = sums[i];
#endif
}

inline void store(Bf16* y, const Vec& sums, int64_t count) {  // rounds half to even
#if defined(__AVX512BF16__)
  _mm256_mask_storeu_epi16(y, first(count), (__m256i)_mm512_cvtneps_pbh((__m512)sums));
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

}  // namespace

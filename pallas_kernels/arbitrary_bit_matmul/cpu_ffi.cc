// y[m, n] = sum_g s[n, g] sum_(k in g) x[m, k] (u[n, k] - centre) for few rows x and dense codes u of 1..8 bits, as they lie.
// Rows are int8, or floats, which enter as a few int8 digits each: x = sum_d scale_d digit_d (see activation.py).
//
// 64 codes of b bits fill 8 b bytes. With AVX-512 VBMI one byte permutation brings the b bytes of every 8 codes into a 64-bit lane,
// one multishift takes 8 codes out of each lane, and VNNI multiplies them with x: five instructions for 64 weights of any width.
// Five-level codes in base 5 (three codes in 7 bits) need three look-ups in 128-byte tables more. Elsewhere the same in scalar code.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "../threads.cc"
#include "xla/ffi/api/ffi.h"

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__AVX512VL__)
#include <immintrin.h>
#endif

namespace ffi = xla::ffi;

namespace {

using Bytes128 = std::array<uint8_t, 128>;
constexpr int64_t kCodes = 64;   // codes of a vector
constexpr int64_t kMaxRows = 4;  // activation rows that share one expansion of the weights
constexpr int64_t kLine = 64;    // bytes that one prefetch brings
constexpr int64_t kBlock = 64;   // rows of weights of a task
constexpr int64_t kSerialBytes = 1 << 16;  // weights that one thread reads faster than it wakes another
constexpr float kDigit = 127, kBase = 2 * kDigit;

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__AVX512VL__)

using Codes = __m512i;  // 64 unsigned bytes
using Sums = __m512i;   // 16 int32, sum i of codes 4 i .. 4 i + 3
using Floats = __m512;

inline Sums zero_sums() { return _mm512_setzero_si512(); }
inline Floats zero_floats() { return _mm512_setzero_ps(); }
inline Codes constant(uint8_t c) { return _mm512_set1_epi8(static_cast<char>(c)); }
inline Sums dot(Sums d, Codes u, const int8_t* x) { return _mm512_dpbusd_epi32(d, u, _mm512_loadu_si512(x)); }
inline Sums negated(Sums d) { return _mm512_sub_epi32(zero_sums(), d); }
inline Floats add_scaled(Floats y, Sums d, Floats s) { return _mm512_fmadd_ps(_mm512_cvtepi32_ps(d), s, y); }
inline float total(Floats y) { return _mm512_reduce_add_ps(y); }
inline int32_t total(Sums d) { return _mm512_reduce_add_epi32(d); }

// The scales of a vector of codes that spans `count` groups, each beside the sums of its group; zero from `left` on.
class Spread {
 public:
  explicit Spread(int64_t count) : count_(count), all_(first(count)) {
    alignas(64) int32_t source[16];
    for (int i = 0; i < 16; ++i) source[i] = static_cast<int32_t>(i * count / 16);
    source_ = _mm512_load_si512(source);
  }
  Floats operator()(const float* s, int64_t left) const {
    if (count_ == 1) return _mm512_set1_ps(*s);
    return _mm512_permutexvar_ps(source_, _mm512_maskz_loadu_ps(left >= count_ ? all_ : first(left), s));
  }

 private:
  static __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

  int64_t count_;
  __mmask16 all_;
  __m512i source_;
};

// 64 codes at a time, by loads of Width bytes, the least of 16, 32 and 64 that holds them: loads that cross into the
// next cache line are slow, even where their mask is zero there.
template <int Width>
class Unpacker {
 public:
  explicit Unpacker(int bits)
      : bytes_(8 * bits), all_(~uint64_t{0} >> (64 - 8 * bits)), keep_(constant(static_cast<uint8_t>((1 << bits) - 1))) {
    alignas(64) uint8_t source[64], shift[64];
    for (int i = 0; i < 64; ++i) {
      source[i] = static_cast<uint8_t>((i / 8) * bits + std::min(i % 8, bits - 1));
      shift[i] = static_cast<uint8_t>((i % 8) * bits);
    }
    source_ = _mm512_load_si512(source);
    shift_ = _mm512_load_si512(shift);
  }
  Codes operator()(const uint8_t* p) const { return codes(load(all_, p)); }
  // 64 codes of which `bytes` bytes are there; the others are zero.
  Codes operator()(const uint8_t* p, int64_t bytes) const {
    return codes(load(bytes >= bytes_ ? all_ : ~uint64_t{0} >> (64 - bytes), p));
  }

 private:
  static __m512i load(__mmask64 mask, const uint8_t* p) {
    if constexpr (Width == 16) return _mm512_castsi128_si512(_mm_maskz_loadu_epi8(static_cast<__mmask16>(mask), p));
    if constexpr (Width == 32) return _mm512_castsi256_si512(_mm256_maskz_loadu_epi8(static_cast<__mmask32>(mask), p));
    return _mm512_maskz_loadu_epi8(mask, p);
  }
  Codes codes(__m512i bytes) const {
    const __m512i octets = _mm512_permutexvar_epi8(source_, bytes);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(shift_, octets), keep_);
  }

  int64_t bytes_;
  __mmask64 all_;
  __m512i keep_, source_, shift_;
};

// Codes of one bit are a mask as they lie.
inline Codes from_bits(uint64_t bits) { return _mm512_maskz_set1_epi8(bits, 1); }

class Table {
 public:
  explicit Table(const Bytes128& t) : low_(_mm512_loadu_si512(t.data())), high_(_mm512_loadu_si512(t.data() + 64)) {}
  Codes operator()(Codes i) const { return _mm512_permutex2var_epi8(low_, i, high_); }

 private:
  __m512i low_, high_;
};

#else

struct Codes {
  uint8_t c[64];
};
struct Sums {
  int32_t v[16];
};
struct Floats {
  float v[16];
};

inline Sums zero_sums() { return Sums{}; }
inline Floats zero_floats() { return Floats{}; }
inline Codes constant(uint8_t c) {
  Codes u;
  std::memset(u.c, c, sizeof u.c);
  return u;
}
inline Sums dot(Sums d, const Codes& u, const int8_t* x) {
  for (int i = 0; i < 64; ++i) d.v[i / 4] += int32_t{u.c[i]} * x[i];
  return d;
}
inline Sums negated(Sums d) {
  for (auto& v : d.v) v = -v;
  return d;
}
inline Floats add_scaled(Floats y, const Sums& d, const Floats& s) {
  for (int i = 0; i < 16; ++i) y.v[i] += static_cast<float>(d.v[i]) * s.v[i];
  return y;
}
inline float total(const Floats& y) {
  float sum = 0;
  for (float v : y.v) sum += v;
  return sum;
}
inline int32_t total(const Sums& d) {
  int32_t sum = 0;
  for (int32_t v : d.v) sum += v;
  return sum;
}

class Spread {
 public:
  explicit Spread(int64_t count) : count_(count) {}
  Floats operator()(const float* s, int64_t left) const {
    Floats scales;
    for (int64_t i = 0; i < 16; ++i) scales.v[i] = i * count_ / 16 < left ? s[i * count_ / 16] : 0;
    return scales;
  }

 private:
  int64_t count_;
};

template <int>
class Unpacker {
 public:
  explicit Unpacker(int bits) : bits_(bits) {}
  Codes operator()(const uint8_t* p) const { return (*this)(p, 8 * bits_); }
  Codes operator()(const uint8_t* p, int64_t bytes) const {
    Codes u;
    for (int octet = 0; octet < 8; ++octet) {
      uint64_t word = 0;
      for (int j = 0; j < bits_ && octet * bits_ + j < bytes; ++j) word |= uint64_t{p[octet * bits_ + j]} << (8 * j);
      for (int i = 0; i < 8; ++i) u.c[8 * octet + i] = static_cast<uint8_t>(word >> (i * bits_) & ((1 << bits_) - 1));
    }
    return u;
  }

 private:
  int bits_;
};

inline Codes from_bits(uint64_t bits) {
  Codes u;
  for (int i = 0; i < 64; ++i) u.c[i] = bits >> i & 1;
  return u;
}

class Table {
 public:
  explicit Table(const Bytes128& t) : t_(t) {}
  Codes operator()(const Codes& i) const {
    Codes u;
    for (int j = 0; j < 64; ++j) u.c[j] = t_[i.c[j]];
    return u;
  }

 private:
  Bytes128 t_;
};

#endif

// Dense codes: one run of activations.
template <int Width>
class Dense {
 public:
  static constexpr int kRuns = 1;
  explicit Dense(int64_t bits) : unpack_(static_cast<int>(bits)), step_(8 * bits) {}
  int64_t step() const { return step_; }
  template <class... Bytes>
  void operator()(Codes* u, const uint8_t* p, Bytes... bytes) const {
    u[0] = unpack_(p, bytes...);
  }

 private:
  Unpacker<Width> unpack_;
  int64_t step_;
};

// Dense codes of one bit.
class Binary {
 public:
  static constexpr int kRuns = 1;
  int64_t step() const { return 8; }
  void operator()(Codes* u, const uint8_t* p, int64_t bytes = 8) const {
    uint64_t bits = 0;
    std::memcpy(&bits, p, std::min<int64_t>(bytes, 8));
    u[0] = from_bits(bits);
  }
};

// Triples of five-level codes, u0 + 5 u1 + 25 u2 in 7 bits: three runs of activations.
class Base5 {
 public:
  static constexpr int kRuns = 3;
  explicit Base5(int64_t) : unpack_(7), digit_{Table(digits(1)), Table(digits(5)), Table(digits(25))} {}
  int64_t step() const { return 56; }
  template <class... Bytes>
  void operator()(Codes* u, const uint8_t* p, Bytes... bytes) const {
    Codes triples = unpack_(p, bytes...);
    for (int i = 0; i < kRuns; ++i) u[i] = digit_[i](triples);
  }

 private:
  static Bytes128 digits(int power) {
    Bytes128 values;
    for (int i = 0; i < 128; ++i) values[i] = static_cast<uint8_t>(i / power % 5);
    return values;
  }
  Unpacker<64> unpack_;
  Table digit_[3];
};

struct Product {
  const int8_t* x;  // [rows, runs, chunks * 64]
  const uint8_t* w;
  const float* scale;
  float* y;  // [rows, n]
  int64_t n, groups, chunks, stride;  // chunks of 64 codes in a run; bytes of a weight row
  int64_t segments, spread;           // runs of chunks that are summed before they are scaled; groups within one
};

// Sums at the start of every segment: -centre times the activations, so that sums are of x (u - centre).
template <int M, class Codec>
std::vector<Sums> starts(const Product& p, uint8_t centre) {
  std::vector<Sums> start(M * p.segments, zero_sums());
  const int64_t length = p.chunks / p.segments;
  for (int64_t m = 0; m < M; ++m)
    for (int64_t c = 0; c < Codec::kRuns * p.chunks; ++c) {
      Sums& s = start[m * p.segments + c % p.chunks / length];
      s = dot(s, constant(centre), p.x + (m * Codec::kRuns * p.chunks + c) * kCodes);
    }
  for (auto& s : start) s = negated(s);
  return start;
}

template <int... I, class F>
[[gnu::always_inline]] inline void unrolled(std::integer_sequence<int, I...>, F&& f) {
  (f(I), ...);
}

// f(0) ... f(N - 1), unrolled so that arrays indexed by the argument live in registers.
template <int N, class F>
[[gnu::always_inline]] inline void each(F&& f) {
  unrolled(std::make_integer_sequence<int, N>{}, f);
}

// Outputs n .. n + R - 1 of M activation rows.
template <int M, int R, class Codec>
void tile(const Product& p, const Codec& shared, const Spread& spread, const Sums* start, int64_t n) {
  const Codec codec = shared;  // in registers
  const int64_t step = codec.step(), stride = p.stride, groups = p.groups, segments = p.segments;
  const int64_t length = p.chunks / segments, run = p.chunks * kCodes, whole = stride / step / length;
  const uint8_t* w = p.w + n * stride;
  const uint8_t* ahead = w + 2 * R * stride;  // fetched in the order of memory: hardware follows no R rows at once
  const int8_t* x = p.x;
  const float* scale = p.scale + n * groups;
  Floats y[R * M];
  Sums d[R * M];
  each<R * M>([&](int i) { y[i] = zero_floats(); });
  const auto add_chunk = [&](auto... bytes) __attribute__((always_inline)) {
    each<R>([&](int r) {
      if (r * kLine < R * step) __builtin_prefetch(ahead + r * kLine);
      Codes u[Codec::kRuns];
      codec(u, w + r * stride, bytes...);
      each<Codec::kRuns * M>([&](int i) { d[r * M + i % M] = dot(d[r * M + i % M], u[i / M], x + (i % M * Codec::kRuns + i / M) * run); });
    });
    w += step;
    ahead += R * step;
    x += kCodes;
  };
  const auto begin_segment = [&](int64_t t) __attribute__((always_inline)) {
    each<R * M>([&](int i) { d[i] = start[i % M * segments + t]; });
  };
  const auto end_segment = [&](int64_t left) __attribute__((always_inline)) {
    each<R>([&](int r) {
      __builtin_prefetch(scale + (r + 2 * R) * groups);
      const Floats s = spread(scale + r * groups, left);
      each<M>([&](int m) { y[r * M + m] = add_scaled(y[r * M + m], d[r * M + m], s); });
    });
    scale += p.spread;
  };
  for (int64_t t = 0; t < segments; ++t) {
    begin_segment(t);
    if (t < whole)
      for (int64_t c = 0; c < length; ++c) add_chunk();
    else
      for (int64_t c = t * length; c < (t + 1) * length; ++c) add_chunk(stride - c * step);
    if (groups > 1) end_segment(groups - t * p.spread);
  }
  each<R * M>([&](int i) {
    const int64_t row = n + i / M;
    p.y[i % M * p.n + row] = groups > 1 ? total(y[i]) : p.scale[row] * static_cast<float>(total(d[i]));
  });
}

template <int M, class Codec>
void multiply(ffi::ThreadPool& pool, const Product& p, const Codec& codec, uint8_t centre) {
  constexpr int R = M == 1 ? 4 : Codec::kRuns == 1 || M == 2 ? 2 : 1;  // as many as registers hold
  const auto start = starts<M, Codec>(p, centre);
  const Spread spread(p.spread);
  const int64_t block = p.n * p.stride <= kSerialBytes ? std::max<int64_t>(p.n, 1) : kBlock;
  parallel(pool, (p.n + block - 1) / block, [&](int64_t i) {
    int64_t n = i * block;
    const int64_t end = std::min(p.n, n + block);
    for (; n + R <= end; n += R) tile<M, R>(p, codec, spread, start.data(), n);
    for (; n < end; ++n) tile<M, 1>(p, codec, spread, start.data(), n);
  });
}

template <class Codec>
void multiply_rows(ffi::ThreadPool& pool, Product p, const Codec& codec, uint8_t centre, int64_t rows) {
  for (int64_t m = 0; m < rows; m += kMaxRows) {
    switch (std::min(rows - m, kMaxRows)) {
      case 1: multiply<1>(pool, p, codec, centre); break;
      case 2: multiply<2>(pool, p, codec, centre); break;
      case 3: multiply<3>(pool, p, codec, centre); break;
      default: multiply<4>(pool, p, codec, centre);
    }
    p.x += kMaxRows * Codec::kRuns * p.chunks * kCodes;
    p.y += kMaxRows * p.n;
  }
}

// Rows of int8 laid out for a product: runs of equal length, each filled with zeros to whole chunks.
class Rows {
 public:
  Rows(int64_t count, int64_t k, int64_t runs)
      : k_(k), runs_(runs), length_((k + runs - 1) / runs), chunks_((length_ + kCodes - 1) / kCodes),
        data_(count * runs * chunks_ * kCodes) {}
  int64_t chunks() const { return chunks_; }
  const int8_t* data() const { return data_.data(); }
  void set(int64_t row, const int8_t* x) {
    for (int64_t r = 0; r < runs_ && r * length_ < k_; ++r)
      std::memcpy(data_.data() + (row * runs_ + r) * chunks_ * kCodes, x + r * length_, std::min(length_, k_ - r * length_));
  }

 private:
  int64_t k_, runs_, length_, chunks_;
  std::vector<int8_t> data_;
};

// The digits of a float row, one after the other; returns the scale of the first.
float split(const float* x, int64_t k, int64_t digits, float* rest, int8_t* out) {
  float top = 0;
  for (int64_t i = 0; i < k; ++i) top = std::max(top, std::abs(x[i]));
  const float scale = (top > 0 ? top : 1) / kDigit;
  for (int64_t i = 0; i < k; ++i) rest[i] = x[i] / scale;
  for (int64_t d = 0; d < digits; ++d, out += k)
    for (int64_t i = 0; i < k; ++i) {
      const float digit = std::nearbyint(rest[i]);
      out[i] = static_cast<int8_t>(digit);
      rest[i] = (rest[i] - digit) * kBase;
    }
  return scale;
}

void multiply_codes(ffi::ThreadPool& pool, const Product& p, int64_t bits, int64_t centre, bool base5, int64_t rows) {
  if (base5)
    multiply_rows(pool, p, Base5(bits), static_cast<uint8_t>(centre), rows);
  else if (bits == 1)
    multiply_rows(pool, p, Binary(), static_cast<uint8_t>(centre), rows);
  else if (bits == 2)
    multiply_rows(pool, p, Dense<16>(bits), static_cast<uint8_t>(centre), rows);
  else if (bits <= 4)
    multiply_rows(pool, p, Dense<32>(bits), static_cast<uint8_t>(centre), rows);
  else
    multiply_rows(pool, p, Dense<64>(bits), static_cast<uint8_t>(centre), rows);
}

ffi::Error run(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::U32> w, ffi::Buffer<ffi::F32> scale,
               ffi::ResultBuffer<ffi::F32> y, int64_t bits, int64_t centre, int64_t digits, bool base5) {
  const auto xs = x.dimensions(), ws = w.dimensions(), ss = scale.dimensions();
  const bool whole = x.element_type() == ffi::S8;
  if (xs.size() != 2 || ws.size() != 2 || ss.size() != 2 || xs[1] % ss[1] || (base5 && ss[1] != 1) || (!whole && x.element_type() != ffi::F32))
    return ffi::Error::InvalidArgument("expected x [M, K] of int8 or float32, w [N, words], scale [N, groups]");
  const int64_t m = xs[0], k = xs[1], n = ws[0], groups = ss[1], group = k / groups;
  const int64_t spread = groups > 1 ? std::max<int64_t>(1, kCodes / group) : 1;
  if (groups > 1 && (group < kCodes ? kCodes % group || group % 4 : group % kCodes))
    return ffi::Error::InvalidArgument("expected groups of 4, 8, 16, 32 or a multiple of 64 columns");
  Rows rows(whole ? m : m * digits, k, base5 ? Base5::kRuns : 1);
  Product p{rows.data(), reinterpret_cast<const uint8_t*>(w.typed_data()), scale.typed_data(), y->typed_data(), n,
            groups, rows.chunks(), 4 * ws[1], (groups + spread - 1) / spread, spread};
  if (whole) {
    for (int64_t i = 0; i < m; ++i) rows.set(i, static_cast<const int8_t*>(x.untyped_data()) + i * k);
    multiply_codes(pool, p, bits, centre, base5, m);
    return ffi::Error::Success();
  }
  std::vector<float> rest(k), products(m * digits * n), scales(m);
  std::vector<int8_t> parts(digits * k);
  for (int64_t i = 0; i < m; ++i) {
    scales[i] = split(static_cast<const float*>(x.untyped_data()) + i * k, k, digits, rest.data(), parts.data());
    for (int64_t d = 0; d < digits; ++d) rows.set(i * digits + d, parts.data() + d * k);
  }
  p.y = products.data();
  multiply_codes(pool, p, bits, centre, base5, m * digits);
  for (int64_t i = 0; i < m; ++i) {
    float* out = y->typed_data() + i * n;
    std::fill(out, out + n, 0.f);
    float digit_scale = scales[i];
    for (int64_t d = 0; d < digits; ++d, digit_scale /= kBase)
      for (int64_t j = 0; j < n; ++j) out[j] += digit_scale * products[(i * digits + d) * n + j];
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ArbitraryBitMatmul, run,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>().Attr<int64_t>("bits")
                                  .Attr<int64_t>("centre").Attr<int64_t>("digits").Attr<bool>("base5"));

// Sparse attention over ranked keys on CPU: lanes are rows of a tile, so softmax needs no sums across lanes, and keys and values
// are read where they lie, one broadcast number at a time: nothing is gathered or transposed but the rows of the tile itself.
//
// Per segment: a dense window in natural order leaves maximum, normaliser and sum of every row in the outputs; then every tile
// picks up its rows, in any order, visits blocks of its list until the gain falls below the threshold, and puts them back.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "order.cc"

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kVectors = 4;                 // vectors of a group of rows
constexpr int kRows = kLanes * kVectors;    // rows of a group
constexpr int kKeys = 4;                    // keys, or columns of v, that share loads of a group: 16 sums in registers
constexpr int64_t kWindow = 128;            // keys of the window at a time
constexpr float kMasked = -2.3e38f;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Int __attribute__((vector_size(4 * kLanes)));

typedef Vec Loose __attribute__((aligned(4), may_alias));  // of any address

inline Vec load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Loose*>(p) = v; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// f(j, i) for every key and vector, unrolled so that arrays indexed by them live in registers.
template <class F>
[[gnu::always_inline]] inline void each(F&& f) {
#pragma GCC unroll 4
  for (int j = 0; j < kKeys; ++j)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) f(j, i);
}

// 2^x for x <= 0, to 2 units in the last place; 0 becomes of what lies below 2^-126.
inline Vec exp2(Vec x) {
  const Vec lowest = Vec{} - 126.0f, magic = Vec{} + 12582912.0f;  // 1.5 * 2^23: the sum ends in the rounded integer
  const Int tiny = x < lowest;
  x = larger(x, lowest);
  const Vec shifted = x + magic, f = x - (shifted - magic);
  Vec p = f * 1.5403530e-4f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return (Vec)(((Int)p + ((Int)shifted << 23)) & ~tiny);
}

enum Aggregate : int64_t { kMean, kMax, kRatio };

struct Problem {
  const float *q, *k, *v;
  const int32_t *order, *count, *rows;
  const float* threshold;
  float *top, *norm, *acc, *gain;  // top in units of log2
  int32_t* blocks;
  int64_t heads, key_heads, lists, segments, tiles, tile_rows, d, keys, listed;
  int64_t length, segment, padded, start;
  int64_t block_k, check_every, min_blocks, aggregate;
  bool budget, causal;
};

class Floats {
 public:
  explicit Floats(int64_t n) : p_(static_cast<float*>(std::aligned_alloc(64, (n * 4 + 63) / 64 * 64)), &std::free) {}
  float* get() const { return p_.get(); }

 private:
  std::unique_ptr<float, decltype(&std::free)> p_;
};

// Gains of the rows of a tile, on their way to one number.
struct Gain {
  Vec first = Vec{}, second = Vec{};

  void add(int64_t how, Vec valid, Vec added, Vec norm) {
    if (how == kMax) {
      first = larger(first, valid * (added / norm));
    } else {
      first += valid * (how == kMean ? added / norm : added);
      second += valid * (how == kMean ? Vec{} + 1.0f : norm);
    }
  }
  float value(int64_t how) const {
    float a = 0, b = 0;
    for (int i = 0; i < kLanes; ++i) {
      a = how == kMax ? std::max(a, first[i]) : a + first[i];
      b += second[i];
    }
    return how == kMax ? a : a / std::max(b, 1.0f);
  }
};

// The rows that stop together: groups of kRows, transposed, [d][kRows] each.
class Tile {
 public:
  Tile(const Problem& p, int64_t rows, int64_t chunk)
      : p_(p), groups_((rows + kRows - 1) / kRows), rows_(rows), q_(groups_ * kRows * p.d), acc_(groups_ * kRows * p.d),
        top_(groups_ * kRows), norm_(groups_ * kRows), valid_(groups_ * kRows), scores_((chunk + kKeys) * kRows) {}

  int64_t groups() const { return groups_; }

  // Takes rows of q, and their state from the outputs unless this is the first time that they are seen.
  bool take(const int32_t* rows, bool first) {
    bool any = false;
    const float scale = 1.44269504f / std::sqrt(static_cast<float>(p_.d));
    for (int64_t r = 0; r < groups_ * kRows; ++r) {
      const bool inside = r < rows_, real = inside && rows[r] % p_.padded < p_.length;
      any |= real;
      valid_.get()[r] = real;
      top_.get()[r] = first || !inside ? kMasked : p_.top[rows[r]];
      norm_.get()[r] = first || !inside ? 0 : p_.norm[rows[r]];
      const int64_t from = inside ? int64_t{rows[r]} * p_.d : 0, to = r / kRows * kRows * p_.d + r % kRows;
      for (int64_t c = 0; c < p_.d; ++c) q_.get()[to + c * kRows] = inside ? p_.q[from + c] * scale : 0;
      for (int64_t c = 0; c < p_.d; ++c) acc_.get()[to + c * kRows] = first || !inside ? 0 : p_.acc[from + c];
    }
    return any;
  }

  void put(const int32_t* rows) const {
    for (int64_t r = 0; r < rows_; ++r) {
      p_.top[rows[r]] = top_.get()[r];
      p_.norm[rows[r]] = norm_.get()[r];
      const int64_t from = r / kRows * kRows * p_.d + r % kRows;
      for (int64_t c = 0; c < p_.d; ++c) p_.acc[int64_t{rows[r]} * p_.d + c] = acc_.get()[from + c * kRows];
    }
  }

  // Visits n keys with one group. Row r of the group sees key w if w <= r + reach.
  void visit(int64_t group, const float* k, const float* v, const int32_t* index, int64_t n, int64_t reach, Gain* gain) {
    const float* q = q_.get() + group * kRows * p_.d;
    float *s = scores_.get(), *top = top_.get() + group * kRows, *norm = norm_.get() + group * kRows;
    for (int64_t w = 0; w < n; w += kKeys) score(q, k, index + w, std::min<int64_t>(n - w, kKeys), s + w * kRows);
    for (int64_t w = std::max<int64_t>(reach + 1, 0); w < n; ++w)
      for (int64_t r = 0; r < std::min<int64_t>(w - reach, kRows); ++r) s[w * kRows + r] = kMasked;
    Vec alpha[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      const Vec old = load(top + i * kLanes);
      Vec high = old, added = Vec{};
      for (int64_t w = 0; w < n; ++w) high = larger(high, load(s + w * kRows + i * kLanes));
      for (int64_t w = 0; w < n; ++w) {
        const Vec e = exp2(load(s + w * kRows + i * kLanes) - high);
        store(s + w * kRows + i * kLanes, e);
        added += e;
      }
      alpha[i] = exp2(old - high);
      const Vec sum = alpha[i] * load(norm + i * kLanes) + added;
      if (gain) gain->add(p_.aggregate, load(valid_.get() + group * kRows + i * kLanes), added, sum);
      store(top + i * kLanes, high);
      store(norm + i * kLanes, sum);
    }
    for (int64_t c = 0; c < p_.d; c += kKeys) add_values(v + c, index, n, alpha, acc_.get() + (group * p_.d + c) * kRows);
  }

 private:
  // Scores of up to kKeys keys with the rows of a group.
  void score(const float* q, const float* k, const int32_t* index, int64_t n, float* s) const {
    const float* key[kKeys];
    for (int j = 0; j < kKeys; ++j) key[j] = k + index[j < n ? j : 0] * p_.d;
    Vec sum[kKeys][kVectors] = {};
    for (int64_t c = 0; c < p_.d; ++c, q += kRows) each([&](int j, int i) { sum[j][i] += load(q + i * kLanes) * key[j][c]; });
    each([&](int j, int i) { store(s + j * kRows + i * kLanes, sum[j][i]); });
  }

  // acc <- alpha acc + sum_w e[w] v[w] for kKeys columns of v.
  void add_values(const float* v, const int32_t* index, int64_t n, const Vec* alpha, float* acc) const {
    Vec sum[kKeys][kVectors];
    each([&](int j, int i) { sum[j][i] = alpha[i] * load(acc + j * kRows + i * kLanes); });
    const float* e = scores_.get();
    for (int64_t w = 0; w < n; ++w, e += kRows) {
      const float* value = v + index[w] * p_.d;
      each([&](int j, int i) { sum[j][i] += load(e + i * kLanes) * value[j]; });
    }
    each([&](int j, int i) { store(acc + j * kRows + i * kLanes, sum[j][i]); });
  }

  const Problem& p_;
  int64_t groups_, rows_;
  Floats q_, acc_, top_, norm_, valid_, scores_;
};

// First pass: the rows of a segment of one head and the keys that stand there.
void window(const Problem& p, Tile& tile, int64_t head, int64_t segment) {
  const int64_t first = segment * p.segment, own = std::min(p.segment, p.length - first);
  const int64_t base = head / (p.heads / p.key_heads) * p.keys * p.d;
  std::vector<int32_t> rows(p.segment), index(kWindow);
  for (int64_t r = 0; r < p.segment; ++r) rows[r] = static_cast<int32_t>(head * p.padded + first + r);
  tile.take(rows.data(), true);
  for (int64_t g = 0; g < tile.groups(); ++g) {
    const int64_t n = p.causal ? std::min(own, (g + 1) * kRows) : own;
    for (int64_t w = 0; w < n; w += kWindow) {
      const int64_t some = std::min(kWindow, n - w), reach = p.causal ? g * kRows - w : some;
      for (int64_t j = 0; j < some; ++j) index[j] = static_cast<int32_t>(p.start + first + w + j);
      tile.visit(g, p.k + base, p.v + base, index.data(), some, reach, nullptr);
    }
  }
  tile.put(rows.data());
}

void prefetch(const Problem& p, const float* k, const float* v, const int32_t* index, int64_t n) {
  for (int64_t w = 0; w < n; ++w)
    for (int64_t c = 0; c < p.d; c += 16) {
      __builtin_prefetch(k + index[w] * p.d + c, 0, 2);
      __builtin_prefetch(v + index[w] * p.d + c, 0, 2);
    }
}

// Second pass: one tile and its list.
void visit_list(const Problem& p, Tile& tile, int64_t list, int64_t segment, int64_t t) {
  const int64_t place = list * p.segments + segment, at = place * p.tiles + t, chunk = p.block_k * p.check_every;
  const int64_t keys = std::min<int64_t>(p.count[place], p.listed), total = (keys + p.block_k - 1) / p.block_k;
  const int64_t base = list / (p.lists / p.key_heads) * p.keys * p.d;
  const int32_t *rows = p.rows + at * p.tile_rows, *order = p.order + place * p.listed;
  p.blocks[at] = 0;
  p.gain[at] = 0;
  if (keys <= 0 || !tile.take(rows, false)) return;
  std::vector<int32_t> index(keys);
  for (int64_t w = 0; w < keys; ++w) index[w] = std::clamp<int32_t>(order[w], 0, static_cast<int32_t>(p.keys - 1));
  for (int64_t w = 0, blocks = 0; w < keys; w += chunk) {
    Gain sum;
    const int64_t n = std::min(chunk, keys - w);
    prefetch(p, p.k + base, p.v + base, index.data() + w + n, std::min(chunk, keys - w - n));
    for (int64_t g = 0; g < tile.groups(); ++g) tile.visit(g, p.k + base, p.v + base, index.data() + w, n, n, &sum);
    blocks = std::min(blocks + p.check_every, total);
    const float gain = sum.value(p.aggregate) / p.check_every, left = gain * (total - blocks);
    p.blocks[at] = static_cast<int32_t>(blocks);
    p.gain[at] = gain;
    if (blocks >= p.min_blocks && !((p.budget ? left / (1 + left) : gain) >= p.threshold[list])) break;
  }
  tile.put(rows);
}

void segment_of(const Problem& p, int64_t list, int64_t segment) {
  const int64_t share = p.heads / p.lists;
  {
    Tile tile(p, p.segment, kWindow);
    for (int64_t g = 0; g < share; ++g) window(p, tile, list * share + g, segment);
  }
  Tile tile(p, p.tile_rows, p.block_k * p.check_every);
  for (int64_t t = 0; t < p.tiles; ++t) visit_list(p, tile, list, segment, t);
}

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;

ffi::Error run(ffi::ThreadPool pool, F32 q, F32 k, F32 v, S32 order, S32 count, F32 threshold, S32 rows, S32 start,
               ffi::ResultBuffer<ffi::F32> top, ffi::ResultBuffer<ffi::F32> norm, ffi::ResultBuffer<ffi::F32> acc,
               ffi::ResultBuffer<ffi::S32> blocks, ffi::ResultBuffer<ffi::F32> gain, int64_t length, int64_t segment, int64_t block_k,
               int64_t check_every, int64_t min_blocks, int64_t aggregate, bool budget, bool causal) {
  const auto qs = q.dimensions(), ks = k.dimensions(), os = order.dimensions(), rs = rows.dimensions();
  if (qs.size() != 3 || ks.size() != 3 || os.size() != 3 || rs.size() != 4 || qs[2] != ks[2] || qs[2] % kKeys)
    return ffi::Error::InvalidArgument("expected q [Hq, N, d], k [Hk, T, d] with d a multiple of 4, order [H, M, L], rows [H, M, tiles, R]");
  const Problem p{q.typed_data(), k.typed_data(), v.typed_data(), order.typed_data(), count.typed_data(), rows.typed_data(),
                  threshold.typed_data(), top->typed_data(), norm->typed_data(), acc->typed_data(), gain->typed_data(),
                  blocks->typed_data(), qs[0], ks[0], os[0], os[1], rs[2], rs[3], qs[2], ks[1], os[2], length, segment, qs[1],
                  std::clamp<int64_t>(start.typed_data()[0], 0, ks[1] - length), block_k, check_every, min_blocks, aggregate, budget,
                  causal};
  parallel(pool, p.lists * p.segments, [&](int64_t i) {  // long histories first
    segment_of(p, i % p.lists, p.segments - 1 - i / p.lists);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    SparseAttention, run,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<S32>().Arg<S32>().Arg<F32>().Arg<S32>().Arg<S32>()
        .Ret<F32>().Ret<F32>().Ret<F32>().Ret<S32>().Ret<F32>().Attr<int64_t>("length").Attr<int64_t>("segment")
        .Attr<int64_t>("block_k").Attr<int64_t>("check_every").Attr<int64_t>("min_blocks").Attr<int64_t>("aggregate")
        .Attr<bool>("budget").Attr<bool>("causal"));

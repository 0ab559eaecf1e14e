// Positions in the order of packed words, rows on the threads of XLA's pool: a radix sort of the bits above the position, which
// starts in order and stays so among ties, as the sort of whole words has it.
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "../threads.cc"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Sorts t words by the bits from `bits` up, a few of them at a time.
void radix_sort(std::vector<uint32_t>& words, std::vector<uint32_t>& other, int64_t bits) {
  const int64_t rounds = (32 - bits + 10) / 11, digit = (32 - bits + rounds - 1) / rounds;
  std::vector<uint32_t> place(int64_t{1} << digit);
  const uint32_t mask = static_cast<uint32_t>(place.size() - 1);
  for (int64_t shift = bits; shift < 32; shift += digit) {
    std::fill(place.begin(), place.end(), 0);
    for (uint32_t word : words) ++place[word >> shift & mask];
    uint32_t before = 0;
    for (uint32_t& p : place) before += std::exchange(p, before);
    for (uint32_t word : words) other[place[word >> shift & mask]++] = word;
    words.swap(other);
  }
}

ffi::Error order(ffi::ThreadPool pool, ffi::Buffer<ffi::U32> words, ffi::ResultBuffer<ffi::S32> out, int64_t bits) {
  const int64_t t = words.dimensions().back(), rows = t ? static_cast<int64_t>(words.element_count()) / t : 0;
  if (bits < 1 || bits > 31 || t > int64_t{1} << bits) return ffi::Error::InvalidArgument("positions do not fit their bits");
  parallel(pool, rows, [&](int64_t r) {
    const uint32_t* from = words.typed_data() + r * t;
    std::vector<uint32_t> sorted(from, from + t), other(t);
    radix_sort(sorted, other, bits);
    for (int64_t i = 0; i < t; ++i) out->typed_data()[r * t + i] = static_cast<int32_t>(sorted[i] & ((1u << bits) - 1));
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SparseAttentionOrder, order,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::U32>>().Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("bits"));

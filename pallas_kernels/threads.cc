// Work that a call shares with the threads of XLA's pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace {

// Runs work(i) for i in [0, n) on the calling thread and on those of the pool that are free: each takes the next.
inline void parallel(xla::ffi::ThreadPool& pool, int64_t n, const std::function<void(int64_t)>& work) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();  // outlives this call in threads that come late and find nothing left
  auto drain = [progress, n, work = &work] {
    for (int64_t i; (i = progress->next.fetch_add(1)) < n; progress->done.fetch_add(1, std::memory_order_release)) (*work)(i);
  };
  for (int64_t t = 1; t < std::min<int64_t>(n, pool.num_threads()); ++t) pool.Schedule([drain] { drain(); });
  drain();
  while (progress->done.load(std::memory_order_acquire) < n) std::this_thread::yield();
}

}  // namespace

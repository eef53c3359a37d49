// What all kernels begin with: numbers that are known to the compiler, and how
// the threads of a call share its work. Compiled with each kernel, see
// native.py.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>

#include "xla/ffi/api/ffi.h"

namespace spec_stream {

constexpr int64_t Up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What work gives of a number, of 1 to `most`, as a constant.
template <int most, typename Work>
auto Known(int64_t number, const Work& work) {
  if constexpr (most > 1) {
    if (number < most) return Known<most - 1>(number, work);
  }
  return work(std::integral_constant<int, most>{});
}

// What the threads of a call share. One may come when all is done and the call
// is over: what it needs to find that out is no other's.
struct Shared {
  std::atomic<int64_t> ends{0}, done{0};
  std::unique_ptr<std::atomic<int64_t>[]> taken;  // of each stretch
};

// Calls work(i, next) for each i below `count`, by `threads` of the pool, of
// which the caller is one. Each stretch of numbers is worked on from both its
// ends, so that a thread reads on and on, and none waits for one that began
// late. next: what this thread will work on then, if no other does (and if it
// is one of them).
template <typename Work>
void Share(xla::ffi::ThreadPool& pool, int64_t count, int64_t threads,
           const Work& work) {
  threads = std::clamp<int64_t>(threads, 1, std::max<int64_t>(1, count));
  threads = std::min(threads, std::max<int64_t>(1, pool.num_threads()));
  const int64_t stretches = Up(threads, 2);
  auto shared = std::make_shared<Shared>();
  shared->taken.reset(new std::atomic<int64_t>[stretches]());
  const auto all = [=] {
    for (int64_t e; (e = shared->ends.fetch_add(1)) < 2 * stretches;) {
      const int64_t s = e / 2, way = e % 2 ? -1 : 1;
      const int64_t from = count * s / stretches;
      const int64_t to = count * (s + 1) / stretches;
      int64_t i = e % 2 ? to - 1 : from, done = 0;
      for (; shared->taken[s].fetch_add(1) < to - from; i += way, ++done) {
        work(i, i + way);
      }
      shared->done.fetch_add(done, std::memory_order_release);
    }
  };
  for (int64_t t = 1; t < threads; ++t) pool.Schedule([all] { all(); });
  all();
  while (shared->done.load(std::memory_order_acquire) < count) {
    std::this_thread::yield();
  }
}

}  // namespace spec_stream

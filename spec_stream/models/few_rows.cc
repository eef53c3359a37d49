// Rows times a kernel whose outputs lie one after the other, at the speed of
// the memory: y [R, O] = x [R, I] W^T of W [O, I], in float32.
//
// W passes through once and is packed nowhere. A chunk of it that fits into a
// core's caches is multiplied with all rows while the next one is on its way
// (prefetched, a few lines with each step of the loop). A row's sums are taken
// in the same order however many others there are.
//
// few_rows.py compiles this file for the machine it runs on.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Lanes of a register; rows and outputs of a tile, whose sums stay in registers
// while it is added up: AVX-512 has 32 of them, AVX and SSE 16.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 8, kOutputs = 2;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRows = 4, kOutputs = 2;
#else
constexpr int kLanes = 4, kRows = 4, kOutputs = 2;
#endif
constexpr int64_t kPiece = 512;  // inputs: 8 rows of them are 16 KiB
constexpr int64_t kLine = 64 / sizeof(float);
constexpr int64_t kLeast = 8192;  // weights worth a thread of their own

template <int lanes>
struct Of {
  typedef float Type
      __attribute__((vector_size(lanes * 4), aligned(4), may_alias));
};
using Vector = Of<kLanes>::Type;

// a b + c, rounded once where the machine can. Said so, and nothing left to the
// compiler (-ffp-contract=off): GCC fuses in some tiles and not in others, and
// a row's sums would depend on how many there are.
inline Vector MultiplyAdd(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX__) && defined(__FMA__)
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vector)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

template <int lanes>
inline float Sum(typename Of<lanes>::Type x) {
  if constexpr (lanes == 1) {
    return x[0];
  } else {
    // By way of an array: of a sum whose address is taken GCC keeps all
    // partial sums in memory.
    using Half = typename Of<lanes / 2>::Type;
    float each[lanes];
    *reinterpret_cast<typename Of<lanes>::Type*>(each) = x;
    return Sum<lanes / 2>(*reinterpret_cast<const Half*>(each) +
                          *reinterpret_cast<const Half*>(each + lanes / 2));
  }
}

// What to prefetch: `lines` of them every `every` steps, from `next` on.
struct Ahead {
  const float* next;
  int lines, every;
};

// Adds one step's products to the sums.
template <int rows, int outputs>
inline void Step(const float* x, const float* w, int64_t x_stride,
                 int64_t w_stride, Vector (&sums)[rows][outputs]) {
  Vector weights[outputs];
#pragma GCC unroll 8
  for (int o = 0; o < outputs; ++o) {
    weights[o] = *reinterpret_cast<const Vector*>(w + o * w_stride);
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    const Vector row = *reinterpret_cast<const Vector*>(x + r * x_stride);
#pragma GCC unroll 8
    for (int o = 0; o < outputs; ++o) {
      sums[r][o] = MultiplyAdd(row, weights[o], sums[r][o]);
    }
  }
}

// Adds the products of `n` of `inputs` inputs to y [rows, outputs], whose rows
// are `stride` apart; if `first`, begins with them.
template <int rows, int outputs>
inline void Tile(const float* x, const float* w, float* y, int64_t n,
                 int64_t inputs, int64_t stride, Ahead& ahead, bool first) {
  Vector sums[rows][outputs];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int o = 0; o < outputs; ++o) sums[r][o] = Vector{};
  }
  int64_t i = 0;
  int wait = 0;
  for (; i + kLanes <= n; i += kLanes) {
    if (--wait < 0) {
      wait = ahead.every - 1;
      for (int line = 0; line < ahead.lines; ++line, ahead.next += kLine) {
        __builtin_prefetch(ahead.next);
      }
    }
    Step<rows, outputs>(x + i, w + i, inputs, inputs, sums);
  }
  if (i < n) {  // the rest and zeros, so that it is rounded as all else is
    float x_rest[rows * kLanes] = {}, w_rest[outputs * kLanes] = {};
    for (int r = 0; r < rows; ++r) {
      std::copy(x + r * inputs + i, x + r * inputs + n, x_rest + r * kLanes);
    }
    for (int o = 0; o < outputs; ++o) {
      std::copy(w + o * inputs + i, w + o * inputs + n, w_rest + o * kLanes);
    }
    Step<rows, outputs>(x_rest, w_rest, kLanes, kLanes, sums);
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int o = 0; o < outputs; ++o) {
      const float sum = Sum<kLanes>(sums[r][o]);
      float& to = y[r * stride + o];
      to = first ? sum : to + sum;
    }
  }
}

template <int rows>
void Strip(const float* x, const float* w, float* y, int64_t n, int64_t inputs,
           int64_t stride, int64_t outputs, Ahead& ahead, bool first) {
  int64_t o = 0;
  for (; o + kOutputs <= outputs; o += kOutputs) {
    Tile<rows, kOutputs>(x, w + o * inputs, y + o, n, inputs, stride, ahead,
                         first);
  }
  for (; o < outputs; ++o) {
    Tile<rows, 1>(x, w + o * inputs, y + o, n, inputs, stride, ahead, first);
  }
}

// As Strip, of `rows` rows, at most kRows.
template <int most = kRows, typename... Args>
void StripOf(int64_t rows, Args&&... args) {
  if constexpr (most > 1) {
    if (rows < most) return StripOf<most - 1>(rows, args...);
  }
  Strip<most>(args...);
}

// The outputs from `from` to `to` (not included) of `all`; `more`: whether the
// outputs that follow are this thread's too.
void Chunk(const float* x, const float* w, float* y, int64_t rows,
           int64_t inputs, int64_t all, int64_t from, int64_t to, bool more) {
  // All tiles of a chunk together ask for as many lines as the chunk has, or
  // half as many more.
  const int strips = (rows + kRows - 1) / kRows;
  constexpr int kSteps = kLine / kLanes;  // of the loop, for a line
  Ahead ahead{w + to * inputs, more ? 1 : 0, 1};
  if (strips * kSteps >= kOutputs) {
    ahead.every = strips * kSteps / kOutputs;
  } else {
    ahead.lines *= kOutputs / (strips * kSteps);
  }
  for (int64_t i = 0; i < inputs; i += kPiece) {
    for (int64_t r = 0; r < rows; r += kRows) {
      StripOf(std::min<int64_t>(kRows, rows - r), x + r * inputs + i,
              w + from * inputs + i, y + r * all + from,
              std::min(kPiece, inputs - i), inputs, all, to - from, ahead,
              i == 0);
    }
  }
}

struct Progress {
  std::atomic<int64_t> taken{0}, done{0};
};

ffi::Error FewRows(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x,
                   ffi::BufferR2<ffi::F32> kernel,
                   ffi::ResultBufferR2<ffi::F32> y) {
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1];
  const int64_t outputs = kernel.dimensions()[0];
  const float *rows_in = x.typed_data(), *weights = kernel.typed_data();
  float* out = y->typed_data();
  if (kernel.dimensions()[1] != inputs || y->dimensions()[0] != rows ||
      y->dimensions()[1] != outputs) {
    return ffi::Error::InvalidArgument("[R, I], [O, I] and [R, O] do not fit");
  }
  if (rows * inputs * outputs == 0) {
    std::fill(out, out + rows * outputs, 0.0f);
    return ffi::Error::Success();
  }
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  // A part in one piece for each thread, so that it reads on and on.
  const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t share = std::max(up(outputs, threads), up(kLeast, inputs));
  const int64_t part = up(share, kOutputs) * kOutputs;
  // Outputs of a chunk: few, so that what is prefetched comes soon, but not
  // where each chunk must read the rows again, from beyond the nearest cache.
  const bool near = rows * inputs <= 8192;
  const int64_t least = near ? 4 : std::clamp<int64_t>(65536 / inputs, 4, 16);
  const int64_t chunk =
      up(std::max(least, 4096 / inputs), kOutputs) * kOutputs;
  const int64_t parts = up(outputs, part);
  // A thread may come when all is done, and this call is over: what it needs
  // to find that out is its own.
  auto progress = std::make_shared<Progress>();
  auto work = [=] {
    for (int64_t p; (p = progress->taken.fetch_add(1)) < parts;) {
      const int64_t end = std::min(outputs, (p + 1) * part);
      for (int64_t o = p * part; o < end; o += chunk) {
        const int64_t to = std::min(end, o + chunk);
        Chunk(rows_in, weights, out, rows, inputs, outputs, o, to, to < end);
      }
      progress->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t p = 1; p < parts; ++p) pool.Schedule([work] { work(); });
  work();
  while (progress->done.load(std::memory_order_acquire) < parts) {
    std::this_thread::yield();
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpecStreamFewRows, FewRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>());

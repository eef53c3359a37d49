// Rows times a kernel in panels, at the speed of the memory or of arithmetic,
// whichever is less: y [R, O] = x [R, I] W, in float32. A panel is kWidth
// outputs: of each input in turn the weights of all of them, [O / kWidth, I,
// kWidth], so that a sum never leaves its lane and the kernel is read in order.
// Weights are float32 or, as integers of 8 bits, become that on their way.
//
// Each panel is read from memory once: a piece of it that fits into a core's
// nearest cache is multiplied with all rows while the next one is on its way
// (prefetched, a few lines with each step of the loop). A row's sums are taken
// in the same order however many others there are.
//
// panels.py compiles this file for the machine it runs on.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kWidth = 32;  // outputs of a panel; panels.py's WIDTH

// Lanes of a register; rows and registers' worth of outputs of a tile, whose
// sums stay in registers while it is added up: AVX-512 and ARM have 32 of them,
// AVX and SSE 16.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 12, kVectors = 2;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRows = 6, kVectors = 2;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRows = 12, kVectors = 2;
#else
constexpr int kLanes = 4, kRows = 6, kVectors = 2;
#endif
constexpr int64_t kPiece = 128;  // inputs: 16 KiB of a panel in float32
constexpr int64_t kBlock = 48;   // rows that pass a panel together
constexpr int64_t kLine = 64;    // bytes
constexpr int kSteps = 8;         // inputs between two turns of prefetching
constexpr int64_t kLeast = 8192;  // weights worth a thread of their own

typedef float Vector __attribute__((vector_size(kLanes * 4)));

inline Vector Load(const float* from) {
  Vector x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

inline Vector Load(const int8_t* from) {
#if defined(__AVX512F__)
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x));
#elif defined(__AVX2__)
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x));
#else
  typedef int8_t Small __attribute__((vector_size(kLanes)));
  Small x;
  std::memcpy(&x, from, sizeof(x));
  return __builtin_convertvector(x, Vector);  // GCC: lane by lane
#endif
}

inline void Store(Vector x, float* to) { std::memcpy(to, &x, sizeof(x)); }

// Keeps what was loaded in a register: GCC else loads it again for each product
// with it, and a core loads no faster than it multiplies.
inline Vector Kept(Vector x) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(x));
#elif defined(__AVX__)
  __asm__("" : "+x"(x));
#endif
  return x;
}

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

// Adds one input's products to the sums. x: of the tile's first row; inputs:
// from one row to the next.
template <int rows, int vectors, typename Weight>
inline void Step(const float* x, const Weight* w, int64_t inputs,
                 Vector (&sums)[rows][vectors]) {
  const auto row = [=](int r) { return Kept(x[r * inputs] - Vector{}); };
  const auto weights = [=](int v) { return Kept(Load(w + v * kLanes)); };
  // Of the two the fewer stay in registers; -0 - 0 is -0.
  if constexpr (rows < vectors) {
    Vector each[rows];
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) each[r] = row(r);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const Vector all = weights(v);
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
        sums[r][v] = MultiplyAdd(each[r], all, sums[r][v]);
      }
    }
  } else {
    Vector each[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) each[v] = weights(v);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const Vector all = row(r);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        sums[r][v] = MultiplyAdd(all, each[v], sums[r][v]);
      }
    }
  }
}

// A piece of a panel: `n` of the `inputs` of a row of x.
template <typename Weight>
struct Piece {
  const float* x;
  const Weight* w;
  int64_t n, inputs;
};

// Adds `rows` rows of a piece to their sums so far, [rows, kWidth], in outputs
// from `at` on; prefetches `lines` lines with each kSteps inputs, from `next`
// on -> up to where. Never inlined: in a function of many tiles GCC keeps the
// sums of some in memory.
template <int rows, int vectors, typename Weight>
__attribute__((noinline)) const char* Tile(const Piece<Weight>& p, int64_t row,
                                           int at, float* so_far,
                                           const char* next, int lines) {
  const float* x = p.x + row * p.inputs;
  const Weight* w = p.w + at;
  float* y = so_far + row * kWidth + at;
  Vector sums[rows][vectors];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sums[r][v] = Vector{};
  }
  int64_t i = 0;
  for (; i + kSteps <= p.n; i += kSteps) {
    for (int line = 0; line < lines; ++line, next += kLine) {
      __builtin_prefetch(next);
    }
#pragma GCC unroll 8
    for (int k = 0; k < kSteps; ++k) {
      Step<rows, vectors>(x + i + k, w + (i + k) * kWidth, p.inputs, sums);
    }
  }
  for (; i < p.n; ++i) {
    Step<rows, vectors>(x + i, w + i * kWidth, p.inputs, sums);
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      float* to = y + r * kWidth + v * kLanes;
      Store(Load(to) + sums[r][v], to);
    }
  }
  return next;
}

// As Tile, of a number of rows that is known now, at most `most`.
template <int most, int vectors, typename... Args>
const char* TileOf(int64_t rows, Args... args) {
  if constexpr (most > 1) {
    if (rows < most) return TileOf<most - 1, vectors>(rows, args...);
  }
  return Tile<most, vectors>(args...);
}

inline int64_t Up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// All rows of a piece, in tiles of nearly the same size; prefetches as much
// again as it has, from `next` on, if that is not null.
template <int most, int vectors, typename Weight>
void Tiles(const Piece<Weight>& p, int64_t rows, float* sums,
           const Weight* next) {
  const int64_t along = Up(rows, most);
  const int64_t tiles = along * (kWidth / kLanes / vectors);
  constexpr int64_t kLines = kSteps * kWidth * sizeof(Weight) / kLine;
  const char* ahead = reinterpret_cast<const char*>(next);
  int64_t tile = 0;
  for (int at = 0; at < kWidth; at += vectors * kLanes) {
    for (int64_t a = 0; a < along; ++a, ++tile) {
      const int64_t row = rows * a / along, end = rows * (a + 1) / along;
      const int lines = kLines * (tile + 1) / tiles - kLines * tile / tiles;
      ahead = TileOf<most, vectors>(end - row, p, row, at, sums, ahead,
                                    next ? lines : 0);
    }
  }
}

template <typename Weight>
struct Product {
  const float* x;
  const Weight* w;
  float* y;
  int64_t rows, inputs, outputs, panels;

  // One panel of all rows; `next`: that which this thread will read then, or
  // one that there is not.
  void Panel(int64_t panel, int64_t next) const {
    const Weight* after = 0 <= next && next < panels ? Of(next) : nullptr;
    const int64_t left = std::min<int64_t>(kWidth, outputs - panel * kWidth);
    for (int64_t row = 0; row < rows; row += kBlock) {
      const int64_t some = std::min(kBlock, rows - row);
      // Side by side: rows of y lie where they take each other's place in a
      // cache.
      float sums[kBlock * kWidth];
      std::fill(sums, sums + some * kWidth, 0.0f);
      Block(panel, row, some, row + some == rows ? after : nullptr, sums);
      float* out = y + row * outputs + panel * kWidth;
      for (int64_t r = 0; r < some; ++r) {
        std::copy_n(sums + r * kWidth, left, out + r * outputs);
      }
    }
  }

  void Block(int64_t panel, int64_t row, int64_t some, const Weight* after,
             float* sums) const {
    // Sums wait for those before them: with few rows more of them are under way
    // in tiles twice as wide and half as high.
    constexpr bool kWide = 2 * kVectors * kLanes <= kWidth;
    const bool wide = kWide && Up(some, kRows / 2) < 2 * Up(some, kRows);
    for (int64_t i = 0; i < inputs; i += kPiece) {
      const int64_t n = std::min(kPiece, inputs - i);
      const Weight *w = Of(panel) + i * kWidth, *next = w + n * kWidth;
      const Piece<Weight> piece{x + row * inputs + i, w, n, inputs};
      if (i + n == inputs) {
        next = after;
      } else if (row) {  // it is here
        next = nullptr;
      }
      // With one row alone the machine's own prefetching does as well.
      if (rows == 1) next = nullptr;
      if constexpr (kWide) {
        if (wide) {
          Tiles<kRows / 2, 2 * kVectors>(piece, some, sums, next);
          continue;
        }
      }
      Tiles<kRows, kVectors>(piece, some, sums, next);
    }
  }

  const Weight* Of(int64_t panel) const { return w + panel * inputs * kWidth; }
};

// What the threads of a call share. One may come when all is done and the call
// is over: what it needs to find that out is no other's.
struct Shared {
  std::atomic<int64_t> ends{0}, done{0};
  std::unique_ptr<std::atomic<int64_t>[]> taken;  // panels of each stretch
};

// Each stretch of panels is worked on from both its ends, so that a thread
// reads on and on, and no one waits for a thread that began late.
template <typename Weight>
void Share(ffi::ThreadPool& pool, const Product<Weight>& product) {
  const int64_t panels = product.panels;
  const int64_t threads = std::clamp<int64_t>(
      panels * product.inputs * kWidth / kLeast, 1,
      std::min<int64_t>(panels, std::max<int64_t>(1, pool.num_threads())));
  const int64_t stretches = Up(threads, 2);
  auto shared = std::make_shared<Shared>();
  shared->taken.reset(new std::atomic<int64_t>[stretches]());
  auto work = [=] {
    for (int64_t e; (e = shared->ends.fetch_add(1)) < 2 * stretches;) {
      const int64_t s = e / 2, way = e % 2 ? -1 : 1;
      const int64_t from = panels * s / stretches;
      const int64_t to = panels * (s + 1) / stretches;
      int64_t panel = e % 2 ? to - 1 : from, count = 0;
      for (; shared->taken[s].fetch_add(1) < to - from; panel += way, ++count) {
        product.Panel(panel, panel + way);
      }
      shared->done.fetch_add(count, std::memory_order_release);
    }
  };
  for (int64_t t = 1; t < threads; ++t) pool.Schedule([work] { work(); });
  work();
  while (shared->done.load(std::memory_order_acquire) < panels) {
    std::this_thread::yield();
  }
}

ffi::Error Matmul(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x,
                  ffi::AnyBuffer kernel, ffi::ResultBufferR2<ffi::F32> y) {
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1];
  const int64_t outputs = y->dimensions()[1], panels = Up(outputs, kWidth);
  const auto sizes = kernel.dimensions();
  if (sizes.size() != 3 || sizes[0] != panels || sizes[1] != inputs ||
      sizes[2] != kWidth || y->dimensions()[0] != rows) {
    return ffi::Error::InvalidArgument("[R, I], [P, I, 32], [R, O] do not fit");
  }
  float* out = y->typed_data();
  if (rows * inputs * outputs == 0) {
    std::fill(out, out + rows * outputs, 0.0f);
    return ffi::Error::Success();
  }
  const auto share = [&](const auto* w) {
    using Weight = std::decay_t<decltype(*w)>;
    Share(pool, Product<Weight>{x.typed_data(), w, out, rows, inputs, outputs,
                                panels});
  };
  switch (kernel.element_type()) {
    case ffi::F32:
      share(kernel.typed_data<float>());
      break;
    case ffi::S8:
      share(kernel.typed_data<int8_t>());
      break;
    default:
      return ffi::Error::InvalidArgument("a kernel of float32 or int8, please");
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpecStreamPanels, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::BufferR2<ffi::F32>>());

// Rows times a kernel in panels, at the speed of the memory or of arithmetic,
// whichever is less: y [R, O] = x [R, I] W, in float32. A panel is kWidth
// outputs: of each input in turn the weights of all of them, [O / kWidth, I,
// kWidth], so that a sum never leaves its lane and the kernel is read in order.
//
// For each kBlock rows W passes through once. A piece of a panel that fits into
// a core's nearest cache is multiplied with all of them while the next one is
// on its way (prefetched, a few lines with each step of the loop). A row's sums
// are taken in the same order however many others there are.
//
// panels.py compiles this file for the machine it runs on.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
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
constexpr int64_t kPiece = 128;  // inputs: 16 KiB of a panel
constexpr int64_t kBlock = 48;   // rows that pass a kernel together
constexpr int kLine = 64 / sizeof(float);
constexpr int kSteps = 8;         // inputs between two turns of prefetching
constexpr int64_t kLeast = 8192;  // weights worth a thread of their own

typedef float Vector __attribute__((vector_size(kLanes * 4)));

inline Vector Load(const float* from) {
  Vector x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

inline void Store(Vector x, float* to) { std::memcpy(to, &x, sizeof(x)); }

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
template <int rows, int vectors>
inline void Step(const float* x, const float* w, int64_t inputs,
                 Vector (&sums)[rows][vectors]) {
  Vector weights[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    weights[v] = Load(w + v * kLanes);
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
    const Vector row = x[r * inputs] - Vector{};  // a zero's sign stays
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      sums[r][v] = MultiplyAdd(row, weights[v], sums[r][v]);
    }
  }
}

// Of the last panel, which may be wider than what is left.
__attribute__((noinline)) void StoreSome(Vector sums, float* y, int64_t left,
                                         bool first) {
  float each[kLanes];
  Store(sums, each);
  for (int64_t o = 0; o < left; ++o) y[o] = first ? each[o] : y[o] + each[o];
}

// A piece of a panel, and where its products go.
struct Piece {
  const float *x, *w;
  float* y;
  int64_t n, inputs, outputs;  // inputs of the piece; of a row of x and y
  int64_t left;                // outputs from y on, of which kWidth are here
  bool first;                  // y begins with it
};

// Adds `rows` rows of a piece, from `row` on, to y, in outputs from `at` on;
// meanwhile prefetches `lines` lines with each kSteps inputs. Never inlined: in
// a function of many tiles GCC keeps the sums of some in memory.
template <int rows, int vectors>
__attribute__((noinline)) void Tile(const Piece& p, int64_t row, int at,
                                    const float*& next, int lines) {
  const float *x = p.x + row * p.inputs, *w = p.w + at;
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
      const int from = at + v * kLanes;
      float* y = p.y + (row + r) * p.outputs + from;
      if (from + kLanes <= p.left) {
        Store(p.first ? sums[r][v] : Load(y) + sums[r][v], y);
      } else {
        StoreSome(sums[r][v], y, p.left - from, p.first);
      }
    }
  }
}

// As Tile, of a number of rows that is known now, at most `most`.
template <int most, int vectors, typename... Args>
void TileOf(int64_t rows, Args&&... args) {
  if constexpr (most > 1) {
    if (rows < most) return TileOf<most - 1, vectors>(rows, args...);
  }
  Tile<most, vectors>(args...);
}

inline int64_t Up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// All rows of a piece, in tiles of nearly the same size; `ahead`: whether to
// prefetch as much again as it has, from `next` on.
template <int most, int vectors>
void Tiles(const Piece& p, int64_t rows, const float* next, bool ahead) {
  const int64_t along = Up(rows, most);
  const int64_t tiles = along * (kWidth / kLanes / vectors);
  constexpr int64_t kLines = kSteps * kWidth / kLine;
  int64_t tile = 0;
  for (int at = 0; at < kWidth; at += vectors * kLanes) {
    for (int64_t a = 0; a < along; ++a, ++tile) {
      const int64_t row = rows * a / along, end = rows * (a + 1) / along;
      const int lines = kLines * (tile + 1) / tiles - kLines * tile / tiles;
      TileOf<most, vectors>(end - row, p, row, at, next, ahead ? lines : 0);
    }
  }
}

// The panels from `from` to `to` (not included), of all rows of a block.
void Panels(const float* x, const float* w, float* y, int64_t rows,
            int64_t inputs, int64_t outputs, int64_t from, int64_t to) {
  // Sums wait for those before them: with few rows more of them are under way
  // in tiles twice as wide and half as high.
  constexpr bool kWide = 2 * kVectors * kLanes <= kWidth;
  const bool wide = kWide && Up(rows, kRows / 2) < 2 * Up(rows, kRows);
  for (int64_t panel = from; panel < to; ++panel) {
    const float* begin = w + panel * inputs * kWidth;
    const int64_t left = outputs - panel * kWidth;
    for (int64_t i = 0; i < inputs; i += kPiece) {
      const int64_t n = std::min(kPiece, inputs - i);
      const Piece piece{x + i,  begin + i * kWidth, y + panel * kWidth, n,
                        inputs, outputs,            left,               i == 0};
      const float* next = piece.w + n * kWidth;
      // With one row alone the machine's own prefetching does as well.
      const bool last = i + n == inputs && panel + 1 == to;
      const bool ahead = rows > 1 && !last;
      if constexpr (kWide) {
        if (wide) {
          Tiles<kRows / 2, 2 * kVectors>(piece, rows, next, ahead);
          continue;
        }
      }
      Tiles<kRows, kVectors>(piece, rows, next, ahead);
    }
  }
}

struct Progress {
  std::atomic<int64_t> taken{0}, done{0};
};

ffi::Error Matmul(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x,
                  ffi::BufferR3<ffi::F32> kernel,
                  ffi::ResultBufferR2<ffi::F32> y) {
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1];
  const int64_t panels = kernel.dimensions()[0], outputs = y->dimensions()[1];
  const float *rows_in = x.typed_data(), *weights = kernel.typed_data();
  float* out = y->typed_data();
  if (kernel.dimensions()[1] != inputs || kernel.dimensions()[2] != kWidth ||
      panels != Up(outputs, kWidth) || y->dimensions()[0] != rows) {
    return ffi::Error::InvalidArgument("[R, I], [P, I, 32], [R, O] do not fit");
  }
  if (rows * inputs * outputs == 0) {
    std::fill(out, out + rows * outputs, 0.0f);
    return ffi::Error::Success();
  }
  // A part in one piece for each thread, so that it reads on and on.
  const int64_t parts = std::clamp<int64_t>(
      panels * inputs * kWidth / kLeast, 1,
      std::min<int64_t>(panels, std::max<int64_t>(1, pool.num_threads())));
  // A thread may come when all is done, and this call is over: what it needs
  // to find that out is its own.
  auto progress = std::make_shared<Progress>();
  auto work = [=] {
    for (int64_t p; (p = progress->taken.fetch_add(1)) < parts;) {
      const int64_t from = panels * p / parts, to = panels * (p + 1) / parts;
      for (int64_t row = 0; row < rows; row += kBlock) {
        Panels(rows_in + row * inputs, weights, out + row * outputs,
               std::min(kBlock, rows - row), inputs, outputs, from, to);
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpecStreamPanels, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR3<ffi::F32>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>());

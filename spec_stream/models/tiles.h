// Registers, and tiles of a product whose sums stay in them. Compiled with each
// kernel for a CPU in float32, see native.py.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "share.h"

namespace spec_stream {

// Lanes of a register; rows and registers' worth of outputs of a tile, whose
// sums stay in registers while it is added up: AVX-512 and ARM have 32 of them,
// AVX and SSE 16. A tile of fewer outputs has more rows, up to kMost.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 12, kVectors = 2;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRows = 3, kVectors = 4;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRows = 6, kVectors = 4;
#else
constexpr int kLanes = 4, kRows = 3, kVectors = 4;
#endif
constexpr int kMost = 12;      // what loops over rows are unrolled for
constexpr int64_t kLine = 64;  // bytes
constexpr int kSteps = 8;      // inputs between two turns of prefetching
constexpr int kGroup = 16;     // outputs of a group: a line, in float32
static_assert(kGroup % kLanes == 0 && kRows <= kMost);

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

// The same of one number.
inline float MultiplyAdd(float a, float b, float c) {
#if defined(__AVX512F__) || defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// Adds one input's products to the sums. x: of the tile's first row; apart:
// from one row to the next; far: from one group of outputs to the next.
template <int rows, int vectors, typename Weight, typename Far>
inline void Step(const float* x, const Weight* w, int64_t apart, Far far,
                 Vector (&sums)[rows][vectors]) {
  const auto row = [=](int r) { return Kept(x[r * apart] - Vector{}); };
  const auto weights = [=](int v) {
    const int at = v * kLanes;
    return Kept(Load(w + at / kGroup * far + at % kGroup));
  };
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

// Outputs lie side by side: see Factors::far.
using SideBySide = std::integral_constant<int64_t, kGroup>;
using Nothing = std::integral_constant<int64_t, 0>;  // see Factors::ahead

// Rows of x times w, [n, outputs]: x is `apart` from row to row, w `width` from
// input to input and `far` from each kGroup outputs to the next, y, where the
// sums go, `to` from row to row. With a tile's weights those `ahead` of them,
// so many (0: none), are prefetched: for inputs that lie too far apart for
// the machine to see what comes, and outputs side by side.
template <typename Weight, typename Width, typename Far,
          typename Ahead = Nothing>
struct Factors {
  const float* x;
  const Weight* w;
  float* y;
  int64_t n, apart, to;
  Width width;
  Far far;
  Ahead ahead{};
};

// Adds the products of `rows` rows from `row` on, in outputs from `at` on, to
// y; prefetches `lines` lines with each kSteps inputs, from `next` on and as
// far from it as each further group of the tile is from the first -> up to
// where.
// Never inlined: in a function of many tiles GCC keeps the sums of some in
// memory.
template <int rows, int vectors, typename Weight, typename Width, typename Far,
          typename Ahead>
__attribute__((noinline)) const char* Tile(
    const Factors<Weight, Width, Far, Ahead>& f, int64_t row, int64_t at,
    const char* next, int lines) {
  static_assert(std::is_same_v<Ahead, Nothing> ||
                std::is_same_v<Far, SideBySide>);
  constexpr int streams =
      std::is_same_v<Far, SideBySide> ? 1 : Up(vectors * kLanes, kGroup);
  const float* x = f.x + row * f.apart;
  const Weight* w = f.w + at / kGroup * f.far + at % kGroup;
  float* y = f.y + row * f.to + at;
  // They go on from y, so that where pieces end changes no bit of them.
  Vector sums[rows][vectors];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      sums[r][v] = Load(y + r * f.to + v * kLanes);
    }
  }
  int64_t i = 0;
  for (; i + kSteps <= f.n; i += kSteps) {
    for (int line = 0; line < lines; ++line, next += kLine) {
      for (int64_t s = 0; s < streams; ++s) {
        __builtin_prefetch(next + s * f.far * int64_t{sizeof(Weight)});
      }
    }
    for (int k = 0; f.ahead && k < kSteps; ++k) {
      for (int v = 0; v < vectors * kLanes; v += kLine / sizeof(Weight)) {
        __builtin_prefetch(w + (i + k) * f.width + f.ahead + v);
      }
    }
#pragma GCC unroll 8
    for (int k = 0; k < kSteps; ++k) {
      Step<rows, vectors>(x + i + k, w + (i + k) * f.width, f.apart, f.far,
                          sums);
    }
  }
  for (; i < f.n; ++i) {
    Step<rows, vectors>(x + i, w + i * f.width, f.apart, f.far, sums);
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      Store(sums[r][v], y + r * f.to + v * kLanes);
    }
  }
  return next;
}

// All rows, in tiles of nearly the same size, of the outputs of a tile from
// `at` on; `lines` to prefetch with each kSteps inputs of all of them: see
// Tile.
template <int vectors, typename Weight, typename Width, typename Far,
          typename Ahead>
const char* Tiles(const Factors<Weight, Width, Far, Ahead>& f, int64_t rows,
                  int64_t at, const char* next, int64_t lines) {
  constexpr int most = std::min(kMost, kRows * kVectors / vectors);
  const int64_t along = Up(rows, most);
  for (int64_t a = 0; a < along; ++a) {
    const int64_t row = rows * a / along, end = rows * (a + 1) / along;
    const int some = lines * (a + 1) / along - lines * a / along;
    next = Known<most>(end - row, [&](auto here) {
      return Tile<here, vectors>(f, row, at, next, some);
    });
  }
  return next;
}

}  // namespace spec_stream

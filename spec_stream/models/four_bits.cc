// Rows times a kernel in 4 bits: y [R, O] = x [R, I] W, nearly, of few rows and
// an eighth of float32's bytes. Weights are integers of -7 to 7 and, for each
// output, what 1 is; rows become integers of 8 bits here, and what 1 is. Sums
// are of integers, and exact.
//
// A panel is kOutputs outputs: of each kInputs inputs in turn the weights of
// all of them, [panels, I / kInputs, kOutputs], those of an output in an
// element of 32 bits, 8 more than they are. In its byte b the low half is the
// weight of input b, the high half that of b + 4. A core reads two panels at
// once, half the kernel apart (panels.cc says why).
//
// native.py compiles this file for the machine it runs on.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "share.h"

namespace ffi = xla::ffi;

namespace spec_stream {
namespace {

constexpr int kOutputs = 8;          // of a panel
constexpr int kInputs = 8;           // of an element
constexpr int kChunk = 4 * kInputs;  // inputs of a chunk: see Add
constexpr int kRows = 4;             // of a tile
constexpr int kMost = 127;           // of a row's integers the largest
constexpr int kAhead = 256;          // elements that prefetching is ahead
constexpr int64_t kLeast = 65536;    // weights of a turn, worth a thread
// A sum of 16 bits is of half a chunk's inputs.
static_assert(kChunk / 2 * 15 * kMost < 1 << 15);

// Add: a chunk's sums and the products of w, 4 bits in each byte, and x, int8.
// Wide: these sums in 32 bits. VNNI has them so at once; there too they are of
// chunks, so that one's need not wait for the last one's.
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
inline __m256i Add(__m256i sums, __m256i w, __m256i x) {
  return _mm256_dpbusd_epi32(sums, w, x);
}
inline __m256i Wide(__m256i sums) { return sums; }
#elif defined(__AVX2__)
// 16 bits, of two inputs' products each; kept where they are, for GCC else puts
// all products away before it adds any.
inline __m256i Add(__m256i sums, __m256i w, __m256i x) {
  sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(w, x));
  __asm__("" : "+v"(sums));
  return sums;
}
inline __m256i Wide(__m256i sums) {
  return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
}
#endif

// Sums of `rows` rows, int8, `apart` from one to the next, in the outputs of
// the panels a and b, of n inputs.
#if defined(__AVX2__)
template <int rows>
__attribute__((noinline)) void Tile(const int8_t* x, int64_t apart,
                                    const int32_t* a, const int32_t* b,
                                    int64_t n,
                                    int32_t (*sums)[2][kOutputs]) {
  const __m256i low = _mm256_set1_epi8(15);
  const auto load = [](const int32_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  };
  __m256i all[rows][2] = {};
  for (int64_t i = 0; i < n; i += kChunk) {
    __m256i some[rows][2] = {};
#pragma GCC unroll 4
    for (int k = 0; k < kChunk; k += kInputs) {
      const int64_t at = (i + k) / kInputs * kOutputs;
      if (k % (2 * kInputs) == 0) {  // a line of each
        __builtin_prefetch(a + at + kAhead);
        __builtin_prefetch(b + at + kAhead);
      }
      const __m256i of_a = load(a + at), of_b = load(b + at);
      const __m256i w[2][2] = {
          {_mm256_and_si256(of_a, low), _mm256_and_si256(of_b, low)},
          {_mm256_and_si256(_mm256_srli_epi16(of_a, 4), low),
           _mm256_and_si256(_mm256_srli_epi16(of_b, 4), low)}};
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          int32_t four;
          std::memcpy(&four, x + r * apart + i + k + 4 * half, 4);
          const __m256i each = _mm256_set1_epi32(four);
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) {
            some[r][v] = Add(some[r][v], w[half][v], each);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        all[r][v] = _mm256_add_epi32(all[r][v], Wide(some[r][v]));
      }
    }
  }
  std::memcpy(sums, all, sizeof(all));
}
#else
template <int rows>
void Tile(const int8_t* x, int64_t apart, const int32_t* a, const int32_t* b,
          int64_t n, int32_t (*sums)[2][kOutputs]) {
  std::fill(sums[0][0], sums[rows - 1][1] + kOutputs, 0);
  for (int64_t i = 0; i < n; i += kInputs, a += kOutputs, b += kOutputs) {
    for (int v = 0; v < 2; ++v) {
      for (int k = 0; k < kInputs; ++k) {
        const int bits = 8 * (k % 4) + 4 * (k / 4);
        int32_t w[kOutputs];
        for (int o = 0; o < kOutputs; ++o) w[o] = (v ? b : a)[o] >> bits & 15;
        for (int r = 0; r < rows; ++r) {
          const int32_t one = x[r * apart + i + k];
          for (int o = 0; o < kOutputs; ++o) sums[r][v][o] += one * w[o];
        }
      }
    }
  }
}
#endif

// Rows as integers, [R, width]: what is beyond their inputs is 0.
struct Rows {
  Rows(const float* x, int64_t count, int64_t inputs, int64_t width)
      : count(count), width(width), whole(count * width), ones(count),
        eights(count) {
    for (int64_t r = 0; r < count; ++r, x += inputs) {
      int32_t top = 0;  // as floats in order, and what is no number above them
      for (int64_t i = 0; i < inputs; ++i) {
        int32_t bits;
        std::memcpy(&bits, x + i, sizeof(bits));
        top = std::max(top, bits & 0x7fffffff);
      }
      float largest;
      std::memcpy(&largest, &top, sizeof(top));
      ones[r] = largest / kMost;
      const float scale = largest > 0 ? kMost / largest : 0;
      int32_t sum = 0;
      for (int64_t i = 0; i < inputs; ++i) {
        // Compared so that what is no number becomes one: `ones` says so.
        const float v = x[i] * scale > -kMost ? x[i] * scale : -kMost;
        const int32_t near = std::min<float>(v, kMost) + (v < 0 ? -.5f : .5f);
        whole[r * width + i] = near;
        sum += near;
      }
      eights[r] = 8 * sum;
    }
  }

  int64_t count, width;
  std::vector<int8_t> whole;
  std::vector<float> ones;      // what 1 is
  std::vector<int32_t> eights;  // a row times 8s
};

// The panels `a` and `a` + `far` times all rows.
void Pair(const Rows& rows, const int32_t* kernel, const float* scale,
          int64_t a, int64_t far, int64_t outputs, float* y) {
  const int64_t size = rows.width / kInputs * kOutputs;
  for (int64_t row = 0; row < rows.count; row += kRows) {
    const int64_t some = std::min<int64_t>(kRows, rows.count - row);
    int32_t sums[kRows][2][kOutputs];
    Known<kRows>(some, [&](auto here) {
      Tile<here>(&rows.whole[row * rows.width], rows.width, kernel + a * size,
                 kernel + (a + far) * size, rows.width, sums);
    });
    for (int64_t r = 0; r < some; ++r) {
      for (int v = 0; v < 2; ++v) {
        const int64_t first = (a + v * far) * kOutputs;
        const int64_t end = std::min<int64_t>(outputs - first, kOutputs);
        if (end <= 0) continue;  // a panel of filling alone
        const int32_t eights = rows.eights[row + r];
        const float one = rows.ones[row + r], *ones = scale + first;
        float found[kOutputs], *to = y + (row + r) * outputs + first;
        for (int o = 0; o < kOutputs; ++o) {
          found[o] = one * (sums[r][v][o] - eights);
        }
        if (end == kOutputs) {  // a few instructions, of a number known here
          for (int o = 0; o < kOutputs; ++o) to[o] = ones[o] * found[o];
        } else {
          for (int o = 0; o < end; ++o) to[o] = ones[o] * found[o];
        }
      }
    }
  }
}

ffi::Error Matmul(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x,
                  ffi::BufferR3<ffi::S32> kernel, ffi::BufferR1<ffi::F32> scale,
                  ffi::ResultBufferR2<ffi::F32> y) {
  const int64_t count = x.dimensions()[0], inputs = x.dimensions()[1];
  const int64_t outputs = y->dimensions()[1];
  const auto sizes = kernel.dimensions();
  const int64_t panels = sizes[0], width = sizes[1] * kInputs;
  const int64_t pairs = panels / 2;
  if (panels % 2 || panels * kOutputs < outputs || width < inputs ||
      width % kChunk || sizes[2] != kOutputs ||
      scale.dimensions()[0] != outputs || y->dimensions()[0] != count) {
    return ffi::Error::InvalidArgument(
        "[R, I], [P, I / 8, 8], [O], [R, O] do not fit");
  }
  float* out = y->typed_data();
  if (count * inputs * outputs == 0) {
    std::fill(out, out + count * outputs, 0.0f);
    return ffi::Error::Success();
  }
  const Rows rows(x.typed_data(), count, inputs, width);
  const int32_t* w = kernel.typed_data();
  const float* ones = scale.typed_data();
  const int64_t all = panels * kOutputs * width;
  const int64_t turns = std::clamp<int64_t>(all / kLeast, 1, pairs);
  Share(pool, turns, turns, [=, &rows](int64_t turn, int64_t) {
    const int64_t end = pairs * (turn + 1) / turns;
    for (int64_t a = pairs * turn / turns; a < end; ++a) {
      Pair(rows, w, ones, a, pairs, outputs, out);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace spec_stream

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpecStreamFourBits, spec_stream::Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR3<ffi::S32>>()
                                  .Arg<ffi::BufferR1<ffi::F32>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>());

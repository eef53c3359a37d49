// Rows times a kernel in panels, at the speed of the memory or of arithmetic,
// whichever is less: y [R, O] = x [R, I] W, in float32. A panel is kGroup
// outputs: of each input in turn the weights of all of them, [O / kGroup, I,
// kGroup], so that a sum never leaves its lane and a panel is read in order.
// Weights are float32 or, as integers of 8 bits, become that on their way; or
// they are such integers of two inputs each, [O / kGroup, I / 2, kGroup], and
// rows become integers too, of 16 bits: half the work, and nearly the sums.
//
// A core reads two panels at once (where a tile is as wide), for memory gives
// more to two streams than to one, and each once: pieces that fit into its
// nearest cache are multiplied with all rows while the next ones are on their
// way (prefetched, a few lines with each step of the loop). A row's sums are
// taken in the same order however many others there are.
//
// native.py compiles this file for the machine it runs on.

#include <cmath>
#include <vector>

#include "tiles.h"

namespace ffi = xla::ffi;

namespace spec_stream {
namespace {

constexpr int kWidth = 2 * kGroup;  // outputs of a pair of panels
static_assert(kWidth % (kVectors * kLanes) == 0);
constexpr int kMost = 32767;        // of a row's whole numbers the largest
constexpr int64_t kPieces = 8192;   // bytes of a pair's two pieces
constexpr int64_t kFew = 8;         // more rows want pieces twice as large
constexpr int64_t kBlock = 48;      // rows that pass a pair together
constexpr int64_t kLeast = 8192;    // weights worth a thread of their own

template <typename Weight>
using Pieces =
    Factors<Weight, std::integral_constant<int64_t, kGroup>, int64_t>;

// All rows of the pieces of a pair; prefetches as much again as they have, from
// `next` on, if that is not null.
template <typename Weight>
void Multiply(const Pieces<Weight>& pieces, int64_t rows, const Weight* next) {
  constexpr int64_t kLines = kSteps * kGroup * sizeof(Weight) / kLine;
  const int64_t lines = next ? kLines : 0;
  if (!next) next = pieces.w;
  for (int at = 0; at < kWidth; at += kVectors * kLanes) {
    const Weight* ahead = next + at / kGroup * pieces.far;
    Tiles<kVectors>(pieces, rows, at, reinterpret_cast<const char*>(ahead),
                    lines);
  }
}

template <typename Weight>
struct Product {
  const Input<Weight>* x;
  const Weight* w;
  float* y;
  const float* ones;  // what 1 of a row of x is; null: 1
  int64_t rows, inputs, outputs, pairs;

  // One pair of panels of all rows; `next`: that which this thread will read
  // then, or one that there is not.
  void Pair(int64_t pair, int64_t next) const {
    const Weight* after = 0 <= next && next < pairs ? Of(next) : nullptr;
    const int64_t left = std::min<int64_t>(kWidth, outputs - pair * kWidth);
    for (int64_t row = 0; row < rows; row += kBlock) {
      const int64_t some = std::min(kBlock, rows - row);
      // Side by side: rows of y lie where they take each other's place in a
      // cache.
      float sums[kBlock * kWidth];
      std::fill(sums, sums + some * kWidth, 0.0f);
      Block(pair, row, some, row + some == rows ? after : nullptr, sums);
      float* out = y + row * outputs + pair * kWidth;
      for (int64_t r = 0; r < some; ++r) {
        const float one = ones ? ones[row + r] : 1;
        for (int64_t i = 0; i < left; ++i) {
          out[r * outputs + i] = one * sums[r * kWidth + i];
        }
      }
    }
  }

  void Block(int64_t pair, int64_t row, int64_t some, const Weight* after,
             float* sums) const {
    constexpr int64_t few = kPieces / (kWidth * sizeof(Weight));  // inputs
    // A piece's sums of integers are below 2 ^ 31.
    static_assert(!kWhole<Weight> || 2 * few * 127 * kMost < 1LL << 31);
    // A piece, the next and rows of x are to have room in the nearest cache;
    // where arithmetic takes longer, tiles that end seldom are worth more. One
    // row reads all but once, best on and on.
    const int64_t most = kWhole<Weight> ? few
                         : rows == 1    ? inputs
                         : rows <= kFew ? few
                                        : 2 * few;
    for (int64_t i = 0; i < inputs; i += most) {
      const int64_t n = std::min(most, inputs - i);
      const Weight *w = Of(pair) + i * kGroup, *next = w + n * kGroup;
      const Pieces<Weight> pieces{
          x + row * inputs + i, w, sums, n, inputs, kWidth, {},
          inputs * kGroup};
      if (i + n == inputs) {
        next = after;
      } else if (row) {  // it is here
        next = nullptr;
      }
      // With one row alone the machine's own prefetching does as well.
      if (rows == 1) next = nullptr;
      Multiply(pieces, some, next);
    }
  }

  const Weight* Of(int64_t pair) const { return w + pair * inputs * kWidth; }
};

// Rows [R, I] as whole numbers, two in the halves of each element, [R, I / 2],
// and what 1 is in each row.
struct Halved {
  Halved(const float* x, int64_t rows, int64_t inputs)
      : width(Up(inputs, 2)), halves(rows * width), ones(rows) {
    for (int64_t r = 0; r < rows; ++r, x += inputs) {
      float largest = 0;
      for (int64_t i = 0; i < inputs; ++i) {
        largest = std::max(largest, std::fabs(x[i]));
      }
      ones[r] = largest / kMost;
      const float scale = largest > 0 ? kMost / largest : 0;
      const auto whole = [=](int64_t i) -> int32_t {
        const float v = x[i] * scale;
        if (!(v > -kMost)) return -kMost;  // and of what is not a number
        return std::min<float>(v, kMost) + (v < 0 ? -0.5f : 0.5f);
      };
      int32_t* out = &halves[r * width];
      for (int64_t i = 0; i < inputs / 2; ++i) {
        out[i] = (whole(2 * i) & 0xffff) | whole(2 * i + 1) * 65536;
      }
      if (inputs % 2) out[width - 1] = whole(inputs - 1) & 0xffff;
    }
  }

  int64_t width;
  std::vector<int32_t> halves;
  std::vector<float> ones;
};

ffi::Error Matmul(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x,
                  ffi::AnyBuffer kernel, ffi::ResultBufferR2<ffi::F32> y) {
  const int64_t rows = x.dimensions()[0], outputs = y->dimensions()[1];
  const int64_t pairs = Up(outputs, kWidth);
  const bool whole = kernel.element_type() == ffi::S16;
  const int64_t inputs = Up(x.dimensions()[1], whole ? 2 : 1);
  const auto sizes = kernel.dimensions();
  if (sizes.size() != 3 || sizes[0] != 2 * pairs || sizes[1] != inputs ||
      sizes[2] != kGroup || y->dimensions()[0] != rows) {
    return ffi::Error::InvalidArgument("[R, I], [P, I, 16], [R, O] do not fit");
  }
  float* out = y->typed_data();
  if (rows * inputs * outputs == 0) {
    std::fill(out, out + rows * outputs, 0.0f);
    return ffi::Error::Success();
  }
  const auto share = [&](const auto* x, const auto* w, const float* ones) {
    using Weight = std::decay_t<decltype(*w)>;
    const Product<Weight> product{x,    w,      out,     ones,
                                  rows, inputs, outputs, pairs};
    Share(pool, pairs, pairs * inputs * kWidth / kLeast,
          [product](int64_t i, int64_t next) { product.Pair(i, next); });
  };
  switch (kernel.element_type()) {
    case ffi::F32:
      share(x.typed_data(), kernel.typed_data<float>(), nullptr);
      break;
    case ffi::S8:
      share(x.typed_data(), kernel.typed_data<int8_t>(), nullptr);
      break;
    case ffi::S16: {
      const Halved of(x.typed_data(), rows, x.dimensions()[1]);
      share(of.halves.data(), kernel.typed_data<int16_t>(), of.ones.data());
      break;
    }
    default:
      return ffi::Error::InvalidArgument(
          "a kernel of float32, int8 or int16, please");
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace spec_stream

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpecStreamPanels, spec_stream::Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::BufferR2<ffi::F32>>());

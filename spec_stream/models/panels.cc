// Rows times a kernel in panels, at the speed of the memory or of arithmetic,
// whichever is less: y [R, O] = x [R, I] W, in float32. A panel is kGroup
// outputs: of each input in turn the weights of all of them, [O / kGroup, I,
// kGroup], so that a sum never leaves its lane and a panel is read in order.
// Weights are float32 or, as integers of 8 bits, become that on their way.
//
// A core reads two panels at once (where a tile is as wide), for memory gives
// more to two streams than to one, and each once: pieces that fit into its
// nearest cache are multiplied with all rows while the next ones are on their
// way (prefetched, a few lines with each step of the loop). A row's sums are
// taken in the same order however many others there are.
//
// A gated product is f(x W) * x V, of W and V in one kernel, a panel of one and
// of the other in turn: f is taken of sums that are in the nearest cache, by
// all threads.
//
// native.py compiles this file for the machine it runs on.

#include <algorithm>

#include "exp.h"
#include "share.h"
#include "tiles.h"

namespace ffi = xla::ffi;

namespace spec_stream {
namespace {

constexpr int kWidth = 2 * kGroup;  // outputs of a pair of panels
static_assert(kWidth % (kVectors * kLanes) == 0);
constexpr int64_t kPieces = 8192;   // bytes of a pair's two pieces
constexpr int64_t kFew = 8;         // more rows want pieces twice as large
constexpr int64_t kBlock = 48;      // rows that pass a pair together
constexpr int64_t kLeast = 8192;    // weights worth a thread of their own

enum Gate : int64_t { kNone, kSilu, kGeluTanh };  // as panels.py has them

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

inline Vector Activate(Vector x, Gate gate) {
  if (gate == kSilu) return x * Sigmoid(x);
  // x (1 + tanh z) / 2 is x times the sigmoid of 2 z.
  const Vector cubic = MultiplyAdd(All(0.044715f) * x * x, x, x);
  return x * Sigmoid(All(2 * 0.7978845608f) * cubic);
}

template <typename Weight>
struct Product {
  const float* x;
  const Weight* w;
  float* y;
  int64_t rows, inputs, outputs, pairs;  // outputs: of y
  Gate gate;

  // One pair of panels of all rows; `next`: that which this thread will read
  // then, or one that there is not.
  void Pair(int64_t pair, int64_t next) const {
    const Weight* after = 0 <= next && next < pairs ? Of(next) : nullptr;
    const int64_t width = gate ? kGroup : kWidth;
    const int64_t left = std::min<int64_t>(width, outputs - pair * width);
    for (int64_t row = 0; row < rows; row += kBlock) {
      const int64_t some = std::min(kBlock, rows - row);
      // Side by side: rows of y lie where they take each other's place in a
      // cache.
      float sums[kBlock * kWidth];
      std::fill(sums, sums + some * kWidth, 0.0f);
      Block(pair, row, some, row + some == rows ? after : nullptr, sums);
      float* out = y + row * outputs + pair * width;
      for (int64_t r = 0; r < some; ++r) {
        float* mine = sums + r * kWidth;
        for (int at = 0; gate && at < kGroup; at += kLanes) {
          const Vector up = Load(mine + kGroup + at);
          Store(Activate(Load(mine + at), gate) * up, mine + at);
        }
        std::copy_n(mine, left, out + r * outputs);
      }
    }
  }

  void Block(int64_t pair, int64_t row, int64_t some, const Weight* after,
             float* sums) const {
    constexpr int64_t few = kPieces / (kWidth * sizeof(Weight));  // inputs
    // A piece, the next and rows of x are to have room in the nearest cache;
    // where arithmetic takes longer, tiles that end seldom are worth more. One
    // row reads all but once, best on and on.
    const int64_t most = rows == 1      ? inputs
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

ffi::Error Matmul(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x,
                  ffi::AnyBuffer kernel, int64_t gate,
                  ffi::ResultBufferR2<ffi::F32> y) {
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1];
  const int64_t outputs = y->dimensions()[1];
  const int64_t pairs = Up(outputs, gate ? kGroup : kWidth);
  const auto sizes = kernel.dimensions();
  if (sizes.size() != 3 || sizes[0] != 2 * pairs || sizes[1] != inputs ||
      sizes[2] != kGroup || y->dimensions()[0] != rows) {
    return ffi::Error::InvalidArgument("[R, I], [P, I, 16], [R, O] do not fit");
  }
  if (gate < kNone || kGeluTanh < gate || (gate && outputs % kGroup)) {
    return ffi::Error::InvalidArgument("no such gate, or not of whole panels");
  }
  float* out = y->typed_data();
  if (rows * inputs * outputs == 0) {
    std::fill(out, out + rows * outputs, 0.0f);
    return ffi::Error::Success();
  }
  const auto share = [&](const auto* w) {
    using Weight = std::decay_t<decltype(*w)>;
    const Product<Weight> product{x.typed_data(), w, out, rows,
                                  inputs, outputs, pairs, Gate(gate)};
    Share(pool, pairs, pairs * inputs * kWidth / kLeast,
          [product](int64_t i, int64_t next) { product.Pair(i, next); });
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
}  // namespace spec_stream

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpecStreamPanels, spec_stream::Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<int64_t>("gate")
                                  .Ret<ffi::BufferR2<ffi::F32>>());

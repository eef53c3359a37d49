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
// native.py compiles this file for the machine it runs on.

#include "tiles.h"

namespace ffi = xla::ffi;

namespace spec_stream {
namespace {

constexpr int kWidth = 32;        // outputs of a panel; panels.py's WIDTH
constexpr int64_t kPiece = 128;   // inputs: 16 KiB of a panel in float32
constexpr int64_t kBlock = 48;    // rows that pass a panel together
constexpr int64_t kLeast = 8192;  // weights worth a thread of their own

using Width = std::integral_constant<int64_t, kWidth>;

// All rows of a piece, in tiles of nearly the same size; prefetches as much
// again as it has, from `next` on, if that is not null.
template <typename Weight>
void Tiles(const Factors<Weight, Width>& piece, int64_t rows,
           const Weight* next) {
  const int64_t along = Up(rows, kRows);
  const int64_t tiles = along * (kWidth / kLanes / kVectors);
  constexpr int64_t kLines = kSteps * kWidth * sizeof(Weight) / kLine;
  const char* ahead = reinterpret_cast<const char*>(next);
  int64_t tile = 0;
  for (int at = 0; at < kWidth; at += kVectors * kLanes) {
    for (int64_t a = 0; a < along; ++a, ++tile) {
      const int64_t row = rows * a / along, end = rows * (a + 1) / along;
      const int lines = kLines * (tile + 1) / tiles - kLines * tile / tiles;
      ahead = TileOf<kRows, kVectors>(end - row, piece, row, at, ahead,
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
    for (int64_t i = 0; i < inputs; i += kPiece) {
      const int64_t n = std::min(kPiece, inputs - i);
      const Weight *w = Of(panel) + i * kWidth, *next = w + n * kWidth;
      const Factors<Weight, Width> piece{
          x + row * inputs + i, w, sums, n, inputs, {}, {}};
      if (i + n == inputs) {
        next = after;
      } else if (row) {  // it is here
        next = nullptr;
      }
      // With one row alone the machine's own prefetching does as well.
      if (rows == 1) next = nullptr;
      Tiles(piece, some, next);
    }
  }

  const Weight* Of(int64_t panel) const { return w + panel * inputs * kWidth; }
};

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
    const Product<Weight> product{x.typed_data(), w,       out,   rows,
                                  inputs,         outputs, panels};
    Share(pool, panels, panels * inputs * kWidth / kLeast,
          [product](int64_t i, int64_t next) { product.Panel(i, next); });
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
                                  .Ret<ffi::BufferR2<ffi::F32>>());

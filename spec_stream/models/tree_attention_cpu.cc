// Attention of new rows over a cache and over each other, in float32: what
// attention.py's dense form gives, in one call for a layer. For each row of the
// batch and each key/value head, and some of the new rows with their query
// heads: scores with the cache's keys up to its length and with the new ones,
// one softmax, values. Both products are of tiles.h, for keys lie by their
// sizes, [H, S], and values by their slots, [S, H].
//
// Letters as in attention.py. native.py compiles this file.

#include <algorithm>
#include <cmath>
#include <vector>

#include "exp.h"
#include "share.h"
#include "tiles.h"

namespace ffi = xla::ffi;

namespace spec_stream {
namespace {

using Queries = ffi::Buffer<ffi::F32, 5>;  // [B, R, K, G, H]

constexpr int64_t kBlock = 48;       // rows with their query heads, at once
constexpr double kLeast = 1 << 17;  // FLOPs worth a thread of their own
constexpr int64_t kAhead = 1 << 16;  // bytes of keys, or values, to prefetch
constexpr float kNever = -1e30f;     // score of what a row may not attend to

// y += x w, w [n, outputs] `width` apart; of any number of outputs. Meanwhile
// prefetches `bytes` from `next` on.
void Multiply(const float* x, int64_t rows, int64_t apart, const float* w,
              int64_t n, int64_t outputs, int64_t width, float* y, int64_t to,
              const float* next = nullptr, int64_t bytes = 0) {
  const Factors<float, int64_t, SideBySide> f{x, w, y, n, apart, to, width, {}};
  const char* ahead = reinterpret_cast<const char*>(next);
  const int64_t turns = n / kSteps * (outputs / kVectors / kLanes);
  const int64_t lines = Up(bytes / kLine, std::max<int64_t>(turns, 1));
  int64_t at = 0;
  constexpr int64_t wide = kVectors * kLanes;
  for (; at + wide <= outputs; at += wide) {
    ahead = Tiles<kVectors>(f, rows, at, ahead, lines);
  }
  for (; at + kLanes <= outputs; at += kLanes) {
    Tiles<1>(f, rows, at, nullptr, 0);
  }
  for (; at < outputs; ++at) {
    for (int64_t r = 0; r < rows; ++r) {
      float sum = y[r * to + at];
      for (int64_t i = 0; i < n; ++i) {
        sum = MultiplyAdd(x[r * apart + i], w[i * width + at], sum);
      }
      y[r * to + at] = sum;
    }
  }
}

// Scores of a row, of which as many as fill registers, -> weights; their sum.
float Softmax(float* scores, int64_t count, float cap) {
  if (cap != 0) {
    for (int64_t i = 0; i < count; ++i) {
      if (scores[i] != kNever) scores[i] = cap * std::tanh(scores[i] / cap);
    }
  }
  Vector most = Load(scores);
  for (int64_t i = kLanes; i < count; i += kLanes) {
    const Vector x = Load(scores + i);
    most = x > most ? x : most;
  }
  float top = most[0];
  for (int lane = 1; lane < kLanes; ++lane) top = std::max(top, most[lane]);
  Vector sums{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vector weight = Exp(Load(scores + i) - All(top));
    Store(weight, scores + i);
    sums += weight;
  }
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  return sum;
}

struct Operands {
  const float *q, *k, *v, *keys, *values;
  const bool* mask;
  const int32_t *length, *first;
  float* y;
  int64_t batch, rows, heads, groups, size, slots, per;  // per: rows of a part
  float cap;

  int64_t Parts() const { return Up(rows, per); }

  // Number `i` of [B, K, parts].
  void Part(int64_t i) const {
    const int64_t part = i % Parts(), head = i / Parts() % heads;
    const int64_t b = i / Parts() / heads, from = part * per;
    const int64_t here = std::min(per, rows - from), n = here * groups;
    const int64_t end = std::clamp<int64_t>(length[b], 0, slots);
    const int32_t* firsts = first + b * rows + from;
    const int64_t least = *std::min_element(firsts, firsts + here);
    const int64_t begin = std::clamp<int64_t>(least, 0, end);
    const int64_t old = Up(end - begin, kLanes) * kLanes;
    const int64_t all = old + Up(rows, kLanes) * kLanes;
    static thread_local std::vector<float> scratch;
    scratch.assign(n * (2 * size + all), 0.0f);
    float *queries = scratch.data(), *found = queries + n * size;
    float* scores = found + n * size;
    for (int64_t r = 0; r < here; ++r) {
      std::copy_n(q + At(b, from + r, head), groups * size,
                  queries + r * groups * size);
    }
    const int64_t unit = b * heads + head;
    const float* k_new = k + unit * size * rows;
    const float* v_new = v + unit * rows * size;
    const float* k_old = keys + unit * size * slots + begin;
    const float* v_old = values + (unit * slots + begin) * size;
    // Scores beyond the length are junk of slots that there are, or stay 0.
    const int64_t there = begin + old <= slots ? old : end - begin;
    const int64_t line = kLine / sizeof(float);
    if (there * size * sizeof(float) <= kAhead) {  // short and far apart
      for (int64_t h = 0; h < size; ++h) {
        for (int64_t s = 0; s < there; s += line) {
          __builtin_prefetch(k_old + h * slots + s);
        }
      }
    }
    const int64_t bytes = (end - begin) * size * sizeof(float);
    Multiply(queries, n, size, k_old, size, there, slots, scores, all, v_old,
             std::min(bytes, kAhead));
    Multiply(queries, n, size, k_new, size, rows, rows, scores + old, all);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t row = from + r / groups;
      const bool* sees = mask + (b * rows + row) * rows;
      float *mine = scores + r * all, *mine_new = mine + old;
      const int64_t hidden = first[b * rows + row] - begin;
      std::fill_n(mine, std::clamp<int64_t>(hidden, 0, end - begin), kNever);
      std::fill(mine + end - begin, mine_new, kNever);
      for (int64_t j = 0; j < rows; ++j) {
        if (!sees[j]) mine_new[j] = kNever;
      }
      std::fill(mine_new + rows, mine + all, kNever);
      const float sum = Softmax(mine, all, cap);
      for (int64_t j = 0; j < all; ++j) mine[j] /= sum;
    }
    Multiply(scores, n, all, v_old, end - begin, size, size, found, size);
    Multiply(scores + old, n, all, v_new, rows, size, size, found, size);
    for (int64_t r = 0; r < here; ++r) {
      std::copy_n(found + r * groups * size, groups * size,
                  y + At(b, from + r, head));
    }
  }

  // Where the query heads of a row begin in [B, R, K, G, H].
  int64_t At(int64_t b, int64_t row, int64_t head) const {
    return ((b * rows + row) * heads + head) * groups * size;
  }
};

ffi::Error Attend(ffi::ThreadPool pool, ffi::BufferR1<ffi::S32> length,
                  ffi::BufferR2<ffi::S32> first, ffi::BufferR3<ffi::PRED> mask,
                  Queries q, ffi::BufferR4<ffi::F32> k,
                  ffi::BufferR4<ffi::F32> v, ffi::BufferR4<ffi::F32> keys,
                  ffi::BufferR4<ffi::F32> values, float cap,
                  ffi::Result<Queries> y) {
  const auto sizes = q.dimensions();
  Operands o{q.typed_data(),      k.typed_data(),      v.typed_data(),
             keys.typed_data(),   values.typed_data(), mask.typed_data(),
             length.typed_data(), first.typed_data(),  y->typed_data()};
  o.batch = sizes[0], o.rows = sizes[1], o.heads = sizes[2];
  o.groups = sizes[3], o.size = sizes[4], o.slots = keys.dimensions()[3];
  o.cap = cap;
  const auto is = [](const auto& x, std::vector<int64_t> sizes) {
    const auto found = x.dimensions();
    return std::equal(found.begin(), found.end(), sizes.begin(), sizes.end());
  };
  if (!is(length, {o.batch}) || !is(first, {o.batch, o.rows}) ||
      !is(mask, {o.batch, o.rows, o.rows}) ||
      !is(k, {o.batch, o.heads, o.size, o.rows}) ||
      !is(v, {o.batch, o.heads, o.rows, o.size}) ||
      !is(keys, {o.batch, o.heads, o.size, o.slots}) ||
      !is(values, {o.batch, o.heads, o.slots, o.size})) {
    return ffi::Error::InvalidArgument("shapes of attention do not fit");
  }
  if (q.element_count() == 0) return ffi::Error::Success();
  o.per = std::max<int64_t>(1, kBlock / o.groups);
  int64_t most = 0;
  for (int64_t b = 0; b < o.batch; ++b) {
    most = std::max<int64_t>(most, length.typed_data()[b]);
  }
  const double flops = 4.0 * q.element_count() * (most + o.rows);
  Share(pool, o.batch * o.heads * o.Parts(), flops / kLeast,
        [o](int64_t i, int64_t) { o.Part(i); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace spec_stream

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpecStreamAttention, spec_stream::Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR2<ffi::S32>>()
                                  .Arg<ffi::BufferR3<ffi::PRED>>()
                                  .Arg<spec_stream::Queries>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Attr<float>("cap")
                                  .Ret<spec_stream::Queries>());

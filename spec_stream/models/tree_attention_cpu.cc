// Attention of new rows over a cache and over each other, in float32: what
// attention.py makes of a layer's projections, rotations and all, in one call.
// For each row of the batch and each key/value head, and some of the new rows
// with their query heads: scores with the cache's keys up to its length and
// with the new ones, one softmax, values. Both products are of tiles.h, for
// keys lie by their sizes, [H, S], and values by their slots, [S, H].
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

using Heads = ffi::Buffer<ffi::F32, 5>;
using Tables = ffi::Buffer<ffi::F32, 5>;  // [B, R, 2, 2, n], see layers.py

constexpr int64_t kBlock = 48;       // rows with their query heads, at once
constexpr double kLeast = 1 << 17;  // FLOPs worth a thread of their own
constexpr int64_t kAhead = 1 << 16;  // bytes of keys, or values, to prefetch
constexpr float kNever = -1e30f;     // score of what a row may not attend to

// The rest of the outputs, from `at` on, that fills registers -> up to where.
template <int vectors = kVectors - 1>
int64_t Rest(const Factors<float, int64_t, SideBySide>& f, int64_t rows,
             int64_t at, int64_t outputs) {
  if constexpr (vectors > 0) {
    if (at + vectors * kLanes > outputs) {
      return Rest<vectors - 1>(f, rows, at, outputs);
    }
    Tiles<vectors>(f, rows, at, nullptr, 0);
    return at + vectors * kLanes;
  }
  return at;
}

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
  for (at = Rest(f, rows, at, outputs); at < outputs; ++at) {
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

// Turns the first 2 n elements of x, of `size`, in pairs; table: of a row.
void Rotate(const float* x, const float* table, int64_t n, int64_t size,
            float* y) {
  const float *cos = table, *sin = table + 3 * n;
  for (int64_t i = 0; i < n; ++i) {
    const float a = x[i], b = x[i + n];
    y[i] = a * cos[i] - b * sin[i];
    y[i + n] = b * cos[i] + a * sin[i];
  }
  std::copy(x + 2 * n, x + size, y + 2 * n);
}

struct Operands {
  const float *qkv, *rotary, *turn, *keys, *values;
  const bool* mask;
  const int32_t *length, *first;
  float *y, *k, *v;
  // per: rows of a part; turned, turned_values: pairs.
  int64_t batch, rows, heads, groups, size, slots, per, turned, turned_values;
  float scale, cap;

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
    // New keys are filled up to whole registers.
    const int64_t wide = Up(rows, kLanes) * kLanes, all = old + wide;
    const int64_t unit = b * heads + head;
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
    static thread_local std::vector<float> scratch;
    const int64_t zeros = n * (size + all) + size * wide;
    scratch.resize(zeros + n * (size + 1) + size * (rows + 1));
    float *found = scratch.data(), *scores = found + n * size;
    float *k_new = scores + n * all, *queries = k_new + size * wide;
    float *v_new = queries + n * size, *one = v_new + size * rows;
    float* sums = one + size;
    std::fill_n(found, zeros, 0.0f);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t row = from + r / groups;
      float* to = queries + r * size;
      Rotate(Of(b, row, head) + r % groups * size, rotary + At(b, row, turned),
             turned, size, to);
      for (int64_t h = 0; h < size; ++h) to[h] *= scale;
    }
    for (int64_t row = 0; row < rows; ++row) {
      const float* key = Of(b, row, head) + groups * size;
      Rotate(key, rotary + At(b, row, turned), turned, size, one);
      for (int64_t h = 0; h < size; ++h) k_new[h * wide + row] = one[h];
      Rotate(key + size, turn + At(b, row, turned_values), turned_values, size,
             v_new + row * size);
    }
    if (part == 0) {
      for (int64_t h = 0; h < size; ++h) {
        std::copy_n(k_new + h * wide, rows, k + (unit * size + h) * rows);
      }
      std::copy_n(v_new, rows * size, v + unit * rows * size);
    }
    const int64_t bytes = (end - begin) * size * sizeof(float);
    Multiply(queries, n, size, k_old, size, there, slots, scores, all, v_old,
             std::min(bytes, kAhead));
    Multiply(queries, n, size, k_new, size, wide, wide, scores + old, all);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t row = from + r / groups;
      const bool* sees = mask + (b * rows + row) * rows;
      float *mine = scores + r * all, *mine_new = mine + old;
      const int64_t hidden = first[b * rows + row] - begin;
      std::fill_n(mine, std::clamp<int64_t>(hidden, 0, end - begin), kNever);
      std::fill(mine + end - begin, mine_new, kNever);
      for (int64_t j = 0; j < rows; ++j) {
        mine_new[j] = sees[j] ? mine_new[j] : kNever;
      }
      std::fill(mine_new + rows, mine + all, kNever);
      sums[r] = Softmax(mine, all, cap);
    }
    Multiply(scores, n, all, v_old, end - begin, size, size, found, size);
    Multiply(scores + old, n, all, v_new, rows, size, size, found, size);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t row = b * rows + from + r / groups;
      float* to = y + ((row * heads + head) * groups + r % groups) * size;
      for (int64_t h = 0; h < size; ++h) to[h] = found[r * size + h] / sums[r];
    }
  }

  // Where the projections of a row begin in [B, R, K, G + 2, H].
  const float* Of(int64_t b, int64_t row, int64_t head) const {
    return qkv + ((b * rows + row) * heads + head) * (groups + 2) * size;
  }

  // Where the table of a row begins in [B, R, 2, 2, pairs].
  int64_t At(int64_t b, int64_t row, int64_t pairs) const {
    return (b * rows + row) * 4 * pairs;
  }
};

ffi::Error Attend(ffi::ThreadPool pool, ffi::BufferR1<ffi::S32> length,
                  ffi::BufferR2<ffi::S32> first, ffi::BufferR3<ffi::PRED> mask,
                  Heads qkv, Tables rotary, Tables turn,
                  ffi::BufferR4<ffi::F32> keys, ffi::BufferR4<ffi::F32> values,
                  float scale, float cap, ffi::Result<Heads> y,
                  ffi::ResultBufferR4<ffi::F32> k,
                  ffi::ResultBufferR4<ffi::F32> v) {
  const auto sizes = y->dimensions();
  Operands o{};
  o.qkv = qkv.typed_data(), o.rotary = rotary.typed_data();
  o.turn = turn.typed_data(), o.mask = mask.typed_data();
  o.keys = keys.typed_data(), o.values = values.typed_data();
  o.length = length.typed_data(), o.first = first.typed_data();
  o.y = y->typed_data(), o.k = k->typed_data(), o.v = v->typed_data();
  o.batch = sizes[0], o.rows = sizes[1], o.heads = sizes[2];
  o.groups = sizes[3], o.size = sizes[4], o.slots = keys.dimensions()[3];
  o.turned = rotary.dimensions()[4], o.turned_values = turn.dimensions()[4];
  o.scale = scale, o.cap = cap;
  const auto is = [](const auto& x, std::vector<int64_t> sizes) {
    const auto found = x.dimensions();
    return std::equal(found.begin(), found.end(), sizes.begin(), sizes.end());
  };
  if (!is(length, {o.batch}) || !is(first, {o.batch, o.rows}) ||
      !is(mask, {o.batch, o.rows, o.rows}) ||
      !is(qkv, {o.batch, o.rows, o.heads, o.groups + 2, o.size}) ||
      !is(rotary, {o.batch, o.rows, 2, 2, o.turned}) ||
      !is(turn, {o.batch, o.rows, 2, 2, o.turned_values}) ||
      2 * std::max(o.turned, o.turned_values) > o.size ||
      !is(*k, {o.batch, o.heads, o.size, o.rows}) ||
      !is(*v, {o.batch, o.heads, o.rows, o.size}) ||
      !is(keys, {o.batch, o.heads, o.size, o.slots}) ||
      !is(values, {o.batch, o.heads, o.slots, o.size})) {
    return ffi::Error::InvalidArgument("shapes of attention do not fit");
  }
  if (y->element_count() == 0) return ffi::Error::Success();
  o.per = std::max<int64_t>(1, kBlock / o.groups);
  int64_t most = 0;
  for (int64_t b = 0; b < o.batch; ++b) {
    most = std::max<int64_t>(most, length.typed_data()[b]);
  }
  const double flops = 4.0 * y->element_count() * (most + o.rows);
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
                                  .Arg<spec_stream::Heads>()
                                  .Arg<spec_stream::Tables>()
                                  .Arg<spec_stream::Tables>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("cap")
                                  .Ret<spec_stream::Heads>()
                                  .Ret<ffi::BufferR4<ffi::F32>>()
                                  .Ret<ffi::BufferR4<ffi::F32>>());

// Attention of new rows over a cache and over each other, in float32: what
// attention.py makes of a layer's projections, in one call. For each row of the
// batch and each key/value head, and some of the new rows with their query
// heads: queries, keys and values turned (and queries scaled), scores with the
// cache's keys up to its length and with the new ones, one softmax, values. New
// keys and values are handed back as the cache has them. Both products are of
// tiles.h, for keys lie by their sizes, [H, S], and values by their slots,
// [S, H].
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

using Buffer5 = ffi::Buffer<ffi::F32, 5>;

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

// Turns the first 2 n elements of x, of `size`, in pairs; table: that of a row,
// [2, 2, n] (`rotation` of layers.py).
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
  const uint8_t* mask;
  const int32_t *length, *first;
  float *y, *k, *v;
  // per: rows of a part; key_pairs, value_pairs: of elements that turn.
  int64_t batch, rows, heads, groups, size, slots, per, key_pairs, value_pairs;
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
    // Of a register, so that a slot's lane, and with it the order of sums, does
    // not depend on what else is in the part.
    const int64_t begin = std::clamp<int64_t>(least, 0, end) / kLanes * kLanes;
    const int64_t old = Up(end - begin, kLanes) * kLanes;
    // New keys are filled up to whole registers.
    const int64_t padded = Up(rows, kLanes) * kLanes, all = old + padded;
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
    // What is added to, and what is beyond the rows of new keys, begins as 0.
    const int64_t cleared = n * (size + all) + size * padded;
    scratch.resize(cleared + n * (size + 1) + size * (rows + 1));
    float* found = scratch.data();
    float* scores = found + n * size;
    float* k_new = scores + n * all;
    float* queries = k_new + size * padded;
    float* v_new = queries + n * size;
    float* key = v_new + size * rows;
    float* sums = key + size;
    std::fill_n(found, cleared, 0.0f);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t row = from + r / groups;
      float* query = queries + r * size;
      Rotate(Projections(b, row, head) + r % groups * size,
             rotary + Table(b, row, key_pairs), key_pairs, size, query);
      for (int64_t h = 0; h < size; ++h) query[h] *= scale;
    }
    // Each part turns all new keys and values for itself, which takes less than
    // to wait for them; the first hands them back.
    for (int64_t row = 0; row < rows; ++row) {
      const float* projected = Projections(b, row, head) + groups * size;
      Rotate(projected, rotary + Table(b, row, key_pairs), key_pairs, size,
             key);
      for (int64_t h = 0; h < size; ++h) k_new[h * padded + row] = key[h];
      Rotate(projected + size, turn + Table(b, row, value_pairs), value_pairs,
             size, v_new + row * size);
    }
    if (part == 0) {
      for (int64_t h = 0; h < size; ++h) {
        std::copy_n(k_new + h * padded, rows, k + (unit * size + h) * rows);
      }
      std::copy_n(v_new, rows * size, v + unit * rows * size);
    }
    const int64_t bytes = (end - begin) * size * sizeof(float);
    Multiply(queries, n, size, k_old, size, there, slots, scores, all, v_old,
             std::min(bytes, kAhead));
    Multiply(queries, n, size, k_new, size, padded, padded, scores + old, all);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t row = from + r / groups;
      const uint8_t* sees = mask + (b * rows + row) * rows;
      float *mine = scores + r * all, *mine_new = mine + old;
      const int64_t hidden = first[b * rows + row] - begin;
      std::fill_n(mine, std::clamp<int64_t>(hidden, 0, end - begin), kNever);
      std::fill(mine + end - begin, mine_new, kNever);
      for (int64_t j = 0; j < rows; ++j) {
        const float x = mine_new[j];  // first, so that GCC makes no branch
        mine_new[j] = sees[j] ? x : kNever;
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

  // Where those of a row begin in [B, R, K, G + 2, H].
  const float* Projections(int64_t b, int64_t row, int64_t head) const {
    return qkv + ((b * rows + row) * heads + head) * (groups + 2) * size;
  }

  // Where the table of a row begins in [B, R, 2, 2, pairs].
  int64_t Table(int64_t b, int64_t row, int64_t pairs) const {
    return (b * rows + row) * 4 * pairs;
  }
};

ffi::Error Attend(ffi::ThreadPool pool, ffi::BufferR1<ffi::S32> length,
                  ffi::BufferR2<ffi::S32> first, ffi::BufferR3<ffi::PRED> mask,
                  Buffer5 qkv, Buffer5 rotary, Buffer5 turn,
                  ffi::BufferR4<ffi::F32> keys, ffi::BufferR4<ffi::F32> values,
                  float scale, float cap, ffi::Result<Buffer5> y,
                  ffi::ResultBufferR4<ffi::F32> k,
                  ffi::ResultBufferR4<ffi::F32> v) {
  const auto sizes = y->dimensions();
  Operands o{};
  o.qkv = qkv.typed_data(), o.rotary = rotary.typed_data();
  o.turn = turn.typed_data();
  o.mask = reinterpret_cast<const uint8_t*>(mask.typed_data());
  o.keys = keys.typed_data(), o.values = values.typed_data();
  o.length = length.typed_data(), o.first = first.typed_data();
  o.y = y->typed_data(), o.k = k->typed_data(), o.v = v->typed_data();
  o.batch = sizes[0], o.rows = sizes[1], o.heads = sizes[2];
  o.groups = sizes[3], o.size = sizes[4], o.slots = keys.dimensions()[3];
  o.key_pairs = rotary.dimensions()[4], o.value_pairs = turn.dimensions()[4];
  o.scale = scale, o.cap = cap;
  const auto is = [](const auto& x, std::vector<int64_t> sizes) {
    const auto found = x.dimensions();
    return std::equal(found.begin(), found.end(), sizes.begin(), sizes.end());
  };
  if (!is(length, {o.batch}) || !is(first, {o.batch, o.rows}) ||
      !is(mask, {o.batch, o.rows, o.rows}) ||
      !is(qkv, {o.batch, o.rows, o.heads, o.groups + 2, o.size}) ||
      !is(rotary, {o.batch, o.rows, 2, 2, o.key_pairs}) ||
      !is(turn, {o.batch, o.rows, 2, 2, o.value_pairs}) ||
      2 * std::max(o.key_pairs, o.value_pairs) > o.size ||
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
                                  .Arg<spec_stream::Buffer5>()
                                  .Arg<spec_stream::Buffer5>()
                                  .Arg<spec_stream::Buffer5>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("cap")
                                  .Ret<spec_stream::Buffer5>()
                                  .Ret<ffi::BufferR4<ffi::F32>>()
                                  .Ret<ffi::BufferR4<ffi::F32>>());

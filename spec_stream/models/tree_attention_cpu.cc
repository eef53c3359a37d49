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

constexpr int64_t kTile = kVectors * kLanes;  // outputs of a tile
constexpr int64_t kBlock = 48;       // rows with their query heads, at once
constexpr double kLeast = 1 << 17;   // FLOPs worth a thread of their own
constexpr int64_t kAhead = 1 << 16;  // bytes of keys, or values, to prefetch
constexpr int64_t kPiece = 1 << 14;  // bytes of values all rows pass at once
constexpr float kNever = -1e30f;     // score of what a row may not attend to

using Matrix = Factors<float, int64_t, SideBySide, int64_t>;

// The rest of the outputs, from `at` on, that fills registers -> up to where.
template <int vectors = kVectors - 1>
int64_t Rest(const Matrix& f, int64_t rows, int64_t at, int64_t outputs) {
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
// prefetches `bytes` from `next` on, and what is `far_ahead` of each input.
void Multiply(const float* x, int64_t rows, int64_t apart, const float* w,
              int64_t n, int64_t outputs, int64_t width, float* y, int64_t to,
              const float* next = nullptr, int64_t bytes = 0,
              int64_t far_ahead = 0) {
  const Matrix f{x, w, y, n, apart, to, width, {}, far_ahead};
  const char* ahead = reinterpret_cast<const char*>(next);
  const int64_t turns = n / kSteps * (outputs / kTile);
  const int64_t lines = Up(bytes / kLine, std::max<int64_t>(turns, 1));
  int64_t at = 0;
  for (; at + kTile <= outputs; at += kTile) {
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

// New rows from `from` on with the query heads of a key/value head: n queries.
// Its scores are of `seen` committed slots, from `begin` on, and of new keys.
struct Part {
  int64_t b, head, from, n, begin, seen;
  // Columns of scores: of slots and of new keys, filled up to whole registers.
  int64_t old, padded;
  float *queries, *scores, *found;  // [n, H], [n, Columns()], [n, H]
  float *k_new, *v_new;             // [H, padded], [R, H]
  float *key, *sums;                // [H], [n]

  int64_t Columns() const { return old + padded; }
};

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
  void Work(int64_t i) const {
    Part p{};
    const int64_t part = i % Parts();
    p.b = i / Parts() / heads, p.head = i / Parts() % heads;
    p.from = part * per;
    const int64_t here = std::min(per, rows - p.from), n = here * groups;
    p.n = n;
    const int64_t end = std::clamp<int64_t>(length[p.b], 0, slots);
    const int32_t* firsts = first + p.b * rows + p.from;
    const int64_t least = *std::min_element(firsts, firsts + here);
    // Of a register, so that a slot's lane, and with it the order of sums, does
    // not depend on what else is in the part.
    p.begin = std::clamp<int64_t>(least, 0, end) / kLanes * kLanes;
    p.seen = end - p.begin;
    p.old = Up(p.seen, kLanes) * kLanes;
    p.padded = Up(rows, kLanes) * kLanes;
    const int64_t unit = p.b * heads + p.head;
    const float* k_old = keys + unit * size * slots + p.begin;
    const float* v_old = values + (unit * slots + p.begin) * size;
    // Scores beyond the length are junk of slots that there are, or stay 0.
    const int64_t there = p.begin + p.old <= slots ? p.old : p.seen;
    // Keys are far apart: of few slots all are prefetched, of many those of the
    // next tile with each.
    const int64_t line = kLine / sizeof(float);
    const bool few = there * size * sizeof(float) <= kAhead;
    if (few) {
      for (int64_t h = 0; h < size; ++h) {
        for (int64_t s = 0; s < there; s += line) {
          __builtin_prefetch(k_old + h * slots + s);
        }
      }
    }
    static thread_local std::vector<float> scratch;
    const int64_t all = p.Columns();
    // What is added to, and what is beyond the rows of new keys, begins as 0.
    const int64_t cleared = n * (size + all) + size * p.padded;
    scratch.resize(cleared + n * (size + 1) + size * (rows + 1));
    std::fill_n(scratch.data(), cleared, 0.0f);
    p.found = scratch.data();
    p.scores = p.found + n * size;
    p.k_new = p.scores + n * all;
    p.queries = p.k_new + size * p.padded;
    p.v_new = p.queries + n * size;
    p.key = p.v_new + size * rows;
    p.sums = p.key + size;
    Turn(p);
    if (part == 0) {  // all of them have the same
      for (int64_t h = 0; h < size; ++h) {
        std::copy_n(p.k_new + h * p.padded, rows, k + (unit * size + h) * rows);
      }
      std::copy_n(p.v_new, rows * size, v + unit * rows * size);
    }
    const int64_t slot = size * sizeof(float);  // bytes
    float* new_scores = p.scores + p.old;
    Multiply(p.queries, n, size, k_old, size, there, slots, p.scores, all,
             v_old, std::min(p.seen * slot, kAhead), few ? 0 : kTile);
    Multiply(p.queries, n, size, p.k_new, size, p.padded, p.padded, new_scores,
             all);
    Weigh(p);
    // In pieces that stay in the nearest cache while all rows pass them.
    const int64_t piece = std::max<int64_t>(kPiece / slot / kSteps, 1) * kSteps;
    for (int64_t i = 0; i < p.seen; i += piece) {
      const int64_t some = std::min(piece, p.seen - i);
      const int64_t left = std::min(piece, p.seen - i - some);
      const float *from = v_old + i * size, *next = from + some * size;
      Multiply(p.scores + i, n, all, from, some, size, size, p.found, size,
               next, left * slot);
    }
    Multiply(new_scores, n, all, p.v_new, rows, size, size, p.found, size);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t row = p.b * rows + p.from + r / groups;
      float* to = y + ((row * heads + p.head) * groups + r % groups) * size;
      for (int64_t h = 0; h < size; ++h) {
        to[h] = p.found[r * size + h] / p.sums[r];
      }
    }
  }

  // Projections -> queries, new keys and new values. Each part turns all new
  // keys and values for itself, which takes less than to wait for them.
  void Turn(const Part& p) const {
    for (int64_t r = 0; r < p.n; ++r) {
      const int64_t row = p.from + r / groups;
      float* query = p.queries + r * size;
      Rotate(Projections(p.b, row, p.head) + r % groups * size,
             rotary + Table(p.b, row, key_pairs), key_pairs, size, query);
      for (int64_t h = 0; h < size; ++h) query[h] *= scale;
    }
    for (int64_t row = 0; row < rows; ++row) {
      const float* projected = Projections(p.b, row, p.head) + groups * size;
      Rotate(projected, rotary + Table(p.b, row, key_pairs), key_pairs, size,
             p.key);
      for (int64_t h = 0; h < size; ++h) p.k_new[h * p.padded + row] = p.key[h];
      Rotate(projected + size, turn + Table(p.b, row, value_pairs), value_pairs,
             size, p.v_new + row * size);
    }
  }

  // Scores -> weights, and their sums.
  void Weigh(const Part& p) const {
    const int64_t all = p.Columns();
    for (int64_t r = 0; r < p.n; ++r) {
      const int64_t row = p.b * rows + p.from + r / groups;
      const uint8_t* sees = mask + row * rows;
      float *mine = p.scores + r * all, *mine_new = mine + p.old;
      const int64_t hidden = first[row] - p.begin;
      std::fill_n(mine, std::clamp<int64_t>(hidden, 0, p.seen), kNever);
      std::fill(mine + p.seen, mine_new, kNever);
      for (int64_t j = 0; j < rows; ++j) {
        const float x = mine_new[j];  // first, so that GCC makes no branch
        mine_new[j] = sees[j] ? x : kNever;
      }
      std::fill(mine_new + rows, mine + all, kNever);
      p.sums[r] = Softmax(mine, all, cap);
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
        [o](int64_t i, int64_t) { o.Work(i); });
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

// e^x and what is made of it, in registers. Compiled with each kernel for a CPU
// in float32, see native.py.

#pragma once

#include "tiles.h"

namespace spec_stream {

typedef int32_t Whole __attribute__((vector_size(kLanes * 4)));

inline Vector All(float x) { return x - Vector{}; }

// e^x for x <= 0, to two units in the last place; below -87 it is 0. 2^n e^r,
// with n = x / log 2, rounded, and the series of e^r to r^7.
inline Vector Exp(Vector x) {
  const Vector clipped = x < All(-87.0f) ? All(-87.0f) : x;
  const Vector magic = All(12582912.0f);  // 1.5 2^23: its sum is rounded
  const Vector shifted = MultiplyAdd(clipped, All(1.44269504f), magic);
  const Vector n = shifted - magic;
  Vector r = MultiplyAdd(n, All(-0.693359375f), clipped);
  r = MultiplyAdd(n, All(2.12194440e-4f), r);
  Vector y = All(1.98412698e-4f);
  for (const float c : {1.38888889e-3f, 8.33333333e-3f, 4.16666667e-2f,
                        1.66666667e-1f, 0.5f, 1.0f, 1.0f}) {
    y = MultiplyAdd(y, r, All(c));
  }
  // The whole number is in the low bits of the shifted sum.
  const Whole power = ((Whole)shifted - (Whole)magic) << 23;
  y = (Vector)((Whole)y + power);
  return x < All(-87.0f) ? Vector{} : x == x ? y : x;
}

// 1 / (1 + e^-x), by a power that cannot overflow.
inline Vector Sigmoid(Vector x) {
  const Vector none{}, one = All(1.0f);
  const Vector small = Exp(x < none ? x : -x);
  return (x < none ? small : one) / (one + small);
}

}  // namespace spec_stream

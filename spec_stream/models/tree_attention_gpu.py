"""Attention over cache and new rows as one kernel for a GPU (Pallas, Triton).

    for each row b of the batch, each key/value head, each part of the slots:
      for each block of that part that begins below `length[b]`: scores, joined
        to those so far by a running maximum and sum
    then, in plain JAX: the parts and the new rows' own scores, joined

A GPU has more processors than a small batch has heads, so the slots are split
among them: Flash-Decoding over the tree's rows. What lies beyond `length` is
not read but for the rest of a block; no mask [B, R, S] is made. The running
softmax is that of FlashAttention (arXiv 2205.14135, algorithm 1).

Letters: as in `attention`; N = R G rows of a key/value head, rounded up to a
power of two; P parts.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from spec_stream.models.layers import softcap, wide
from spec_stream.models.scores import NEVER, scores

BLOCK = 64  # slots
LARGEST = 2**15  # bytes of N queries: what a processor's registers hold
PROGRAMS = 256  # to split the slots for: two for each processor


def fits(rows: int, groups: int, size: int, slots: int, dtype) -> bool:
  """Whether the kernel is for such shapes: Triton's are powers of two."""
  if size & (size - 1) or min(size, slots) < 16:
    return False
  dtype = jnp.dtype(dtype)
  return _padded(rows * groups) * size * dtype.itemsize <= LARGEST


def _padded(rows: int) -> int:
  return max(16, pl.next_power_of_2(rows))


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array,
  cache: tuple[jax.Array, jax.Array],
  length: jax.Array,
  first: jax.Array,
  *,
  cap: float = 0.0,
  block: int = BLOCK,
  programs: int = PROGRAMS,
  interpret: bool = False,
) -> jax.Array:
  """-> [B, K, R, G, H]; arguments as of `tree_attention.attend`.

  programs: least number of them to split the slots for.
  """
  batch, heads, rows, groups, size = q.shape
  slots, many = cache[0].shape[3], rows * groups
  padded = _padded(many)
  block = min(block, 1 << (slots.bit_length() - 1))
  blocks = pl.cdiv(slots, block)
  per = pl.cdiv(blocks, pl.cdiv(programs, batch * heads))  # of a part
  parts = pl.cdiv(blocks, per)
  dtype = wide(q.dtype)
  more = lambda x, axis: jnp.pad(
    x, [(0, padded - many if i == axis else 0) for i in range(x.ndim)]
  )
  whole = lambda *shape: pl.BlockSpec(
    (None, None, *shape), lambda b, h, p: (b, h, 0, 0)
  )
  part = lambda *shape: pl.BlockSpec(
    (None, None, None, *shape), lambda b, h, p: (b, h, p) + (0,) * len(shape)
  )
  out = lambda *shape: jax.ShapeDtypeStruct(
    (batch, heads, parts, padded, *shape), dtype
  )
  found = pl.pallas_call(
    functools.partial(_kernel, block=block, per=per, cap=cap),
    out_shape=(out(size), out(), out()),
    grid=(batch, heads, parts),
    in_specs=[
      pl.BlockSpec((None,), lambda b, h, p: (b,)),
      pl.BlockSpec((None, padded), lambda b, h, p: (b, 0)),
      whole(padded, size),
      whole(size, slots),
      whole(slots, size),
    ],
    out_specs=(part(padded, size), part(padded), part(padded)),
    compiler_params=triton.CompilerParams(
      num_warps=4 if padded * size < 2**13 else 8, num_stages=2
    ),
    interpret=interpret,
    name="tree_attention",
  )(
    length,
    more(jnp.repeat(first, groups, 1), 1),
    more(q.reshape(batch, heads, many, size), 2),
    *cache,
  )
  own = scores("bkrgh,bkht->bkrgt", q, k, mask[:, None, :, None], cap)
  y = _joined(*(x[:, :, :, :many] for x in found), own, v, q.shape)
  return y.astype(q.dtype)


def _kernel(length, first, q, keys, values, y, top, total, *, block, per, cap):
  """One part of the slots of one key/value head: its maximum, its sum, and its
  values by weights that are not divided by the sum."""
  count, slots, begin = length[...], keys.shape[1], pl.program_id(2) * per
  queries, firsts = q[...], first[...]  # [N, H], [N]
  dtype = top.dtype
  product = functools.partial(jax.lax.dot, preferred_element_type=dtype)

  def join(i, carry):
    top, total, acc = carry
    at = jnp.minimum(i * block, slots - block)  # the last may overlap
    slot = at + jax.lax.iota(jnp.int32, block)
    fresh = (slot >= i * block) & (slot < count)
    seen = fresh[None] & (slot[None] >= firsts[:, None])
    k = keys[:, pl.ds(at, block)].astype(queries.dtype)
    x = jnp.where(seen, softcap(product(queries, k), cap), NEVER)
    high = jnp.maximum(top, x.max(1))
    weights, keep = jnp.exp(x - high[:, None]), jnp.exp(top - high)
    # Anything may lie beyond the length.
    v = jnp.where(fresh[:, None], values[pl.ds(at, block), :], 0)
    v = v.astype(queries.dtype)
    acc = acc * keep[:, None] + product(weights.astype(v.dtype), v)
    return high, total * keep + weights.sum(1), acc

  used = jax.lax.div(count + (block - 1), jnp.int32(block))
  end = jnp.minimum(begin + per, used)
  rows = queries.shape[:1]
  none = (
    jnp.full(rows, NEVER, dtype),
    jnp.zeros(rows, dtype),
    jnp.zeros(queries.shape, dtype),
  )
  top[...], total[...], y[...] = jax.lax.fori_loop(begin, end, join, none)


def _joined(y, top, total, own, v, shape):
  """Parts [B, K, P, N, (H)], own scores [B, K, R, G, R] -> [B, K, R, G, H]."""
  split = lambda x: x.reshape(*x.shape[:3], *shape[2:4], *x.shape[4:])
  y, top, total = split(y), split(top), split(total)
  high = jnp.maximum(top.max(2), own.max(-1))  # [B, K, R, G]
  keep = jnp.exp(top - high[:, :, None])
  weights = jnp.exp(own - high[..., None])
  mine = jnp.einsum(
    "bkrgt,bkth->bkrgh",
    weights.astype(v.dtype),
    v,
    preferred_element_type=y.dtype,
  )
  total = (total * keep).sum(2) + weights.sum(-1)
  return ((y * keep[..., None]).sum(2) + mine) / total[..., None]

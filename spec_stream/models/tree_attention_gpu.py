"""Attention over cache and new rows as one kernel for a GPU (Pallas, Triton).

    for each row b of the batch, each key/value head, each tile of the new rows,
    each part of the slots:
      the new rows' own scores, by their mask (with the first part)
      for each block of that part that begins below `length[b]`: scores, joined
        to those so far by a running maximum and sum

Where there is one part, that is all: scores, softmax and values of a layer in
one launch, which is what counts while the cache is short. A GPU has more
processors than a small batch has heads: the slots of a long one are split among
them and the parts joined in plain JAX (Flash-Decoding over the tree's rows).
What lies beyond `length` is not read but for the rest of a block; no mask
[B, R, S] is made. The running softmax is that of FlashAttention (arXiv
2205.14135, algorithm 1).

Letters: as in `attention`; N rows of a tile with their query heads; P parts.
Triton's shapes are powers of two: rows and query heads are filled up.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from spec_stream.models.layers import softcap, wide
from spec_stream.models.scores import NEVER

BLOCK = 64  # slots
TILE = 32  # N, or the least that holds one row
LARGEST = 256  # new rows, whose keys a program reads at once
PROGRAMS = 128  # to split the slots for: about as many as processors
LEAST = 8  # blocks of a part: fewer are not worth joining parts


def fits(rows: int, groups: int, size: int, slots: int, dtype) -> bool:
  """Whether the kernel is for such shapes."""
  if size & (size - 1) or min(size, slots) < 16 or rows > LARGEST:
    return False
  # Keys, values and queries of a program in a processor's registers.
  held = max(_padded(rows), BLOCK) + max(TILE, _padded(groups, 1))
  return held * size * jnp.dtype(dtype).itemsize <= 2**17


def _padded(count: int, least: int = 16) -> int:
  return max(least, pl.next_power_of_2(count))


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
  least: int = LEAST,
  interpret: bool = False,
) -> jax.Array:
  """-> [B, K, R, G, H]; arguments as of `tree_attention.attend`.

  programs: least number of them to split the slots for, into parts of `least`
  blocks or more.
  """
  batch, heads, rows, groups, size = q.shape
  slots = cache[0].shape[3]
  wider = _padded(groups, 1)  # groups, filled up
  high = max(16 // wider, min(TILE // wider, _padded(rows)), 1)  # of a tile
  tiles = pl.cdiv(rows, high)
  block = min(block, 1 << (slots.bit_length() - 1))
  blocks = pl.cdiv(slots, block)
  parts = min(pl.cdiv(programs, batch * heads * tiles), blocks // least)
  per = pl.cdiv(blocks, max(parts, 1))  # blocks of a part
  parts = pl.cdiv(blocks, per)
  dtype, many = wide(q.dtype), _padded(rows)
  fill = lambda x, *shape: jnp.pad(
    x, [(0, new - old) for new, old in zip(shape, x.shape)]
  )
  # As the projection left them, row by row: no copy in another order is made.
  queries = q.swapaxes(1, 2)  # [B, R, K, G, H]
  queries = fill(queries, batch, tiles * high, heads, wider, size)
  own = (jnp.moveaxis(k, 3, 1), v.swapaxes(1, 2))  # [B, R, K, H]
  own = [fill(x, batch, many, heads, size) for x in own]
  spec = lambda shape, at: pl.BlockSpec(shape, at)
  new = spec((None, many, None, size), lambda b, h, t, p: (b, 0, h, 0))
  if parts == 1:
    out_shape = (batch, rows, heads, groups, size)
    out = jax.ShapeDtypeStruct(out_shape, q.dtype)
    out_specs = spec(
      (None, high, None, wider, size), lambda b, h, t, p: (b, t, h, 0, 0)
    )
  else:
    part = (batch, heads, parts, tiles * high * wider)
    out = tuple(
      jax.ShapeDtypeStruct((*part, *more), dtype) for more in ((size,), (), ())
    )
    at = lambda b, h, t, p: (b, h, p, t)
    one = (None, None, None, high * wider)
    out_specs = (
      spec((*one, size), lambda *i: (*at(*i), 0)),
      spec(one, at),
      spec(one, at),
    )
  found = pl.pallas_call(
    functools.partial(
      _kernel, rows=rows, groups=groups, block=block, per=per, cap=cap
    ),
    out_shape=out,
    grid=(batch, heads, tiles, parts),
    in_specs=[
      spec((None,), lambda b, h, t, p: (b,)),
      spec((None, high), lambda b, h, t, p: (b, t)),
      spec((None, high, many), lambda b, h, t, p: (b, t, 0)),
      spec((None, high, None, wider, size), lambda b, h, t, p: (b, t, h, 0, 0)),
      new,
      new,
      spec((None, None, size, slots), lambda b, h, t, p: (b, h, 0, 0)),
      spec((None, None, slots, size), lambda b, h, t, p: (b, h, 0, 0)),
    ],
    out_specs=out_specs,
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
    interpret=interpret,
    name="tree_attention",
  )(
    length,
    fill(first, batch, tiles * high),
    fill(mask.astype(jnp.int32), batch, tiles * high, many),
    queries,
    *own,
    *cache,
  )
  if parts == 1:
    return found.swapaxes(1, 2)
  y = _joined(*found).reshape(batch, heads, tiles * high, wider, size)
  return y[:, :, :rows, :groups].astype(q.dtype)


def _kernel(
  length,
  first,
  mask,
  q,
  k,
  v,
  keys,
  values,
  y,
  *rest,
  rows,
  groups,
  block,
  per,
  cap,
):
  """One part of the slots for one tile of rows of one key/value head.

  Without `rest` what it finds is y. Else that is not divided by the sum yet,
  and rest are the maximum and the sum.
  """
  part, count, slots = pl.program_id(3), length[...], keys.shape[1]
  high, wider, size = q.shape
  many = high * wider
  queries = q[...].reshape(many, size)
  # By tile of rows, the query heads of each below each other.
  each = lambda x: jnp.broadcast_to(
    x[:, None], (high, wider, *x.shape[1:])
  ).reshape(many, *x.shape[1:])
  firsts, dtype = each(first[...]), wide(queries.dtype)

  def join(carry, scores, seen, v):
    """scores, seen: [N, n]; v [n, H]."""
    top, total, acc = carry
    x = jnp.where(seen, softcap(scores, cap), jnp.asarray(NEVER, dtype))
    high = jnp.maximum(top, x.max(1))
    weights, keep = jnp.exp(x - high[:, None]), jnp.exp(top - high)
    acc = acc * keep[:, None]
    acc += jax.lax.dot(weights.astype(v.dtype), v, preferred_element_type=dtype)
    return high, total * keep + weights.sum(1), acc

  def slots_at(i, carry):
    at = jnp.minimum(i * block, slots - block)  # the last may overlap
    slot = at + jax.lax.iota(jnp.int32, block)
    fresh = (slot >= i * block) & (slot < count)
    seen = fresh[None] & (slot[None] >= firsts[:, None])
    k = keys[:, pl.ds(at, block)].astype(queries.dtype)
    scores = jax.lax.dot(queries, k, preferred_element_type=dtype)
    # Anything may lie beyond the length.
    v = jnp.where(fresh[:, None], values[pl.ds(at, block), :], 0)
    return join(carry, scores, seen, v.astype(queries.dtype))

  carry = (
    jnp.full((many,), NEVER, dtype),
    jnp.zeros((many,), dtype),
    jnp.zeros((many, size), dtype),
  )
  scores = jax.lax.dot_general(
    queries, k[...], (((1,), (1,)), ((), ())), preferred_element_type=dtype
  )
  carry = join(carry, scores, each(mask[...] * (part == 0)) > 0, v[...])
  used = jax.lax.div(count + (block - 1), jnp.int32(block))
  end = jnp.minimum((part + 1) * per, used)
  top, total, acc = jax.lax.fori_loop(part * per, end, slots_at, carry)
  if rest:
    y[...], rest[0][...], rest[1][...] = acc, top, total
    return
  iota = functools.partial(jax.lax.broadcasted_iota, jnp.int32, q.shape)
  real = (pl.program_id(2) * high + iota(0) < rows) & (iota(1) < groups)
  acc = (acc / total[:, None]).astype(y.dtype).reshape(q.shape)
  triton.store(y.at[...], acc, mask=real)


def _joined(y, top, total):
  """Parts [B, K, P, N, (H)] -> [B, K, N, H]."""
  keep = jnp.exp(top - top.max(2, keepdims=True))
  y = (y * keep[..., None]).sum(2)
  return y / (total * keep).sum(2)[..., None]

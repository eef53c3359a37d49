"""Attention over cache and new rows as one kernel for a GPU (Pallas, Triton).

    for each row b of the batch, each key/value head, each tile of the new rows,
    each part of the slots:
      the new rows' own scores, by their mask (masked but in the first part)
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
TILE = 32  # N, or the least that holds one row; half where programs are few
LARGEST = 128  # new rows, whose keys a program reads at once: no prompt's chunk
PROGRAMS = 128  # about as many as processors: more parts, or tiles, for them
LEAST = 4  # blocks of a part: fewer are not worth joining parts


def fits(rows: int, groups: int, size: int, slots: int, dtype) -> bool:
  """Whether the kernel is for such shapes."""
  if size & (size - 1) or size < 16 or slots % 16 or rows > LARGEST:
    return False
  # A block's keys and values, and all new rows': what an H100 was seen to hold
  # beside scores and sums. Triton knows no float64 products.
  itemsize = jnp.dtype(dtype).itemsize
  most = max(_padded(rows), 2 * BLOCK, _padded(groups))
  held = most * size * itemsize
  return itemsize <= 4 and held <= 2**16


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

  programs: number of them to split rows and slots for, the slots into parts of
  `least` blocks or more.
  """
  batch, heads, rows, groups, size = q.shape
  slots = cache[0].shape[3]
  wider = _padded(groups, 1)  # groups, filled up
  few = batch * heads * pl.cdiv(rows * wider, TILE) < programs
  tile = TILE // 2 if few else TILE
  high = max(16 // wider, min(tile // wider, _padded(rows)), 1)  # of a tile
  tiles = pl.cdiv(rows, high)
  block = min(block, pl.next_power_of_2(slots))
  blocks = pl.cdiv(slots, block)
  parts = min(pl.cdiv(programs, batch * heads * tiles), blocks // least)
  per = pl.cdiv(blocks, max(parts, 1))  # blocks of a part
  parts = pl.cdiv(blocks, per)
  # One array, row by row, as the projection left them: the rotation before and
  # this are one kernel of XLA's.
  k, v = jnp.moveaxis(k, 3, 1), v.swapaxes(1, 2)  # [B, R, K, H]
  new = jnp.concatenate([q.swapaxes(1, 2), k[..., None, :], v[..., None, :]], 3)
  if parts == 1:
    out = jax.ShapeDtypeStruct((batch, rows, heads, groups, size), q.dtype)
  else:
    shape = (batch, heads, parts, tiles * high * wider)
    out = tuple(
      jax.ShapeDtypeStruct((*shape, *more), wide(q.dtype))
      for more in ((size,), (), ())
    )
  found = pl.pallas_call(
    functools.partial(_kernel, high=high, block=block, per=per, cap=cap),
    out_shape=out,
    grid=(batch, heads, tiles, parts),
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
    interpret=interpret,
    name="tree_attention",
  )(length, first, mask.astype(jnp.int32), new, *cache)
  if parts == 1:
    return found.swapaxes(1, 2)
  y = _joined(*found).reshape(batch, heads, tiles * high, wider, size)
  return y[:, :, :rows, :groups].astype(q.dtype)


def _kernel(
  length, first, mask, new, keys, values, y, *rest, high, block, per, cap
):
  """One part of the slots for one tile of rows of one key/value head.

  new: [B, R, K, G + 2, H]. Without `rest` what it finds is y. Else that is not
  divided by the sum yet, and rest are the maximum and the sum.
  """
  b, h, tile, part = (pl.program_id(axis) for axis in range(4))
  rows, slots = new.shape[1], keys.shape[3]
  groups, size = new.shape[3] - 2, new.shape[4]
  wider, others = _padded(groups, 1), _padded(rows)
  many = high * wider  # N
  dtype, iota = wide(new.dtype), jax.lax.broadcasted_iota
  here = pl.ds(tile * high, high)
  row = tile * high + iota(jnp.int32, (high,), 0)
  shape = (high, wider, size)
  is_query = tile * high + iota(jnp.int32, shape, 0) < rows
  is_query &= iota(jnp.int32, shape, 1) < groups
  # What Triton would read beyond an array's end is masked. All starts are of
  # one type, which the interpreter asks for.
  zero = jnp.zeros((), jnp.int32)
  to, all_of = functools.partial(pl.ds, zero), pl.ds(zero, size)
  some = lambda x, mask: triton.load(x, mask=mask, other=0)
  queries = some(new.at[b, here, h, to(wider), all_of], is_query)
  queries = queries.reshape(many, size)
  is_row = iota(jnp.int32, (others, 1, size), 0) < rows
  each_row = lambda at: some(new.at[b, to(others), h, at, all_of], is_row)
  k, v = (
    each_row(pl.ds(zero + (groups + i), 1)).reshape(others, size)
    for i in (0, 1)
  )
  pair = (high, others)
  is_pair = tile * high + iota(jnp.int32, pair, 0) < rows
  is_pair &= iota(jnp.int32, pair, 1) < rows
  sees = some(mask.at[b, here, to(others)], is_pair) * (part == 0)
  # By tile of rows, the query heads of each below each other.
  each = lambda x: jnp.broadcast_to(
    x[:, None], (high, wider, *x.shape[1:])
  ).reshape(many, *x.shape[1:])
  firsts = each(some(first.at[b, here], row < rows))
  count = jnp.minimum(length[b], slots)

  def join(carry, scores, seen, v):
    """scores, seen: [N, n]; v [n, H]."""
    top, total, acc = carry
    x = jnp.where(seen, softcap(scores, cap), jnp.asarray(NEVER, dtype))
    new_top = jnp.maximum(top, x.max(1))
    weights, keep = jnp.exp(x - new_top[:, None]), jnp.exp(top - new_top)
    acc = acc * keep[:, None]
    acc += jax.lax.dot(weights.astype(v.dtype), v, preferred_element_type=dtype)
    return new_top, total * keep + weights.sum(1), acc

  def slots_at(i, carry):
    at = pl.ds(i * block, block)
    slot = i * block + iota(jnp.int32, (block,), 0)
    seen = (slot[None] >= firsts[:, None]) & (slot < count)[None]
    # The mask of keys is known beforehand, so that they are read eight at once.
    there = i * block + iota(jnp.int32, (size, block), 1) < slots
    k = some(keys.at[b, h, all_of, at], there).astype(queries.dtype)
    scores = jax.lax.dot(queries, k, preferred_element_type=dtype)
    # Anything may lie beyond the length.
    there = i * block + iota(jnp.int32, (block, size), 0) < count
    v = some(values.at[b, h, at, all_of], there)
    return join(carry, scores, seen, v.astype(queries.dtype))

  carry = (
    jnp.full((many,), NEVER, dtype),
    jnp.zeros((many,), dtype),
    jnp.zeros((many, size), dtype),
  )
  scores = jax.lax.dot_general(
    queries, k, (((1,), (1,)), ((), ())), preferred_element_type=dtype
  )
  carry = join(carry, scores, each(sees) > 0, v)
  used = jax.lax.div(count + (block - 1), jnp.int32(block))
  end = jnp.minimum((part + 1) * per, used)
  top, total, acc = jax.lax.fori_loop(part * per, end, slots_at, carry)
  if rest:
    at = (b, h, part, pl.ds(tile * many, many))
    y[at], rest[0][at], rest[1][at] = acc, top, total
    return
  acc = (acc / total[:, None]).astype(y.dtype).reshape(shape)
  triton.store(y.at[b, here, h, to(wider), all_of], acc, mask=is_query)


def _joined(y, top, total):
  """Parts [B, K, P, N, (H)] -> [B, K, N, H]."""
  keep = jnp.exp(top - top.max(2, keepdims=True))
  y = (y * keep[..., None]).sum(2)
  return y / (total * keep).sum(2)[..., None]

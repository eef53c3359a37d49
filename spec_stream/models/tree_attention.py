"""Attention over cache and new rows as one kernel for a TPU (Pallas).

    for each row b of the batch, for each key/value head:
      scores of the new rows among themselves, by their mask
      for each block of cache slots that begins below `length[b]`: scores,
        joined to those so far by a running maximum and sum

The blocks are asked for by their number, known before they are loaded: beyond
the last that counts the number stays the same, and what lies there is never
read. Neither is a mask [B, R, S] made. The softmax over blocks one after the
other is that of FlashAttention (arXiv 2205.14135, algorithm 1).

Letters: as in `attention`; N = R G rows of a key/value head.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spec_stream.models.layers import softcap, wide
from spec_stream.models.scores import NEVER

BLOCK = 512  # slots
LARGEST = 1024  # N: what a TPU's fast memory holds beside scores of a block


def fits(rows: int, groups: int, size: int, slots: int, dtype) -> bool:
  """Whether the kernel is for such shapes."""
  del size, slots, dtype  # any
  return rows * groups <= LARGEST


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
  interpret: bool = False,
) -> jax.Array:
  """-> [B, K, R, G, H], as `attention` without this kernel has it, but for rows
  that see nothing, which hold junk there and here. N is at most `LARGEST`.

  Args:
    q: [B, K, R, G, H] queries, scaled.
    k, v: [B, K, H, R] and [B, K, R, H] of the new rows.
    mask: [B, R, R] new rows that a row sees.
    cache: keys [B, K, H, S] and values [B, K, S, H].
    length: [B] slots that count.
    first: [B, R] of them the first that a row sees (0, or a window's).
    cap: of the scores, see `softcap`.
    block: slots at a time: all, or a multiple of 128.
    interpret: run it as plain JAX, anywhere.
  """
  batch, heads, rows, groups, size = q.shape
  slots, many = cache[0].shape[3], rows * groups
  block = min(block, slots)
  # By key/value head, the queries of a group one below the other.
  each = lambda x: jnp.repeat(x, groups, 1)
  mask = each(mask.astype(jnp.int32))  # [B, N, R]
  first = each(first)[..., None]  # [B, N, 1]

  def at(b, i, length):  # the block, or the last that counts
    last = jax.lax.div(length[b] - 1, jnp.int32(block))  # 0 of length 0
    return jnp.minimum(i, last)

  new = lambda *shape: pl.BlockSpec(
    (1, 1, *shape), lambda b, h, i, length: (b, h, 0, 0)
  )
  of_batch = lambda *shape: pl.BlockSpec(
    (1, *shape), lambda b, h, i, length: (b, 0, 0)
  )
  keys = pl.BlockSpec(
    (1, 1, size, block), lambda b, h, i, length: (b, h, 0, at(b, i, length))
  )
  values = pl.BlockSpec(
    (1, 1, block, size), lambda b, h, i, length: (b, h, at(b, i, length), 0)
  )
  dtype = wide(q.dtype)
  y = pl.pallas_call(
    functools.partial(_kernel, block=block, cap=cap),
    out_shape=jax.ShapeDtypeStruct((batch, heads, many, size), q.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(batch, heads, pl.cdiv(slots, block)),
      in_specs=[
        new(many, size),
        new(size, rows),
        new(rows, size),
        of_batch(many, rows),
        of_batch(many, 1),
        keys,
        values,
      ],
      out_specs=new(many, size),
      scratch_shapes=[
        pltpu.VMEM((many, 1), dtype),
        pltpu.VMEM((many, 1), dtype),
        pltpu.VMEM((many, size), dtype),
      ],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary")
    ),
    interpret=interpret,
    name="tree_attention",
  )(length, q.reshape(batch, heads, many, size), k, v, mask, first, *cache)
  return y.reshape(q.shape)


def _kernel(
  length, q, k, v, mask, first, keys, values, y, top, total, acc, *, block, cap
):
  """One block of slots of one key/value head; the new rows with the first."""
  b, i = pl.program_id(0), pl.program_id(2)
  queries = q[0, 0]  # [N, H]
  product = functools.partial(jax.lax.dot, preferred_element_type=top.dtype)

  def join(k, v, seen):
    """k [H, n], v [n, H], seen [N, n]."""
    scores = softcap(product(queries, k.astype(queries.dtype)), cap)
    scores = jnp.where(seen, scores, jnp.asarray(NEVER, scores.dtype))
    high = jnp.maximum(top[...], scores.max(1, keepdims=True))
    weights = jnp.exp(scores - high)
    keep = jnp.exp(top[...] - high)
    total[...] = total[...] * keep + weights.sum(1, keepdims=True)
    v = v.astype(queries.dtype)
    acc[...] = acc[...] * keep + product(weights.astype(v.dtype), v)
    top[...] = high

  @pl.when(i == 0)
  def _():
    top[...] = jnp.full_like(top, NEVER)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)
    join(k[0, 0], v[0, 0], mask[0] != 0)

  @pl.when(i * block < length[b])
  def _():
    slot = i * block + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
    below = i * block + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0)
    seen = (slot < length[b]) & (slot >= first[0])
    # The last block may reach beyond the cache, where anything may lie.
    found = jnp.where(below < length[b], values[0, 0], 0)
    join(keys[0, 0], found, seen)

  @pl.when(i == pl.num_programs(2) - 1)
  def _():
    y[0, 0] = (acc[...] / total[...]).astype(y.dtype)

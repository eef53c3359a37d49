"""Attention over cache and new rows as one call for a CPU, in float32.

`tree_attention_cpu.cc` (see `native`) turns queries, keys and values, and has
the scores with the cache, up to its length, and with the new rows, their
softmax and the values; nothing of the size of the slots is made. XLA makes many
small programs of it, each of which takes longer to begin than a short cache
takes to be read. A request is shared by as many threads as there are key/value
heads, and parts of 48 query rows.
"""

import jax
import jax.numpy as jnp
import numpy as np

from spec_stream.models import native

LARGEST = 128  # new rows: no prompt's chunk
TARGET = "spec_stream_attention"


def fits(rows: int, groups: int, size: int, slots: int, dtype) -> bool:
  """Whether the kernel is for such shapes; compiles it, if it was not."""
  del groups, size, slots  # any
  of_its_kind = rows <= LARGEST and dtype == jnp.float32
  return of_its_kind and native.is_ready()


def attend_projections(
  qkv: jax.Array,
  rotary: jax.Array | None,
  turn: jax.Array | None,
  mask: jax.Array,
  cache: tuple[jax.Array, jax.Array],
  length: jax.Array,
  first: jax.Array,
  *,
  scale: float,
  cap: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """-> y [B, K, R, G, H] and the new rows' k [B, K, H, R], v [B, K, R, H].

  Args:
    qkv: [B, R, K, G + 2, H], of each head its G queries, its key, its value.
    rotary: [B, R, 2, 2, n], see `layers.rotation`: of queries and keys.
    turn: [B or 1, R, 2, 2, m]: of values.
    mask, cache, length, first, cap: as of `tree_attention.attend`, in float32.
    scale: of queries.
  """
  batch, rows, heads, parts, size = qkv.shape
  result = lambda *shape: jax.ShapeDtypeStruct((batch, *shape), qkv.dtype)
  results = (
    result(rows, heads, parts - 2, size),
    result(heads, size, rows),
    result(heads, rows, size),
  )
  call = jax.ffi.ffi_call(TARGET, results, vmap_method="sequential")

  def table(turns):
    if turns is None:
      return jnp.zeros((batch, rows, 2, 2, 0), qkv.dtype)
    turns = jnp.broadcast_to(turns, (batch, *turns.shape[1:]))
    return turns.astype(qkv.dtype)

  y, k, v = call(
    length.astype(jnp.int32),
    first.astype(jnp.int32),
    mask,
    qkv,
    table(rotary),
    table(turn),
    *cache,
    scale=np.float32(scale),
    cap=np.float32(cap),
  )
  return y.swapaxes(1, 2), k, v

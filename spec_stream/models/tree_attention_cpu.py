"""Attention over cache and new rows as one call for a CPU, in float32.

`tree_attention_cpu.cc` (see `native`) turns queries and keys, and has the
scores with the cache, up to its length, and with the new rows, their softmax
and the values; nothing of the size of the slots is made. XLA makes some fifteen
small programs of it, each of which takes longer to begin than a short cache
takes to be read. A request is shared by as many threads as there are key/value
heads, and parts of 48 rows.
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
  rotary: jax.Array,
  turn: jax.Array,
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
    turn: [B or 1, R, 2, 2, m]: of values. n, m: 0 where they are not turned.
    mask, cache, length, first, cap: as of `tree_attention.attend`, in float32.
    scale: of queries.
  """
  batch, rows, heads, parts, size = qkv.shape
  of = lambda *shape: jax.ShapeDtypeStruct((batch, *shape), qkv.dtype)
  call = jax.ffi.ffi_call(
    TARGET,
    (
      of(rows, heads, parts - 2, size),
      of(heads, size, rows),
      of(heads, rows, size),
    ),
    vmap_method="sequential",
  )
  whole = lambda x: x.astype(jnp.int32)
  table = lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])).astype(qkv.dtype)
  y, k, v = call(
    *(whole(length), whole(first), mask),
    *(qkv, table(rotary), table(turn), *cache),
    scale=np.float32(scale),
    cap=np.float32(cap),
  )
  return y.swapaxes(1, 2), k, v

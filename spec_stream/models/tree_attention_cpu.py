"""Attention over cache and new rows as one call for a CPU, in float32.

`tree_attention_cpu.cc` (see `native`) has the scores with the cache, up to its
length, and with the new rows, their softmax and the values; nothing of the size
of the slots is made. XLA makes some ten small programs of it, each of which
takes longer to begin than a short cache takes to be read. A request is shared
by as many threads as there are key/value heads, and parts of 48 rows.
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
) -> jax.Array:
  """-> [B, K, R, G, H]; arguments as of `tree_attention.attend`, in float32."""
  q = q.swapaxes(1, 2)  # [B, R, K, G, H], as the projection left it
  call = jax.ffi.ffi_call(
    TARGET,
    jax.ShapeDtypeStruct(q.shape, q.dtype),
    vmap_method="sequential",
  )
  length, first = length.astype(jnp.int32), first.astype(jnp.int32)
  y = call(length, first, mask, q, k, v, *cache, cap=np.float32(cap))
  return y.swapaxes(1, 2)

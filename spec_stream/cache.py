"""The key/value cache of committed tokens.

One cache, one length per row:

    row 0   k k k k k k . . . .    length 6
    row 1   k k k . . . . . . .    length 3

Only committed tokens are ever read: a verification attends to slots below
`length` and to its own tree, and `commit` then writes the accepted path's keys
and values at `length`. Slots from `length` on hold leftovers that no mask
admits, so nothing is rewound when a draft is rejected.

Letters: B batch row, S cache slots, K key/value heads, H head size, T new
positions, A longest accepted path.
"""

import flax.struct
import jax
import jax.numpy as jnp

# One pair per layer: keys and values, [B, K, T, H] each, positions applied.
KV = tuple[tuple[jax.Array, jax.Array], ...]


@flax.struct.dataclass
class KVCache:
  """Keys and values of the committed tokens, per layer."""

  layers: KV  # per layer (k, v), each [B, K, S, H]
  length: jax.Array  # [B] int32: committed tokens of each row

  @property
  def num_slots(self) -> int:
    return self.layers[0][0].shape[2]


def empty(
  batch: int, slots: int, layers: int, kv_heads: int, head_dim: int, dtype
) -> KVCache:
  zeros = lambda: jnp.zeros((batch, kv_heads, slots, head_dim), dtype)
  return KVCache(
    layers=tuple((zeros(), zeros()) for _ in range(layers)),
    length=jnp.zeros((batch,), jnp.int32),
  )


def commit(
  cache: KVCache, kv: KV, path: jax.Array | None, count: jax.Array
) -> KVCache:
  """Writes the first `count` entries of `path` at each row's `length`.

  Args:
    cache: with room for the whole path: `length + A <= S` for each row. The
      caller sizes the cache so; XLA would clamp the start, and overwrite.
    kv: new keys and values per layer, [B, K, T, H].
    path: [B, A] indices into T, or None for 0..T-1.
    count: [B] entries that count; the slots after them stay unread.
  """
  write = jax.vmap(
    lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, 1)
  )

  def update(old, new):
    if path is not None:
      new = jnp.take_along_axis(new, path[:, None, :, None], 2)
    return write(old, new.astype(old.dtype), cache.length)

  layers = tuple(
    (update(k, new_k), update(v, new_v))
    for (k, v), (new_k, new_v) in zip(cache.layers, kv, strict=True)
  )
  return KVCache(layers=layers, length=cache.length + count)

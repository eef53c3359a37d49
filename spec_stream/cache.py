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

# One pair per layer: keys [B, K, H, T], positions applied, and values
# [B, K, T, H]: each as its product with queries or weights reads it, without a
# transposed copy of the whole cache in every step.
KV = tuple[tuple[jax.Array, jax.Array], ...]


@flax.struct.dataclass
class KVCache:
  """Keys and values of the committed tokens, per layer."""

  layers: KV  # per layer (k, v), [B, K, H, S] and [B, K, S, H]
  length: jax.Array  # [B] int32: committed tokens of each row

  @property
  def num_slots(self) -> int:
    return self.layers[0][1].shape[2]


def empty(
  batch: int, slots: int, layers: int, kv_heads: int, head_dim: int, dtype
) -> KVCache:
  zeros = lambda *shape: jnp.zeros((batch, kv_heads, *shape), dtype)
  return KVCache(
    layers=tuple(
      (zeros(head_dim, slots), zeros(slots, head_dim)) for _ in range(layers)
    ),
    length=jnp.zeros((batch,), jnp.int32),
  )


def take(kv: KV, at: jax.Array) -> KV:
  """Of T positions those `at` [B, U]."""
  return tuple(
    (
      jnp.take_along_axis(k, at[:, None, None, :], 3),
      jnp.take_along_axis(v, at[:, None, :, None], 2),
    )
    for k, v in kv
  )


def commit(
  cache: KVCache, kv: KV, path: jax.Array | None, count: jax.Array
) -> KVCache:
  """Writes the first `count` entries of `path` at each row's `length`.

  Args:
    cache: with room for the whole path: `length + A <= S` for each row. The
      caller sizes the cache so; XLA would clamp the start, and overwrite.
    kv: new keys and values per layer.
    path: [B, A] indices into T, or None for 0..T-1.
    count: [B] entries that count; the slots after them stay unread.
  """

  def write(axis):
    """Of the axis of a row's slots."""
    update = jax.lax.dynamic_update_slice_in_dim
    if len(cache.length) == 1:  # else XLA reads the slots first, and selects
      return lambda old, new, at: update(
        old, new.astype(old.dtype), at[0], axis + 1
      )
    return jax.vmap(
      lambda old, new, at: update(old, new.astype(old.dtype), at, axis)
    )

  new = kv if path is None else take(kv, path)
  layers = tuple(
    (write(2)(k, new_k, cache.length), write(1)(v, new_v, cache.length))
    for (k, v), (new_k, new_v) in zip(cache.layers, new, strict=True)
  )
  return KVCache(layers=layers, length=cache.length + count)

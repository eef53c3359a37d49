"""Drafting by a network with a cache of its own: a draft model, EAGLE.

What the target accepted is run through the network at once and committed to its
cache; the draft grows from the last of it. Drafted nodes write their keys and
values behind the committed ones, where only their descendants see them; the
next call overwrites them. Nothing is rewound.

Letters: B batch row, T new rows, W nodes of a level, E nodes drafted before, S
cache slots, D width, V vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from spec_stream.cache import KVCache, commit
from spec_stream.drafters.grow import Guess, grow
from spec_stream.tree import TokenTree, TreeSpec

# (tokens [B, T], features [B, T, D] or None, positions [B, T], mask [B, T, T],
# cache, cache_mask [B, T, S] or None) -> (features [B, T, D], keys and values)
Run = Callable[..., tuple[jax.Array, tuple]]


def room(tree: TreeSpec, length: int, slots: int) -> int:
  """Slots of the cache, given those of the target's: drafts need more."""
  depths = [len(path) for path in tree.paths]  # fixed trees ask whole levels
  width = max(tree.width, *map(depths.count, depths), 0)
  longest = tree.reach(length)
  return -(-(slots + longest + width * max(longest - 2, 0)) // 16) * 16


def propose(
  run: Run,
  logits: Callable[[jax.Array], jax.Array],
  cache: KVCache,
  tokens: jax.Array,
  features: jax.Array | None,
  last: jax.Array,
  count: jax.Array,
  root: jax.Array,
  tree: TreeSpec,
  length: int,
  guess: Guess,
) -> tuple[TokenTree, KVCache]:
  """The next tree and the cache with what was accepted.

  Args:
    run, logits: the network, and its features [B, T, D] -> [B, T, V].
    cache: its committed rows.
    tokens, features: its inputs of the rows to catch up with.
    last: [B] the row that says what follows the root.
    count: [B] rows to commit: last + 1, or last if the root's own row will be
      run again with the next call.
    root: [B]; tree, length, guess: see `grow`.
  """
  batch, size = tokens.shape
  start, order = cache.length, jnp.arange(size)
  causal = jnp.broadcast_to(order[:, None] >= order, (batch, size, size))
  positions = start[:, None] + order
  out, kv = run(tokens, features, positions, causal, cache, None)
  cache = commit(cache, kv, None, count)
  committed, seen = cache.length, start + last + 1
  take = lambda x, at: jnp.take_along_axis(
    x, at.reshape(*at.shape, *(1,) * (x.ndim - at.ndim)), 1
  )
  first = take(out, last[:, None])  # [B, 1, D]
  slot = jnp.arange(cache.num_slots)

  def extend(carry, tokens, parents):
    layers, features, above, depth = carry
    batch, width = tokens.shape
    above = take(above, parents)  # [B, W, E] ancestors among drafted nodes
    drafted = above.shape[2]
    # Slot s holds drafted node s - seen.
    node = jnp.clip(slot - seen[:, None], 0, max(drafted - 1, 0))
    old = slot < seen[:, None]
    mine = slot < (seen + drafted)[:, None]
    if drafted:
      node = jnp.broadcast_to(node[:, None], (batch, width, node.shape[1]))
      mask = old[:, None] | mine[:, None] & jnp.take_along_axis(above, node, 2)
    else:
      mask = jnp.broadcast_to(old[:, None], (batch, width, old.shape[1]))
    own = jnp.broadcast_to(jnp.eye(width, dtype=bool), (batch, width, width))
    features = None if features is None else take(features, parents)
    positions = jnp.broadcast_to((seen + depth)[:, None], tokens.shape)
    there = KVCache(layers, seen + drafted)
    out, kv = run(tokens, features, positions, own, there, mask)
    there = commit(there, kv, None, jnp.zeros_like(seen))
    above = jnp.concatenate([above, own], 2)
    feed = None if features is None else out
    return logits(out), (there.layers, feed, above, depth + 1)

  nothing = jnp.zeros((batch, 1, 0), bool)
  carry = (cache.layers, None if features is None else first, nothing, 0)
  draft = grow(tree, length, root, logits(first)[:, 0], carry, extend, guess)
  return draft, cache.replace(length=committed)

"""Scores and one softmax over several blocks of keys.

Scores are float32 or wider, and soft-capped before they are masked. The blocks
are joined by their common maximum and sum: no key, value or score is copied.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from spec_stream.models.layers import softcap, wide

NEVER = -1e30  # finite: a row with nothing to attend to must not give NaN


def scores(equation: str, q, k, mask, cap: float) -> jax.Array:
  """`equation` of queries (scaled) and keys, where `mask` allows it."""
  dtype = wide(q.dtype)
  x = jnp.einsum(equation, q, k.astype(q.dtype), preferred_element_type=dtype)
  return jnp.where(mask, softcap(x, cap), jnp.asarray(NEVER, dtype))


def joined(
  blocks: Sequence[jax.Array], values: Sequence[tuple[str, jax.Array]]
) -> jax.Array:
  """Values weighted by one softmax over all blocks, in the values' dtype.

  blocks: scores [..., keys]; values: for each an einsum equation of weights and
  values, and the values.
  """
  top = jnp.max(blocks[0], -1, keepdims=True)
  for block in blocks[1:]:
    top = jnp.maximum(top, jnp.max(block, -1, keepdims=True))
  exps = [jnp.exp(block - jax.lax.stop_gradient(top)) for block in blocks]
  total = sum(jnp.sum(e, -1, keepdims=True) for e in exps)
  dtype = values[0][1].dtype
  y = sum(
    jnp.einsum(equation, e.astype(dtype), v.astype(dtype))
    for e, (equation, v) in zip(exps, values, strict=True)
  )
  return (y / total).astype(dtype)

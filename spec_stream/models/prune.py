"""Pruning a draft by an early exit (paper 3.1.3).

After layer L-N_s the pruner reads the next-token distribution off the main
stream, `LM_head(o(h))` with a rank-r `o`; the softmax of a parent's logits at
its child's token is the transition probability. Of the tree, the `kept_nodes`
most probable paths go on (one static shape); `threshold` is the paper's form,
which drops a child and all below it where that probability is under it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from spec_stream.models.config import ModelConfig
from spec_stream.tree import TokenTree


class PruneParam(nnx.Param):
  """A weight of the pruning adapter o."""


class Pruner(nnx.Module):
  """o(h) = h + (h a) b, rank r: 2 r D parameters (the paper's 16 h)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    rank = config.streams.prune_rank
    normal = jax.nn.initializers.normal(config.width**-0.5)
    shape = (config.width, rank)
    self.a = PruneParam(normal(rngs.params(), shape, jnp.float32))
    self.b = PruneParam(jnp.zeros(shape[::-1], jnp.float32))

  def __call__(self, hidden: jax.Array) -> jax.Array:
    low = hidden @ self.a[...].astype(hidden.dtype)
    return hidden + low @ self.b[...].astype(hidden.dtype)


@dataclasses.dataclass(frozen=True)
class Prune:
  """kept_nodes: nodes that enter the MSA layers, root included; 0 = all.

  threshold: least transition probability of a child; 0 = off.
  """

  kept_nodes: int = 0
  threshold: float = 0.0

  def __bool__(self):
    return bool(self.kept_nodes or self.threshold)


def prune(
  tree: TokenTree, logits: jax.Array, rule: Prune, longest: int
) -> tuple[TokenTree, jax.Array]:
  """The pruned tree [B, M'] and the nodes it keeps [B, M'].

  tree: [B, M]; logits: [B, M, V] of the early exit at each node.
  """
  log_probs = jax.nn.log_softmax(logits, -1)
  parent = jnp.maximum(tree.parents, 0)
  # step[b, m] = log p(token m | parent of m), by one gather over [M, V].
  step = jnp.take_along_axis(
    jnp.take_along_axis(log_probs, parent[..., None], 1),
    jnp.maximum(tree.tokens, 0)[..., None],
    2,
  )[..., 0]
  is_root = tree.parents < 0
  step = jnp.where(is_root, 0, step)
  alive = is_root | (step >= jnp.log(rule.threshold)) & (tree.tokens >= 0)
  if rule.threshold == 0:
    alive = is_root | (tree.tokens >= 0)
  path, lives = step, alive
  for _ in range(longest - 1):
    above = jnp.take_along_axis(path, parent, 1)
    path = jnp.where(is_root, 0, step + above)
    lives = alive & (is_root | jnp.take_along_axis(lives, parent, 1))
  tree = tree.replace(tokens=jnp.where(lives, tree.tokens, -1))
  size = tree.num_nodes
  kept = min(rule.kept_nodes or size, size)
  if kept == size:
    nodes = jnp.broadcast_to(jnp.arange(size), tree.tokens.shape)
    return tree, nodes
  # A dead node ranks below every living one. Of equals the first is taken, and
  # parents stand before children: the kept set is closed under parents.
  rank = jnp.where(lives, path, -jnp.inf)
  nodes = jnp.sort(jax.lax.top_k(rank, kept)[1], 1)
  return tree.take(nodes), nodes

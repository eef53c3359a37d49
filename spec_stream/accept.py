"""Acceptance: the longest path of a draft that the target would have drawn.

`exact` (the default): the target draws its own next token at every node (see
`sampling`); a child survives if it equals its parent's draw. At most one child
of a node does, if siblings differ, so the survivors form one path. The tokens
are those of plain decoding under the same seed, for any tree and any drafter.
"""

import flax.struct
import jax
import jax.numpy as jnp

from spec_stream.tree import TokenTree, path_to


@flax.struct.dataclass
class Acceptance:
  path: jax.Array  # [B, A] nodes from the root; repeats its last node
  accepted_len: jax.Array  # [B] accepted nodes; excludes root and bonus token
  tokens: jax.Array  # [B, A] emitted: accepted tokens, the bonus, then junk

  @property
  def last(self) -> jax.Array:
    """[B] the last accepted node."""
    return self.path[:, -1]


def exact(tree: TokenTree, draws: jax.Array, longest: int) -> Acceptance:
  """Longest path whose every child equals its parent's draw.

  tree: [B, M]; draws: [B, M] the target's next token at each node; longest: A.
  """
  wanted = jnp.take_along_axis(draws, jnp.maximum(tree.parents, 0), 1)
  match = (tree.tokens == wanted) | (tree.parents < 0)
  alive = match
  for _ in range(longest - 1):
    above = jnp.take_along_axis(alive, jnp.maximum(tree.parents, 0), 1)
    alive = match & (above | (tree.parents < 0))
  accepted_len = jnp.max(jnp.where(alive, tree.depth, 0), 1)
  last = jnp.argmax(jnp.where(alive, tree.depth, -1), 1)
  path = path_to(tree, last, longest)
  return Acceptance(
    path=path,
    accepted_len=accepted_len,
    tokens=jnp.take_along_axis(draws, path, 1),
  )

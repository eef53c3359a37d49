"""Acceptance: the longest path of a draft that the target goes along with.

`exact` (the default): the target draws its own next token at every node (see
`sampling`); a child survives if it equals its parent's draw. At most one child
of a node does, if siblings differ, so the survivors form one path. The tokens
are those of plain decoding under the same seed, for any tree and any drafter.

`rejection`: drafts are drawn from the drafter's own distribution, and a drawn
token x is accepted with probability min(1, p(x) / q(x)), p the target's and q
the drafter's (paper eq. 7); the first that is not gives way to a draw from what
remains of p (eq. 8). Siblings are drawn without replacement, and each rejection
takes q from p before the next sibling is looked at. The output is distributed
as the target's, but is not that of plain decoding under the same seed.

`typical` (Medusa, 2401.10774, section 2.3.1): a token is accepted if the target
gives it more than min(epsilon, delta exp(-entropy)). NOT lossless: the output
is distributed otherwise than the target's.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from spec_stream.tree import TokenTree, path_to

EPSILON, DELTA = 0.09, 0.3  # Medusa's own; delta is the root of epsilon


@flax.struct.dataclass
class Acceptance:
  path: jax.Array  # [B, A] nodes from the root; repeats its last node
  accepted_len: jax.Array  # [B] accepted nodes; excludes root and bonus token
  tokens: jax.Array  # [B, A] emitted: accepted tokens, the bonus, then junk

  @property
  def last(self) -> jax.Array:
    """[B] the last accepted node."""
    return self.path[:, -1]

  @property
  def bonus(self) -> jax.Array:
    """[B] the target's own token behind the accepted ones: the new root."""
    return _take(self.tokens, self.accepted_len)


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
  """x [B, n, ...], at [B] -> [B, ...]."""
  return jax.vmap(lambda x, i: x[i])(x, at)


def exact(tree: TokenTree, draws: jax.Array, longest: int) -> Acceptance:
  """Longest path whose every child equals its parent's draw.

  tree: [B, M]; draws: [B, M] the target's next token at each node; longest: A.
  """
  wanted = jnp.take_along_axis(draws, jnp.maximum(tree.parents, 0), 1)
  alive = _reached(tree, tree.tokens == wanted, longest)
  last = jnp.argmax(jnp.where(alive, tree.depth, -1), 1)
  path = path_to(tree, last, longest)
  return Acceptance(
    path=path,
    accepted_len=_take(tree.depth, last),
    tokens=jnp.take_along_axis(draws, path, 1),
  )


def typical(
  tree: TokenTree, draws: jax.Array, probs: jax.Array, longest: int
) -> Acceptance:
  """Longest path of tokens that the target finds typical; of equals the more
  probable one.

  tree: [B, M]; draws: [B, M]; probs: [B, M, V] the target's next token, a
  certainty where it is greedy; longest: A.
  """
  entropy = -jnp.where(probs > 0, probs * jnp.log(probs), 0).sum(-1)
  bound = jnp.minimum(EPSILON, DELTA * jnp.exp(-entropy))
  above = jnp.maximum(tree.parents, 0)
  take = lambda x: jnp.take_along_axis(x, above, 1)
  token = jnp.maximum(tree.tokens, 0)
  here = jnp.take_along_axis(probs, above[..., None], 1)
  here = jnp.take_along_axis(here, token[..., None], 2)[..., 0]  # [B, M]
  match = (tree.tokens >= 0) & (here > take(bound))
  alive = _reached(tree, match, longest)
  score = jnp.where(tree.parents < 0, 0, jnp.log(here))
  path_score = score
  for _ in range(longest - 1):
    path_score = jnp.where(tree.parents < 0, 0, score + take(path_score))
  deepest = jnp.max(jnp.where(alive, tree.depth, -1), 1, keepdims=True)
  best = alive & (tree.depth == deepest)
  last = jnp.argmax(jnp.where(best, path_score, -jnp.inf), 1)
  return _ending(tree, last, _take(draws, last), longest)


def rejection(
  tree: TokenTree,
  paths: tuple[tuple[int, ...], ...],
  probs: jax.Array,
  draft: jax.Array,
  uniform: jax.Array,
  gumbel: jax.Array,
) -> Acceptance:
  """Speculative sampling (eq. 7-8), sibling by sibling, from the root on.

  Args:
    tree: [B, M]; the children of a node hold draws of `draft` at their depth,
      without replacement, in the order of their ranks.
    paths: the tree's shape, see `tree.check_ranks`.
    probs: [B, M, V] the target's next token after each node; a certainty where
      it is greedy.
    draft: [B, A - 1, V] probabilities that nodes of depth 1, 2, ... are from.
    uniform: [B, A - 1, C] in [0, 1), for each depth and rank.
    gumbel: [B, A, V] noise of the bonus token after a path of each length.
  """
  longest = 1 + draft.shape[1]
  index = {path: i for i, path in enumerate([(), *paths])}
  width = 1 + max((path[-1] for path in paths), default=0)
  children = np.full((len(index), width), -1)
  for path in paths:
    children[index[path[:-1]], path[-1]] = index[path]
  children = jnp.asarray(children)
  node = jnp.zeros(len(tree.tokens), jnp.int32)
  alive = jnp.ones(len(node), bool)
  rest = probs[:, 0]  # what remains of the target's where the path ends
  for depth in range(longest - 1):
    here, left = _take(probs, node), draft[:, depth]
    chosen = node
    for rank in range(width):
      child = children[node, rank]
      token = _take(tree.tokens, jnp.maximum(child, 0))
      looked = alive & (chosen == node) & (child >= 0) & (token >= 0)
      accept = acceptance(here, left, token)
      taken = looked & (uniform[:, depth, rank] < accept)
      chosen = jnp.where(taken, child, chosen)
      rejected = (looked & ~taken)[:, None]
      below = residual(here, left)
      here = jnp.where(rejected, below, here)
      left = jnp.where(rejected, without(left, token), left)
    rest = jnp.where(alive[:, None], here, rest)
    alive &= chosen != node
    node = chosen.astype(jnp.int32)
  rest = jnp.where(alive[:, None], _take(probs, node), rest)
  scores = jnp.log(rest) + _take(gumbel, _take(tree.depth, node))
  bonus = jnp.argmax(scores, -1).astype(jnp.int32)
  return _ending(tree, node, bonus, longest)


def acceptance(target: jax.Array, draft: jax.Array, token: jax.Array):
  """[B] probability that a draw `token` of `draft` is accepted (eq. 7)."""
  at = jnp.maximum(token, 0)
  p, q = _take(target, at), _take(draft, at)
  return jnp.where(q > 0, jnp.minimum(p / jnp.where(q > 0, q, 1), 1), 0)


def residual(target: jax.Array, draft: jax.Array) -> jax.Array:
  """[B, V] what remains of the target's after a rejection (eq. 8)."""
  rest = jnp.maximum(target - draft, 0)
  total = rest.sum(-1, keepdims=True)
  # Alike but for rounding: then nothing is ever rejected.
  return jnp.where(total > 0, rest / jnp.where(total > 0, total, 1), target)


def without(draft: jax.Array, token: jax.Array) -> jax.Array:
  """[B, V] the draft's once `token` [B] was drawn from it."""
  ids = jnp.arange(draft.shape[-1])
  rest = jnp.where(ids == token[:, None], 0, draft)
  total = rest.sum(-1, keepdims=True)
  return rest / jnp.where(total > 0, total, 1)


def _ending(
  tree: TokenTree, last: jax.Array, bonus: jax.Array, longest: int
) -> Acceptance:
  """The path that ends at the node `last` [B], its own tokens and `bonus`."""
  path, size = path_to(tree, last, longest), _take(tree.depth, last)
  drafted = jnp.take_along_axis(tree.tokens, path, 1)
  drafted = jnp.roll(drafted, -1, 1)  # the root is not emitted anew
  order = jnp.arange(longest)
  return Acceptance(
    path=path,
    accepted_len=size,
    tokens=jnp.where(order < size[:, None], drafted, bonus[:, None]),
  )


def _reached(tree: TokenTree, match: jax.Array, longest: int) -> jax.Array:
  """[B, M] nodes that match, with all above them."""
  match |= tree.parents < 0
  alive = match
  for _ in range(longest - 1):
    above = jnp.take_along_axis(alive, jnp.maximum(tree.parents, 0), 1)
    alive = match & (above | (tree.parents < 0))
  return alive

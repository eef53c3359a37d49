"""Trees that grow level by level: each node is scored after its own parent.

Streams and Medusa's heads say what comes at each depth whatever stands before
it, and one pass gives all depths. A recurrent head, a draft model or EAGLE must
be asked again for each level:

    best_first  the W most probable nodes of a level are asked for the next, W
                candidates each; of all candidates the M - 1 most probable stay
                (EAGLE-2, section 4)
    beam        the W most probable paths of each length; nodes that lead to no
                path of full length are dead (ReDrafter, section 3.2)
    chain, cartesian, paths   fixed: which candidates of which node

Letters: B batch row, M nodes (root included), W width, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spec_stream.errors import UserError
from spec_stream.tree import (
  TokenTree,
  TreeSpec,
  join,
  most_probable,
  root_only,
  top,
)

# (carry, tokens [B, W], parents [B, W] in the level before) -> (logits
# [B, W, V] of what follows each token, carry)
Extend = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]]
# (logits [B, W, V], drafted tokens before them) -> those to choose by; a
# drafter's `guess`.
Guess = Callable[[jax.Array, int], jax.Array]


def resolve(tree: TreeSpec, length: int, vocab_size: int) -> TreeSpec:
  """As `TreeSpec.resolve`, for trees that grow; `tree.width` is W.

  W is about the root of the nodes where it is left open, and more where drafts
  are too short for that.
  """
  if length < 1:
    raise UserError(f"draft_length={length} must be 1 or more")
  if tree.kind not in ("best_first", "beam"):
    return tree.resolve(length, vocab_size)
  nodes, beam = tree.num_nodes, tree.kind == "beam"
  if nodes < 0 or tree.width < 0:
    raise UserError("tree_nodes and tree_width must not be negative")
  nodes = nodes or (0 if beam and tree.width else 16)
  room = lambda width: width + (length - 1) * width ** (1 if beam else 2)
  width = tree.width or math.ceil(math.sqrt(max(nodes - 1, 1)))
  while not tree.width and room(width) < nodes - 1:
    width += 1
  width = min(width, vocab_size)
  nodes = nodes or 1 + room(width)
  if nodes > 1 + room(width):
    raise UserError(
      f"a {tree.kind} tree of {nodes} nodes does not fit: drafts of {length} "
      f"tokens and width {width} give {1 + room(width)} nodes at the most"
    )
  return TreeSpec(tree.kind, nodes, width)


def grow(
  tree: TreeSpec,
  length: int,
  root: jax.Array,
  logits: jax.Array,
  carry: Any,
  extend: Extend,
  guess: Guess,
) -> TokenTree:
  """The tree [B, M] below `root`.

  Args:
    tree: resolved; length: greatest depth, where its kind leaves it open.
    root: [B] int32.
    logits: [B, V] of what follows the root.
    carry: what `extend` needs to know of the root.
    extend: asked once for each level but the last.
    guess: of what its and the first logits are made.
  """
  if tree.num_nodes == 1:
    return root_only(root)
  length = tree.reach(length) - 1
  if tree.paths:
    return _fixed(tree.paths, root, logits, carry, extend, guess)
  beam, budget, width = tree.kind == "beam", tree.num_nodes - 1, tree.width
  size = width if beam else budget  # nodes of a level that can matter
  levels, offset = [], 0
  score, place = jnp.zeros_like(logits[:, :1]), jnp.full((1, 1), -1)
  logits = logits[:, None]
  for level in range(length):
    logits = guess(logits, level)
    log_probs, tokens = most_probable(logits, width)
    flat = lambda x: x.reshape(x.shape[0], -1)
    joint = flat(score[..., None] + log_probs)
    score, best = top(joint, size)
    parent = best // log_probs.shape[2]
    token = jnp.take_along_axis(flat(tokens), best, 1)
    place = jnp.broadcast_to(place, (len(root), place.shape[1]))
    at = jnp.take_along_axis(place, parent, 1).astype(jnp.int32)
    levels.append((score, token, at))
    if level + 1 < length:  # the next level's parents
      score, parent = score[:, :width], parent[:, :width]
      logits, carry = extend(carry, token[:, :width], parent)
      place = offset + jnp.arange(score.shape[1])[None]
    offset += levels[-1][0].shape[1]
  return join(root, _survivors(levels) if beam else levels, budget + 1)


def _survivors(levels):
  """Beams: what does not lead to the last level is dead, and least probable."""
  alive = jnp.ones(levels[-1][0].shape, bool)
  offset = sum(score.shape[1] for score, _, _ in levels)
  out = []
  for score, token, parent in levels[::-1]:
    out.append(
      (jnp.where(alive, score, -jnp.inf), jnp.where(alive, token, -1), parent)
    )
    offset -= score.shape[1]
    if offset:
      above = levels[len(levels) - len(out) - 1][0].shape[1]
      at = parent - (offset - above)  # within the level above
      led = (at[..., None] == jnp.arange(above)) & alive[..., None]
      alive = led.any(1)
  return out[::-1]


def _fixed(paths, root, logits, carry, extend, guess) -> TokenTree:
  """`paths`: sorted by length, as `check_paths` has them."""
  tokens, scores = [root[:, None]], [jnp.zeros_like(logits[:, :1])]
  asked, score, logits = [()], scores[0], logits[:, None]
  for depth in range(1, 1 + len(paths[-1])):
    here = [path for path in paths if len(path) == depth]
    parent = np.array([asked.index(path[:-1]) for path in here])
    rank = np.array([path[-1] for path in here])
    log_probs = jax.nn.log_softmax(guess(logits, depth - 1), -1)
    log_probs, found = top(log_probs, 1 + int(rank.max()))
    token = found[:, parent, rank]
    score = score[:, parent] + log_probs[:, parent, rank]
    tokens.append(token)
    scores.append(score)
    # Of these, the parents of the next level are asked.
    above = {path[:-1] for path in paths if len(path) == depth + 1}
    keep = np.array([i for i, path in enumerate(here) if path in above], int)
    if len(keep):
      at = jnp.broadcast_to(parent[keep], (len(root), len(keep)))
      logits, carry = extend(carry, token[:, keep], at)
      asked, score = [here[i] for i in keep], score[:, keep]
  index = {path: i for i, path in enumerate([(), *paths])}
  parents = np.array([-1] + [index[path[:-1]] for path in paths], np.int32)
  depth = np.array([0] + [len(path) for path in paths], np.int32)
  shape = (len(root), len(index))
  return TokenTree(
    tokens=jnp.concatenate(tokens, 1),
    parents=jnp.broadcast_to(parents, shape),
    depth=jnp.broadcast_to(depth, shape),
    log_prob=jnp.concatenate(scores, 1),
  )

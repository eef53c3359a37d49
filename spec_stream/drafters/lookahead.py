"""Lookahead decoding: Jacobi iteration in the verification pass (Fu et al.,
2402.02057).

No weights, no parameters. Beside the n-grams to verify, the pass holds a window
of guesses: row l of N - 1 is the l-th iterate of W guesses at successive
positions, oldest first (section 3.1; a guess stands below the row before it, at
the position one further on):

    root - g00 - g01 - g02 ...          row 0, a chain
            |     |     |
           g10   g11   g12              row 1: below g00, at the place of g01
            |     |     |
           g20   g21   g22

What the target draws after the last row is the next row; a column with it is
an n-gram, and goes into a pool. The pool's n-grams that begin with the root are
the candidates of the next call, G chains from the root. The window is part
of the tree, so a right guess in it is accepted like any other.

Letters: B batch row, W columns, N tokens of an n-gram, G candidates, P pool.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from spec_stream.drafters.base import Accepted, Params, TreeDrafter
from spec_stream.errors import UserError
from spec_stream.models.config import ModelConfig
from spec_stream.tree import TokenTree, TreeSpec, side_by_side


@flax.struct.dataclass
class Window:
  guesses: jax.Array  # [B, N-1, W]
  # [B, P, N] n-grams, each once, the newest last; -1 where there is none
  pool: jax.Array


@dataclasses.dataclass(frozen=True)
class Lookahead(TreeDrafter):
  """tree: its nodes are shared by window and candidates, half each.

  length: N - 1 tokens of a candidate, 0 for 3 (fewer in small trees); pool: P.
  """

  pool: int = 512

  name = "lookahead"

  def resolve(self, config: ModelConfig, own=None) -> "Lookahead":
    nodes = self.tree.num_nodes or 31
    if self.tree.kind != "best_first":
      raise UserError(
        f"lookahead draws a tree of its own, no {self.tree.kind}: leave --tree"
      )
    length = self.length or min(3, max((nodes - 1) // 2, 1))
    width = (nodes - 1) // (2 * length)
    if width < 1:
      raise UserError(
        f"lookahead needs at least {1 + 2 * length} nodes for n-grams of "
        f"{length + 1} tokens, not {nodes}"
      )
    nodes = 1 + (nodes - 1) // length * length
    tree = TreeSpec("best_first", nodes, width)
    return self.resolved(config, tree, length)

  @property
  def chains(self) -> int:
    """G of a resolved drafter."""
    return (self.num_nodes - 1) // self.length - self.tree.width

  @property
  def longest(self) -> int:
    return self.tree.width + self.length

  def init(self, params: Params, batch: int, slots: int) -> Window:
    guesses = jnp.zeros((batch, self.length, self.tree.width), jnp.int32)
    pool = jnp.full((batch, self.pool, self.length + 1), -1, jnp.int32)
    return Window(guesses, pool)

  def propose(self, params: Params, state: Window, accepted: Accepted):
    if accepted.draws is None:  # after prefill: words of the prompt
      at = np.arange(self.length)[:, None] * 3 + np.arange(self.tree.width) * 7
      at = at.ravel() % accepted.count[:, None]
      words = jnp.take_along_axis(accepted.tokens, at, 1)
      guesses = words.reshape(state.guesses.shape)
      state = state.replace(guesses=guesses)
    else:
      state = self._iterate(state, accepted)
    starts = state.pool[:, :, 0] == accepted.root[:, None]
    age = jnp.where(starts, jnp.arange(self.pool), -1)
    newest, which = jax.lax.top_k(age, self.chains)
    found = jnp.take_along_axis(state.pool, which[..., None], 1)[..., 1:]
    found = jnp.where((newest >= 0)[..., None], found, -1)  # [B, G, N-1]
    return self._tree(accepted.root, state.guesses, found), state

  def _iterate(self, state: Window, accepted: Accepted) -> Window:
    """The window one iterate on, and its columns in the pool."""
    width, length = self.tree.width, self.length
    end = 1 + width * length
    drawn = accepted.draws[:, end - width : end]  # after the last row
    grams = jnp.concatenate([state.guesses, drawn[:, None]], 1)  # [B, N, W]
    new = grams.swapaxes(1, 2)  # [B, W, N]
    # One that is there already, or twice among the new, counts as the newest.
    alike = lambda a, b: (a[:, :, None] == b[:, None]).all(-1)
    old = jnp.where(alike(state.pool, new).any(2)[..., None], -1, state.pool)
    later = jnp.arange(width)[:, None] < jnp.arange(width)
    new = jnp.where((alike(new, new) & later).any(2)[..., None], -1, new)
    pool = jnp.concatenate([old, new], 1)[:, width:]
    # One row on is one position on; further tokens shift the columns. What is
    # shifted out comes back at the end, as a guess like any other.
    shift = jnp.maximum(accepted.count - 1, 0)
    roll = jax.vmap(lambda x, by: jnp.roll(x, -by, 1))
    return Window(roll(grams[:, 1:], shift), pool)

  def _tree(self, root, guesses, found) -> TokenTree:
    width, length = self.tree.width, self.length
    columns, rows = np.arange(width), np.arange(length)[:, None]
    node = 1 + rows * width + columns  # of a guess
    above = np.where(rows > 0, node - width, columns)  # row 0 is a chain
    depth = 1 + rows + columns
    chain, deep = side_by_side(self.chains, length, 1 + width * length)
    batch = len(root)
    whole = lambda top, *parts: jnp.broadcast_to(
      np.concatenate([[top], *(x.ravel() for x in parts)]).astype(np.int32),
      (batch, self.num_nodes),
    )
    flat = lambda x: x.reshape(batch, -1)
    tokens = jnp.concatenate([root[:, None], flat(guesses), flat(found)], 1)
    return TokenTree(
      tokens=tokens,
      parents=whole(-1, above, chain),
      depth=whole(0, depth, deep),
      log_prob=jnp.where(tokens < 0, -jnp.inf, 0.0),
    )

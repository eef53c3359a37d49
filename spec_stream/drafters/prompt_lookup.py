"""Prompt lookup: what followed the same words before (Saxena, 2023).

The last n tokens, n = `ngram` and below, are looked up in prompt and output;
the `length` tokens that followed the match are the draft. No weights, no
parameters. A longer match wins; of equal ones the most recent. (The original
takes the earliest; recent ones are better where text repeats with changes.) A
tree of more nodes holds further matches side by side, as chains from the root.

Letters: B batch row, S slots, P chains, K tokens of a chain.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from spec_stream.drafters.base import Accepted, Params, TreeDrafter
from spec_stream.errors import UserError
from spec_stream.models.config import ModelConfig
from spec_stream.tree import TokenTree, TreeSpec, root_only, side_by_side


@flax.struct.dataclass
class History:
  tokens: jax.Array  # [B, S] committed tokens, then junk
  length: jax.Array  # [B]


def append(history: History, accepted: Accepted) -> History:
  """With the tokens of a call."""
  write = jax.vmap(jax.lax.dynamic_update_slice)
  tokens = write(history.tokens, accepted.tokens, history.length[:, None])
  return History(tokens, history.length + accepted.count)


def lookup(
  tokens: jax.Array, length: jax.Array, ngram: int, chains: int, ahead: int
) -> jax.Array:
  """What followed the last n-gram before: [B, P, K], -1 where nothing did.

  Args:
    tokens: [B, S], `length` [B] of which count.
    ngram: the longest that is looked up; shorter ones down to 1 as well.
    chains: P matches, the longest first, then the most recent.
    ahead: K tokens of each.
  """
  batch, slots = tokens.shape
  at, rows = jnp.arange(slots), jnp.arange(batch)[:, None]
  # How many tokens before slot s (exclusive) equal the last ones of the row.
  same, matched = jnp.ones((batch, slots), bool), jnp.zeros((batch, slots), int)
  for n in range(1, ngram + 1):
    last = tokens[rows, (length[:, None] - n) % slots]
    same &= (jnp.roll(tokens, n, 1) == last) & (at >= n)
    same &= (length >= n)[:, None]
    matched = jnp.where(same, n, matched)
  # A match is before the end; the end itself matches itself.
  rank = jnp.where(at < length[:, None], matched * slots + at, -1)
  rank = jnp.where(matched > 0, rank, -1)
  best, start = jax.lax.top_k(rank, min(chains, slots))
  follow = start[:, :, None] + jnp.arange(ahead)
  found = (best >= 0)[:, :, None] & (follow < length[:, None, None])
  chain = tokens[rows[:, :, None], jnp.minimum(follow, slots - 1)]
  chain = jnp.where(found, chain, -1)
  missing = chains - chain.shape[1]
  return jnp.pad(chain, ((0, 0), (0, missing), (0, 0)), constant_values=-1)


def chains_below(root: jax.Array, chains: jax.Array) -> TokenTree:
  """A tree [B, 1 + P K] of chains [B, P, K] side by side below the root."""
  batch, count, ahead = chains.shape
  parents, depth = side_by_side(count, ahead)
  whole = lambda top, below: jnp.broadcast_to(
    np.concatenate([[top], below.ravel()]).astype(np.int32),
    (batch, 1 + count * ahead),
  )
  tokens = jnp.concatenate([root[:, None], chains.reshape(batch, -1)], 1)
  return TokenTree(
    tokens=tokens,
    parents=whole(-1, parents),
    depth=whole(0, depth),
    log_prob=jnp.where(tokens < 0, -jnp.inf, 0.0),
  )


def _fill(budget: int) -> int:
  """Tokens of a chain, 4 to 8, that leave the fewest nodes over."""
  sizes = range(min(4, budget), min(8, budget) + 1)
  return min(sizes, key=lambda size: (budget % size if size else 0, -size))


@dataclasses.dataclass(frozen=True)
class PromptLookup(TreeDrafter):
  """tree: "chain" is one match; otherwise as many as its nodes hold.

  length: tokens of a match, 0 for 4 to 8; ngram: longest that is looked up.
  """

  ngram: int = 3

  name = "prompt_lookup"

  def resolve(self, config: ModelConfig, own=None) -> "PromptLookup":
    kind, nodes = self.tree.kind, self.tree.num_nodes
    if kind not in ("best_first", "chain"):
      raise UserError(
        f"prompt_lookup draws chains, no {kind} tree: use --tree=chain for one "
        "match, best_first for as many as fit its nodes"
      )
    if self.ngram < 1 or self.length < 0 or nodes < 0:
      raise UserError("prompt_lookup: ngram, length and nodes are too small")
    if kind == "chain":
      length = self.length or (nodes - 1 if nodes else 8)
      chains = 1
    else:
      budget = (nodes or 16) - 1
      length = min(self.length or _fill(budget), budget)
      chains = budget // length if length else 0
    if kind == "chain" and nodes not in (0, length + 1):
      raise UserError(
        f"tree_nodes={nodes} contradicts a chain of {length} tokens: leave one "
        "of them at 0"
      )
    tree = TreeSpec(kind, 1 + chains * length)
    return self.resolved(config, tree, length)

  @property
  def chains(self) -> int:
    """P of a resolved drafter."""
    return (self.num_nodes - 1) // self.length if self.length else 0

  @property
  def longest(self) -> int:
    return 1 + self.length

  def init(self, params: Params, batch: int, slots: int) -> History:
    return History(
      jnp.zeros((batch, slots), jnp.int32), jnp.zeros((batch,), jnp.int32)
    )

  def propose(self, params: Params, state: History, accepted: Accepted):
    state = append(state, accepted)
    # The root is the last word of the n-gram, but not yet committed.
    rows = jnp.arange(len(state.length))
    tokens = state.tokens.at[rows, state.length].set(accepted.root)
    if not self.chains:
      return root_only(accepted.root), state
    found = lookup(
      tokens, state.length + 1, self.ngram, self.chains, self.length
    )
    return chains_below(accepted.root, found), state

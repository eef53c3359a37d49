"""Token trees: what a drafter proposes and one forward pass verifies.

A draft is a tree of tokens over static arrays. Node 0 is the root, the token
the target has already decided; every other node follows its parent:

        0 the               tokens  [the cat dog sat ran]
       / \\                  parents [-1  0   0   1   1  ]
    1 cat  2 dog            depth   [0   1   1   2   2  ]
    /  \\
 3 sat  4 ran               ancestors[4] = {0, 1, 4}

A parent always stands before its children. A node whose token is -1 is dead:
no draw of the target equals it, so it is never accepted.

Letters: B batch row, M nodes (root included), J streams, C candidates per
stream, V vocabulary, A longest path (root included) = greatest depth + 1.
"""

import dataclasses
import functools
import itertools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from spec_stream.errors import UserError


@flax.struct.dataclass
class TokenTree:
  """A batch of drafted trees of one static size (paper 3.1.2)."""

  tokens: jax.Array  # [B, M] int32, -1 where the node is dead
  parents: jax.Array  # [B, M] int32, -1 at the root
  depth: jax.Array  # [B, M] int32, 0 at the root
  # [B, M] drafter's log-probability of the path to a node; where it knows the
  # noise that the target will meet, of the target drawing it.
  log_prob: jax.Array

  @property
  def num_nodes(self) -> int:
    return self.tokens.shape[1]

  def take(self, nodes: jax.Array) -> "TokenTree":
    """Keeps `nodes` [B, M'], sorted and closed under parents."""
    kept = jax.tree.map(lambda x: jnp.take_along_axis(x, nodes, 1), self)
    # Old index -> new index; -1 stays -1 through the extra last slot.
    batch, size = self.tokens.shape
    where = jnp.full((batch, size + 1), -1, jnp.int32)
    order = jnp.arange(nodes.shape[1], dtype=jnp.int32)[None]
    where = where.at[jnp.arange(batch)[:, None], nodes].set(order)
    parents = jnp.take_along_axis(where, kept.parents % (size + 1), 1)
    return kept.replace(parents=parents)


def root_only(root: jax.Array) -> TokenTree:
  """Trees of one node [B, 1]: plain decoding. root: [B] int32."""
  zero = jnp.zeros_like(root)[:, None]
  return TokenTree(
    tokens=root[:, None],
    parents=zero - 1,
    depth=zero,
    log_prob=zero.astype(jnp.float32),
  )


def star(root: jax.Array, tokens: jax.Array) -> TokenTree:
  """Trees [B, 1 + n] of `tokens` [B, n], each a child of the root [B]."""
  below = jnp.zeros_like(tokens)
  join = lambda a, b: jnp.concatenate([a, b], 1)
  above = root_only(root)
  return TokenTree(
    tokens=join(above.tokens, tokens),
    parents=join(above.parents, below),
    depth=join(above.depth, below + 1),
    log_prob=join(above.log_prob, jnp.zeros(tokens.shape, jnp.float32)),
  )


def ancestors(parents: jax.Array, longest: int) -> jax.Array:
  """Mask [B, M, M]: True at [b, i, n] if n is i or above i.

  parents: [B, M]; longest: A, at least the greatest depth + 1.
  """
  size = parents.shape[1]
  mask = jnp.broadcast_to(jnp.eye(size, dtype=bool), (*parents.shape, size))
  above = mask
  for _ in range(longest - 1):
    # One step up: the row of a node becomes its parent's unit row.
    up = jnp.take_along_axis(above, jnp.maximum(parents, 0)[..., None], 1)
    above = jnp.where((parents >= 0)[..., None], up | above, above)
  return above | mask


def path_to(tree: TokenTree, node: jax.Array, longest: int) -> jax.Array:
  """Indices [B, A] of the nodes from the root to `node` [B].

  Entries after `node` repeat `node`, so that a gather stays in bounds.
  """
  take = lambda x, at: jnp.take_along_axis(x, at[:, None], 1)[:, 0]
  path = jnp.broadcast_to(node[:, None], (node.shape[0], longest))
  slots = jnp.arange(longest)[None]
  here = node
  for _ in range(longest):
    depth = take(tree.depth, here)
    path = jnp.where(slots == depth[:, None], here[:, None], path)
    here = jnp.maximum(take(tree.parents, here), 0)
  return path


def best_first(
  root: jax.Array, log_probs: jax.Array, tokens: jax.Array, num_nodes: int
) -> TokenTree:
  """The most probable nodes of the C^J product of the streams' candidates.

  A node at depth g is a choice of one candidate from each of streams 1..g; its
  probability is the product of theirs. A node is never more probable than its
  ancestors, so the `num_nodes - 1` most probable ones form a tree. Equal
  probabilities: the shallower node first, then the one whose ranks, from the
  first stream's on, come first in order.

  Args:
    root: [B] int32.
    log_probs: [B, J, C], descending along C, none above 0.
    tokens: [B, J, C] int32.
    num_nodes: M, root included.
  """
  batch, num_streams, width = log_probs.shape
  levels, score = [], jnp.zeros((batch, 1), log_probs.dtype)
  offset, above = -1, 1  # of the level above: the root stands before them all
  for g, (parent, rank) in enumerate(_within(num_streams, width, num_nodes)):
    score = score[:, parent] + log_probs[:, g, rank]
    place = jnp.broadcast_to(jnp.int32(offset + parent), score.shape)
    levels.append((score, tokens[:, g, rank], place))
    offset += above
    above = len(rank)
  return join(root, levels, num_nodes)


@functools.cache
def _within(num_streams: int, width: int, num_nodes: int):
  """Nodes of the product that can be among the best: for each level the index
  of its parent in the level above, and its own rank, in order of all ranks.

  A node whose ranks are all as good as another's is as probable and stands
  before it. So one with `num_nodes - 1` such before it, prod(rank + 1) at each
  depth down to its own, can be left out: of J = 3, M = 32 stay 257 of 30,783.
  """
  levels = []
  above = [(1, 0)]  # product of ranks + 1, and the sum of it over depths
  for _ in range(num_streams):
    found = []
    for parent, (product, before) in enumerate(above):
      for rank in range(width):
        here = product * (rank + 1)
        if before + here > num_nodes - 1:
          break
        found.append((parent, rank, here, before + here))
    if not found:
      break
    parents, ranks, *rest = zip(*found)
    levels.append((np.array(parents, np.int32), np.array(ranks, np.int32)))
    above = list(zip(*rest))
  return tuple(levels)


def join(root: jax.Array, levels, num_nodes: int) -> TokenTree:
  """The most probable nodes of all levels, below the root: a tree if no node is
  more probable than its parent.

  Args:
    root: [B] int32.
    levels: for depth 1, 2, ...: score, token and parent, [B, n] each; a parent
      is an index into all levels joined, -1 for the root.
    num_nodes: M, root included.
  """
  batch, budget = root.shape[0], num_nodes - 1
  score, token, parent = (jnp.concatenate(x, 1) for x in zip(*levels))
  depth = np.repeat(
    np.arange(1, len(levels) + 1), [x[0].shape[1] for x in levels]
  )
  score, chosen = top(score, budget)
  if chosen.shape[1] != budget:
    raise UserError(
      f"a tree of {num_nodes} nodes needs more than the {len(levels)} levels "
      f"drafted here allow ({chosen.shape[1] + 1} nodes)"
    )
  # Joined index -> node; a chosen node's parent is chosen, and stands before.
  rows = jnp.arange(batch)[:, None]
  node = jnp.full(token.shape, 0, jnp.int32)
  node = node.at[rows, chosen].set(jnp.arange(1, num_nodes, dtype=jnp.int32))
  take = lambda x: jnp.take_along_axis(x, chosen, 1)
  parent = take(parent)
  parents = jnp.where(
    parent < 0, 0, jnp.take_along_axis(node, jnp.maximum(parent, 0), 1)
  )
  below = TokenTree(
    tokens=take(token),
    parents=parents,
    depth=jnp.asarray(depth, jnp.int32)[chosen],
    log_prob=score,
  )
  above = root_only(root)
  return jax.tree.map(
    lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], 1),
    above.replace(log_prob=above.log_prob.astype(score.dtype)),
    below,
  )


def top(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Largest k along the last axis, without NaN; of equals, the one that stands
  first.

  In two dimensions: XLA's CPU backend sorts anything of higher rank in full,
  and so it does where parts of the result alone are read, unless all of it is
  asked for. On a GPU it sorts where more than 16 are wanted. Of few among many
  the runs that they are in are looked for first: on a CPU 3 of each of 3 x
  16,384 take 20 us so, where XLA's own pass takes 80 to 130.
  """
  size, k = x.shape[-1], min(k, x.shape[-1])
  rows = x.reshape(-1, size)
  largest = jax.lax.top_k
  # One by one: of a pair XLA makes what its own pass for top_k breaks off at.
  whole = lambda x, k: map(jax.lax.optimization_barrier, largest(x, k))
  ways = {"cpu": whole, "default": largest}
  if size > 64 * k:
    ways["cpu"] = functools.partial(_top_of_runs, largest=whole)
    if k > 16:
      ways["cuda"] = functools.partial(_top_of_runs, largest=largest)
  ways = {on: lambda x, way=way: tuple(way(x, k)) for on, way in ways.items()}
  values, indices = jax.lax.platform_dependent(rows, **ways)
  shape = (*x.shape[:-1], k)
  return values.reshape(shape), indices.reshape(shape)


def most_probable(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Of logits [..., V] the k most probable tokens: their log-probabilities and
  themselves, [..., k] each.

  As `top` of a log_softmax, which looks for the largest once more: with 16,384
  tokens 0.15 ms of a step on a CPU. There exponentials are made before they are
  added up, by a product: a third of the time.
  """
  values, tokens = top(logits, k)
  largest = values[..., :1]
  ones = jnp.ones((logits.shape[-1], 1), logits.dtype)
  total = jax.lax.platform_dependent(
    logits - largest,
    cpu=lambda x: jnp.exp(x) @ ones,
    default=lambda x: jnp.exp(x).sum(-1, keepdims=True),
  )
  return values - largest - jnp.log(total), tokens


def _top_of_runs(x: jax.Array, k: int, run: int = 32, largest=jax.lax.top_k):
  """As `jax.lax.top_k` of x [R, V] without NaN, by sorting less: the largest k
  lie in the k runs of neighbours whose own largest are so."""
  pad = -x.shape[1] % run
  least = -jnp.inf
  runs = jnp.pad(x, ((0, 0), (0, pad)), constant_values=least)
  runs = runs.reshape(len(x), -1, run)
  _, chosen = largest(runs.max(-1), k)
  chosen = jnp.sort(chosen, -1)  # so that equals stay in their order
  few = jnp.take_along_axis(runs, chosen[..., None], 1)
  values, at = largest(few.reshape(len(x), -1), k)
  which = jnp.take_along_axis(chosen, at // run, 1)
  return values, which * run + at % run


def from_paths(
  root: jax.Array,
  log_probs: jax.Array,
  tokens: jax.Array,
  paths: tuple[tuple[int, ...], ...],
) -> TokenTree:
  """A fixed shape: `paths` names each node by its ranks, e.g. (0,), (0, 1).

  (0, 1) is the second candidate of stream 2 below the first of stream 1. The
  arguments are those of `best_first`; `paths` must pass `check_paths`.
  """
  index = {path: i + 1 for i, path in enumerate(paths)}
  index[()] = 0
  parents = np.array([-1] + [index[p[:-1]] for p in paths], np.int32)
  depth = np.array([0] + [len(p) for p in paths], np.int32)
  level = np.array([len(p) - 1 for p in paths])
  rank = np.array([p[-1] for p in paths])
  score = jnp.zeros((root.shape[0], 1), log_probs.dtype)
  if paths:
    steps = log_probs[:, level, rank]  # [B, M-1]
    # Each path's sum, one matrix product with the static ancestor table.
    above = np.zeros((len(paths), len(paths)), bool)
    for path, i in index.items():
      for g in range(1, len(path) + 1):
        above[i - 1, index[path[:g]] - 1] = True
    steps = jnp.where(above[None], steps[:, None, :], 0).sum(-1)
    score = jnp.concatenate([score, steps], 1)
  batch = root.shape[0]
  return TokenTree(
    tokens=jnp.concatenate([root[:, None], tokens[:, level, rank]], 1)
    if paths
    else root[:, None],
    parents=jnp.broadcast_to(parents, (batch, len(parents))),
    depth=jnp.broadcast_to(depth, (batch, len(depth))),
    log_prob=score,
  )


def cartesian_paths(width: int, depth: int) -> tuple[tuple[int, ...], ...]:
  """The paper's tree: every node of level g has the same `width` children."""
  levels = (
    itertools.product(range(width), repeat=g) for g in range(1, depth + 1)
  )
  return tuple(itertools.chain.from_iterable(levels))


def chain_paths(depth: int) -> tuple[tuple[int, ...], ...]:
  """One path, the best candidate of each stream."""
  return tuple((0,) * g for g in range(1, depth + 1))


def side_by_side(count: int, length: int, first: int = 1):
  """-> parents and depths [count, length] of chains below the root, whose nodes
  are numbered from `first` on, chain after chain."""
  order = np.arange(length)
  start = first + np.arange(count)[:, None] * length
  parents = np.where(order > 0, start + order - 1, 0)
  return parents, np.broadcast_to(1 + order, parents.shape)


def check_paths(paths) -> tuple[tuple[int, ...], ...]:
  """Sorted paths with every parent present, or a UserError that says why."""
  try:
    paths = tuple(tuple(int(rank) for rank in path) for path in paths)
  except (TypeError, ValueError, OverflowError) as e:
    raise UserError(
      f"tree paths must be lists of whole numbers such as [0, 1]: {e}"
    ) from e
  known = set(paths)
  if len(known) != len(paths):
    raise UserError("tree paths must not repeat")
  for path in paths:
    if not path or min(path) < 0:
      raise UserError(f"tree path {path} must hold ranks of 0 or more")
    if len(path) > 1 and path[:-1] not in known:
      raise UserError(
        f"tree path {list(path)} has no parent: add {list(path[:-1])}"
      )
  return tuple(sorted(paths, key=lambda p: (len(p), p)))


def check_ranks(paths):
  """Raises: UserError if siblings leave a rank out: (0,) and (2,), say."""
  known = set(paths)
  for path in paths:
    before = (*path[:-1], path[-1] - 1)
    if path[-1] and before not in known:
      raise UserError(
        f"tree path {list(path)} without {list(before)}: drawn siblings must "
        "leave no rank out"
      )


@dataclasses.dataclass(frozen=True)
class TreeSpec:
  """Which tree to build from the streams; static, hashable.

  kind: "best_first" (num_nodes), "cartesian" (width), "chain", "paths".
  num_nodes: M, root included; 0 = what the kind implies (16 for best_first).
  width: C for "cartesian" (the paper's k); for "best_first" the candidates per
    stream that enter the search, 0 = as many as can matter (M - 1).
  paths: for "paths", ranks per node (see `from_paths`).
  """

  kind: str = "best_first"
  num_nodes: int = 0
  width: int = 0
  paths: tuple[tuple[int, ...], ...] = ()

  def resolve(self, length: int, vocab_size: int) -> "TreeSpec":
    """Checks against what is drafted and fills in what was left open.

    length: tokens ahead that can be drafted: the streams, say.
    """
    nodes = self.num_nodes
    if nodes < 0 or self.width < 0:
      raise UserError("tree_nodes and tree_width must not be negative")
    if self.kind == "best_first":
      nodes = nodes or 16
      width = min(self.width or max(nodes - 1, 1), vocab_size)
      room = 1 + sum(width**g for g in range(1, length + 1))
      if nodes > room:
        raise UserError(
          f"a best_first tree of {nodes} nodes does not fit: drafts of "
          f"{length} tokens with {width} candidates give {room} nodes at the "
          "most"
        )
      return TreeSpec("best_first", nodes, width)
    if self.kind == "chain":
      depth = nodes - 1 if nodes else length
      paths = chain_paths(depth)
    elif self.kind == "cartesian":
      paths = cartesian_paths(self.width or 3, length)
    elif self.kind == "paths":
      paths = check_paths(self.paths)
    else:
      raise UserError(
        f"unknown tree '{self.kind}': use best_first, cartesian, chain or a "
        "JSON file with a list of paths"
      )
    depth = max(map(len, paths), default=0)
    if depth > length:
      raise UserError(
        f"the {self.kind} tree is {depth} deep but the drafts reach {length} "
        f"tokens ahead: a tree can be {length} deep at the most"
      )
    if nodes and nodes != len(paths) + 1:
      raise UserError(
        f"tree_nodes={nodes} contradicts the {self.kind} tree, which has "
        f"{len(paths) + 1} nodes here: leave tree_nodes at 0"
      )
    width = 1 + max((max(p) for p in paths), default=0)
    if width > vocab_size:
      raise UserError(
        f"the tree asks for rank {width} of a vocabulary of {vocab_size}"
      )
    return TreeSpec(self.kind, len(paths) + 1, width, paths)

  def reach(self, length: int) -> int:
    """A of a resolved tree whose drafts reach `length` tokens ahead."""
    if self.kind in ("best_first", "beam"):
      return 1 + min(length, self.num_nodes - 1)
    return 1 + max(map(len, self.paths), default=0)

  def build(self, root: jax.Array, logits: jax.Array) -> TokenTree:
    """Tree [B, M] from the streams' logits [B, J, V]; self is resolved."""
    if self.num_nodes == 1:
      return root_only(root)
    log_probs, tokens = most_probable(logits, self.width)
    if self.kind == "best_first":
      return best_first(root, log_probs, tokens, self.num_nodes)
    return from_paths(root, log_probs, tokens, self.paths)

"""Trees against plain Python: the best nodes of the whole product, paths."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_stream import accept, tree
from spec_stream.errors import UserError
from spec_stream.tree import TokenTree, TreeSpec

BATCH = 4
SEEDS = st.integers(0, 2**32 - 1)

best_first = jax.jit(tree.best_first, static_argnames="num_nodes")
from_paths = jax.jit(tree.from_paths, static_argnames="paths")
build = jax.jit(lambda spec, *args: spec.build(*args), static_argnums=0)


def streams(rng, num_streams, width, tied=False, vocab=50):
  """Candidates of each stream, best first: log-probs, tokens [B, J, C]."""
  shape = (BATCH, num_streams, width)
  log_probs = -rng.exponential(size=shape)
  if tied:  # many equal sums, exact in binary; 0 ties a child with its parent
    log_probs = -rng.integers(0, 4, shape) / 4
  log_probs = -np.sort(-log_probs.astype(np.float32), -1)
  draw = lambda: rng.choice(vocab, width, replace=False)
  tokens = [[draw() for _ in range(num_streams)] for _ in range(BATCH)]
  return log_probs, np.array(tokens, np.int32)


def check(built: TokenTree, expected, roots):
  """Equal to one reading (of the module `reference`) per row."""
  for b, nodes in enumerate(expected):
    tokens, parents, depth, score = zip(*nodes)
    assert built.tokens[b].tolist() == [int(roots[b]), *tokens[1:]]
    assert built.parents[b].tolist() == list(parents)
    assert built.depth[b].tolist() == list(depth)
    np.testing.assert_allclose(built.log_prob[b], score, rtol=1e-6)
  check_closed(built)


def check_closed(built: TokenTree):
  """One root; every other node after its parent, one deeper, no more likely."""
  rows = np.arange(built.tokens.shape[0])[:, None]
  parents = np.asarray(built.parents)
  depth, score = np.asarray(built.depth), np.asarray(built.log_prob)
  assert (parents[:, 0] == -1).all() and (depth[:, 0] == 0).all()
  below = parents[:, 1:]
  assert (below >= 0).all() and (below < np.arange(1, parents.shape[1])).all()
  assert (depth[:, 1:] == depth[rows, below] + 1).all()
  assert (score[:, 1:] <= score[rows, below]).all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
  ("num_streams", "width", "num_nodes"),
  [
    (1, 4, 4),
    (2, 5, 2),
    (3, 3, 13),
    (3, 11, 9),
    (4, 2, 31),  # all of the product
    (5, 3, 24),
  ],
)
def test_best_first_is_the_best_of_the_product(
  num_streams, width, num_nodes, tied
):
  @settings(max_examples=15)
  @given(SEEDS)
  def run(seed):
    rng = np.random.default_rng(seed)
    log_probs, tokens = streams(rng, num_streams, width, tied)
    roots = rng.integers(0, 50, BATCH).astype(np.int32)
    built = best_first(roots, log_probs, tokens, num_nodes=num_nodes)
    expected = [
      reference.best_first(log_probs[b], tokens[b], num_nodes)
      for b in range(BATCH)
    ]
    check(built, expected, roots)

  run()


@pytest.mark.parametrize("size", [65, 992, 1000])
@pytest.mark.parametrize("tied", [False, True])
def test_the_largest_lie_in_the_runs_of_the_largest(size, tied):
  x = np.random.default_rng(size).normal(size=(3, size)).astype(np.float32)
  x = np.round(x) if tied else x
  expected = np.argsort(-x, -1, kind="stable")[:, :17]
  values, indices = tree._top_of_runs(jnp.asarray(x), 17, run=2)
  np.testing.assert_array_equal(indices, expected)
  np.testing.assert_array_equal(values, np.take_along_axis(x, expected, 1))


@pytest.mark.parametrize("size", [192, 193, 1000])
def test_the_largest_of_few_that_there_are(size):
  """All others are -inf, and what fills the last run up is so too."""
  x = np.full((2, 2, size), -np.inf, np.float32)
  x[0, 1, -1], x[1, 0, size // 2] = 1.0, -2.0
  expected = np.argsort(-x, -1, kind="stable")[..., :3]
  values, indices = tree.top(jnp.asarray(x), 3)
  np.testing.assert_array_equal(indices, expected)
  np.testing.assert_array_equal(values, np.take_along_axis(x, expected, -1))


def test_parts_of_the_largest_need_no_sort_of_the_whole():
  def parts(x):
    values, indices = tree.top(x, 3)
    return [(values[r, : 3 // (r + 1)], indices[r, :2]) for r in range(3)]

  program = jax.jit(parts).lower(jnp.zeros((3, 4096))).compile().as_text()
  assert "TopK" in program
  # Whole numbers, the chosen runs, are.
  assert not re.search(r"= \(?f32[^=]* sort\(", program)


@pytest.mark.parametrize(
  ("num_streams", "width", "num_nodes"), [(1, 9, 4), (3, 7, 8), (5, 63, 64)]
)
def test_what_best_first_leaves_out(num_streams, width, num_nodes):
  """Nodes with as many that stand before them whatever the probabilities."""
  levels = tree._within(num_streams, width, num_nodes)
  above = [()]
  for parents, ranks in levels:
    above = [(*above[p], r) for p, r in zip(parents, ranks, strict=True)]
    for path in above:
      sizes = np.cumprod([1 + rank for rank in path])
      assert sizes.sum() <= num_nodes - 1
  # The chain of first candidates is as long as the streams and nodes allow.
  assert len(levels) == min(num_streams, num_nodes - 1)
  assert len(levels[0][0]) == min(width, num_nodes - 1)


def test_best_first_needs_candidates_enough():
  log_probs, tokens = streams(np.random.default_rng(0), 2, 2)
  roots = np.zeros(BATCH, np.int32)
  assert tree.best_first(roots, log_probs, tokens, 7).num_nodes == 7
  with pytest.raises(UserError, match=r"8 nodes.*2 levels.*7 nodes"):
    tree.best_first(roots, log_probs, tokens, 8)


@pytest.mark.parametrize(
  "paths",
  [
    tree.chain_paths(4),
    tree.cartesian_paths(3, 3),
    tree.cartesian_paths(1, 2),
    tree.check_paths([[2], [2, 0, 1], [0], [2, 0], [0, 2]]),
    (),
  ],
)
def test_fixed_trees(paths):
  rng = np.random.default_rng(len(paths))
  log_probs, tokens = streams(rng, 4, 3)
  roots = rng.integers(0, 50, BATCH).astype(np.int32)
  built = from_paths(roots, log_probs, tokens, paths=paths)
  expected = [
    reference.fixed_tree(log_probs[b], tokens[b], paths) for b in range(BATCH)
  ]
  check(built, expected, roots)


def test_paths():
  assert tree.chain_paths(3) == ((0,), (0, 0), (0, 0, 0))
  assert tree.cartesian_paths(2, 2) == (
    (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1),
  )  # fmt: skip
  assert len(tree.cartesian_paths(3, 3)) + 1 == 40
  assert tree.check_paths([[1, 0], [1], [0]]) == ((0,), (1,), (1, 0))
  for bad, why in [
    ([[0, 1]], r"no parent: add \[0\]"),
    ([[0], [0]], "repeat"),
    ([[]], "ranks of 0 or more"),
    ([[-1]], "ranks of 0 or more"),
    (["a"], "whole numbers"),
    ([3], "whole numbers"),
  ]:
    with pytest.raises(UserError, match=why):
      tree.check_paths(bad)


@pytest.mark.parametrize(
  ("spec", "nodes", "longest"),
  [
    (TreeSpec(), 16, None),
    (TreeSpec("best_first", 9, width=4), 9, None),
    (TreeSpec("best_first", 1), 1, None),
    (TreeSpec("chain"), 4, 4),
    (TreeSpec("chain", 3), 3, 3),
    (TreeSpec("cartesian"), 40, 4),
    (TreeSpec("cartesian", width=2), 15, 4),
    (TreeSpec("paths", paths=((1,), (0,), (0, 2))), 4, 3),
  ],
)
def test_specs_build_what_they_say(spec, nodes, longest):
  spec = spec.resolve(3, 11)
  assert spec.num_nodes == nodes
  assert spec.resolve(3, 11) == spec
  if longest:
    assert spec.reach(3) == longest
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(BATCH, 3, 11)).astype(np.float32)
  roots = np.arange(BATCH, dtype=np.int32)
  built = build(spec, roots, logits)
  assert built.num_nodes == nodes
  width = spec.width or 1
  spec = TreeSpec(spec.kind, nodes, width, spec.paths)
  check(built, [reference.build(spec, x) for x in logits], roots)


@pytest.mark.parametrize(
  ("spec", "why"),
  [
    (TreeSpec("star"), "unknown tree 'star': use best_first"),
    (TreeSpec("best_first", -1), "negative"),
    (TreeSpec("best_first", 16, width=-2), "negative"),
    (TreeSpec("best_first", 16, width=2), r"16 nodes does not fit.*15 nodes"),
    (TreeSpec("chain", 5), r"4 deep but the drafts reach 3 tokens"),
    (TreeSpec("paths", paths=((0,), (0, 0), (0,) * 3, (0,) * 4)), "4 deep"),
    (TreeSpec("paths", paths=((0, 0),)), "no parent"),
    (TreeSpec("cartesian", 12), "contradicts.*40 nodes"),
    (TreeSpec("cartesian", width=12), "rank 12 of a vocabulary of 11"),
    (TreeSpec("paths", paths=((11,),)), "rank 12 of a vocabulary of 11"),
  ],
)
def test_specs_that_cannot_be(spec, why):
  with pytest.raises(UserError, match=why):
    spec.resolve(3, 11)


# -- walking -----------------------------------------------------------------

SIZE, LONGEST = 13, 5


def random_trees(seed, dead=0.0):
  rng = np.random.default_rng(seed)
  rows = [
    reference.random_tree(rng, SIZE, LONGEST, 4, dead) for _ in range(BATCH)
  ]
  tokens, parents, depth = (np.array(x, np.int32) for x in zip(*rows))
  score = -rng.exponential(size=tokens.shape).astype(np.float32)
  return rng, TokenTree(*map(jnp.asarray, (tokens, parents, depth, score)))


@functools.partial(jax.jit, static_argnames="longest")
def walk(trees, nodes, draws, longest):
  mask = tree.ancestors(trees.parents, longest)
  paths = tree.path_to(trees, nodes, longest)
  return mask, paths, accept.exact(trees, draws, longest)


@settings(max_examples=30)
@given(SEEDS)
def test_ancestors_paths_and_acceptance(seed):
  rng, trees = random_trees(seed, dead=0.1)
  nodes = rng.integers(0, SIZE, BATCH).astype(np.int32)
  draws = rng.integers(0, 4, (BATCH, SIZE)).astype(np.int32)
  mask, paths, accepted = walk(trees, nodes, draws, longest=LONGEST)
  for b in range(BATCH):
    tokens, parents = trees.tokens[b].tolist(), trees.parents[b].tolist()
    above = reference.ancestors(parents)
    assert [set(np.flatnonzero(row)) for row in mask[b]] == above
    path = reference.path_to(parents, int(nodes[b]))
    padded = path + path[-1:] * (LONGEST - len(path))
    assert paths[b].tolist() == padded
    path = reference.accept(tokens, parents, draws[b])
    count = len(path)
    assert accepted.accepted_len[b] == count - 1
    assert accepted.path[b].tolist() == path + path[-1:] * (LONGEST - count)
    assert accepted.last[b] == path[-1]
    # Emitted: the accepted tokens, which are the draws above them, and a bonus.
    emitted = accepted.tokens[b, :count].tolist()
    assert emitted == [tokens[n] for n in path[1:]] + [draws[b, path[-1]]]


def test_acceptance_reaches_every_depth():
  """The trees above are not all rejected at the root."""
  lengths = set()
  for seed in range(20):
    rng, trees = random_trees(seed)
    draws = rng.integers(0, 4, (BATCH, SIZE)).astype(np.int32)
    accepted = walk(trees, np.zeros(BATCH, np.int32), draws, longest=LONGEST)
    lengths |= set(accepted[2].accepted_len.tolist())
  assert lengths == set(range(LONGEST))


def test_a_dead_node_is_never_accepted():
  """Not even by a draw of -1, and nothing below it."""
  row = lambda *x: jnp.array([x], jnp.int32)
  trees = TokenTree(
    row(3, -1, 2), row(-1, 0, 1), row(0, 1, 2), jnp.zeros((1, 3))
  )
  accepted = walk(trees, row(0)[0], row(2, 2, 2), longest=LONGEST)[2]
  assert accepted.accepted_len.tolist() == [0]
  assert accepted.path.tolist() == [[0] * LONGEST]


take = jax.jit(TokenTree.take)


@settings(max_examples=30)
@given(SEEDS)
def test_take(seed):
  rng, trees = random_trees(seed)
  kept = []
  for b in range(BATCH):  # six nodes: each below one that is kept
    parents, nodes = trees.parents[b].tolist(), {0}
    while len(nodes) < 6:
      below = [
        n for n, p in enumerate(parents) if n not in nodes and p in nodes
      ]
      nodes.add(int(rng.choice(below)))
    kept.append(sorted(nodes))
  taken = take(trees, np.array(kept, np.int32))
  for b, nodes in enumerate(kept):
    for name in ("tokens", "depth", "log_prob"):
      whole = np.asarray(getattr(trees, name)[b])
      assert getattr(taken, name)[b].tolist() == whole[nodes].tolist()
    parents = trees.parents[b].tolist()
    expected = [nodes.index(parents[n]) if n else -1 for n in nodes]
    assert taken.parents[b].tolist() == expected


def test_root_only():
  alone = tree.root_only(jnp.array([4, 2], jnp.int32))
  assert alone.tokens.tolist() == [[4], [2]]
  assert alone.parents.tolist() == [[-1], [-1]]
  assert alone.depth.tolist() == [[0], [0]]
  assert alone.num_nodes == 1

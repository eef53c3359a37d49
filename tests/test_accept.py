"""Acceptance by summation: what is emitted is distributed as the target's.

A target over five tokens is a table of the next token after every text. Each
rule is given every draft and every turn that its noise can take, with their
probabilities; the sum over all of them is the distribution of the first three
tokens that come out. No sampling, so no tolerance for it.
"""

import itertools

import jax
import numpy as np
import pytest

from spec_stream import accept
from spec_stream.tree import TokenTree, cartesian_paths, chain_paths

VOCAB, FIRST = 5, 3  # tokens of which the distribution is compared
EDGE = 1e-6
acceptance = accept.acceptance


def table(seed, sharp=1.5):
  """{text: probabilities of the next token}, for texts of up to 3 tokens."""
  rng = np.random.default_rng(seed)
  texts = itertools.chain.from_iterable(
    itertools.product(range(VOCAB), repeat=n) for n in range(FIRST + 1)
  )
  return {text: softmax(rng.normal(0, sharp, VOCAB)) for text in texts}


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def expected(target):
  """{three tokens: probability}."""
  return {
    text: np.prod([target[text[:i]][text[i]] for i in range(FIRST)])
    for text in itertools.product(range(VOCAB), repeat=FIRST)
  }


def plane_trees(nodes):
  """All shapes of `nodes` nodes below the root, at most 3 deep, as paths."""
  found = {()}
  for _ in range(nodes):
    found = {
      tuple(sorted((*tree, path), key=lambda p: (len(p), p)))
      for tree in found
      for above in ((), *tree)
      if len(above) < 3
      for path in [(*above, sum(p[:-1] == above for p in tree if p))]
    }
  return sorted(found)


SHAPES = [shape for n in range(4) for shape in plane_trees(n)]
LARGE = [chain_paths(3), cartesian_paths(2, 3), cartesian_paths(4, 2)]


def trees(paths, drafts):
  """[R, M] trees of one shape; drafts [R, J, C]: tokens by depth and rank."""
  index = {path: i for i, path in enumerate([(), *paths])}
  rows = len(drafts)
  tokens = np.zeros((rows, len(index)), np.int32)
  for path in paths:
    tokens[:, index[path]] = drafts[:, len(path) - 1, path[-1]]
  parents = np.array([-1] + [index[path[:-1]] for path in paths], np.int32)
  depth = np.array([0] + [len(path) for path in paths], np.int32)
  whole = lambda x: np.broadcast_to(x, tokens.shape)
  return TokenTree(tokens, whole(parents), whole(depth), np.zeros(tokens.shape))


def texts(paths, draft):
  """The text in front of what follows each node, the root's own left out."""
  return [
    tuple(draft[g][rank] for g, rank in enumerate(path))
    for path in [(), *paths]
  ]


def collect(emitted, weights, target):
  """{three tokens: probability} of emitted texts; those that are shorter are
  drawn on from the target, as later calls do."""
  total = dict.fromkeys(itertools.product(range(VOCAB), repeat=FIRST), 0.0)
  for text, weight in zip(emitted, weights):
    missing = max(0, FIRST - len(text))
    for rest in itertools.product(range(VOCAB), repeat=missing):
      whole, more = (*text[:FIRST], *rest), weight
      for i in range(len(text), FIRST):
        more *= target[whole[:i]][whole[i]]
      total[whole] += more
  return total


def emitted_of(accepted):
  counts = np.asarray(accepted.accepted_len) + 1
  tokens = np.asarray(accepted.tokens)
  return [tuple(row[:n].tolist()) for row, n in zip(tokens, counts)]


def distance(a, b):
  return max(abs(a[text] - b[text]) for text in a)


# -- exact and typical: the noise is the draw at each depth -------------------

run_exact = jax.jit(accept.exact, static_argnames="longest")
run_typical = jax.jit(accept.typical, static_argnames="longest")


def by_draws(rule, paths, seed):
  """The distribution of what one draft gives, over all draws of the target.

  One node of a depth is reached, so the draws of a depth may be one number.
  """
  target, rng = table(seed), np.random.default_rng(seed)
  longest = 1 + max(map(len, paths), default=0)
  draft = np.array([rng.permutation(VOCAB) for _ in range(3)])
  draws = np.array(list(itertools.product(range(VOCAB), repeat=longest)))
  tree = trees(paths, np.broadcast_to(draft, (len(draws), 3, VOCAB)))
  drawn = np.take_along_axis(draws, tree.depth, 1).astype(np.int32)
  before = texts(paths, draft)
  probs = np.stack([target[text] for text in before])
  if rule == "typical":
    every = np.broadcast_to(probs, (len(draws), *probs.shape))
    accepted = run_typical(tree, drawn, every, longest=longest)
    # Which nodes are reached is decided; only the last one draws.
    reached = lambda path: path[-1:]
  else:
    accepted = run_exact(tree, drawn, longest=longest)
    reached = lambda path: path
  weights = []
  for row, path, size in zip(draws, accepted.path, accepted.accepted_len):
    nodes = reached(np.asarray(path[: size + 1]))
    depth = tree.depth[0][nodes]
    weight = np.prod([probs[n][row[d]] for n, d in zip(nodes, depth)])
    weights.append(weight / VOCAB ** (longest - len(nodes)))
  assert abs(sum(weights) - 1) < 1e-9
  return collect(emitted_of(accepted), weights, target), expected(target)


MORE = [pytest.param(x, marks=pytest.mark.slow) for x in plane_trees(4)]


@pytest.mark.parametrize("paths", [*SHAPES, *LARGE, *MORE], ids=len)
def test_exact_gives_the_targets_distribution(paths):
  got, right = by_draws("exact", paths, len(paths))
  assert distance(got, right) < 1e-6


@pytest.mark.slow
def test_typical_does_not():
  far = []
  for i, paths in enumerate([*SHAPES[1:], *LARGE]):
    got, right = by_draws("typical", paths, i)
    far.append(distance(got, right))
  assert max(far) > 0.1 and np.median(far) > 0.01


# -- rejection: the draft is drawn too ---------------------------------------

run_rejection = jax.jit(accept.rejection, static_argnames="paths")


def ordered_draws(q, width):
  """(tokens, probability) of `width` draws without replacement, in order."""
  for tokens in itertools.permutations(range(VOCAB), width):
    left, weight = 1.0, 1.0
    for token in tokens:
      weight *= q[token] / left
      left -= q[token]
    yield tokens, weight


def turns(paths, tokens, probs, q, width):
  """Every way the rule can go on one draft, read off the paper: yields
  (uniform [A-1][C], gumbel [A][V], emitted, probability).

  The noise is on the edge: a uniform number just on one side of the probability
  to accept, and Gumbel noise that makes all that remains of p equal, but for
  the bonus token. So other values in the rule would go another way.
  """
  index = {path: i for i, path in enumerate([(), *paths])}
  longest = 1 + max(map(len, paths), default=0)

  def go(path, uniform, text, weight):
    p, left = probs[index[path]], q[len(path)] if len(path) < 3 else None
    for rank in range(width):
      child = (*path, rank)
      if child not in index:
        break
      token = tokens[len(path)][rank]
      a = min(1.0, p[token] / left[token])
      if a > 0:
        yes = uniform.copy()
        yes[len(path), rank] = a * (1 - EDGE)
        yield from go(child, yes, (*text, token), weight * a)
      weight *= 1 - a
      if weight <= 0:
        return
      uniform = uniform.copy()
      uniform[len(path), rank] = a * (1 + EDGE)
      p = np.maximum(p - left, 0)
      p /= p.sum()
      left = np.where(np.arange(VOCAB) == token, 0, left)
      left = left / left.sum()
    for bonus in np.flatnonzero(p):
      gumbel = np.zeros((longest, VOCAB))
      gumbel[len(path)] = -np.log(np.where(p > 0, p, 1))
      gumbel[len(path), bonus] += EDGE
      yield uniform, gumbel, (*text, int(bonus)), weight * p[bonus]

  yield from go((), np.ones((longest - 1, width)), (), 1.0)


def by_turns(paths, seed):
  target, rng = table(seed), np.random.default_rng(seed)
  longest = 1 + max(map(len, paths))
  widths = [
    1 + max(path[-1] for path in paths if len(path) == g)
    for g in range(1, longest)
  ]
  width = max(widths)
  q = np.stack([softmax(rng.normal(0, 1.5, VOCAB)) for _ in range(3)])
  each = [list(ordered_draws(q[g], n)) for g, n in enumerate(widths)]
  rows = []
  for choice in itertools.product(*each):
    weight = np.prod([w for _, w in choice])
    draft = np.full((3, width), -1)
    for g, (tokens, _) in enumerate(choice):
      draft[g, : len(tokens)] = tokens
    probs = np.stack([target[text] for text in texts(paths, draft)])
    for uniform, gumbel, text, chance in turns(paths, draft, probs, q, width):
      rows.append((draft, probs, uniform, gumbel, text, weight * chance))
  return rows, q[: longest - 1], target


def emitted_by(rule, rows, paths, q):
  """What the rule emits in each of the turns."""
  drafts, probs, uniform, gumbel, *_ = zip(*rows)
  accepted = rule(
    trees(paths, np.array(drafts)),
    paths,
    np.array(probs),
    np.broadcast_to(q, (len(rows), *q.shape)),
    np.array(uniform),
    np.array(gumbel),
  )
  return emitted_of(accepted)


REJECTION = [p for p in SHAPES if p]
REJECTION += [chain_paths(3), cartesian_paths(2, 2), ((0,), (1,), (2,), (1, 0))]


@pytest.mark.parametrize("paths", REJECTION, ids=str)
def test_rejection_gives_the_targets_distribution(x64, paths):
  rows, q, target = by_turns(paths, len(paths))
  texts_, weights = [row[4] for row in rows], [row[5] for row in rows]
  assert emitted_by(run_rejection, rows, paths, q) == texts_
  assert abs(sum(weights) - 1) < 1e-9
  assert distance(collect(texts_, weights, target), expected(target)) < 1e-6


@pytest.mark.parametrize(
  "name, wrong",
  [
    # Drawing anew from p, a common mistake.
    ("residual", lambda target, draft: target),
    ("acceptance", lambda *args: 0.999 * acceptance(*args)),
    ("without", lambda draft, token: draft),
  ],
)
def test_a_broken_rule_emits_something_else(x64, monkeypatch, name, wrong):
  paths = cartesian_paths(2, 2)
  rows, q, _ = by_turns(paths, 3)
  monkeypatch.setattr(accept, name, wrong)
  rule = jax.jit(lambda *args: accept.rejection(*args), static_argnums=1)
  assert emitted_by(rule, rows, paths, q) != [row[4] for row in rows]

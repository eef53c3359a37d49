"""Draws: noise of seed and position alone, filters against plain Python."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_stream import sampling
from spec_stream.drafters.base import Accepted
from spec_stream.drafters.streams import StreamDraft
from spec_stream.errors import UserError
from spec_stream.tree import TreeSpec

SEEDS = st.integers(0, 2**32 - 1)
VOCAB = 9

noise = jax.jit(sampling.noise, static_argnames=("size", "purpose"))
draw = jax.jit(sampling.draw, static_argnames="longest")
scores = jax.jit(sampling.scores, static_argnames="longest")
filter_logits = jax.jit(sampling.filter_logits)


# -- noise -------------------------------------------------------------------


def test_noise_is_that_of_seed_and_position_alone():
  seeds = np.array([5, 5, 2**32 - 1], np.uint32)
  positions = np.array([[0, 7, 7], [7, 8, 2], [7, 0, 1]], np.int32)
  several = noise(seeds, positions, size=VOCAB)
  for b, i in np.ndindex(3, 3):
    one = noise(seeds[b : b + 1], positions[b : b + 1, i : i + 1], size=VOCAB)
    np.testing.assert_array_equal(several[b, i], one[0, 0])
  assert (several[0, 1] == several[0, 2]).all()  # the same position
  assert (several[0, 1] == several[1, 0]).all()  # in another row
  assert (several[0, 0] != several[0, 1]).any()  # another position
  assert (several[0, 1] != several[2, 0]).any()  # another seed


@settings(max_examples=20)
@given(SEEDS)
def test_a_node_draws_for_the_position_after_it(seed):
  """The same draw at a node of depth d, and for a root d further on."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(0, 2, (3, 5, VOCAB)).astype(np.float32)
  depth = rng.integers(0, 4, (3, 5)).astype(np.int32)
  position = rng.integers(0, 1000, 3).astype(np.int32)
  # The last row is greedy, the first filters nothing.
  settings_ = sampling.make(
    3,
    [0.7, 1.5, 0.0],
    [0, 3, 2],
    [1, 0.7, 1],
    seed=rng.integers(0, 2**32, 3),
  )
  drawn = draw(logits, depth, position, longest=4, sampling=settings_)
  zero = np.zeros((3, 1), np.int32)
  for m in range(5):
    alone = draw(
      logits[:, m : m + 1],
      zero,
      position + depth[:, m],
      longest=1,
      sampling=settings_,
    )
    assert (alone[:, 0] == drawn[:, m]).all()
  np.testing.assert_array_equal(drawn[2], logits[2].argmax(-1))


@settings(max_examples=20)
@given(SEEDS)
def test_scores_are_filtered_logits_and_noise(seed):
  rng = np.random.default_rng(seed)
  logits = rng.normal(0, 2, (3, 5, VOCAB)).astype(np.float32)
  depth = rng.integers(0, 4, (3, 5)).astype(np.int32)
  position = rng.integers(0, 1000, 3).astype(np.int32)
  temperature, top_k, top_p = [0.7, 1.5, 0.0], [0, 3, 2], [1, 0.7, 1]
  min_p, penalty = [0.1, 0.0, 0.5], [1.0, 1.3, 0.8]
  rule = sampling.make(
    3,
    temperature,
    top_k,
    top_p,
    min_p,
    penalty,
    seed=rng.integers(0, 2**32, 3),
  )
  seen = rng.random((3, 5, VOCAB)) < 0.3
  got = scores(logits, depth, position, longest=4, sampling=rule, seen=seen)
  for b, m in np.ndindex(3, 5):
    x = reference.penalize(logits[b, m], np.flatnonzero(seen[b, m]), penalty[b])
    if temperature[b]:
      at = np.array([[position[b] + 1 + depth[b, m]]])
      scaled = x / np.float32(temperature[b])
      x = reference.filter_logits(scaled, top_k[b], top_p[b], min_p[b])
      x += noise(rule.seed[b : b + 1], at, size=VOCAB)[0, 0]
    np.testing.assert_allclose(got[b, m], x, rtol=1e-5, atol=1e-5)


def test_a_greedy_batch_needs_no_noise():
  rule = sampling.make(2, 0.0, 5, 0.5, seed=[1, 2])
  assert rule.greedy
  logits = np.random.default_rng(0).normal(size=(2, 5, VOCAB))
  depth, position = np.zeros((2, 5), np.int32), np.zeros(2, np.int32)
  drawn = draw(logits, depth, position, longest=4, sampling=rule)
  np.testing.assert_array_equal(drawn, logits.argmax(-1))
  assert not sampling.make(2, [0.0, 0.1]).greedy
  assert not sampling.make(2, 1.0).filtered
  assert sampling.make(2, 1.0, [0, 1]).filtered
  assert sampling.make(2, 1.0, 0, [1.0, 0.9]).filtered


# -- filters -----------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_filters(x64, tied):
  @settings(max_examples=40)
  @given(SEEDS)
  def check(seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (4, 3, VOCAB))
    if tied:
      logits = rng.integers(0, 3, logits.shape) * 1.0
    top_k = rng.integers(0, VOCAB + 2, 4).astype(np.int32)
    # Sums of equal probabilities are not exact: stay clear of their multiples.
    top_p = rng.choice([0.0617, 0.3719, 0.7931, 0.9787, 1.0], 4)
    min_p = rng.choice([0.0, 0.013, 0.21, 1.0], 4)
    got = filter_logits(logits, top_k, top_p, min_p)
    for b, m in np.ndindex(4, 3):
      expected = reference.filter_logits(
        logits[b, m], top_k[b], top_p[b], min_p[b]
      )
      np.testing.assert_array_equal(got[b, m], expected)

  check()


def test_top_p_reached_exactly_ends_the_set():
  logits = np.log(np.array([[[1, 2, 1, 4]]], np.float32))  # 1/8 1/4 1/8 1/2
  for top_p, expected in [
    (0.1, [3]),
    (0.5, [3]),
    (0.51, [1, 3]),
    (0.75, [1, 3]),
    (0.76, [0, 1, 3]),  # of equals the lower id
    (1.0, [0, 1, 2, 3]),
  ]:
    got = filter_logits(
      logits, np.array([0]), np.array([top_p], np.float32), np.zeros(1)
    )
    assert np.flatnonzero(np.isfinite(got[0, 0])).tolist() == expected, top_p


def test_filters_that_are_off_exclude_nothing():
  """Not even what is less probable than rounding: a request must not depend
  on whether another one of its batch is filtered."""
  logits = np.array([[[0, -20, -25, -30]], [[3, 2, 1, 0]]], np.float32)
  off, some = np.array([0, 2], np.int32), np.array([1, 0.9], np.float32)
  none = np.zeros(2)
  got = filter_logits(logits, off, some, none)
  np.testing.assert_array_equal(got[0], logits[0])
  got = filter_logits(logits, np.array([3, 0], np.int32), some, none)
  assert np.isfinite(got[0, 0]).tolist() == [True, True, True, False]


def test_processors_are_those_of_transformers():
  processors = pytest.importorskip("transformers").generation.logits_process
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(0)
  for _ in range(30):
    logits = rng.normal(0, 3, (1, 40)).astype(np.float32)
    prompt = rng.integers(0, 40, (1, 7))
    penalty, temperature = rng.uniform(0.7, 1.6), rng.uniform(0.5, 1.5)
    top_k, top_p = int(rng.integers(1, 41)), rng.uniform(0.3, 0.99)
    min_p = rng.uniform(0, 0.3)
    theirs = torch.tensor(logits)
    for processor in (
      processors.RepetitionPenaltyLogitsProcessor(penalty),
      processors.TemperatureLogitsWarper(temperature),
      processors.TopKLogitsWarper(top_k),
      processors.TopPLogitsWarper(top_p),
      processors.MinPLogitsWarper(min_p),
    ):
      theirs = processor(torch.tensor(prompt), theirs)
    rule = sampling.make(1, temperature, top_k, top_p, min_p, penalty)
    seen = sampling.seen_in(prompt, np.ones_like(prompt, bool), 40)[:, None]
    ours = sampling.filtered(jnp.asarray(logits)[:, None], rule, seen)
    np.testing.assert_allclose(ours[:, 0], theirs.numpy(), rtol=1e-5)


# -- distributions -----------------------------------------------------------

COUNT = 2000
# Chi-square at a probability of 0.001, by degrees of freedom.
CRITICAL = {4: 18.47, 5: 20.52, 8: 26.12, 15: 37.70}


def chi_square(counts, expected):
  assert min(expected) >= 5  # or the approximation does not hold
  return float(((counts - expected) ** 2 / expected).sum())


@functools.cache
def many_draws(temperature, top_k, top_p, positions):
  """Tokens [2000, M] drawn under 2000 seeds, one per depth; and the logits."""
  logits = np.array([0.5, 1.0, -0.5, 0.0, 0.3, -0.2], np.float32)
  rule = sampling.make(COUNT, temperature, top_k, top_p, seed=np.arange(COUNT))
  depth = jnp.broadcast_to(jnp.arange(positions), (COUNT, positions))
  everywhere = jnp.broadcast_to(logits, (COUNT, positions, logits.size))
  position = jnp.full(COUNT, 12)
  drawn = draw(everywhere, depth, position, longest=positions, sampling=rule)
  return np.asarray(drawn), logits


@pytest.mark.parametrize(
  ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 5, 1.0)]
)
def test_draws_follow_the_distribution(temperature, top_k, top_p):
  drawn, logits = many_draws(temperature, top_k, top_p, 1)
  kept = reference.filter_logits(logits / temperature, top_k, top_p)
  probs = np.exp(reference.log_softmax(kept))
  counts = np.bincount(drawn[:, 0], minlength=logits.size)
  assert (counts[probs == 0] == 0).all()
  counts, probs = counts[probs > 0], probs[probs > 0]
  freedom = probs.size - 1
  assert chi_square(counts, COUNT * probs) < CRITICAL[freedom]
  # The test has the power to tell a near miss.
  wrong = np.exp(reference.log_softmax(0.8 * np.log(probs)))
  assert chi_square(counts, COUNT * wrong) > CRITICAL[freedom]


def test_draws_of_two_positions_are_independent():
  drawn, logits = many_draws(1.0, 3, 1.0, 2)
  kept = np.isfinite(reference.filter_logits(logits, 3, 1.0))
  probs = np.exp(reference.log_softmax(logits[kept]))
  rank = np.cumsum(kept) - 1
  pairs = np.bincount(rank[drawn[:, 0]] * 3 + rank[drawn[:, 1]], minlength=9)
  expected = COUNT * np.outer(probs, probs).reshape(-1)
  assert chi_square(pairs, expected) < CRITICAL[8]


# -- guesses -----------------------------------------------------------------


@settings(max_examples=10)
@given(SEEDS)
def test_a_guess_from_the_targets_own_logits_is_its_draw(seed):
  rng = np.random.default_rng(seed)
  logits = rng.normal(0, 2, (4, 3, VOCAB)).astype(np.float32)
  given = sampling.make(
    4,
    temperature=[0.0, 0.5, 1.0, 2.0],
    top_k=[0, 3, 0, 4],
    top_p=[1.0, 1.0, 0.7, 1.0],
    seed=rng.integers(0, 2**32, 4),
  )
  position = rng.integers(0, 99, 4).astype(np.int32)
  depth = np.tile([0, 2, 1], (4, 1))
  guess = sampling.coupled(logits, depth, position, 3, given)
  drawn = draw(logits, depth, position, longest=3, sampling=given)
  np.testing.assert_array_equal(sampling.argmax(guess), drawn)
  np.testing.assert_array_equal(guess[0], logits[0])  # greedy
  # By the definition: logits and the temperature times the noise.
  gumbel = noise(given.seed, position[:, None] + 1 + depth, size=VOCAB)
  kept = np.isfinite(guess[1])
  assert (kept.sum(-1) == 3).all()
  expected = logits[1] + 0.5 * gumbel[1]
  np.testing.assert_allclose(guess[1][kept], expected[kept], atol=1e-5)


@pytest.mark.parametrize(
  "kind", [pytest.param("best_first", marks=pytest.mark.slow), "cartesian"]
)
def test_trees_of_any_temperature_are_trees(kind):
  """Also where all is noise, and where filters leave fewer than have room."""
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 3, (64, 3, VOCAB)).astype(np.float32)
  spec = TreeSpec(kind, 12 if kind == "best_first" else 0, 0).resolve(3, VOCAB)
  root, position = np.zeros(64, np.int32), np.arange(64, dtype=np.int32)
  depth = np.tile(np.arange(3), (64, 1))
  for temperature in (1e-40, 1e-20, 1.0, 1e20, 3e38):
    for rest in ({}, dict(top_k=1), dict(top_p=0.5, min_p=0.3)):
      given = sampling.make(64, temperature, seed=np.arange(64), **rest)
      guess = sampling.coupled(logits, np.arange(3), position, 3, given)
      if temperature < 1e-10:  # as if greedy
        drawn = draw(logits, depth, position, longest=3, sampling=given)
        np.testing.assert_array_equal(drawn, logits.argmax(-1))
      tree = spec.build(root, guess)
      assert not np.isnan(tree.log_prob).any()
      above = np.take_along_axis(
        np.asarray(tree.depth), np.maximum(tree.parents, 0), 1
      )
      is_root = np.asarray(tree.parents) < 0
      assert (np.where(is_root, 0, above + 1) == tree.depth).all()
      assert (is_root.sum(1) == 1).all()


def test_a_drafters_guess_is_of_the_positions_after_the_root():
  logits = np.random.default_rng(0).normal(0, 2, (2, 4, VOCAB))
  accepted = Accepted(
    *[None] * 6,
    sampling=sampling.make(2, temperature=0.7, seed=[3, 4]),
  ).replace(position=np.array([5, 11], np.int32))
  drafter = StreamDraft()
  whole = drafter.guess(accepted, logits)
  after = np.array([[6, 7, 8, 9], [12, 13, 14, 15]])
  gumbel = noise(accepted.sampling.seed, after, size=VOCAB)
  np.testing.assert_allclose(whole, logits + 0.7 * gumbel, atol=1e-5)
  for level in range(4):
    one = drafter.guess(accepted, logits[:, level : level + 1], level)
    np.testing.assert_array_equal(one[:, 0], whole[:, level])


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_guesses_agree_as_often_as_is_promised(temperature):
  """Daliri et al., 2408.07978: at least (1 - d) / (1 + d)."""
  rng, count = np.random.default_rng(0), 4000
  target, drafter = rng.normal(0, 1.5, (2, 1, 1, VOCAB)).astype(np.float32)
  given = sampling.make(1, temperature=temperature)
  depth = np.arange(count)[None]
  guess = lambda x: sampling.coupled(
    np.broadcast_to(x, (1, count, VOCAB)), depth, np.zeros(1, int), count, given
  )
  drawn, guessed = (
    np.asarray(sampling.argmax(guess(x))) for x in (target, drafter)
  )
  p, q = (
    np.asarray(sampling.probabilities(x, given))[0, 0]
    for x in (target, drafter)
  )
  distance = 0.5 * np.abs(p - q).sum()
  assert distance > 0.2
  agree = (drawn == guessed).mean()
  assert agree > (1 - distance) / (1 + distance) - 0.02
  assert agree > p[q.argmax()] + 0.05  # what no noise would have given


# -- settings ----------------------------------------------------------------


def test_argmax_is_the_lowest_of_the_largest():
  x = np.random.default_rng(0).integers(0, 3, (50, 7)).astype(np.float32)
  x[0] = -np.inf
  got = jax.jit(sampling.argmax)(x)
  assert got.dtype == jnp.int32
  np.testing.assert_array_equal(got, x.argmax(-1))


def test_settings_are_one_or_one_per_request():
  rule = sampling.make(3, 0.5, [1, 2, 3], 0.9, seed=np.array([7, 8, 2**32 - 1]))
  assert rule.temperature.tolist() == [0.5] * 3
  assert rule.top_k.tolist() == [1, 2, 3]
  assert rule.seed.tolist() == [7, 8, 2**32 - 1]
  assert rule.seed.dtype == jnp.uint32


@pytest.mark.parametrize(
  ("setting", "why"),
  [
    (dict(temperature=-0.1), "temperature must be 0"),
    (dict(temperature=float("nan")), "temperature must be 0"),
    (dict(temperature=[1.0, float("inf")]), "temperature must be 0"),
    (dict(temperature=[1.0]), r"one per request \(2\)"),
    (dict(top_k=-1), "top_k must be 0"),
    (dict(top_k=[1, 2, 3]), r"one per request \(2\)"),
    (dict(top_p=0), r"top_p must be in \(0, 1\]"),
    (dict(top_p=1.1), r"top_p must be in \(0, 1\]"),
    (dict(min_p=1.5), r"min_p must be in \[0, 1\]"),
    (dict(repetition_penalty=0), "repetition_penalty must be above 0"),
    (dict(seed=-1), r"seed must be in \[0, 2\*\*32\)"),
    (dict(seed=2**32), r"seed must be in \[0, 2\*\*32\)"),
  ],
)
def test_bad_settings(setting, why):
  with pytest.raises(UserError, match=why):
    sampling.make(2, **setting)

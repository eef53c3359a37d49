"""Pruning: against plain Python, closed, and without a trace in what stays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import CASES, VOCAB, in_short, random_model, random_requests

from spec_stream.decode import Decoder, generate
from spec_stream.drafters.streams import StreamDraft
from spec_stream.models.prune import Prune, prune
from spec_stream.models.transformer import ALL, forward
from spec_stream.tree import TokenTree, TreeSpec, ancestors

SEEDS = st.integers(0, 2**32 - 1)
BATCH, SIZE, LONGEST = 4, 12, 4

compiled = jax.jit(prune, static_argnames=("rule", "longest"))


def random_trees(rng, dead=0.0):
  rows = [
    reference.random_tree(rng, SIZE, LONGEST, VOCAB, dead) for _ in range(BATCH)
  ]
  tokens, parents, depth = (np.array(x, np.int32) for x in zip(*rows))
  return TokenTree(
    tokens, parents, depth, -np.arange(SIZE) * np.ones(BATCH)[:, None]
  )


@pytest.mark.parametrize(
  "rule",
  [
    Prune(kept_nodes=5),
    Prune(threshold=0.08),
    Prune(kept_nodes=7, threshold=0.05),
    Prune(kept_nodes=1),
    Prune(kept_nodes=SIZE),
  ],
)
@pytest.mark.parametrize("saturated", [False, True])
def test_against_plain_python(x64, rule, saturated):
  dropped = []

  @settings(max_examples=15)
  @given(SEEDS)
  def check(seed):
    rng = np.random.default_rng(seed)
    trees = random_trees(rng, dead=0.1)
    logits = rng.normal(0, 1.5, (BATCH, SIZE, VOCAB))
    if saturated:  # probabilities of 0 and 1: ties between child and parent
      logits = np.round(logits) * 1000
    pruned, nodes = compiled(trees, logits, rule=rule, longest=LONGEST)
    for b in range(BATCH):
      tokens, parents = trees.tokens[b].tolist(), trees.parents[b].tolist()
      kept = nodes[b].tolist()
      # Ascending, and closed under parents: dead or alive.
      assert kept == sorted(set(kept)) and kept[0] == 0
      assert len(kept) == (rule.kept_nodes or SIZE)
      assert all(parents[n] in kept for n in kept[1:])
      above = [kept.index(parents[n]) for n in kept[1:]]
      assert pruned.parents[b].tolist() == [-1, *above]
      for name in ("depth", "log_prob"):
        whole = np.asarray(getattr(trees, name)[b])
        assert getattr(pruned, name)[b].tolist() == whole[kept].tolist()
      # The most probable of those that live, and no token but theirs.
      path = reference.prune(tokens, parents, logits[b], rule.threshold)
      alive = np.asarray(pruned.tokens[b]) >= 0
      assert alive[0]
      living = [n for n, a in zip(kept, alive) if a]
      assert pruned.tokens[b][alive].tolist() == [tokens[n] for n in living]
      if saturated:  # the reading's product underflows
        assert (path[living] > 0).sum() == min((path > 0).sum(), len(kept))
        continue
      ranked = sorted(np.flatnonzero(path), key=lambda n: -path[n])
      assert living == sorted(ranked[: len(kept)])
      dropped.append(SIZE - len(living))

  check()
  assert saturated or rule.kept_nodes == SIZE or sum(dropped) > 0


def test_off_is_false():
  assert not Prune()
  assert Prune(kept_nodes=1) and Prune(threshold=0.1)


@functools.partial(jax.jit, static_argnames=("graphdef", "rule"))
def verify(graphdef, state, cache, trees, rule):
  """The forward pass of a step, pruned and whole."""
  model = nnx.merge(graphdef, state)

  def keep(early):
    kept, nodes = prune(trees, model.early_logits(early), rule, LONGEST)
    return nodes, (kept, nodes)

  call = lambda **more: forward(
    model,
    trees.tokens,
    cache.length[:, None] + trees.depth,
    ancestors(trees.parents, LONGEST),
    cache=cache,
    streams=ALL,
    **more,
  )
  return call(), call(keep=keep)


@pytest.mark.parametrize("name", in_short(["shared, pruned", "lossless"]))
def test_what_is_kept_is_what_it_was(x64, name):
  """Hidden states, streams, keys and values: of the whole tree, gathered."""
  config, drafter = CASES[name]
  rule = Prune(kept_nodes=5, threshold=0.01)
  for seed in range(5):
    model = random_model(config, seed)
    prompts, options = random_requests(seed, BATCH)
    options["temperature"][0] = 1.0
    options["top_k"][0] = 3
    cache = Decoder(model, drafter).start(prompts, **options).cache
    trees = random_trees(np.random.default_rng(seed))
    whole, pruned = verify(*nnx.split(model), cache, trees, rule)
    kept, nodes = pruned.kept
    assert kept.num_nodes == nodes.shape[1] == 5
    rows = np.arange(BATCH)[:, None]
    close = functools.partial(np.testing.assert_allclose, atol=1e-9)
    close(pruned.main, np.asarray(whole.main)[rows, nodes])
    close(pruned.streams, np.asarray(whole.streams)[rows, nodes])
    early = np.asarray(whole.early)[rows, nodes]
    np.testing.assert_array_equal(pruned.early, early)
    for (k, v), (whole_k, whole_v) in zip(pruned.kv, whole.kv):
      close(np.moveaxis(k, 3, 1), np.moveaxis(whole_k, 3, 1)[rows, nodes])
      close(np.moveaxis(v, 2, 1), np.moveaxis(whole_v, 2, 1)[rows, nodes])


def test_pruning_nothing_changes_no_call(x64):
  config, _ = CASES["lossless"]
  tree = TreeSpec("best_first", 8)
  seen = set()
  for seed in range(4):
    model = random_model(config, seed)
    prompts, options = random_requests(seed)
    greedy = {k: options[k] for k in ("max_new_tokens", "end_token")}
    plain, kept, halved = (
      generate(model, prompts, StreamDraft(tree, rule), **greedy)
      for rule in (Prune(), Prune(kept_nodes=8), Prune(kept_nodes=3))
    )
    assert plain == kept
    assert [x.token_ids for x in plain] == [x.token_ids for x in halved]
    seen.add(plain == halved)
  assert False in seen  # fewer nodes cost calls


def test_dead_nodes_do_not_take_the_place_of_living_ones():
  """A chain of probable nodes whose first is dead, beside one that lives."""
  row = lambda *x: jnp.array([x], jnp.int32)
  trees = TokenTree(
    row(1, -1, 3, 4), row(-1, 0, 1, 0), row(0, 1, 2, 1), jnp.zeros((1, 4))
  )
  logits = jnp.zeros((1, 4, 5)).at[:, :, 3].set(9.0)
  pruned, nodes = prune(trees, logits, Prune(kept_nodes=2), 3)
  assert nodes.tolist() == [[0, 3]]
  assert pruned.tokens.tolist() == [[1, 4]]
  pruned, nodes = prune(trees, logits, Prune(kept_nodes=3), 3)
  assert nodes.tolist() == [[0, 1, 3]]
  assert pruned.tokens.tolist() == [[1, -1, 4]]


def test_threshold_is_that_of_a_step_not_of_a_path():
  """Paper 3.1.3: a child is dropped for its own transition probability."""
  row = lambda *x: jnp.array([x], jnp.int32)
  trees = TokenTree(
    row(0, 1, 1, 0), row(-1, 0, 1, 1), row(0, 1, 2, 2), jnp.zeros((1, 4))
  )
  logits = jnp.log(jnp.broadcast_to(jnp.array([0.4, 0.6]), (1, 4, 2)))
  for threshold, expected in [
    (0.39, [0, 1, 1, 0]),  # paths of 0.36 and 0.24 live
    (0.5, [0, 1, 1, -1]),
    (0.61, [0, -1, -1, -1]),
  ]:
    pruned, _ = prune(trees, logits, Prune(threshold=threshold), 3)
    assert pruned.tokens.tolist() == [expected]


def test_no_pruner():
  config, _ = CASES["lossless"]
  streams = dataclasses.replace(config.streams, prune_rank=0)
  model = random_model(dataclasses.replace(config, streams=streams), 0)
  with pytest.raises(ValueError, match="no pruner: train with model.streams"):
    model.early_logits(jnp.zeros((1, 1, config.width)))
  drafter = StreamDraft(TreeSpec(), Prune(kept_nodes=4))
  with pytest.raises(ValueError, match="no pruner: train with model.streams"):
    drafter.resolve(model.config)

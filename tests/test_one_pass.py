"""Streams of all nodes in the pass that verifies, or of the accepted one alone
in a pass of their own: the drafts are the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_drafters import CASES as DRAFTERS
from random_models import (
  CASES,
  REJECTION,
  in_short,
  random_model,
  random_requests,
)

from spec_stream import draft_time, limits, one_pass
from spec_stream.cache import commit, empty
from spec_stream.decode import Decoder, collect
from spec_stream.drafters.none import NoDraft
from spec_stream.models.attention import at_rows
from spec_stream.models.transformer import (
  causal_mask,
  forward,
  forward_streams,
)


def variant(name, streams=None, **changes):
  config = CASES[name][0]
  streams = dataclasses.replace(config.streams, **(streams or {}))
  return dataclasses.replace(config, streams=streams, **changes)


FIRST = "shared, first version"
ALONE = {
  FIRST: variant(FIRST),
  "lossless": variant("lossless"),
  "rotation": variant(
    FIRST, dict(stream_id="rotation", rotation_eps=0.3, lora_layers="streams")
  ),
  "same positions": variant("lossless", dict(stream_position="same")),
  "sliding window": variant(
    "lossless", sliding_window=3, sliding_layers=(0, 2), qk_norm=True
  ),
  "learned positions": variant(FIRST, positions="learned"),
}


@pytest.mark.parametrize("num_streams", [1, 3])
@pytest.mark.parametrize("name", ALONE)
def test_streams_of_a_committed_token(x64, name, num_streams):
  """From the cache they are what they are beside the main rows."""
  config = ALONE[name]
  rng = np.random.default_rng(num_streams)
  graph, values = nnx.split(random_model(config, 1))
  tokens, length = rng.integers(0, 11, (2, 7)), jnp.array([7, 4])
  at = length - 1

  @jax.jit
  def both(values):
    model = nnx.merge(graph, values)
    ids = (jnp.arange(7) < length[:, None]).astype(jnp.int32)
    order = jnp.broadcast_to(jnp.arange(7), tokens.shape)
    mask = causal_mask(ids)
    out = forward(model, tokens, order, mask, streams=at[:, None])
    shape = config.num_layers, config.num_kv_heads, config.head_dim
    cache = commit(empty(2, 9, *shape, "float64"), out.kv, None, length)
    early = at_rows(out.early, at[:, None])[:, 0]
    return out.streams[:, 0, :num_streams], forward_streams(
      model, early, at, cache, num_streams
    )

  beside, alone = both(values)
  np.testing.assert_allclose(alone, beside, rtol=1e-11, atol=1e-11)


def test_when_a_step_takes_one_pass(x64, monkeypatch):
  """By the rows of all nodes and streams that count, of all requests."""
  assert one_pass.most_rows("cpu", False) < one_pass.most_rows("tpu", False)
  assert not one_pass.most_rows("cpu", True)
  name = "lossless, fewer streams"  # 4 of 6 nodes are kept, 2 of 3 streams
  monkeypatch.setattr(one_pass, "most_rows", lambda *_: 24)
  decoder = Decoder(random_model(CASES[name][0], 1), CASES[name][1])
  assert decoder.in_one_pass(2) and not decoder.in_one_pass(3)
  config, drafter = CASES["shared, main attends"]
  assert Decoder(random_model(config, 1), drafter).in_one_pass(9)
  assert Decoder(random_model(config, 1), NoDraft()).in_one_pass(1) is None


@pytest.mark.parametrize("name", ["lossless", "shared, main attends"])
def test_what_a_step_multiplies(x64, monkeypatch, name):
  """In two passes, fewer rows in the top layers by the streams of all nodes
  but one, unless the main stream needs them."""
  config, drafter = CASES[name]
  model = random_model(config, 1)
  flops = []
  for most in (0, 10**6):
    monkeypatch.setattr(one_pass, "most_rows", lambda *_, most=most: most)
    flops.append(limits.of_step(Decoder(model, drafter), 1, 9).flops)
  two, one = flops
  rows = (drafter.tree.num_nodes - 1) * config.streams.num_streams
  head = 2 * rows * config.width * config.vocab_size
  if config.streams.attends:
    assert one - two == head
    return
  top = list(model.blocks)[config.insertion_layer :]
  products = [x for x in jax.tree.leaves(nnx.state(top)) if x.ndim > 1]
  layers = 2 * rows * sum(x.size for x in products)
  assert one - two > head + layers  # and what attention multiplies


DRAFTS = {
  **CASES,
  "corrected": DRAFTERS["streams, corrected"][:2],
  "rejection": REJECTION,
}


@pytest.mark.parametrize(
  "name", in_short(DRAFTS, ("shared, pruned", "lossless"))
)
def test_drafts_by_one_pass_or_two(x64, monkeypatch, name):
  """Tree by tree the same, whether all nodes carry streams or the accepted."""
  config, drafter = DRAFTS[name]
  model = random_model(config, 4)
  prompts, options = random_requests(4, 2)
  found = []
  for most in (0, 10**6):
    monkeypatch.setattr(one_pass, "most_rows", lambda *_, most=most: most)
    decoder = Decoder(model, drafter)
    assert decoder.drafter.stream_depth
    assert decoder.in_one_pass(2) == (most > 0 or config.streams.attends)
    state = decoder.start(prompts, **options)
    trees = []
    while not state.done.all():
      state = decoder.step(state)
      # What a row drafts after its end is junk, which no one reads.
      trees.append(jnp.where(state.done[:, None], -1, state.tree.tokens))
    assert draft_time.seconds(decoder, state, 2) > 0
    found.append((trees, collect(state)))
  (trees, two), (same, once) = found
  np.testing.assert_array_equal(np.stack(trees), np.stack(same))
  assert two == once

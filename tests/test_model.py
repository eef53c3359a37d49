"""The forward pass: against plain NumPy, trees against paths, who sees whom."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import (
  CASES,
  MODES,
  VOCAB,
  in_short,
  random_model,
  random_requests,
)

from spec_stream import weights
from spec_stream.decode import Decoder
from spec_stream.errors import UserError
from spec_stream.models import lora, transformer
from spec_stream.models.config import (
  ModelConfig,
  StreamConfig,
  from_dict,
  to_dict,
)
from spec_stream.models.lora import LoRAParam
from spec_stream.models.transformer import (
  ALL,
  Transformer,
  causal_mask,
  forward,
  merge_lora,
  num_params,
)
from spec_stream.tree import ancestors

SEEDS = st.integers(0, 2**32 - 1)
LENGTH = 6


@functools.partial(jax.jit, static_argnames=("graphdef", "num_streams"))
def _run(graphdef, state, tokens, positions, mask, streams, num_streams):
  model = nnx.merge(graphdef, state)
  out = forward(
    model, tokens, positions, mask, streams=streams, num_streams=num_streams
  )
  early = model.early_logits(out.early)
  return out, model.logits(out.main), early


def run(model, tokens, at=None, positions=None, mask=None, num_streams=None):
  """-> (Output, main logits, early logits) of one sequence, batch axis gone.

  at: positions that carry streams, padded with -1 to one static shape.
  """
  count = len(tokens)
  positions = np.arange(count) if positions is None else positions
  mask = np.tri(count, dtype=bool) if mask is None else mask
  streams = None
  if at is not None:
    streams = np.array([[*at] + [-1] * (count - len(at))], np.int32)
  arrays = (np.array([x]) for x in (tokens, positions, mask))
  out = _run(
    *nnx.split(model), *arrays, streams=streams, num_streams=num_streams
  )
  return jax.tree.map(lambda x: np.asarray(x[0]), out)


def variant(name, **streams):
  """The config of a case, other streams."""
  config = CASES[name][0]
  return dataclasses.replace(
    config, streams=dataclasses.replace(config.streams, **streams)
  )


def tokens_of(seed, count=LENGTH):
  return np.random.default_rng(seed).integers(0, VOCAB, count)


close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)


# -- against plain NumPy -----------------------------------------------------

CONFIGS = {name: config for name, (config, _) in CASES.items()}
CONFIGS["untied, one head each"] = dataclasses.replace(
  variant("shared, main attends", num_streams=2, map_rank=3),
  tie_embeddings=False,
  num_kv_heads=4,
)


@pytest.mark.parametrize("name", CONFIGS)
def test_against_plain_numpy(x64, name):
  """A tree of positions, of which some carry streams."""
  config = CONFIGS[name]
  num_streams = config.streams.num_streams
  for seed in range(2):
    rng = np.random.default_rng(seed)
    model = random_model(config, seed)
    tokens, parents, depth = reference.random_tree(rng, LENGTH, 4, VOCAB)
    above = reference.ancestors(parents)
    positions = 5 + np.array(depth)
    carriers = sorted(rng.choice(LENGTH, 4, replace=False).tolist())
    mask = np.array([[u in a for u in range(LENGTH)] for a in above])
    out, logits, early_logits = run(model, tokens, carriers, positions, mask)
    weights = reference.numpy_weights(model)
    hidden, early = reference.forward(
      config, weights, tokens, positions, above, carriers, num_streams
    )
    reading = reference.Reading(config, weights)
    tight = functools.partial(close, rtol=1e-10, atol=1e-10)
    for t in range(LENGTH):
      tight(out.main[t], hidden[t, 0])
      tight(out.early[t], early[t])
      tight(logits[t], reading.logits(hidden[t, 0]))
      tight(early_logits[t], reading.early_logits(early[t]))
    for u, t in enumerate(carriers):
      for j in range(num_streams):
        tight(out.streams[u, j], hidden[t, j + 1])


# -- trees and sequences -----------------------------------------------------

NODES, LONGEST = 9, 4


@functools.partial(jax.jit, static_argnames="graphdef")
def verify(graphdef, state, cache, tokens, parents, depth):
  """Logits [B, M, V] and [B, M, J, V] of a tree on a cache."""
  model = nnx.merge(graphdef, state)
  out = forward(
    model,
    tokens,
    cache.length[:, None] + depth,
    ancestors(parents, LONGEST),
    cache=cache,
    streams=ALL,
  )
  streams = out.streams.reshape(tokens.shape[0], -1, out.streams.shape[-1])
  streams = model.logits(streams).reshape(*out.streams.shape[:3], -1)
  return model.logits(out.main), streams


@pytest.mark.parametrize("name", in_short(CASES, MODES))
def test_a_node_of_a_tree_is_the_end_of_its_path(x64, name):
  """Main and streams; the cache against the whole sequence at once."""
  config, drafter = CASES[name]

  @settings(max_examples=4)
  @given(SEEDS)
  def check(seed):
    rng = np.random.default_rng(seed)
    model = random_model(config, seed)
    prompts, options = random_requests(seed)
    cache = Decoder(model, drafter).start(prompts, **options).cache
    trees = [reference.random_tree(rng, NODES, LONGEST, VOCAB) for _ in prompts]
    arrays = (np.array(x, np.int32) for x in zip(*trees))
    main, streams = verify(*nnx.split(model), cache, *arrays)
    rows, first, nodes = [], [], []
    for b, (tokens, parents, _) in enumerate(trees):
      for m in range(NODES):
        path = reference.path_to(parents, m)
        rows.append([*prompts[b], *(tokens[n] for n in path)])
        first.append(len(prompts[b]) - 1)
        nodes.append((b, m))
    whole_main, whole_streams, _ = reference.sequences(model, rows, first)
    for i, (row, node) in enumerate(zip(rows, nodes)):
      trained = whole_streams[i, len(row) - 1]
      close(main[node], whole_main[i, len(row) - 1])
      # A stream never sees a later one: no matter how many are drafted with.
      close(streams[node], trained)

  check()


def test_packed_sequences_do_not_see_each_other(x64):
  config, _ = CASES["shared, main attends"]
  model = random_model(config, 0)
  tokens = tokens_of(0)
  segments = np.array([[1, 1, 1, 2, 2, 0]])
  mask = np.asarray(causal_mask(jnp.asarray(segments)))[0]
  both, *_ = run(model, tokens, range(5), [0, 1, 2, 0, 1, 0], mask)
  for part in (slice(0, 3), slice(3, 5)):
    count = part.stop - part.start
    # Padded, so that this is one program.
    padded = [*tokens[part]] + [0] * (LENGTH - count)
    alone, *_ = run(model, padded, range(count))
    close(both.main[part], alone.main[:count])
    close(both.streams[part], alone.streams[:count])


def test_causal_mask():
  mask = np.asarray(causal_mask(jnp.array([[1, 1, 2, 2, 0, 0]])))[0]
  seen = [np.flatnonzero(row).tolist() for row in mask]
  assert seen == [[0], [0, 1], [2], [2, 3], [], []]


# -- who sees whom (paper eq. 1-2) -------------------------------------------
#
# With one stream layer a row depends on what it attends to, and on no more.

ONE = {
  "shared": variant("shared, main attends", num_stream_layers=1),
  "first version": variant(
    "shared, main attends", num_stream_layers=1, main_attends_streams=False
  ),
  "lossless": variant("lossless", num_stream_layers=1),
}


def changed(a, b):
  """Along the leading axes, where the last axis differs beyond rounding."""
  return (np.abs(np.asarray(a) - np.asarray(b)) > 1e-12).any(-1)


@pytest.mark.parametrize("name", ONE)
def test_tokens_reach_later_positions_alone(x64, name):
  model = random_model(ONE[name], 1)
  tokens = tokens_of(1)
  before, *_ = run(model, tokens, range(LENGTH))
  after = np.arange(LENGTH)
  for t in range(LENGTH):
    other = tokens.copy()
    other[t] = (other[t] + 1) % VOCAB
    out, *_ = run(model, other, range(LENGTH))
    np.testing.assert_array_equal(changed(out.main, before.main), after >= t)
    np.testing.assert_array_equal(
      changed(out.streams, before.streams).all(-1), after >= t
    )
    assert not changed(out.streams, before.streams)[:t].any()


@pytest.mark.parametrize("name", ONE)
def test_a_stream_reaches_itself_and_later_ones(x64, name):
  """Stream j of a position: streams j.. there, and in eq. 1 the main stream."""
  config = ONE[name]
  # Small weights: a softmax must not leave a row without any attention.
  model = random_model(config, 2, scale=0.1)
  tokens = tokens_of(2)
  before, *_ = run(model, tokens, range(LENGTH))
  for j in range(3):
    embed = np.array(model.streams.embed[...])
    other = random_model(config, 2, scale=0.1)
    other.streams.embed[...] = embed + np.eye(3)[j][:, None]
    out, *_ = run(other, tokens, range(LENGTH))
    moved = changed(out.streams, before.streams)
    np.testing.assert_array_equal(
      moved, np.broadcast_to(np.arange(3) >= j, moved.shape)
    )
    moved = changed(out.main, before.main)
    assert moved.all() if config.streams.attends else not moved.any()


@pytest.mark.parametrize("name", ONE)
def test_streams_of_other_positions_are_not_seen(x64, name):
  config = ONE[name]
  model = random_model(config, 3)
  tokens = tokens_of(3)
  everywhere, *_ = run(model, tokens, range(LENGTH))
  nowhere, *_ = run(model, tokens, [])
  without, *_ = run(model, tokens)
  assert without.streams is None
  close(nowhere.main, without.main)
  for at in ([0], [2, 4], [5, 1, 3]):  # in any order
    out, *_ = run(model, tokens, at)
    close(out.streams[: len(at)], everywhere.streams[at])
    if config.streams.attends:  # eq. 1: a position's own streams
      close(out.main[at], everywhere.main[at])
      rest = np.setdiff1d(np.arange(LENGTH), at)
      close(out.main[rest], without.main[rest])
      assert changed(out.main, without.main)[at].all()
    else:
      close(out.main, without.main)


@pytest.mark.parametrize("name", ["lossless", "lossless, fewer streams"])
def test_lossless_main_stream_is_the_base_model(x64, name):
  """With streams and adapters attached, without, and without the weights."""
  config, _ = CASES[name]
  base = dataclasses.replace(config, streams=StreamConfig(0))
  tight = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
  for seed in range(3):
    model = random_model(config, seed)
    tokens = tokens_of(seed)
    with_streams = run(model, tokens, range(LENGTH))
    without = run(model, tokens)
    tight(with_streams[1], without[1])
    jax.tree.map(tight, with_streams[0].kv, without[0].kv)
    plain = Transformer(base, rngs=nnx.Rngs(0))
    nnx.update(plain, nnx.state(model, _of_base(model)))
    logits = plain.logits(
      forward(
        plain,
        tokens[None],
        np.arange(LENGTH)[None],
        np.tri(LENGTH, dtype=bool)[None],
      ).main
    )
    tight(with_streams[1], logits[0])
    # The adapters are not idle: they move the streams.
    for path, weight in nnx.to_flat_state(nnx.state(model, LoRAParam)):
      weight[...] = weight[...] * (0.0 if path[-1] == "lora_b" else 1.0)
    idle = run(model, tokens, range(LENGTH))
    assert changed(idle[0].streams, with_streams[0].streams).all()
    tight(idle[1], with_streams[1])


def _of_base(model):
  """Filter: weights that a model without streams has."""
  from spec_stream.weights import ADAPTERS

  return lambda path, value: not isinstance(value, ADAPTERS)


@pytest.mark.parametrize("name", ["lossless", "shared, first version"])
def test_fewer_streams_are_the_first_ones(x64, name):
  config, _ = CASES[name]
  model = random_model(config, 4)
  tokens = tokens_of(4)
  whole = run(model, tokens, range(LENGTH))
  two = run(model, tokens, range(LENGTH), num_streams=2)
  assert two[0].streams.shape[1] == 2
  close(two[0].streams, whole[0].streams[:, :2])
  close(two[1], whole[1])


def test_what_tells_streams_apart(x64):
  """Eq. 9's angle, and positions ahead where there are others to look at."""
  tokens = tokens_of(5)

  def streams(**options):
    config = variant("shared, rotation", **options)
    return run(random_model(config, 5), tokens, range(LENGTH))[0].streams

  none = streams(rotation_eps=0.0)
  assert changed(streams(rotation_eps=0.3), none).all()
  ahead = streams(rotation_eps=0.0, stream_position="future")
  assert changed(ahead, none)[1:].all()


# -- adapters ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["shared, first version", "shared, pruned"])
def test_merged_adapters_give_the_same_model(x64, name):
  config, _ = CASES[name]
  model = random_model(config, 6)
  kernel = np.array(model.blocks[2].ffw.down.kernel[...])
  tokens = tokens_of(6)
  before = run(model, tokens, range(LENGTH))
  merged = merge_lora(model)
  assert num_params(merged, LoRAParam) == 0 < num_params(model, LoRAParam)
  after = run(merged, tokens, range(LENGTH))
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
    np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8)
  # The model itself stays what it was; merging again gives the same.
  np.testing.assert_array_equal(model.blocks[2].ffw.down.kernel[...], kernel)
  again = nnx.state(merge_lora(model))
  jax.tree.map(np.testing.assert_array_equal, again, nnx.state(merged))
  assert np.abs(merged.blocks[2].ffw.down.kernel[...] - kernel).max() > 0.1


def test_lossless_adapters_are_not_merged(x64):
  model = random_model(CASES["lossless"][0], 0)
  assert merge_lora(model) is model


# -- what cannot be ----------------------------------------------------------


@pytest.mark.parametrize(
  ("options", "why"),
  [
    (dict(num_layers=2, streams=StreamConfig(3, 3)), "=3 is above.*=2"),
    (dict(num_heads=3), "num_heads=3 must be a multiple of.*=2"),
    (dict(head_dim=5), "head_dim must be even"),
    (dict(width=0), "model.width must be 1 or more"),
    (dict(dtype="int8"), "model.dtype is 'int8'"),
    (dict(streams=dict(mode="lossy")), "mode is 'lossy': use one of shared"),
    (dict(streams=dict(num_stream_layers=0)), "num_stream_layers must be 1"),
    (dict(streams=dict(num_streams=-1)), "num_streams must not be negative"),
    (dict(streams=dict(mode="lossless", lora_layers="all")), "lossless mode"),
    (dict(streams=dict(gamma=3)), "model.streams has no key 'gamma'"),
    (dict(depth=3), "model has no key 'depth'"),
  ],
)
def test_bad_configs(options, why):
  with pytest.raises(UserError, match=why):
    if isinstance(options.get("streams"), StreamConfig):
      ModelConfig(**options)
    else:
      from_dict(options)


@pytest.mark.parametrize("name", CASES)
def test_configs_survive_json(name):
  import json

  config, _ = CASES[name]
  assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_streams_that_do_not_exist():
  arrays = np.array([[1]]), np.array([[0]]), np.ones((1, 1, 1), bool)

  def attempt(asked, **options):
    config = ModelConfig(11, 8, 1, 2, 1, 4, 8, streams=StreamConfig(**options))
    model = Transformer(config, rngs=nnx.Rngs(0))
    forward(model, *arrays, streams=ALL, num_streams=asked)

  with pytest.raises(UserError, match="without streams"):
    attempt(None, num_streams=0, num_stream_layers=1)
  with pytest.raises(UserError, match="4 streams asked for.*with 3"):
    attempt(4, num_streams=3, num_stream_layers=1)
  with pytest.raises(UserError, match="all 3 must be attached"):
    attempt(2, num_streams=3, num_stream_layers=1)


def test_two_rows_give_what_one_gives(x64):
  """What a TPU computes for a row alone, on this device."""
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(1, 1, 5)), rng.normal(size=(5, 2, 3))
  product = functools.partial(jnp.tensordot, b=kernel, axes=1)
  two = lora._of_two_rows(lambda x: product(x), jnp.asarray(x))
  assert two.shape == (1, 1, 2, 3)
  np.testing.assert_array_equal(two, lora.matmul(jnp.asarray(x), kernel))


@pytest.mark.parametrize("on", ["cpu", "cuda"])
@pytest.mark.parametrize("batch, rows", [(1, 1), (1, 5), (3, 1), (2, 4)])
def test_kernels_with_outputs_first_give_the_same(batch, rows, on, x64):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(batch, rows, 6)))
  kernel = jnp.asarray(rng.normal(size=(6, 2, 3)))
  product = jax.jit(lambda x, w: lora.matmul_out_first(x, w, (2, 3), None, on))
  np.testing.assert_allclose(
    product(x, kernel.reshape(6, 6).T),
    np.einsum("bri,ijk->brjk", x, kernel),
    rtol=1e-12,
    atol=1e-12,
  )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("on", ["cpu", "cuda"])
def test_what_is_laid_out_is_the_same_model(tied, on, x64, monkeypatch):
  config = dataclasses.replace(
    tiny.MODEL,
    tie_embeddings=tied,
    qkv_bias=True,
    dtype="float64",
    param_dtype="float64",
    streams=StreamConfig(2, 1, mode="lossless", lora_rank=2),
  )
  values = weights.init(config, 0)
  rng = np.random.default_rng(0)
  for path, x in values.items():
    if path.endswith("lora_b"):  # zero at the start
      values[path] = jnp.asarray(rng.normal(size=x.shape))
  model = weights.to_model(config, values)
  assert transformer.for_decoding(model) is model  # nothing to gain
  if on == "cuda":
    device = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
    monkeypatch.setattr(transformer, "devices", lambda _: [device])
  monkeypatch.setattr(lora, "_LARGE", 0)
  laid = transformer.for_decoding(model)
  assert transformer.for_decoding(laid) is laid
  marked = "cpu" if tied and on == "cpu" else ""
  assert laid.embed.out_first == marked and not model.embed.out_first
  assert laid.blocks[0].ffw.down.out_first == on
  assert tied or laid.head.kernel.shape == (19, 16)
  assert laid.blocks[0].ffw.down.kernel.shape == (16, 24)
  assert model.blocks[0].ffw.down.kernel.shape == (24, 16)
  tokens = rng.integers(0, 19, (2, 7))
  args = tokens, np.arange(7)[None].repeat(2, 0), causal_mask(tokens * 0 + 1)

  def logits(model):
    out = forward(model, *args, streams=transformer.ALL)
    return [model.logits(x) for x in (out.main, out.streams[:, :, 0])]

  for got, right in zip(logits(laid), logits(model), strict=True):
    np.testing.assert_allclose(got, right, rtol=1e-11, atol=1e-11)

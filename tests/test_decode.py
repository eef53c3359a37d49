"""Decoding: its cache, its acceptance, what it compiles, what it refuses."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import reference
from flax import nnx
from random_models import (
  CASES,
  MODES,
  VOCAB,
  in_short,
  random_model,
  random_requests,
)

from spec_stream.bench import Compilations
from spec_stream.decode import Decoder, generate, stream
from spec_stream.drafters.none import NoDraft
from spec_stream.drafters.streams import StreamDraft
from spec_stream.errors import UserError
from spec_stream.models.config import StreamConfig
from spec_stream.models.prune import Prune
from spec_stream.train.losses import LossConfig, loss
from spec_stream.tree import TreeSpec

close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)


# -- the cache ---------------------------------------------------------------


@pytest.mark.parametrize("name", in_short(CASES))
def test_cache_after_steps_is_that_of_a_fresh_prefill(x64, name):
  """After each step, of the tokens committed so far."""
  config, drafter = CASES[name]
  for seed in range(2):
    model = random_model(config, seed)
    prompts, options = random_requests(seed)
    decoder = Decoder(model, drafter)
    state = decoder.start(prompts, **options)
    for _ in range(4):
      state = decoder.step(state)
      lengths = np.asarray(state.cache.length)
      rows = [
        [*prompt, *np.asarray(state.tokens[b])][: lengths[b]]
        for b, prompt in enumerate(prompts)
      ]
      counts = np.asarray(state.num_tokens)
      np.testing.assert_array_equal(
        lengths, [len(p) + n - 1 for p, n in zip(prompts, counts)]
      )
      first = [len(prompt) - 1 for prompt in prompts]
      *_, whole = reference.sequences(model, rows, first)
      same_cache(state.cache, whole, lengths)
      if not config.streams.attends:  # else prompts carry streams at their end
        fresh = Decoder(model, NoDraft()).start(rows, max_new_tokens=1).cache
        np.testing.assert_array_equal(fresh.length, lengths)
        same_cache(state.cache, fresh.layers, lengths)


def same_cache(cache, layers, lengths):
  for old, new in zip(cache.layers, layers, strict=True):
    for row, length in enumerate(lengths):
      close(*(k[row, :, :, :length] for k, _ in (old, new)))
      close(*(v[row, :, :length] for _, v in (old, new)))


# -- acceptance --------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="graphdef")
def teacher_forced(graphdef, state, batch):
  return loss(nnx.merge(graphdef, state), batch, LossConfig())[1]


@pytest.mark.parametrize("name", in_short(["shared, first version", *MODES]))
def test_acceptance_is_that_under_teacher_forcing(x64, name):
  """A chain accepts as long as the streams' argmax is the text's next token."""
  config, _ = CASES[name]
  accepted = 0
  for seed in range(6):
    model = random_model(config, seed, scale=0.2)
    prompts, _ = random_requests(seed)
    outputs = generate(
      model, prompts, StreamDraft(TreeSpec("chain")), max_new_tokens=14
    )
    rows = [[*p, *out.token_ids] for p, out in zip(prompts, outputs)]
    first = [len(p) - 1 for p in prompts]
    _, logits, _ = reference.sequences(model, rows, first)
    hits, targets = [], []
    for b, (row, prompt, out) in enumerate(zip(rows, prompts, outputs)):
      is_hit, is_target = hits_of(logits[b].argmax(-1), row)
      calls, root, call = [0], len(prompt), 0
      while root < len(row) - 1:
        call += 1
        depth = int(is_hit[root - 1].cumprod().sum())
        calls += [call] * (depth + 1)
        root += depth + 1
        accepted += depth
      assert calls[: len(out.calls)] == out.calls
      completion = slice(len(prompt) - 1, len(row) - 1)
      hits.append(is_hit[completion].sum(0))
      targets.append(is_target[completion].sum(0))
    metrics = teacher_forced(*nnx.split(model), training_batch(prompts, rows))
    for j in range(1, config.streams.num_streams + 1):
      share = sum(hits)[j - 1] / sum(targets)[j - 1]  # the metric is float32
      np.testing.assert_allclose(metrics[f"accept_{j}"], share, rtol=1e-6)
  assert accepted > 20  # or nothing was tested


def hits_of(best, row):
  """[T, J] stream j at t says row[t+1+j]; and whether there is such a token.

  best: [T', J] argmax of the streams, T' at least T.
  """
  at = np.arange(len(row))[:, None] + np.arange(2, 2 + best.shape[1])
  is_target = at < len(row)
  right = np.array(row)[np.minimum(at, len(row) - 1)]
  return is_target & (best[: len(row)] == right), is_target


def training_batch(prompts, rows, size=32, places=16):
  """One completion a row, streams before each of its tokens."""
  shape = (len(rows), size)
  batch = {
    "tokens": np.zeros(shape, np.int32),
    "segment_ids": np.zeros(shape, np.int32),
    "positions": np.broadcast_to(np.arange(size, dtype=np.int32), shape),
    "loss_mask": np.zeros(shape, bool),
    "stream_at": np.zeros((len(rows), places), np.int32),
    "stream_mask": np.zeros((len(rows), places), bool),
  }
  for b, (prompt, row) in enumerate(zip(prompts, rows)):
    batch["tokens"][b, : len(row)] = row
    batch["segment_ids"][b, : len(row)] = 1
    batch["loss_mask"][b, len(prompt) : len(row)] = True
    at = np.arange(len(prompt) - 1, len(row) - 1)
    batch["stream_at"][b, : len(at)] = at
    batch["stream_mask"][b, : len(at)] = True
  return batch


# -- compilations ------------------------------------------------------------


def test_models_alike_share_their_programs():
  """Not those of another structure, though its weights have the same shapes."""
  config, drafter = CASES["lossless"]
  config = dataclasses.replace(config, dtype="float32", param_dtype="float32")
  models = [random_model(config, seed) for seed in (0, 1)]
  one, two = (Decoder(model, drafter) for model in models)
  assert one.graph is two.graph
  prompt, options = [5, 6, 7], dict(max_new_tokens=9)
  first, expected = (
    generate(model, [prompt], NoDraft(), **options)[0].token_ids
    for model in models
  )
  assert first != expected
  one.warm_up([prompt], **options)
  count = Compilations()
  state = two.finish(two.start([prompt], **options))
  assert not count.count
  assert np.asarray(state.tokens)[0, : len(expected)].tolist() == expected
  other = dataclasses.replace(config, rope_theta=500.0)
  assert Decoder(random_model(other, 0), drafter).graph is not one.graph


@pytest.mark.slow
@pytest.mark.parametrize("drafter", [NoDraft(), StreamDraft()], ids=repr)
def test_a_second_prompt_compiles_nothing(drafter):
  """Of the same bucket, with another limit, seed, temperature and end."""
  config = dataclasses.replace(
    CASES["shared, first version"][0], dtype="float32", param_dtype="float32"
  )
  model = random_model(config, 0)
  options = dict(temperature=0.8, top_k=5, top_p=0.9, seed=1, end_token=2)
  generate(model, [[1, 2, 3]], drafter, max_new_tokens=9, **options)
  list(stream(model, [1, 2, 3], drafter, max_new_tokens=9, **options))
  counter = Compilations()
  options = dict(temperature=1.3, top_k=2, top_p=0.5, seed=7, end_token=-1)
  other = random_model(config, 1)
  out = generate(other, [[5] * 16], drafter, max_new_tokens=16, **options)
  list(stream(other, [4], drafter, max_new_tokens=5, **options))
  assert len(out[0].token_ids) == 16
  assert counter.count == 0
  generate(model, [[5] * 17], drafter, max_new_tokens=9, **options)
  assert counter.count > 0  # another bucket


# -- what cannot be ----------------------------------------------------------

MODEL = functools.cache(lambda: random_model(CASES["lossless"][0], 0))
LONG = "prompt 0 of 60 tokens and 5 new ones do not fit the cache of 64"


@pytest.mark.parametrize(
  ("prompts", "options", "why"),
  [
    ([], {}, "no prompt given"),
    ([[1], []], {}, "prompt 1 is empty"),
    ([[1, VOCAB]], {}, f"prompt 0 has token {VOCAB}: the vocabulary ends at"),
    ([[-1]], {}, "prompt 0 has token -1"),
    ([[1]], dict(max_new_tokens=0), "max_new_tokens=0 must be 1 or more"),
    ([[1] * 60], dict(max_new_tokens=5), LONG),
    ([[1]], dict(end_token=VOCAB), f"end token {VOCAB} is outside"),
    ([[1]], dict(temperature=-1.0), "temperature"),
    ([[1]], dict(top_p=1.5), "top_p"),
    ([[1]], dict(top_k=-2), "top_k"),
    ([[1]], dict(seed=-1), "seed"),
  ],
)
def test_bad_requests(prompts, options, why):
  with pytest.raises(UserError, match=why):
    generate(MODEL(), prompts, NoDraft(), **{"max_new_tokens": 4, **options})


@pytest.mark.parametrize(
  ("drafter", "why"),
  [
    (StreamDraft(num_streams=4), "draft_length=4: .* has 3 streams"),
    (StreamDraft(TreeSpec("chain", num_nodes=6)), "deep|3 streams"),
    (StreamDraft(prune=Prune(kept_nodes=99)), "kept_nodes=99"),
    (StreamDraft(prune=Prune(threshold=1.5)), "prune_threshold=1.5"),
    (StreamDraft(TreeSpec("bushy")), "bushy"),
  ],
)
def test_bad_drafters(drafter, why):
  with pytest.raises(UserError, match=why):
    Decoder(MODEL(), drafter)


def test_drafters_and_models_that_do_not_fit(x64):
  config, _ = CASES["shared, main attends"]
  with pytest.raises(UserError, match="all 3 must be attached"):
    Decoder(random_model(config, 0), StreamDraft(num_streams=2))
  plain = dataclasses.replace(config, streams=StreamConfig(0))
  with pytest.raises(UserError, match="this model has no streams"):
    Decoder(random_model(plain, 0), StreamDraft())
  unpruned = dataclasses.replace(
    config, streams=dataclasses.replace(config.streams, prune_rank=0)
  )
  with pytest.raises(UserError, match="this model has no pruner"):
    Decoder(random_model(unpruned, 0), StreamDraft(prune=Prune(kept_nodes=4)))

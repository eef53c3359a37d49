"""Attention in segments, and targets that the main stream gives.

Segments change where scores are held, not what they are: losses and gradients
are those of the dense form. The target "main" is read again in plain numpy.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import in_short
from test_losses import _run, numpy_terms
from tiny import MODEL, make_batch, make_model

from spec_stream import weights
from spec_stream.models.config import StreamConfig
from spec_stream.models.segments import Segments
from spec_stream.models.transformer import causal_mask, forward
from spec_stream.train import losses
from spec_stream.train.losses import LossConfig

SHARED = StreamConfig(num_streams=2, num_stream_layers=1, prune_rank=2)
CASES = {
  "shared": {},
  "without streams": {"streams": StreamConfig(0, 1)},
  "lossless": {
    "streams": dataclasses.replace(SHARED, mode="lossless", lora_rank=2)
  },
  "rotation, same position": {
    "streams": dataclasses.replace(
      SHARED, stream_id="rotation", stream_position="same", rotation_eps=0.3
    )
  },
  "two layers, one slides": {
    "streams": dataclasses.replace(SHARED, num_stream_layers=2),
    "sliding_window": 3,
    "sliding_layers": (1,),
    "attention_softcap": 2.0,
  },
}


def make(name):
  config = dataclasses.replace(MODEL, **CASES[name])
  config = dataclasses.replace(config, dtype="float64", param_dtype="float64")
  values = weights.to_weights(make_model(dataclasses.replace(config)))
  return config, {path: x.astype(jnp.float64) for path, x in values.items()}


@pytest.mark.parametrize(
  "name", in_short(CASES, ("without streams", "two layers, one slides"))
)
def test_segments_are_the_dense_form(x64, name):
  """16 main rows and 12 sets in segments of 4, each block computed twice.

  Without segments the form is that of test_losses.
  """
  config, values = make(name)
  batch = {k: jnp.asarray(x) for k, x in make_batch().items()}
  at = jnp.where(batch["stream_mask"], batch["stream_at"], -1)
  at = at if config.streams.num_streams else None
  seen = batch["segment_ids"] > 0

  def outputs(values, mask, remat):
    model = weights.to_model(config, values)
    out = forward(
      model,
      batch["tokens"],
      batch["positions"],
      mask,
      streams=at,
      remat=remat,
    )
    main = jnp.where(seen[..., None], out.main, 0)  # padding sees nothing
    if at is None:
      return (main,)
    there = batch["stream_mask"][..., None, None]
    return main, jnp.where(there, out.streams, 0)

  @functools.partial(jax.jit, static_argnums=2)
  def both(values, mask, remat):
    def total(values):
      parts = outputs(values, mask, remat)
      waves = [jnp.cos(jnp.arange(x.size)).reshape(x.shape) for x in parts]
      sums = [(x * w).sum() for x, w in zip(parts, waves, strict=True)]
      return sum(sums), parts

    return jax.grad(total, has_aux=True)(values)

  want_grads, want = both(values, causal_mask(batch["segment_ids"]), False)
  grads, found = both(values, Segments(batch["segment_ids"], 4), True)
  for a, b in zip(want, found, strict=True):
    np.testing.assert_allclose(b, a, atol=1e-12)
  for path, x in want_grads.items():
    np.testing.assert_allclose(grads[path], x, atol=1e-9, err_msg=path)
  assert any(np.abs(x).max() > 1e-3 for x in want_grads.values())


def numpy_main_target(logits, main, batch, ahead, places):
  """(cross-entropy to the main stream's distribution, share of its argmaxes).

  logits [B, U, V] of stream `ahead` at places [B, U]; main [B, T, V].
  """
  softmax = lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum()
  log = lambda x: x - x.max() - np.log(np.exp(x - x.max()).sum())
  total, right, count = 0.0, 0, 0
  for b, row in enumerate(places):
    for u, i in enumerate(row):
      target = i + 1 + ahead  # the token that it is about
      if i < 0 or target >= batch["tokens"].shape[1]:
        continue
      if batch["segment_ids"][b, i] != batch["segment_ids"][b, target]:
        continue
      if not batch["loss_mask"][b, target]:
        continue
      teacher = main[b, i + ahead]
      total -= (softmax(teacher) * log(logits[b, u])).sum()
      right += int(np.argmax(teacher) == np.argmax(logits[b, u]))
      count += 1
  return total / count, right / count


def loss(config, values, batch, target):
  def total(values):
    model = weights.to_model(config, values)
    settings = LossConfig(0.0, (0.3, 0.2), 0.0, target)
    return losses.loss(model, batch, settings)

  return jax.jit(jax.value_and_grad(total, has_aux=True))(values)


@pytest.mark.parametrize("name", in_short(["shared", "lossless"], ("shared",)))
def test_the_main_stream_is_the_target(x64, name):
  config, values = make(name)
  batch = make_batch()
  (_, metrics), grads = loss(config, values, batch, "main")
  main, _, streams = _run(config)(values, batch)
  main = np.asarray(main)
  places = np.where(batch["stream_mask"], batch["stream_at"], -1)
  for j, logits in enumerate(streams, 1):
    want = numpy_main_target(np.asarray(logits), main, batch, j, places)
    found = metrics[f"loss_stream_{j}"], metrics[f"accept_{j}"]
    np.testing.assert_allclose(found, want, rtol=1e-7)
    text, _ = numpy_terms(logits, batch, 1 + j, places)
    assert abs(text - want[0]) > 1e-3  # another target than the text is
  # Held constant: the gradient is that of a cross-entropy to fixed numbers.
  target = jax.nn.softmax(jnp.asarray(main))
  at = jnp.asarray(places)

  def plain(values):
    model = weights.to_model(config, values)
    out = forward(
      model,
      batch["tokens"],
      batch["positions"],
      causal_mask(batch["segment_ids"]),
      streams=at,
    )
    total = 0.0
    for j, weight in enumerate((0.3, 0.2), 1):
      _, valid = losses.targets(batch, at, 1 + j)
      index = jnp.clip(at + j, 0, target.shape[1] - 1)[..., None]
      known = jnp.take_along_axis(target, index, 1)
      said = jax.nn.log_softmax(model.logits(out.streams[:, :, j - 1]))
      ce = -(known * said).sum(-1)
      total += weight * jnp.where(valid, ce, 0).sum() / valid.sum()
    return total

  for path, x in jax.jit(jax.grad(plain))(values).items():
    np.testing.assert_allclose(grads[path], x, atol=1e-9, err_msg=path)

"""The loss against an independent reading of eq. 5 in plain numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MODEL, ROWS, make_batch, make_model

from spec_stream import weights
from spec_stream.errors import UserError
from spec_stream.models.prune import PruneParam
from spec_stream.models.transformer import causal_mask, forward
from spec_stream.train import losses
from spec_stream.train.losses import LossConfig


def numpy_terms(logits, batch, ahead, places):
  """(mean cross-entropy, share of right argmaxes) by plain loops.

  logits: [B, R, V] of predicting `ahead` on from places [B, R] (or -1).
  """
  logits, total, right, count = np.asarray(logits, np.float64), 0.0, 0, 0
  for b, row in enumerate(places):
    for r, i in enumerate(row):
      if i < 0 or i + ahead >= batch["tokens"].shape[1]:
        continue
      segment = batch["segment_ids"][b, i]
      if segment == 0 or segment != batch["segment_ids"][b, i + ahead]:
        continue
      if not batch["loss_mask"][b, i + ahead]:
        continue
      x = logits[b, r]
      label = batch["tokens"][b, i + ahead]
      total += np.log(np.exp(x - x.max()).sum()) + x.max() - x[label]
      right += int(np.argmax(x) == label)
      count += 1
  return total / count, right / count


@functools.cache
def _run(config):
  """Jitted (weights, batch) -> what `numpy_loss` reads of the model."""

  @jax.jit
  def run(values, batch):
    model = weights.to_model(config, values)
    places = jnp.where(batch["stream_mask"], batch["stream_at"], -1)
    out = forward(
      model,
      batch["tokens"],
      batch["positions"],
      causal_mask(batch["segment_ids"]),
      streams=places if config.streams.num_streams else None,
    )
    streams = range(config.streams.num_streams)
    return (
      model.logits(out.main),
      model.early_logits(out.early) if model.pruner is not None else None,
      [model.logits(out.streams[:, :, j]) for j in streams],
    )

  return run


def numpy_loss(model, batch, main_weight, stream_weight, prune_weight):
  """Every number of `losses.loss`, from the model's logits."""
  size = batch["tokens"].shape[1]
  every = np.broadcast_to(np.arange(size), batch["tokens"].shape)
  places = np.where(batch["stream_mask"], batch["stream_at"], -1)
  main, early, streams = _run(model.config)(weights.to_weights(model), batch)
  expected = {}
  ce, hit = numpy_terms(main, batch, 1, every)
  expected |= {"loss_main": ce, "accuracy_main": hit}
  total = main_weight * ce
  if early is not None:
    ce, _ = numpy_terms(early, batch, 1, every)
    expected["loss_prune"] = ce
    total += prune_weight * ce
  for j, logits in enumerate(streams, 1):
    ce, hit = numpy_terms(logits, batch, 1 + j, places)
    expected |= {f"loss_stream_{j}": ce, f"accept_{j}": hit}
    total += stream_weight[j - 1] * ce
  return {"loss": total, **expected}


CONFIG = LossConfig(0.7, (0.3, 0.2), 0.4)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _value_and_grads(config, values, batch, loss_config, count=None):
  def loss(values):
    model = weights.to_model(config, values)
    return losses.loss(model, batch, loss_config, count)

  return jax.value_and_grad(loss, has_aux=True)(values)


def _loss(model, batch, config):
  values = weights.to_weights(model)
  (value, metrics), _ = _value_and_grads(model.config, values, batch, config)
  assert value == metrics["loss"]
  return metrics


def _grads(model, batch, config, count=None):
  values = weights.to_weights(model)
  return _value_and_grads(model.config, values, batch, config, count)[1]


@pytest.mark.parametrize(
  "num_streams, remat",
  [(2, 0), pytest.param(2, 1, marks=pytest.mark.slow), (0, 0)],
)
def test_equals_a_plain_reading(num_streams, remat):
  streams = dataclasses.replace(MODEL.streams, num_streams=num_streams)
  model = make_model(dataclasses.replace(MODEL, streams=streams))
  batch = make_batch()
  weight = CONFIG.stream_weight if num_streams else 1.0
  config = dataclasses.replace(
    CONFIG, stream_weight=weight, remat_logits=bool(remat)
  )
  metrics = _loss(model, batch, config)
  expected = numpy_loss(model, batch, 0.7, (0.3, 0.2), 0.4)
  assert set(metrics) == set(expected)
  for name in expected:
    np.testing.assert_allclose(metrics[name], expected[name], rtol=2e-6)


def test_accuracy_is_one_on_the_models_own_greedy_text():
  batch = make_batch(rows=(((3, 5),), (), ()))
  model = make_model()
  for i in range(3, 8):
    main, *_ = _run(MODEL)(weights.to_weights(model), batch)
    batch["tokens"][0, i] = np.argmax(np.asarray(main)[0, i - 1])
  metrics = _loss(model, batch, CONFIG)
  assert metrics["accuracy_main"] == 1


def test_prompts_and_other_segments_do_not_count():
  batch = make_batch()
  count = losses.counts(jax.tree.map(jnp.asarray, batch), 2)
  completions = [c for row in ROWS for _, c in row]
  expected = [sum(max(c - j, 0) for c in completions) for j in range(3)]
  assert count.tolist() == expected


def test_the_pruners_loss_moves_the_pruner_alone():
  model, batch = make_model(), make_batch()
  grads = _grads(model, batch, LossConfig(0.0, 0.0, 1.0))
  pruner = weights.paths(MODEL, PruneParam)
  assert pruner == {"pruner/a", "pruner/b"}
  for path, grad in grads.items():
    assert (np.abs(grad).max() > 0) == (path in pruner), path


def test_no_other_loss_moves_the_pruner():
  grads = _grads(make_model(), make_batch(), LossConfig(1.0, 0.1, 0.0))
  for path in ("pruner/a", "pruner/b"):
    assert np.abs(grads[path]).max() == 0
  assert np.abs(grads["streams/embed"]).max() > 0


def test_gradient_of_the_whole_is_the_sum_over_its_parts():
  model, batch = make_model(), make_batch()
  count = losses.counts(jax.tree.map(jnp.asarray, batch), 2)

  def grads(*rows):
    """Of these rows; the others are padding."""
    keep = np.isin(np.arange(len(ROWS)), rows)[:, None]
    part = {name: np.where(keep, x, 0 * x) for name, x in batch.items()}
    return _grads(model, part, CONFIG, count)

  whole, parts = grads(0, 1, 2), [grads(0), grads(1), grads(2)]
  for path, grad in whole.items():
    total = sum(part[path] for part in parts)
    assert np.abs(total).max() > 0
    np.testing.assert_allclose(grad, total, atol=2e-6)


def test_an_empty_batch_has_a_finite_loss():
  batch = {name: np.zeros_like(x) for name, x in make_batch().items()}
  metrics = _loss(make_model(), batch, CONFIG)
  assert metrics["loss"] == 0 and all(np.isfinite(x) for x in metrics.values())


@pytest.mark.slow
def test_wrong_number_of_stream_weights():
  with pytest.raises(UserError, match="3 numbers for 2 streams"):
    losses.loss(make_model(), make_batch(), LossConfig(1.0, (0.1, 0.1, 0.1)))


def test_a_teacher_takes_the_place_of_the_text():
  """Cross-entropy with another model's distribution, by hand."""
  config = dataclasses.replace(
    MODEL, streams=dataclasses.replace(MODEL.streams, num_streams=0)
  )
  model, teacher, batch = (
    make_model(config),
    make_model(config, 1),
    make_batch(),
  )
  total, metrics = losses.loss(model, batch, LossConfig(), teacher=teacher)
  logits = lambda model: np.asarray(
    model.logits(
      forward(
        model,
        batch["tokens"],
        batch["positions"],
        causal_mask(batch["segment_ids"]),
      ).main
    ),
    np.float64,
  )
  said, truth = logits(model), logits(teacher)
  normal = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))
  ce, right, count = 0.0, 0, 0
  for b, i in zip(*np.nonzero(batch["stream_mask"])):
    at = batch["stream_at"][b, i]
    ce -= (np.exp(normal(truth[b, at])) * normal(said[b, at])).sum()
    right += said[b, at].argmax() == truth[b, at].argmax()
    count += 1
  np.testing.assert_allclose(total, ce / count, rtol=1e-5)
  np.testing.assert_allclose(metrics["accuracy_main"], right / count)
  alone, _ = losses.loss(model, batch, LossConfig())
  assert abs(alone - total) > 0.1

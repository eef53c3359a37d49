"""One optimizer step, and a run: start, stop, kill, resume, refuse."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MODEL, make_batch

from spec_stream import sharding, weights
from spec_stream.errors import UserError
from spec_stream.models.lora import LoRAParam
from spec_stream.models.streams import StreamParam
from spec_stream.train import state as states
from spec_stream.train.config import TrainConfig, resolve
from spec_stream.train.step import make_step

ROWS = 4 * (((3, 4), (2, 5)),)  # four rows, so that they can be accumulated
TRAIN = TrainConfig(
  steps=20, learning_rate=0.01, warmup_steps=2, weight_decay=0.1
)


def lora(rank=2, **changes):
  """MODEL with adapters."""
  streams = dataclasses.replace(MODEL.streams, lora_rank=rank, **changes)
  return dataclasses.replace(MODEL, streams=streams)


@functools.cache
def run(model, train, steps=3):
  """(fresh weights, weights after `steps` steps, their metrics, the state)."""
  mesh = sharding.make_mesh()
  state, shardings = states.init(model, train, mesh)
  before = {path: np.array(w) for path, w in state.weights.items()}
  step = make_step(model, train, mesh, shardings)
  history = []
  for _ in range(steps):
    state, metrics = step(state, make_batch(ROWS))
    history.append({name: float(x) for name, x in metrics.items()})
  after = {path: np.array(w) for path, w in state.weights.items()}
  return before, after, history, state


def moved(before, after):
  return {path for path in before if (before[path] != after[path]).any()}


def test_all_weights_move_and_the_loss_falls():
  before, after, history, state = run(MODEL, TRAIN)
  assert moved(before, after) == set(before)
  assert state.frozen == {} and state.step == 3
  assert history[-1]["loss"] < history[0]["loss"]
  rates = [h["learning_rate"] for h in history]
  np.testing.assert_allclose(rates, [0.005, 0.01, 0.01], rtol=1e-6)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_one_large_batch(parts):
  _, whole, one, _ = run(MODEL, TRAIN)
  several = dataclasses.replace(TRAIN, accumulate=parts)
  _, split, many, _ = run(MODEL, several)
  for a, b in zip(one, many):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_allclose(a[name], b[name], rtol=2e-5, atol=1e-6)
  # The first step's numbers have met no rounding of an earlier update.
  np.testing.assert_allclose(one[0]["loss"], many[0]["loss"], rtol=1e-6)


def test_lossless_adapters_leave_the_base_as_it_is():
  model = lora(mode="lossless")
  train = dataclasses.replace(TRAIN, trainable="adapters")
  before, after, history, state = run(model, train)
  adapters = weights.paths(model, *weights.ADAPTERS)
  assert moved(before, after) == adapters == set(state.trained)
  base = set(before) - adapters
  assert set(state.frozen) == base and len(base) == 14
  for path in base:  # to the bit
    assert before[path].tobytes() == after[path].tobytes()
  sizes = [x.size for x in jax.tree.leaves(state.opt_state)]
  count = sum(after[path].size for path in adapters)
  assert sum(n for n in sizes if n > 1) == 2 * count
  # a_0 is 0: the loss is that of the streams and the pruner.
  first = history[0]
  total = first["loss_prune"] + 0.1 * sum(
    first[f"loss_stream_{j}"] for j in (1, 2, 3)
  )
  np.testing.assert_allclose(first["loss"], total, rtol=1e-6)


def test_adapters_of_shared_mode_serve_the_main_stream():
  model = lora(num_streams=0)
  train = dataclasses.replace(TRAIN, trainable="adapters", steps=21)
  before, after, history, _ = run(model, train)
  assert moved(before, after) == weights.paths(model, LoRAParam)
  assert history[-1]["loss_main"] < history[0]["loss_main"]


def test_the_pruner_moves_no_other_weight_not_even_by_clipping():
  """Clipping bites here: a shared norm would couple the two."""
  tight = dataclasses.replace(TRAIN, clip_norm=0.05)
  _, with_pruner, history, _ = run(MODEL, tight)
  heavy = dataclasses.replace(tight, prune_weight=50.0)
  _, with_heavy, _, _ = run(MODEL, heavy)
  assert history[0]["grad_norm"] > 0.05
  for path in with_pruner:
    if not path.startswith("pruner/"):
      assert with_pruner[path].tobytes() == with_heavy[path].tobytes(), path


def test_norms_and_embeddings_do_not_decay():
  """Without a gradient AdamW moves exactly what decays."""
  mesh = sharding.make_mesh()
  state, _ = states.init(lora(map_rank=2), TRAIN, mesh)
  tx = states.optimizer(lora(map_rank=2), TRAIN)

  @jax.jit
  def update(trained):
    ones = jax.tree.map(jnp.ones_like, trained)
    zeros = jax.tree.map(jnp.zeros_like, trained)
    return tx.update(zeros, tx.init(ones), ones)[0]

  updates = update(state.trained)
  still = {path for path, u in updates.items() if not np.any(u)}
  expected = {p for p in updates if p.endswith("/scale")}
  assert still == expected | {"embed/table", "streams/embed"}


@pytest.mark.parametrize(
  "name, half, end",
  [("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("constant", 1.0, 1.0)],
)
def test_schedules(name, half, end):
  config = TrainConfig(
    steps=110, warmup_steps=10, learning_rate=2.0, schedule=name
  )
  rate = states.schedule(config)
  rates = [float(rate(step)) for step in (0, 9, 10, 60, 110)]
  expected = [0.2, 2.0, 2.0, 2 * half, 2 * end]
  np.testing.assert_allclose(rates, expected, atol=1e-5)


def test_next_token_is_the_model_without_streams():
  train = dataclasses.replace(TRAIN, objective="next_token")
  model = resolve(MODEL, train)
  assert model.streams.num_streams == 0
  assert not weights.paths(model, StreamParam)


@pytest.mark.parametrize(
  "model, changes, message",
  [
    (MODEL, dict(schedule="step"), "train.schedule is 'step'"),
    (MODEL, dict(accumulate=0), "train.accumulate must be 1 or more"),
    (MODEL, dict(learning_rate=-1.0), "train.learning_rate must not be"),
    (MODEL, dict(learning_rate=float("nan")), "train.learning_rate must not"),
    (MODEL, dict(stream_weight=(0.1, 0.2)), "2 numbers for 3 streams"),
    (lora(mode="lossless"), {}, "train.trainable=adapters"),
    (
      lora(num_streams=0, rank=0),
      dict(trainable="adapters"),
      "nothing to train",
    ),
    (
      lora(mode="lossless"),
      dict(trainable="adapters", objective="next_token"),
      "would train nothing",
    ),
  ],
)
def test_settings_that_contradict_each_other(model, changes, message):
  with pytest.raises(UserError, match=message):
    resolve(model, dataclasses.replace(TRAIN, **changes))

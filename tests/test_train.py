"""One optimizer step, and a run: start, stop, kill, resume, refuse."""

import dataclasses
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import MODEL, make_batch

from spec_stream import checkpoints, sharding, storage, weights
from spec_stream.errors import UserError
from spec_stream.models.lora import LoRAParam
from spec_stream.models.streams import StreamParam
from spec_stream.train import state as states
from spec_stream.train.config import TrainConfig, resolve
from spec_stream.train.step import make_step

ROWS = 4 * (((3, 4), (2, 5)),)  # four rows, so that they can be accumulated
TRAIN = TrainConfig(
  steps=20, learning_rate=0.01, warmup_steps=2, weight_decay=0.1, clip_norm=0.05
)


def lora(rank=2, model=MODEL, **changes):
  """The model with adapters."""
  streams = dataclasses.replace(model.streams, lora_rank=rank, **changes)
  return dataclasses.replace(model, streams=streams)


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


def test_accumulation_equals_one_large_batch():
  _, _, one, _ = run(MODEL, TRAIN)
  _, _, many, _ = run(MODEL, dataclasses.replace(TRAIN, accumulate=2))
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
  adapters = weights.adapters(model)
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
    first[f"loss_stream_{j}"] for j in (1, 2)
  )
  np.testing.assert_allclose(first["loss"], total, rtol=1e-6)


def test_adapters_of_shared_mode_serve_the_main_stream():
  model = lora(num_streams=0)
  train = dataclasses.replace(TRAIN, trainable="adapters", steps=21)
  before, after, history, _ = run(model, train)
  assert moved(before, after) == weights.paths(model, LoRAParam)
  assert history[-1]["loss_main"] < history[0]["loss_main"]


@pytest.mark.slow
def test_the_pruner_moves_no_other_weight_not_even_by_clipping():
  """Clipping bites here: a shared norm would couple the two."""
  _, with_pruner, history, _ = run(MODEL, TRAIN)
  heavy = dataclasses.replace(TRAIN, prune_weight=50.0)
  _, with_heavy, _, _ = run(MODEL, heavy)
  assert history[0]["grad_norm"] > TRAIN.clip_norm
  for path in with_pruner:
    if not path.startswith("pruner/"):
      assert with_pruner[path].tobytes() == with_heavy[path].tobytes(), path


def test_norms_and_embeddings_do_not_decay():
  """Without a gradient AdamW moves exactly what decays."""
  model = lora(map_rank=2)
  tx = states.optimizer(model, TRAIN)

  @jax.jit
  def update():
    ones = {p: jnp.ones(x.shape) for p, x in weights.shapes(model).items()}
    zeros = jax.tree.map(jnp.zeros_like, ones)
    return tx.update(zeros, tx.init(ones), ones)[0]

  updates = update()
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
    (MODEL, dict(stream_weight=(0.1, 0.2, 0.3)), "3 numbers for 2"),
    (lora(mode="lossless"), {}, "train.trainable=adapters"),
    (lora(), dict(trainable="adapters"), "fresh and untrained"),
    (
      lora(num_streams=0, rank=0),
      dict(trainable="adapters", init_from="base"),
      "nothing to train",
    ),
    (
      lora(mode="lossless"),
      dict(trainable="adapters", init_from="base", objective="next_token"),
      "would train nothing",
    ),
  ],
)
def test_settings_that_contradict_each_other(model, changes, message):
  with pytest.raises(UserError, match=message):
    resolve(model, dataclasses.replace(TRAIN, **changes))


# -- whole runs --------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
  """Runs of one program, in this process and others, share its compilation."""
  folder = str(tmp_path_factory.mktemp("compiled"))
  names = {
    "jax_compilation_cache_dir": folder,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
  }
  before = {name: getattr(jax.config, name) for name in names}
  with pytest.MonkeyPatch.context() as patch:
    for name, value in names.items():
      jax.config.update(name, value)
      patch.setenv(name.upper(), str(value))  # for the processes started here
    yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The workdir of a run that nothing interrupted."""
  with pytest.MonkeyPatch.context() as patch:
    tiny.use_small_data(patch)
    workdir = str(tmp_path_factory.mktemp("finished"))
    assert tiny.train(workdir) == 0
  return workdir


@pytest.fixture
def small_data(monkeypatch):
  tiny.use_small_data(monkeypatch)


def change(**changes):
  return dataclasses.replace(tiny.TRAIN, **changes)


def stop(workdir, step, kind):
  """Runs the same training in a process that a signal meets at `step`."""
  root = pathlib.Path(tiny.__file__).parent.parent
  return subprocess.run(
    [sys.executable, tiny.__file__, workdir, str(step), kind],
    env={**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=300,
  )


def test_a_run_learns_and_keeps_its_last_checkpoints(finished):
  curve = tiny.losses(finished)
  assert list(curve) == list(range(1, 13))
  assert curve[12] < 0.8 * curve[1]
  assert storage.steps(finished) == [8, 12]
  line = open(f"{finished}/metrics.jsonl").readline()
  keys = "loss_main loss_stream_1 accept_1 tokens_per_second"
  for key in [*keys.split(), "learning_rate", "seconds", "eta_seconds"]:
    assert f'"{key}"' in line


def test_kill_9_and_resume_is_exact(finished, tmp_path, small_data):
  workdir = str(tmp_path)
  killed = stop(workdir, 10, "SIGKILL")
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert max(tiny.losses(workdir)) == 10
  last = storage.steps(workdir)[-1]
  assert last in (4, 8)  # 8 may have been on its way
  assert tiny.train(workdir) == 0
  assert tiny.losses(workdir) == tiny.losses(finished)  # bit for bit
  one, two = (checkpoints.load_run(w) for w in (workdir, finished))
  one, two = weights.to_weights(one.model), weights.to_weights(two.model)
  for path in one:
    assert np.array_equal(one[path], two[path]), path


@pytest.mark.slow
def test_ctrl_c_saves_the_step_and_says_so(finished, tmp_path, small_data):
  workdir = str(tmp_path)
  stopped = stop(workdir, 6, "SIGINT")
  assert stopped.returncode == 130, stopped.stderr
  assert stopped.stderr == ""
  assert stopped.stdout.splitlines()[-1].startswith("stopped: step 6 is saved")
  assert storage.steps(workdir) == [4, 6]
  assert tiny.train(workdir) == 0
  assert tiny.losses(workdir) == tiny.losses(finished)


def test_a_finished_run_is_left_alone(finished, small_data, capsys):
  before = sorted(os.walk(finished))
  assert tiny.train(finished) == 0
  assert (
    "already trained for 12 steps: nothing to do" in capsys.readouterr().out
  )
  assert sorted(os.walk(finished)) == before


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(train=change(learning_rate=0.02)), "train.learning_rate=0.01, now"),
    (dict(train=change(seed=1)), "train.seed=0, now it is 1"),
    (dict(seed=3), "data.seed=0, now it is 3"),
    (dict(batch_size=8), "data.batch_size=4, now it is 8"),
    (dict(model=lora(model=tiny.SMALL)), "model.streams.lora_rank=0, now it"),
  ],
)
def test_other_settings_are_another_run(finished, small_data, changes, message):
  with pytest.raises(UserError, match=message):
    tiny.train(finished, **changes)


@pytest.mark.slow
def test_more_steps_go_on(finished, tmp_path, small_data, capsys):
  workdir = str(tmp_path / "run")
  shutil.copytree(finished, workdir)
  longer = change(steps=14, log_every=2, save_every=9)
  assert tiny.train(workdir, train=longer) == 0
  assert "from its checkpoint of step 12" in capsys.readouterr().out
  assert storage.steps(workdir) == [12, 14]


def test_a_loss_that_is_not_finite_keeps_the_checkpoint(tmp_path, small_data):
  with pytest.raises(UserError, match="no longer finite at step"):
    tiny.train(tmp_path, train=change(learning_rate=1e20, save_every=1))
  # Step 1 was fine before its update; what it led to is not saved.
  assert storage.steps(tmp_path) in ([], [1])


def test_init_from_takes_base_weights_and_tokenizer(
  finished, tmp_path, small_data
):
  workdir = str(tmp_path)
  model = lora(model=tiny.SMALL, mode="lossless")
  start = change(trainable="adapters", init_from=finished, steps=2)
  assert tiny.train(workdir, model=model, train=start) == 0
  new, base = checkpoints.load_run(workdir), checkpoints.load_run(finished)
  assert new.tokenizer.hash() == base.tokenizer.hash()
  new, base = weights.to_weights(new.model), weights.to_weights(base.model)
  adapters = weights.adapters(model)
  for path in new:
    if path not in adapters:
      assert new[path].tobytes() == base[path].tobytes(), path
  assert np.any(new["streams/embed"] != base["streams/embed"])


@pytest.mark.parametrize(
  "alike", [pytest.param(True, marks=pytest.mark.slow), False]
)
def test_init_from_goes_on_with_streams_that_are_alike(
  finished, tmp_path, small_data, alike
):
  model = tiny.SMALL
  if not alike:
    streams = dataclasses.replace(model.streams, stream_position="same")
    model = dataclasses.replace(model, streams=streams)
  start = change(init_from=finished, steps=1, learning_rate=0.0, seed=7)
  assert tiny.train(tmp_path, model=model, train=start) == 0
  new, old = checkpoints.load_run(str(tmp_path)), checkpoints.load_run(finished)
  new, old = weights.to_weights(new.model), weights.to_weights(old.model)
  own = weights.adapters(model)
  assert own
  for path in new:
    same = new[path].tobytes() == old[path].tobytes()
    assert same == (alike or path not in own), path


def test_init_from_another_shape(finished, tmp_path, small_data):
  model = dataclasses.replace(tiny.SMALL, ffw_dim=32)
  with pytest.raises(UserError, match="model.ffw_dim=24, here it is 32"):
    tiny.train(tmp_path, model=model, train=change(init_from=finished))

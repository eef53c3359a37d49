"""Placement: one rule a weight, and the same numbers on any mesh."""

import dataclasses
import importlib
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from spec_stream import (
  NoDraft,
  StreamDraft,
  TreeSpec,
  buckets,
  checkpoints,
  decode,
  generate,
  manifest,
  sharding,
  storage,
  weights,
)
from spec_stream.errors import UserError
from spec_stream.hf.config import configure
from spec_stream.models.config import (
  DrafterConfig,
  ModelConfig,
  StreamConfig,
)
from spec_stream.train import state as states
from spec_stream.train.step import make_step

ROOT = pathlib.Path(tiny.__file__).parent.parent
# Everything that can be split is split by 2 x 2.
MODEL = dataclasses.replace(
  tiny.MODEL,
  vocab_size=20,
  num_layers=1,
  streams=StreamConfig(1, 1, lora_rank=2, map_rank=2, prune_rank=2),
)
ROWS = 4 * (((3, 4), (2, 5)),)

STREAMS = [
  StreamConfig(),
  StreamConfig(num_streams=0),
  StreamConfig(lora_rank=4, lora_layers="all", map_rank=2, correction_rank=2),
  StreamConfig(stream_id="rotation", lora_rank=2, mode="lossless"),
]
DRAFTERS = {
  "medusa": DrafterConfig("medusa"),
  "hydra": DrafterConfig("hydra"),
  "redrafter": DrafterConfig("redrafter"),
  "eagle": DrafterConfig("eagle", (("fuse", (0, 1)),)),
}


def config_files():
  names = sorted(p.stem for p in (ROOT / "configs").glob("[!_]*.py"))
  assert {"e2e_nlg", "restaurants"} <= set(names)
  return names


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("streams", STREAMS)
def test_each_weight_matches_one_rule(streams, tied):
  config = ModelConfig(num_layers=3, tie_embeddings=tied, streams=streams)
  for path, x in weights.shapes(config).items():
    rule = sharding.spec(path)  # raises unless exactly one matches
    assert len(rule) in (0, len(x.shape)), path
  assert sharding.spec("blocks/31/ffw_norm/scale") == P()


def test_each_rule_serves_some_weight():
  paths = set()
  for streams in STREAMS:
    for tied in (True, False):
      config = ModelConfig(num_layers=2, tie_embeddings=tied, streams=streams)
      paths |= set(weights.shapes(config))
  every = dict.fromkeys("qkv_bias out_bias ffw_bias head_bias".split(), True)
  config = ModelConfig(
    num_layers=2, tie_embeddings=False, positions="learned", **every
  )
  paths |= set(weights.shapes(config))
  for drafter in DRAFTERS.values():
    paths |= set(weights.shapes(ModelConfig(num_layers=2, drafter=drafter)))
  quantises = importlib.util.find_spec("qwix") is not None
  if quantises:
    config = ModelConfig(num_layers=2, quantize="int8")
    paths |= set(weights.shapes(config))
  for pattern, _ in sharding.RULES:
    if pattern.endswith("_scale") and not quantises:
      continue
    assert any(re.fullmatch(pattern, path) for path in paths), pattern


@pytest.mark.parametrize("name", config_files())
def test_the_configs_split_over_two_by_two(name, monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT))
  config = importlib.import_module(f"configs.{name}").get_config()
  settings = config.model.to_dict()
  if settings["checkpoint"]:
    pytest.skip("its shape is that of a checkpoint to be given")
  model, _ = configure(settings, config.data.vocab_size)
  mesh = jax.sharding.AbstractMesh((2, 2, 2), sharding.AXES)
  sharding.weight_shardings(mesh, weights.shapes(model))
  sharding.check_batch(mesh, config.data.batch_size, config.train.accumulate)


def test_a_mesh_that_does_not_fit_the_devices():
  count = jax.device_count()
  assert sharding.make_mesh().shape == {"data": count, "fsdp": 1, "tensor": 1}
  with pytest.raises(UserError, match=f"does not fit {count} device"):
    sharding.make_mesh(data=1, fsdp=count + 1)
  with pytest.raises(UserError, match=f"does not fit {count} device"):
    sharding.make_mesh(tensor=count + 1)
  with pytest.raises(UserError, match="-1 at most once"):
    sharding.make_mesh(data=-1, fsdp=-1)
  with pytest.raises(UserError, match="sizes of 1 or more"):
    sharding.make_mesh(data=0)


@pytest.mark.parametrize(
  "sizes, changes, message",
  [
    ((1, 1, 4), {}, "mesh.tensor=4 must divide model.num_kv_heads=2"),
    ((1, 5, 1), dict(vocab_size=20), "mesh.fsdp=5 must divide model.width=16"),
    ((1, 1, 2), dict(ffw_dim=23), "mesh.tensor=2 must divide model.ffw_dim=23"),
    ((1, 2, 2), dict(vocab_size=19), "must divide the vocabulary"),
  ],
)
def test_what_does_not_divide_is_named(sizes, changes, message):
  mesh = jax.sharding.AbstractMesh(sizes, sharding.AXES)
  shapes = weights.shapes(dataclasses.replace(MODEL, **changes))
  with pytest.raises(UserError, match=message):
    sharding.weight_shardings(mesh, shapes)


def test_a_batch_that_does_not_divide():
  mesh = jax.sharding.AbstractMesh((2, 2, 1), sharding.AXES)
  sharding.check_batch(mesh, 8, 2)
  with pytest.raises(UserError, match="batch_size=12 must be a multiple of 8"):
    sharding.check_batch(mesh, 12, 2)


# -- eight devices -----------------------------------------------------------


def steps(mesh, accumulate=1):
  """(losses of two steps, the state after them)."""
  train = dataclasses.replace(tiny.TRAIN, accumulate=accumulate)
  state, shardings = states.init(MODEL, train, mesh)
  step = make_step(MODEL, train, mesh, shardings)
  history = []
  for seed in range(2):
    state, metrics = step(state, tiny.make_batch(ROWS, vocab=20, seed=seed))
    history.append({name: float(x) for name, x in metrics.items()})
  return history, state


def on_eight_devices(workdir):
  """Run by `python tests/test_sharding.py WORKDIR` below."""
  mesh = sharding.make_mesh(2, 2, 2)
  history, state = steps(mesh)
  placed = state.trained["blocks/0/attention/qkv/kernel"].sharding.spec
  assert placed == P("fsdp", "tensor", None, None)
  # The optimizer's moments lie where their weights do.
  for moment in jax.tree.leaves(state.opt_state):
    if moment.ndim:
      assert moment.sharding.mesh.size == 8
  shard = state.opt_state[-1][0].mu["embed/table"].addressable_shards[0]
  assert shard.data.shape == (5, 16)
  # As many as a real model's: their programs must not wait for one another.
  rows = jax.sharding.NamedSharding(mesh, P("fsdp", "tensor"))
  many = {str(i): np.arange(i, i + 128.0).reshape(8, 16) for i in range(100)}
  placed = {name: jax.device_put(x, rows) for name, x in many.items()}
  assert manifest.digests(placed) == manifest.digests(jax.device_put(many))
  with storage.Saver(workdir, keep=1) as saver:
    saver.save(2, state.weights, state.opt_state, tiny.iterator())
  other, _ = checkpoints.load_weights(
    workdir, MODEL, mesh=sharding.make_mesh(4, 1, 2)
  )
  for path, x in state.weights.items():
    assert np.array_equal(x, other[path]), path
  print(json.dumps(history))


def decode_on_eight_devices():
  """Run by `python tests/test_sharding.py decode`: tokens on three meshes."""
  jax.config.update("jax_enable_x64", True)
  kinds = dict(dtype="float64", param_dtype="float64")
  model = dataclasses.replace(MODEL, **kinds)
  drawn, rng = weights.init(model, 0), np.random.default_rng(0)
  sizes = (3, 5, 2, 7, 4, 3, 6, 2)
  prompts = [rng.integers(1, 20, size).tolist() for size in sizes]
  drafters = [NoDraft(), StreamDraft(TreeSpec("best_first", num_nodes=6))]

  def tokens(values, temperature):
    for drafter in drafters:
      found = generate(
        weights.to_model(model, values),
        prompts,
        drafter,
        max_new_tokens=50,
        temperature=temperature,
        seed=3,
      )
      yield [g.token_ids for g in found]

  grew, grown = set(), decode.Decoder._grown

  def grow(decoder, state, **options):
    state = grown(decoder, state, **options)
    grew.add(state.cache.num_slots)
    return state

  decode.Decoder._grown = grow
  for temperature in (0.0, 0.8):
    buckets.SMALLEST = 256
    expected, same = tokens(drawn, temperature)
    assert expected == same
    assert not grew
    buckets.SMALLEST = 16
    for mesh in ((8, 1, 1), (2, 4, 1), (2, 2, 2)):
      place = sharding.weight_shardings(
        sharding.make_mesh(*mesh), weights.shapes(model)
      )
      placed = {
        path: jax.device_put(drawn[path], place[path]) for path in drawn
      }
      for found in tokens(placed, temperature):
        assert found == expected, (mesh, temperature)
      assert grew == {48, 96}, grew  # of 24
      grew.clear()


def run_on_eight_devices(argument):
  done = subprocess.run(
    [sys.executable, __file__, argument],
    env={
      **os.environ,
      "PYTHONPATH": str(ROOT),
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    },
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr
  return done


@pytest.mark.slow
def test_eight_devices_decode_the_tokens_of_one():
  run_on_eight_devices("decode")


def test_eight_devices_give_the_numbers_of_one(tmp_path):
  eight = run_on_eight_devices(str(tmp_path))
  one, state = steps(sharding.make_mesh())
  # Adam's first update is g / |g|: it makes of a rounding of a tiny gradient a
  # step of full size, which the second step's numbers show.
  for a, b, rtol in zip(
    one, json.loads(eight.stdout), (1e-5, 1e-3), strict=True
  ):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_allclose(
        a[name], b[name], rtol=rtol, atol=1e-6, err_msg=name
      )
  # What eight devices saved, this one reads.
  values, step = checkpoints.load_weights(tmp_path, MODEL)
  assert step == 2
  for path, x in state.weights.items():
    np.testing.assert_allclose(values[path], x, rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
  if sys.argv[1] == "decode":
    decode_on_eight_devices()
  else:
    on_eight_devices(sys.argv[1])

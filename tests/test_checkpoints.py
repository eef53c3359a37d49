"""Runs on disk: what comes back, and what a damaged one says."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from spec_stream import checkpoints, manifest, sharding, storage, weights
from spec_stream.data.pipeline import DataConfig
from spec_stream.data.tokenizer import Tokenizer
from spec_stream.errors import UserError
from spec_stream.models.config import to_dict
from spec_stream.train import start
from spec_stream.train import state as states


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """(workdir of a run with checkpoints 3 and 5, the weights of step 5)."""
  workdir = tmp_path_factory.mktemp("run")
  texts = (text for pair in tiny.pairs() for text in pair)
  tokenizer = Tokenizer.train(texts, tiny.DATA["vocab_size"])
  model = dataclasses.replace(tiny.SMALL, vocab_size=tokenizer.vocab_size)
  data = DataConfig(**tiny.DATA)
  checkpoints.write_config(workdir, start.describe(model, data, tiny.TRAIN))
  tokenizer.save(str(workdir / "tokenizer.json"))
  state, _ = states.init(model, tiny.TRAIN, sharding.make_mesh())
  source = tiny.iterator()
  about = tokenizer.hash(), to_dict(model)
  with storage.Saver(workdir, 2, *about) as saver:
    for step in range(1, 6):
      next(source)
      if step in (1, 3, 5):
        one = {path: x + step for path, x in state.weights.items()}
        saver.save(step, one, state.opt_state, source)
  return workdir, one, state


@pytest.fixture
def workdir(saved, tmp_path):
  """A copy to damage."""
  return pathlib.Path(shutil.copytree(saved[0], tmp_path / "run"))


def contents(folder):
  return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def same(model, values):
  found = weights.to_weights(model)
  return found.keys() == values.keys() and all(
    np.array_equal(found[path], values[path]) for path in values
  )


def refuses(workdir, message, **step):
  """load_run says `message` in one line and writes nothing."""
  before = contents(workdir) if workdir.exists() else {}
  with pytest.raises(UserError, match=message) as caught:
    checkpoints.load_run(workdir, **step)
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
  assert (contents(workdir) if workdir.exists() else {}) == before


def test_load_run_gives_back_what_was_saved(saved):
  workdir, values, state = saved
  run = checkpoints.load_run(workdir)
  assert run.step == 5 and same(run.model, values)
  assert run.config["train"]["steps"] == tiny.TRAIN.steps
  assert to_dict(run.model.config) == run.config["model"]
  assert run.tokenizer.decode(run.tokenizer.encode("red")) == "red"
  older = checkpoints.load_run(str(workdir), step=3)
  assert older.step == 3
  assert same(older.model, {p: x + 3 for p, x in state.weights.items()})


def test_the_last_ones_are_kept(saved):
  assert storage.steps(saved[0]) == [3, 5]


def test_restore_gives_back_optimizer_and_iterator(workdir, saved):
  _, values, state = saved
  target = jax.tree.map(np.zeros_like, (state.weights, state.opt_state))
  target = jax.device_put(target, jax.devices()[0])
  fresh = tiny.iterator()
  with storage.Saver(workdir, keep=2) as saver:
    found, opt_state = saver.restore(5, *target, fresh)
  assert jax.tree.all(jax.tree.map(np.array_equal, found, values))
  assert jax.tree.structure(opt_state) == jax.tree.structure(state.opt_state)
  assert jax.tree.all(jax.tree.map(np.array_equal, opt_state, state.opt_state))
  whole = tiny.iterator()
  expected = [next(whole) for _ in range(8)][5:]
  assert [next(fresh) for _ in range(3)] == expected


def test_a_half_written_checkpoint_is_none(workdir):
  shutil.copytree(
    workdir / "checkpoints/5",
    workdir / "checkpoints/9.orbax-checkpoint-tmp",
  )
  assert storage.steps(workdir) == [3, 5]
  assert checkpoints.load_run(workdir).step == 5


def files(workdir, item):
  folder = workdir / "checkpoints/5" / item
  return sorted(p for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("damage", ["delete", "truncate", "empty"])
def test_damaged_weights_are_an_error_or_do_no_harm(workdir, saved, damage):
  """Whatever file is damaged: the weights come back whole, or one line."""
  refused = []
  for path in files(workdir, "weights"):
    good = path.read_bytes()
    if damage == "delete":
      path.unlink()
    else:
      path.write_bytes(good[: len(good) // 2 if damage == "truncate" else 0])
    before = contents(workdir)
    try:
      assert same(checkpoints.load_run(workdir).model, saved[1]), path
    except UserError as e:
      assert "checkpoints/5 cannot be read" in str(e)
      assert "\n" not in str(e)
      refused.append(path)
    assert contents(workdir) == before
    path.write_bytes(good)
  # The arrays themselves are among what cannot be missed.
  biggest = max(files(workdir, "weights"), key=lambda p: p.stat().st_size)
  assert biggest in refused


READS = """
import asyncio, gc, pathlib, sys
import jax, numpy as np
from spec_stream import storage
from spec_stream.errors import UserError
workdir = sys.argv[1]
one = np.random.default_rng(0).random((64, 64), np.float32)
values = {str(name): jax.numpy.asarray(one) for name in range(60)}
storage.write_base(workdir, values)
files = [p for p in pathlib.Path(workdir, "base").rglob("d/*") if p.is_file()]
largest = max(files, key=lambda p: p.stat().st_size)
largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
for _ in range(20):
  try:
    storage.read_base(workdir, values)
  except UserError:
    print("refused")
gc.collect()

async def fail():
  raise ValueError("of the app")

async def app():
  asyncio.ensure_future(asyncio.gather(fail()))
  await asyncio.sleep(0.1)

asyncio.run(app())

class Left:
  def __del__(self):
    raise KeyError("left behind")

Left()
gc.collect()
"""


def test_reads_under_way_when_one_fails_say_nothing(tmp_path):
  """Orbax closes the loop of 60 reads when one of them has failed; what others
  complain of is heard all the same."""
  done = subprocess.run(
    [sys.executable, "-c", READS, str(tmp_path)],
    env=dict(os.environ, PYTHONPATH=str(pathlib.Path(__file__).parents[1])),
    capture_output=True,
    text=True,
  )
  assert done.stdout.split() == 20 * ["refused"], done.stderr
  assert "Event loop is closed" not in done.stderr
  assert done.stderr.count("never retrieved") == 1
  assert not re.search("orbax|tensorstore|OCDBT", done.stderr, re.I)
  assert "ValueError: of the app" in done.stderr
  assert "KeyError: 'left behind'" in done.stderr


def test_a_missing_item(workdir):
  shutil.rmtree(workdir / "checkpoints/5/weights")
  refuses(workdir, "checkpoints/5 cannot be read")


def test_resume_from_damage_is_refused(workdir, saved):
  _, _, state = saved
  arrays = [p for p in files(workdir, "optimizer") if p.parent.name == "d"]
  iterators = [p for p in files(workdir, "data") if p.suffix == ".json"]
  for paths in (arrays, iterators):
    good = [path.read_bytes() for path in paths]
    assert good
    for path, content in zip(paths, good):
      path.write_bytes(content[: len(content) // 2])
    with storage.Saver(workdir, keep=2) as saver:
      with pytest.raises(UserError, match="checkpoints/5 cannot be read"):
        saver.restore(5, state.weights, state.opt_state, tiny.iterator())
    for path, content in zip(paths, good):
      path.write_bytes(content)


def test_another_model_than_the_saved_one(workdir):
  config = checkpoints.read_config(workdir)
  config["model"]["ffw_dim"] = 48
  checkpoints.write_config(workdir, config)
  refuses(workdir, r"differ, such as .*, saved .*24.*, expected .*48")


def test_settings_that_leave_all_shapes_as_they_are(workdir):
  config = checkpoints.read_config(workdir)
  config["model"]["rope_theta"] = 500.0
  checkpoints.write_config(workdir, config)
  refuses(workdir, "model.rope_theta was 10000.0, and there it is 500.0")


def test_numbers_that_are_not_those_that_were_saved(workdir, saved):
  """As a flipped bit in a compressed block may make them."""
  path = workdir / "checkpoints/5/meta/metadata"
  meta = json.loads(path.read_text())
  meta["digests"]["final_norm/scale"] ^= 1
  path.write_text(json.dumps(meta))
  refuses(workdir, "damaged: .* of 1 arrays, such as final_norm/scale")
  meta["digests"]["final_norm/scale"] ^= 1
  meta["optimizer"]["0"] += 1
  path.write_text(json.dumps(meta))
  assert same(checkpoints.load_run(workdir).model, saved[1])
  _, _, state = saved
  with storage.Saver(workdir, keep=2) as saver:
    with pytest.raises(UserError, match="arrays, such as optimizer/0,"):
      saver.restore(5, state.weights, state.opt_state, tiny.iterator())


@pytest.mark.parametrize(
  "dtype", "float32 bfloat16 float16 int8 int4 int32 bool float64".split()
)
def test_a_digest_changes_with_any_word(x64, dtype):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.integers(0, 2, (3, 4, 5)), dtype)
  whole = manifest.digests({"a": x})
  assert manifest.digests({"a": x + 0 if dtype != "bool" else x}) == whole
  other = 1 - x if dtype != "bool" else ~x
  seen = {whole["a"]}
  for i in range(60):
    at = np.unravel_index(i, x.shape)
    seen.add(manifest.digests({"a": x.at[at].set(other[at])})["a"])
  assert len(seen) == 61
  moved = jnp.roll(x, 1, 2)
  assert manifest.digests({"a": moved}) != whole


def test_another_tokenizer_of_the_same_size(workdir):
  path = workdir / "tokenizer.json"
  words = json.loads(path.read_text())
  merges = words["model"]["merges"]
  merges[0], merges[1] = merges[1], merges[0]
  path.write_text(json.dumps(words))
  refuses(workdir, "is not the one that .*step 5 was trained with")


def test_a_checkpoint_without_its_manifest_is_read_no_less(workdir, saved):
  """Those of earlier versions have none."""
  (workdir / "checkpoints/5/meta/metadata").write_text('{"step": 5}')
  assert same(checkpoints.load_run(workdir).model, saved[1])


@pytest.mark.parametrize(
  "text", ["[]", "{", '{"weights": {"a": 3}}', '{"weights": {"a": []}}']
)
def test_a_manifest_that_is_none(workdir, text):
  (workdir / "checkpoints/5/meta/metadata").write_text(text)
  refuses(workdir, "checkpoints/5")


def test_manifests_number_the_arrays_of_an_optimizer():
  """The keys of those that were saved must be those that are looked for."""
  arrays = manifest.leaves({"mu": jnp.zeros(2), "nu": (jnp.ones(2),)})
  assert list(arrays) == ["0", "1"]


def test_what_is_missing_is_named(workdir, tmp_path):
  refuses(tmp_path / "nowhere", "nowhere: no such directory")
  refuses(tmp_path, "no config.json")
  refuses(workdir, "no checkpoint of step 4; it has: 3, 5", step=4)
  tokenizer = (workdir / "tokenizer.json").read_text()
  (workdir / "tokenizer.json").write_text(tokenizer[:500])
  refuses(workdir, "tokenizer.json")
  (workdir / "tokenizer.json").unlink()
  refuses(workdir, "no tokenizer.json")
  (workdir / "tokenizer.json").write_text(tokenizer)
  shutil.rmtree(workdir / "checkpoints")
  refuses(workdir, "no complete checkpoint")


def test_a_tokenizer_of_another_vocabulary(workdir):
  other = Tokenizer.train(["red green blue"], 270)
  other.save(str(workdir / "tokenizer.json"))
  size = other.vocab_size
  refuses(workdir, rf"has {size} tokens, but the model has \d+")


@pytest.mark.parametrize(
  "text, words",
  [
    *((text, "config") for text in ("", '{"model": ', "[]", "{}")),
    (
      '{"model": {"widht": 3}}',
      "config.json: model has no key 'widht'; did you mean 'width'?",
    ),
  ],
)
def test_a_config_that_is_none(workdir, text, words):
  (workdir / "config.json").write_text(text)
  refuses(workdir, words)


def test_config_names_the_commit_of_a_checkout(saved):
  config = json.loads((saved[0] / "config.json").read_text())
  assert set(config) == {"model", "data", "train", "commit"}
  assert config["commit"] == checkpoints.git_commit()

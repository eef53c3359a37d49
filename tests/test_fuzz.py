"""Files damaged at random: a UserError in one line or the right answer.

Each reader of files meets hundreds or thousands of inputs that were valid and
then had bytes or values changed. Any other exception fails, a hang fails, and
what is read in spite of the damage is what another reader finds in the file.
The short run has every tenth input.
"""

import contextlib
import dataclasses
import gc
import json
import math
import pathlib
import random
import shutil
import signal

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from test_bad_checkpoints import CONFIG, WEIGHTS, tensors, write
from tiny import SMALL, iterator

from spec_stream import (
  auto,
  checkpoints,
  cost_model,
  report,
  requests,
  storage,
  tree,
  weights,
)
from spec_stream.data import chat_prompts, conversations, rows
from spec_stream.data.tokenizer import Tokenizer
from spec_stream.drafters import registry
from spec_stream.drafters.none import NoDraft
from spec_stream.drafters.streams import StreamDraft
from spec_stream.errors import UserError
from spec_stream.hf import checkpoint as hf
from spec_stream.hf import config as hf_config
from spec_stream.models import config as model_config

SECONDS = 20  # an input that takes longer hangs

# -- damage ------------------------------------------------------------------

ODD = (
  None,
  True,
  False,
  0,
  1,
  -1,
  2,
  3,
  7,
  2**31,
  10**40,
  0.5,
  -0.0,
  1e308,
  float("nan"),
  float("inf"),
  "",
  "0",
  "linear",
  "\ud83d",
  "é\u2028\n",
  [],
  [1],
  [[]],
  {},
  {"a": 1},
  {"type": "linear"},
)


def bytes_changed(rng: random.Random, data: bytes) -> bytes:
  """Some bytes flipped, cut out, doubled or put in; or the end cut off."""
  data = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 5))):
    at = rng.randrange(len(data) + 1)
    kind = rng.randrange(6)
    if kind == 0:
      del data[at:]
    elif kind == 1:
      del data[at : at + rng.randrange(1, 9)]
    elif kind == 2:
      data[at:at] = bytes(
        rng.randrange(256) for _ in range(rng.randrange(1, 9))
      )
    elif kind == 3:
      data[at:at] = data[at : at + rng.randrange(1, 40)]
    elif kind == 4:
      data[at:at] = rng.choice((b"[" * 3000, b'{"a":' * 2000, b"9" * 5000))
    elif at < len(data):
      data[at] ^= 1 << rng.randrange(8)
  return bytes(data)


def value_changed(rng: random.Random, value):
  """One place of a JSON value changed, left out or renamed."""
  if isinstance(value, dict) and value and rng.random() < 0.9:
    key = rng.choice(sorted(value))
    rest = {k: v for k, v in value.items() if k != key}
    kind = rng.randrange(8)
    if kind == 0:
      return rest
    if kind == 1:
      return rest | {key + rng.choice("_x"): value[key]}
    if kind == 2:
      return value | {rng.choice(("rope_scaling", "x", "")): rng.choice(ODD)}
    return rest | {key: value_changed(rng, value[key])}
  if isinstance(value, list) and value and rng.random() < 0.7:
    at = rng.randrange(len(value))
    return [*value[:at], value_changed(rng, value[at]), *value[at + 1 :]]
  if isinstance(value, int | float) and rng.random() < 0.4:
    return rng.choice((value + 1, value * 2, -value, value / 3, str(value)))
  return rng.choice(ODD)


def json_changed(rng: random.Random, value) -> bytes:
  if rng.random() < 0.3:
    return bytes_changed(rng, json.dumps(value).encode())
  for _ in range(rng.choice((1, 1, 2, 3))):
    value = value_changed(rng, value)
  return json.dumps(value).encode()


class Hang(BaseException):
  """No reader may take it for an error of the file."""


@contextlib.contextmanager
def in_time():
  def stop(*_):
    raise Hang(f"longer than {SECONDS} s")

  before = signal.signal(signal.SIGALRM, stop)
  signal.alarm(SECONDS)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def read(reader, *args):
  """What a reader makes of an input; None for a proper refusal."""
  try:
    with in_time():
      return reader(*args)
  except UserError as e:
    assert str(e).strip() and len(str(e)) <= 1000
    return None


COUNTS = {
  "hf config": 3000,
  "hf weights": 2000,
  "rows": 2500,
  "prompts": 1200,
  "questions": 500,
  "conversations": 500,
  "run config": 1500,
  "trees": 500,
  "results": 400,
  "costs": 300,
  "run": 200,
}
assert sum(COUNTS.values()) >= 10_000


@pytest.fixture(
  params=[
    pytest.param(10, id="short"),
    pytest.param(1, id="all", marks=pytest.mark.slow),
  ]
)
def times(request):
  return lambda name: range(COUNTS[name] // request.param)


# -- checkpoints of others -----------------------------------------------------


def test_hf_config(tmp_path, times):
  directory = tmp_path / "hf"
  directory.mkdir()
  path = directory / "config.json"
  extra = {
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "attention_bias": False,
  }
  good = 0
  for seed in times("hf config"):
    rng = random.Random(seed)
    whole = CONFIG | {k: x for k, x in extra.items() if rng.random() < 0.5}
    path.write_text(json.dumps(whole))
    before = hf_config.read_config(directory)
    path.write_bytes(json_changed(rng, whole))
    found = read(hf_config.read_config, directory)
    if found is None:
      continue
    good += 1
    # Nothing is ignored: what says another thing is another model.
    now = json.loads(path.read_text())
    fields = {
      "vocab_size": "vocab_size",
      "hidden_size": "width",
      "intermediate_size": "ffw_dim",
      "num_hidden_layers": "num_layers",
      "num_attention_heads": "num_heads",
      "max_position_embeddings": "max_positions",
      "rms_norm_eps": "norm_eps",
    }
    for key, field in fields.items():
      if now["model_type"] == "llama" and now.get(key) is not None:
        assert math.isclose(getattr(found, field), now[key]), (seed, key)
    if found == before:
      harmless = {"torch_dtype", "bos_token_id", "eos_token_id", "x", "x_", ""}
      odd = {
        k
        for k in {*now, *whole}
        if k not in harmless
        and now.get(k) != whole.get(k)
        and (now.get(k) or whole.get(k))
      }
      # Keys left out, or null, may mean what was there before.
      odd = {k for k in odd if now.get(k) not in (None, False, {}, [], "")}
      assert odd <= {"rope_theta", "hidden_act"}, (seed, odd)
  assert good > 10


def test_hf_weights(tmp_path, times):
  directory = write(tmp_path / "hf")
  path = directory / WEIGHTS
  whole = path.read_bytes()
  length = int.from_bytes(whole[:8], "little")
  header = json.loads(whole[8 : 8 + length])
  config = hf_config.read_config(directory)
  good = 0
  for seed in times("hf weights"):
    rng = random.Random(seed)
    if rng.random() < 0.6:
      text = json_changed(rng, header)
      size = len(text) if rng.random() < 0.9 else rng.randrange(2**40)
      path.write_bytes(size.to_bytes(8, "little") + text + whole[8 + length :])
    elif rng.random() < 0.5:
      path.write_bytes(bytes_changed(rng, whole))
    else:  # within the numbers: nothing can tell, but they must arrive
      at = rng.randrange(8 + length, len(whole))
      path.write_bytes(
        whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :]
      )
    found = read(hf.read_weights, directory, config)
    if found is None:
      continue
    good += 1
    there = safetensors.numpy.load_file(path)
    assert {k: v.shape for k, v in there.items()} == {
      k: v.shape for k, v in tensors().items()
    }
    for name, key in (
      ("embed/table", "model.embed_tokens.weight"),
      ("final_norm/scale", "model.norm.weight"),
    ):
      np.testing.assert_array_equal(found[name], there[key])
  assert good > 10


# -- text files ----------------------------------------------------------------


def plain_lines(path: pathlib.Path):
  """JSON objects of a file up to the first line that is none."""
  found = []
  try:
    text = path.read_bytes().decode()
  except UnicodeDecodeError:
    return None
  for line in text.split("\n"):
    if line.strip():
      try:
        found.append(json.loads(line))
      except (ValueError, RecursionError):
        break
  return found


def lines_changed(rng, values) -> bytes:
  lines = [json.dumps(x, ensure_ascii=False).encode() for x in values]
  at = rng.randrange(len(lines))
  lines[at] = json_changed(rng, values[at])
  return b"\n".join(lines) + b"\n"


def test_rows(tmp_path, times):
  path = tmp_path / "train.jsonl"
  values = [{"a": f"text {i} é", "b": "x" * i, "c": i} for i in range(4)]
  good = 0

  def all_rows():
    return [row for _, row in rows.read(str(path), ("a", "b"))]

  for seed in times("rows"):
    rng = random.Random(seed)
    path.write_bytes(lines_changed(rng, values))
    found = read(all_rows)
    if found is not None:
      good += 1
      assert repr(found) == repr(plain_lines(path)), seed  # nan is not nan
      assert all(isinstance(r["a"], str) for r in found)
  assert good > 10


def test_prompts(tmp_path, times):
  path = tmp_path / "p.jsonl"
  values = [
    {"prompt": "red", "seed": 3},
    {"token_ids": [1, 40, 2]},
    {"turns": ["one", "two"], "category": "c", "question_id": 3},
  ]
  for seed in times("prompts"):
    rng = random.Random(seed)
    path.write_bytes(lines_changed(rng, values))
    found = read(requests.read, None, None, str(path), 0, False)
    for request in found or ():
      assert (request.text is None) != (request.token_ids is None)
      assert 0 <= request.seed < 2**32


def test_questions(tmp_path, times):
  path = tmp_path / "question.jsonl"
  values = [
    {"question_id": i, "category": "c", "turns": ["one", "two"]}
    for i in range(3)
  ]
  for seed in times("questions"):
    path.write_bytes(lines_changed(random.Random(seed), values))
    found = read(lambda: list(chat_prompts.read(str(path))))
    for question in found or ():
      assert question.turns and all(isinstance(t, str) for t in question.turns)


def test_conversations(tmp_path, times):
  path = tmp_path / "talk.json"
  talk = [
    {"from": "human", "value": "one"},
    {"from": "gpt", "value": "two"},
  ]
  values = [{"id": str(i), "conversations": talk} for i in range(3)]
  for seed in times("conversations"):
    path.write_bytes(json_changed(random.Random(seed), values))
    found = read(lambda: list(conversations.read(str(path))))
    for _, turns in found or ():
      assert all(isinstance(text, str) for _, text in turns)


def test_trees(tmp_path, times):
  paths = [[0], [1], [0, 0], [0, 1], [1, 0]]
  for seed in times("trees"):
    rng = random.Random(seed)
    try:
      value = json.loads(json_changed(rng, paths))
    except (ValueError, RecursionError):
      continue
    if not isinstance(value, list):
      continue
    found = read(tree.check_paths, value)
    for path in found or ():
      assert path and min(path) >= 0 and (path[:-1] in found or not path[:-1])


# -- runs ----------------------------------------------------------------------


def test_run_config(tmp_path, times):
  heads = model_config.DrafterConfig("medusa", (("length", 3),))
  model = dataclasses.replace(SMALL, drafter=heads)
  whole = {"model": model_config.to_dict(model), "data": {"dataset": "e2e_nlg"}}
  path = tmp_path / "config.json"

  def configure():
    found = checkpoints.read_config(tmp_path)["model"]
    found = model_config.from_dict(found)
    if found.drafter.name:
      registry.options(found.drafter)
    return found

  for seed in times("run config"):
    rng = random.Random(seed)
    path.write_bytes(json_changed(rng, whole))
    found = read(configure)
    if found is not None:  # another model may be: its shapes must be some
      assert model_config.from_dict(model_config.to_dict(found)) == found


def test_results(tmp_path, times):
  row = {
    "method": "streams",
    "run_id": "1",
    "dataset": "e2e_nlg",
    "tree": "best_first",
    "tree_nodes": 4,
    "tokens_per_call": 2.0,
    "speedup": 1.5,
    "speedup_low": 1.4,
    "speedup_high": 1.6,
    "step_cost": 1.2,
    "tokens_per_call_by_position": [1.0, 2.0],
    "accept_by_depth": [0.5, 0.2],
  }
  plain = row | {"method": "none", "tree": None, "tree_nodes": 1}
  config = {
    "model": model_config.to_dict(SMALL),
    "data": {"dataset": "e2e_nlg"},
  }
  (tmp_path / "config.json").write_text(json.dumps(config))
  for seed in times("results"):
    rng = random.Random(seed)
    changed = lines_changed(rng, [plain, row])
    (tmp_path / "results.jsonl").write_bytes(changed)
    read(lambda: report.render(report.read(str(tmp_path))))


def test_costs(tmp_path, times):
  whole = {
    "acceptance": {
      "k": {"streams": {"tokens": [3], "steps": [2], "accepted": [[[0, 1]]]}}
    },
    "step_cost": {"h": {"none 1 0 0": 1.0, "streams 2 1 0": 1.3}},
  }
  path, good = tmp_path / auto.FILE, 0
  drafter = StreamDraft(tree.TreeSpec("best_first", 2)).resolve(SMALL)
  off = NoDraft().resolve(SMALL)
  for seed in times("costs"):
    path.write_bytes(json_changed(random.Random(seed), whole))
    found = read(auto._read, path)
    if found is None:
      continue
    for counts in found["acceptance"].values():
      for costs in found["step_cost"].values():
        model = cost_model.CostModel(1, counts, costs)
        assert model.best([drafter], off).speedup > 0
        good += 1
  assert good


def test_run(tmp_path, times):
  """Any file of a run damaged: it is refused or read as it was."""
  texts = ["It is red.", "It is small and green."] * 9
  tokenizer = Tokenizer.train(texts, 280)
  config = dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size)
  whole = tmp_path / "whole"
  about = {"model": model_config.to_dict(config)}
  checkpoints.write_config(whole, about)
  tokenizer.save(str(whole / "tokenizer.json"))
  expected = weights.init(config, 1)
  with storage.Saver(whole, 1, tokenizer.hash(), about["model"]) as saver:
    saver.save(3, expected, {"a": np.zeros(3)}, iterator())
  expected = jax.device_get(expected)
  files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
  good = 0
  for seed in times("run"):
    rng = random.Random(seed)
    damaged = tmp_path / "damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(whole, damaged)
    path = damaged / rng.choice(files)
    if rng.random() < 0.1:
      path.unlink()
    else:
      path.write_bytes(bytes_changed(rng, path.read_bytes()))
    run = read(checkpoints.load_run, damaged)
    if run is None:
      continue
    good += 1
    found = weights.to_weights(run.model)
    for name, x in jax.device_get(found).items():
      np.testing.assert_array_equal(x, expected[name], str(path))
  gc.collect()
  assert good > 0

"""Runs side by side: which may be, what is warned of, where speed-ups are from.

Two small runs are written to disk; launch/evaluate.py is in test_launch.
"""

import dataclasses
import json

import pytest
from test_launch import write_run
from tiny import DATA, MODEL, pairs

from spec_stream import checkpoints, compare, task
from spec_stream.data.tokenizer import Tokenizer
from spec_stream.drafters.streams import StreamDraft
from spec_stream.errors import UserError
from spec_stream.models.config import StreamConfig
from spec_stream.tree import TreeSpec

TEXTS = [text for pair in pairs() for text in pair]
TOKENIZER = Tokenizer.train(TEXTS, 280)
PLAIN = StreamConfig(num_streams=0, num_stream_layers=1)
LORA = StreamConfig(num_streams=2, num_stream_layers=1, lora_rank=2)
TREE = StreamDraft(TreeSpec(num_nodes=4))


def write(
  directory, streams, step=3, tokenizer=TOKENIZER, train=(), model=MODEL, **data
):
  model = dataclasses.replace(
    model,
    vocab_size=tokenizer.vocab_size,
    max_positions=64,
    streams=streams,
  )
  data = DATA | {"dataset": "restaurants"} | data
  write_run(directory, model, tokenizer, step, data=data, train=dict(train))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("compared")
  write(folder / "base", PLAIN, step=9, train={"objective": "next_token"})
  start = {"init_from": str(folder / "base"), "trainable": "adapters"}
  write(folder / "streams", LORA, train=start)
  next_token = dataclasses.replace(LORA, num_streams=0)
  write(folder / "next", next_token, train=start | {"objective": "next_token"})
  write(folder / "longer", PLAIN, step=4, seed=5)
  return folder


def test_steps_and_data_that_differ_are_said(folder):
  find = lambda *names: compare.find([folder / name for name in names])
  # The base was trained otherwise, as a base is.
  assert compare.differences(find("streams", "next", "base")) == []
  steps, seed = compare.differences(find("streams", "next", "longer"))
  assert "differ in steps:" in steps and "longer 4" in steps
  assert "differ in data.seed:" in seed and "longer 5" in seed
  # Without one that started from it, a base is a run like others.
  said = compare.differences(find("longer", "base"))
  assert len(said) == 2 and "base 9" in said[0]
  # A run that a lossless one began with is still compared with a third.
  after = {"init_from": str(folder / "next"), "trainable": "adapters"}
  lossless = dataclasses.replace(LORA, mode="lossless")
  write(folder / "lossless", lossless, step=7, train=after)
  assert not compare.differences(find("streams", "base", "next", "lossless"))
  steps, _ = compare.differences(find("longer", "next", "lossless"))
  assert "next 3" in steps and "lossless" not in steps
  # Another model, and other rows of the same data.
  wide = dataclasses.replace(MODEL, width=32)
  write(folder / "wide", PLAIN, step=4, seed=5, model=wide, stream_positions=8)
  places, width = compare.differences(find("longer", "wide"))
  assert "data.stream_positions" in places and "model.width" in width


def test_what_cannot_be_compared(folder, tmp_path):
  other = Tokenizer.train(TEXTS[::-1] + ["zz zz"] * 99, 280)
  assert other.vocab_size == TOKENIZER.vocab_size
  write(tmp_path / "other", PLAIN, tokenizer=other)
  for names, says in (
    ((folder / "next", tmp_path / "other"), "have different tokenizers"),
    ((folder / "next", folder / "base" / ".." / "next"), "given twice"),
    ((folder / "next", tmp_path), "holds no config.json"),
  ):
    with pytest.raises(UserError, match=says) as error:
      compare.find(names)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_row_for_each_run(folder):
  entries = compare.find([folder / n for n in ("streams", "next", "base")])
  texts = ["red big", "old new small"]
  prompts = [task.Prompt(text, [], [f"It is {text}."]) for text in texts]
  seen = []
  rows = compare.evaluate_all(
    entries,
    prompts,
    "test",
    TREE,
    lambda name: lambda done, total: seen.append((name, done, total)),
    batch=2,
    max_new_tokens=5,
  )
  names = [entry.directory for entry in entries]
  assert list(dict.fromkeys(seen)) == [(name, 2, 2) for name in names]
  assert seen.count((names[0], 2, 2)) == 2  # plainly, and by its streams
  streams, after, base = rows
  assert [r["steps"] for r in rows] == [3, 3, 9]
  assert [r["objective"] for r in rows] == [None, "next_token", "next_token"]
  assert (streams["mode"], streams["tree_nodes"]) == ("shared", 4)
  assert streams["identical"] == 1 and after["identical"] is None
  assert streams["tokens_per_call"] >= 1 == after["tokens_per_call"]
  assert all(0 <= r["rouge1"] <= 100 for r in rows)
  # As in results.jsonl: what drafting needs. LoRA serves the main stream.
  assert base["extra_params"] == after["extra_params"] == 0
  size = 2 * MODEL.width
  assert streams["extra_params"] == size
  table = compare.render(rows).splitlines()
  assert len(table) == 4 and f"{size:,}" in table[1]
  assert "adapters of rank 2" in table[1] and "next token" in table[2]
  json.dumps(rows)


ROW = {
  "method": "streams",
  "step": 3,
  "dataset": "restaurants",
  "tree": "best_first",
  "tree_nodes": 4,
  "tree_width": 0,
  "num_streams": 2,
  "kept_nodes": 0,
  "prune_threshold": 0.0,
  "temperature": 0.0,
  "batch": 1,
  "device": "cpu",
}


def test_a_speed_up_is_one_that_was_measured(folder, tmp_path):
  (entry,) = compare.find([folder / "streams"])
  entry = dataclasses.replace(entry, directory=str(tmp_path))
  model = checkpoints.load_run(folder / "streams").model.config
  drafter = TREE.resolve(model)
  row = ROW | {"tree_width": drafter.tree.width, "accept": "exact"}
  about = {"step": 3, "dataset": "restaurants", "device": "cpu"}
  speed = lambda drafter=drafter: compare.speed(entry, about, drafter)
  assert speed() == {}
  lines = [row | {"speedup": 1.5}, row | {"speedup": 1.7}]
  others = {
    "step": 2, "dataset": "e2e_nlg", "tree": "chain", "tree_nodes": 8,
    "temperature": 0.5, "method": "none", "kept_nodes": 2, "num_streams": 1,
    "batch": 8, "device": "gpu", "accept": "typical",
    "repetition_penalty": 1.3, "refill": True,
  }  # fmt: skip
  lines += [row | {name: x, "speedup": 9.0} for name, x in others.items()]
  path = tmp_path / "results.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  assert speed()["speedup"] == 1.7  # the newest of this very measurement
  path.write_text("".join(json.dumps(line) + "\n" for line in lines[2:]))
  assert speed() == {}

"""Drafters trained beside a target, and compared on it, from the shell."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from test_launch import QUICK, call_all, one_line, write_run
from tiny import DATA, SMALL, TRAIN, losses, pairs, train, use_small_data

from spec_stream import checkpoints, export, rivals, weights
from spec_stream.data.tokenizer import Tokenizer
from spec_stream.errors import UserError
from spec_stream.models.config import DrafterConfig, StreamConfig
from spec_stream.train import start

PLAIN = dataclasses.replace(SMALL, streams=StreamConfig(0, 1))
HEADS = {
  "medusa": (("length", 2),),
  "hydra": (("length", 2),),
  "redrafter": (("length", 3),),
  "eagle": (("fuse", (0,)), ("length", 2)),
}


def beside(name, **changes):
  config = DrafterConfig(name, HEADS[name])
  return dataclasses.replace(PLAIN, drafter=config, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A target and a run of each drafter with weights, trained beside it."""
  folder = tmp_path_factory.mktemp("rivals")
  with pytest.MonkeyPatch.context() as patch:
    use_small_data(patch)
    target = dict(objective="next_token", steps=8)
    train(str(folder / "run"), PLAIN, dataclasses.replace(TRAIN, **target))
    for name in HEADS:
      train(
        str(folder / name),
        beside(name),
        dataclasses.replace(
          TRAIN,
          trainable="drafter",
          objective="next_token",
          init_from=str(folder / "run"),
        ),
      )
  return folder


@pytest.mark.parametrize("name", HEADS)
def test_training_a_drafter_moves_nothing_else(folder, name):
  target = checkpoints.load_run(folder / "run").model
  tuned = checkpoints.load_run(folder / name).model
  base, all_of_it = weights.to_weights(target), weights.to_weights(tuned)
  own = weights.of_drafter(tuned.config)
  assert own and set(all_of_it) == own | set(base)
  for path in base:
    assert np.array_equal(base[path], all_of_it[path]), path
  seen = losses(folder / name)
  assert seen[12] < seen[1]
  fresh = weights.init(tuned.config, TRAIN.seed)
  fresh |= start.start_drafter(tuned.config, base)
  moved = [p for p in own if not np.array_equal(fresh[p], all_of_it[p])]
  assert len(moved) == len(own)


def test_export_leaves_the_drafter_out_and_says_so(folder, tmp_path):
  run = checkpoints.load_run(folder / "medusa")
  notes = export.merge(run, tmp_path / "out")
  assert ["medusa" in note for note in notes] == [True]
  found = weights.to_weights(
    checkpoints.load_checkpoint(tmp_path / "out").model
  )
  mine = weights.to_weights(run.model)
  assert set(mine) - set(found) == weights.of_drafter(run.model.config)
  assert all(np.array_equal(mine[path], found[path]) for path in found)


def test_fresh_heads_say_what_the_target_says(folder):
  values = checkpoints.load_run(folder / "run")
  config = beside("medusa", vocab_size=values.model.config.vocab_size)
  base = start.load_base(str(folder / "run"), config)
  started = start.start_drafter(config, base)
  trained = checkpoints.load_run(folder / "medusa").model
  trained = weights.to_weights(trained)["drafter/head_kernels"]
  gap = np.abs(trained - started["drafter/head_kernels"])
  assert gap.mean() < 0.1  # 12 steps from there, not from noise (0.2)
  heads = np.asarray(started["drafter/head_kernels"])
  assert heads.shape[0] == 2
  np.testing.assert_array_equal(heads[1], np.asarray(base["embed/table"]).T)


def test_a_second_stage_goes_on_with_the_heads(folder, tmp_path, monkeypatch):
  """Medusa-2: LoRA and the heads of a Medusa-1 run together."""
  use_small_data(monkeypatch)
  streams = StreamConfig(0, 1, lora_rank=2, lora_layers="all")
  joint = dataclasses.replace(
    TRAIN,
    trainable="adapters",
    objective="next_token",
    steps=2,
    init_from=str(folder / "medusa"),
  )
  options = (*HEADS["medusa"], ("weight", 0.2))  # another loss, the same heads
  drafter = DrafterConfig("medusa", options)
  model = beside("medusa", streams=streams)
  model = dataclasses.replace(model, drafter=drafter)
  train(str(tmp_path / "joint"), model, joint)
  before = checkpoints.load_run(folder / "medusa").model
  after = checkpoints.load_run(tmp_path / "joint").model
  before, config = weights.to_weights(before), after.config
  after = weights.to_weights(after)
  adapters = weights.adapters(config)
  for path in set(after) - adapters:
    assert np.array_equal(before[path], after[path])
  gap = np.abs(before["drafter/head_kernels"] - after["drafter/head_kernels"])
  assert 0 < gap.max() < 0.1  # two steps from where they were
  assert {p for p in adapters if "lora_b" in p}
  with pytest.raises(UserError, match="another target"):
    run = checkpoints.load_run(folder / "run")
    rivals.load("medusa", str(tmp_path / "joint"), run)


@pytest.mark.slow
def test_a_draft_model_learns_from_its_target(folder, tmp_path, monkeypatch):
  """DistillSpec; a stopped run goes on with the same teacher."""
  use_small_data(monkeypatch)
  smaller = dataclasses.replace(PLAIN, width=8, num_heads=2, num_kv_heads=1)
  config = dataclasses.replace(
    TRAIN,
    objective="next_token",
    teacher=str(folder / "run"),
    learning_rate=0.03,
  )
  tokens = dict(tokenizer=str(folder / "run/tokenizer.json"))
  first = dataclasses.replace(config, steps=4, schedule="constant")
  work = str(tmp_path / "draft")
  train(work, smaller, first, **tokens)
  longer = dataclasses.replace(first, steps=12)
  train(work, smaller, longer, **tokens)
  seen = losses(work)
  assert len(seen) == 12 and seen[12] < seen[1]
  with pytest.raises(UserError, match="another tokenizer"):
    train(str(tmp_path / "words"), smaller, first, vocab_size=270)


def test_heads_of_another_shape_do_not_go_on(folder, tmp_path, monkeypatch):
  use_small_data(monkeypatch)
  longer = DrafterConfig("medusa", (("length", 3),))
  settings = dataclasses.replace(
    TRAIN, trainable="drafter", init_from=str(folder / "medusa")
  )
  model = dataclasses.replace(PLAIN, drafter=longer)
  with pytest.raises(UserError, match="medusa of another shape"):
    train(str(tmp_path / "run"), model, settings)
  taught = dataclasses.replace(settings, teacher=str(folder / "run"))
  with pytest.raises(UserError, match="which is frozen"):
    train(str(tmp_path / "run"), beside("medusa"), taught)


@pytest.fixture(scope="module")
def called(folder):
  texts = [text for pair in pairs() for text in pair]
  other = Tokenizer.train(["xy zw"] * 9 + texts[:9], DATA["vocab_size"])
  write_run(
    folder / "other_words",
    dataclasses.replace(PLAIN, vocab_size=other.vocab_size),
    other,
    data=DATA,
  )
  (folder / "run/drafters").mkdir()
  (folder / "eagle").rename(folder / "run/drafters/eagle")
  every = (
    "none,prompt_lookup,lookahead,draft_model=run,medusa=medusa,hydra=hydra,"
    "redrafter=redrafter,eagle"
  )
  run, few = "--workdir=run", ["--prompts=3", "--max_new_tokens=6"]
  return call_all(
    "benchmark",
    {
      "good": ([run, f"--drafters={every}", "--tree_nodes=4", *few], ""),
      "own": (["--workdir=medusa", "--tree_nodes=3", *few], ""),
      "hydra=medusa was trained with medusa": (
        [run, "--drafters=hydra=medusa"],
        "",
      ),
      "without a drafter": ([run, "--drafters=medusa=run"], ""),
      "another tokenizer": ([run, "--drafters=draft_model=other_words"], ""),
      "no such directory": ([run, "--drafters=medusa=nowhere"], ""),
      "lookahead has no weights": ([run, "--drafters=lookahead=medusa"], ""),
      "trained without hydra": ([run, "--drafters=hydra"], ""),
      "needs a second run": ([run, "--drafters=draft_model"], ""),
      "--kept_nodes is not for medusa": (
        [run, "--drafters=medusa=medusa", "--kept_nodes=2"],
        "",
      ),
      "names medusa twice": ([run, "--drafters=medusa,medusa=medusa"], ""),
    },
    folder,
  )


@pytest.mark.slow
def test_one_table_of_all(folder, called):
  good = called["good"]
  assert good.code == 0, good
  text = (folder / "run/results.jsonl").read_text()
  rows = {row["method"]: row for row in map(json.loads, text.splitlines())}
  assert len(rows) == 9  # with plain decoding, twice
  for name, row in rows.items():
    assert row["identical"] == 1 and row["recompiles"] == 0, name
    if not name.startswith("none"):
      assert 0 < row["draft_share"] < 1 and row["tree_nodes"] <= 4, name
  width, vocab = SMALL.width, 280
  target = checkpoints.load_run(folder / "run").model
  assert target.config.vocab_size == vocab
  extra = lambda name: rows[name]["extra_params"]
  assert extra("prompt_lookup") == extra("lookahead") == 0
  # The formulas of the docstrings.
  one = width**2 + width + width * vocab
  assert extra("medusa") == 2 * one
  assert extra("hydra") == (2 + 3) * width**2 + 2 * (width + width * vocab)
  recurrence, layer = 2 * width**2 + width, 4 * width**2 + 2 * width
  assert extra("redrafter") == recurrence + 2 * layer + 2 * width * vocab
  block = sum(
    x.size for p, x in weights.to_weights(target).items() if "blocks/0" in p
  )
  assert extra("eagle") == 3 * width**2 + block
  assert extra("draft_model") == sum(
    x.size for x in weights.to_weights(target).values()
  )
  # A model that drafts for itself is always right.
  draft = rows["draft_model"]
  assert draft["accept_by_depth"][0] == 1
  assert rows["eagle"]["draft_from"] == "run/drafters/eagle"
  assert "extra weights" in good.out and "drafting" in good.out


@pytest.mark.slow
def test_a_run_drafts_with_what_it_was_trained_with(folder, called):
  assert called["own"].code == 0, called["own"]
  rows = (folder / "medusa/results.jsonl").read_text().splitlines()
  assert [json.loads(row)["method"] for row in rows][-1] == "medusa"


@pytest.mark.slow
def test_generate_chooses_the_tree_of_another_runs_heads(folder, tmp_path):
  shutil.copytree(folder / "run", tmp_path / "run")
  ask = ["--workdir=run", "--max_new_tokens=6", "--prompt=red big"]
  heads = [f"--drafter=medusa={folder}/medusa", "--tree=auto"]
  done = call_all(
    "generate",
    {
      "plain": ([*ask, "--drafter=none", "--nostats"], ""),
      "auto": ([*ask, *heads, "--nostats"], QUICK),
      "without --tree_nodes": ([*ask, *heads, "--tree_nodes=4"], ""),
    },
    tmp_path,
  )
  one_line(done.pop("without --tree_nodes"), "without --tree_nodes")
  assert all(d.code == 0 for d in done.values()), done
  assert done["auto"].out == done["plain"].out
  assert "--tree=auto: " in done["auto"].err
  kept = json.loads((tmp_path / "run/cost_model.json").read_text())
  (costs,) = kept["step_cost"].values()
  assert {setting.split()[0] for setting in costs} == {"none", "medusa"}


@pytest.mark.slow
def test_mistakes_are_said_in_one_line(called):
  for says, done in called.items():
    if says not in ("good", "own"):
      one_line(done, says)


@pytest.mark.parametrize(
  "changes, words",
  [
    (dict(drafter=DrafterConfig("medusae")), "unknown drafter"),
    (dict(drafter=DrafterConfig("streams")), "no weights beside"),
    (dict(drafter=DrafterConfig("medusa", (("heads", 3),))), "no 'heads'"),
    (dict(drafter=DrafterConfig("hydra", (("length", 0),))), "1 or more"),
    (dict(drafter=DrafterConfig()), "needs model.drafter.name"),
    (dict(streams=StreamConfig(1, 1)), "has no streams"),
    (dict(drafter=DrafterConfig("eagle", (("fuse", (7,)),))), "must lie in"),
  ],
)
def test_wrong_settings(folder, tmp_path, monkeypatch, changes, words):
  use_small_data(monkeypatch)
  beside_target = dataclasses.replace(
    TRAIN, trainable="drafter", init_from=str(folder / "run")
  )
  model = dataclasses.replace(beside("medusa"), **changes)
  with pytest.raises(UserError, match=words):
    train(str(tmp_path / "run"), model, beside_target)

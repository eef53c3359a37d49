"""Predictions of speed: nested trees, counts, interpolation, what is chosen."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from random_models import CASES, random_model
from tiny import MODEL, SMALL, make_model

from spec_stream import auto, bench, cost_model, task
from spec_stream.cost_model import Acceptance, CostModel
from spec_stream.decode import generate
from spec_stream.drafters.none import NoDraft
from spec_stream.drafters.prompt_lookup import PromptLookup
from spec_stream.drafters.streams import StreamDraft
from spec_stream.errors import UserError
from spec_stream.models.prune import Prune
from spec_stream.tree import TreeSpec, best_first, top

CONFIG = CASES["lossless"][0]  # J = 3


def streams(nodes, length=0, config=CONFIG, **rest):
  tree = TreeSpec("best_first", nodes)
  return StreamDraft(tree, num_streams=length, **rest).resolve(config)


def test_small_trees_are_the_first_nodes_of_large_ones():
  """What counting places in the largest tree rests on."""
  rng = np.random.default_rng(0)
  root = np.zeros(2, np.int32)
  logits = rng.normal(0, 2, (2, 4, 11))
  log_probs, tokens = top(jax.nn.log_softmax(logits, -1), 11)
  large = best_first(root, log_probs, tokens, 20)
  for length in range(1, 5):
    for nodes in (2, 5, 9):
      small = best_first(root, log_probs[:, :length], tokens[:, :length], nodes)
      for b in range(2):
        inside = np.flatnonzero(large.depth[b] <= length)[:nodes]
        if len(inside) < nodes:
          continue  # the large one has fewer so shallow
        assert small.tokens[b].tolist() == large.tokens[b][inside].tolist()
        parents = [
          int(np.flatnonzero(inside == p)[0]) if p >= 0 else -1
          for p in np.asarray(large.parents[b])[inside]
        ]
        assert small.parents[b].tolist() == parents


@pytest.mark.slow
@pytest.mark.parametrize("sampled", [False, True])
def test_steps_of_the_largest_tree_are_those_that_were_taken(x64, sampled):
  model = random_model(CONFIG, 1)
  prompts = [[3, 1, 4], [2, 7], [5, 5, 5, 1]] * 3
  prompts = [[i, *p] for i, p in enumerate(prompts)]  # more than ROWS
  settings = dict(max_new_tokens=13, end_token=4)
  if sampled:
    settings |= dict(temperature=0.9, top_k=4)
  found = auto.acceptance(model, streams(8), prompts, seed=5, **settings)
  seeds = 5 + np.arange(len(prompts))
  made = generate(model, prompts, streams(8), seed=seeds, **settings)
  assert found.tokens.tolist() == [len(g.token_ids) for g in made]
  assert found.steps.tolist() == [g.target_calls - 1 for g in made]
  assert found.accepted.sum() > 0
  np.testing.assert_allclose(found.steps_of(8, 3), found.steps)
  # Plain decoding takes a step a token; more nodes and depth never take more.
  np.testing.assert_allclose(found.steps_of(1, 3), found.tokens - 1)
  for length in (1, 2, 3):
    steps = [found.steps_of(m, length).sum() for m in range(1, 9)]
    assert steps == sorted(steps, reverse=True)
  with pytest.raises(ValueError, match="not measured"):
    found.steps_of(9, 3)


def by_hand(**costs):
  """20 tokens after the first in 10 steps: node 1 was right in all of them."""
  accepted = np.zeros((2, 3, 8), int)
  accepted[:, :, 1] = 10
  found = Acceptance(np.array([21, 21]), np.array([10, 10]), accepted)
  table = {("none", 1, 0, 0): 1.0}
  table |= {
    ("streams", nodes, length, 0): cost
    for (nodes, length), cost in {
      (2, 1): 1.2,
      (2, 3): 1.4,
      (8, 1): 1.8,
      (8, 3): 3.2,
    }.items()
  }
  return CostModel(1, {"streams": found}, table | costs)


def test_predictions_are_what_the_counts_say():
  model = by_hand()
  found = model.predict(streams(2, 1))
  assert found.step_cost == 1.2
  assert found.speedup == pytest.approx(2 / 1.2)
  assert found.tokens_per_call == pytest.approx(42 / (2 + 20))
  between = model.predict(streams(5, 2))  # the middle of all four
  assert between.step_cost == pytest.approx((1.2 + 1.4 + 1.8 + 3.2) / 4)
  assert "5 nodes, 2 tokens ahead" in str(between)
  # Not measured: more nodes, pruned, another drafter.
  assert model.predict(streams(9, 1)) is None
  pruned = streams(4, prune=Prune(kept_nodes=2))
  assert model.predict(pruned) is None
  lookup = PromptLookup(TreeSpec("best_first", 5)).resolve(CONFIG)
  assert model.predict(lookup) is None
  assert set(model.fields(lookup).values()) == {None}
  plain = model.predict(NoDraft().resolve(CONFIG))
  assert plain.speedup == 1 and "no draft pays" in str(plain)


def test_a_batch_runs_until_its_last_row_is_done():
  found = by_hand().acceptance["streams"]
  slow = Acceptance(found.tokens, np.array([10, 20]), found.accepted)
  # The second row accepts nothing in half of its steps: 1.5 tokens a step.
  costs = by_hand().costs
  alone = CostModel(1, {"streams": slow}, costs).predict(streams(2, 1))
  batch = CostModel(2, {"streams": slow}, costs).predict(streams(2, 1))
  assert alone.speedup == pytest.approx(40 / (10 + 20 / 1.5) / 1.2)
  assert batch.speedup == pytest.approx(20 / (20 / 1.5) / 1.2)
  # Unless it goes on with the next prompt.
  going = CostModel(2, {"streams": slow}, costs, refill=True)
  assert going.predict(streams(2, 1)).speedup == pytest.approx(alone.speedup)


def test_the_fastest_is_chosen_or_none():
  off = NoDraft().resolve(CONFIG)
  choice = [streams(n, j) for n in (2, 5, 8) for j in (1, 2, 3)]
  assert by_hand().best(choice, off).drafter == streams(2, 1)
  model = by_hand()
  slow = {k: 2.2 * c for k, c in model.costs.items() if k[0] == "streams"}
  model.costs |= slow  # 2 / 2.64 < 1
  assert model.best(choice, off).drafter == off
  # Streams that must be attached make plain decoding slow as well.
  model.costs["none", 1, 0, 0] = 1.5
  assert model.best(choice, off).drafter == streams(2, 1)
  assert model.best([], off).speedup == pytest.approx(1 / 1.5)


def test_what_is_considered(x64):
  model = random_model(CONFIG, 0)
  found = auto.candidates(model, {"streams": None, "prompt_lookup": None})
  shapes = {cost_model.setting(d) for d in found}
  assert len(shapes) == len(found)
  assert {s[2] for s in shapes if s[0] == "streams"} == {1, 2, 3}
  assert ("streams", 16, 3, 8) in shapes  # pruned from 16 nodes to 8
  assert any(s[0] == "prompt_lookup" for s in shapes)
  timed = {cost_model.setting(d) for d in auto.timed(found)}
  assert ("streams", 16, 3, 8) in timed and ("streams", 8, 1, 0) in timed
  assert ("streams", 8, 2, 0) not in timed  # between 1 and 3
  assert ("streams", 12, 3, 0) not in timed  # between 8 and 16
  attends = auto.candidates(make_model(MODEL), {"streams": None})
  assert {d.num_streams for d in attends} == {2}  # all must be attached
  corrected = dataclasses.replace(
    CONFIG, streams=dataclasses.replace(CONFIG.streams, correction_rank=2)
  )
  # Streams that are attached all the same are not what other drafters draft.
  lookup = PromptLookup(TreeSpec("best_first", 3)).resolve(MODEL)
  assert lookup.num_streams and cost_model.ahead(lookup) == lookup.length
  grown = auto.candidates(random_model(corrected, 0), {"streams": None})
  assert {d.num_nodes for d in grown} <= set(auto.TIMED)
  with pytest.raises(UserError, match="depends on what"):
    auto.candidates(model, {"streams": None}, "rejection")


class Run:
  step = 7
  model = make_model(SMALL)
  config = {"data": {"dataset": "restaurants"}}

  class tokenizer:
    eos_ids = (2,)


@pytest.mark.slow
def test_what_was_measured_is_kept(tmp_path, monkeypatch):
  monkeypatch.setattr(auto, "SIZES", (2, 3))
  monkeypatch.setattr(auto, "TIMED", (2, 3))
  monkeypatch.setattr(auto, "_SECONDS", 0)
  prompts = [[3, 1, 4], [2, 7], [5, 5, 5, 1]]
  given = [task.Prompt("", p, []) for p in prompts]
  monkeypatch.setattr(task, "prompts", lambda *_: given)
  measured = []
  real = auto.acceptance
  spy = lambda *args, **rest: measured.append(1) or real(*args, **rest)
  monkeypatch.setattr(auto, "acceptance", spy)
  settings = bench.Settings(max_new_tokens=6)
  ask = lambda settings: auto.of_run(
    Run, tmp_path, {"streams": (None, "")}, settings
  )
  first, choice = ask(settings)
  assert [d.num_nodes for d in choice] == [2, 3] and len(measured) == 1
  assert set(first.costs) == {("none", 1, 0, 0)} | {
    cost_model.setting(d) for d in choice
  }
  assert min(first.costs.values()) > 0
  # As before, from the file; another batch: steps are timed anew, no more.
  monkeypatch.setattr(task, "prompts", lambda *_: 1 / 0)
  again, _ = ask(settings)
  assert [again.predict(d) for d in choice] == [
    first.predict(d) for d in choice
  ]
  monkeypatch.setattr(task, "prompts", lambda *_: given)
  ask(dataclasses.replace(settings, batch=2))
  assert len(measured) == 1
  ask(dataclasses.replace(settings, max_new_tokens=7))  # longer texts
  assert len(measured) == 2
  kept = json.loads((tmp_path / auto.FILE).read_text())
  assert [len(kept[k]) for k in ("acceptance", "step_cost")] == [2, 3]
  with monkeypatch.context() as other:  # code, whose steps may cost otherwise
    other.setattr(auto.checkpoints, "git_commit", lambda: "another")
    ask(settings)
  kept = json.loads((tmp_path / auto.FILE).read_text())
  assert [len(kept[k]) for k in ("acceptance", "step_cost")] == [2, 4]
  for damaged in ("[]", "{", '{"acceptance": {}, "step_cost": {"a": 1}}'):
    (tmp_path / auto.FILE).write_text(damaged)
    with pytest.raises(UserError, match="delete it"):
      ask(settings)

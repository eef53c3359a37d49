"""Every drafter: the tokens of plain decoding, whatever its weights; and drafts
that are those it was trained to make."""

import dataclasses
import pathlib
import re
import sys
import types

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from random_drafters import (
  ATTENDS,
  CASES,
  CORRECTED,
  PLAIN,
  SHORT,
  case,
  decoder,
  make,
)
from random_models import differences, in_short, random_requests

from spec_stream.decode import Decoder, collect, stream
from spec_stream.drafters import registry
from spec_stream.drafters.none import NoDraft
from spec_stream.errors import UserError
from spec_stream.models.prune import Prune
from spec_stream.train import losses
from spec_stream.tree import TreeSpec

ROOT = pathlib.Path(__file__).parent.parent
SEEDS = st.integers(0, 2**32 - 1)


def decode(decoder, prompts, options):
  return collect(decoder.finish(decoder.start(prompts, **options)))


def requests(seed, batch, sampled):
  """Ragged prompts; two programs in all: all greedy, or one row that is not."""
  prompts, options = random_requests(seed, batch)
  forced = dict(repetition_penalty=1.2)
  if sampled:
    forced |= dict(temperature=0.9, top_k=3)
  else:
    for name in ("temperature", "top_k", "top_p", "min_p"):
      del options[name]
  for name, value in forced.items():
    options[name] = np.array([value, *options[name][1:]])
  return prompts, options


def compare(name, seed, batch, sampled, dtype="float64"):
  """Decodes both ways; -> (plain, drafted, prompts, options, model)."""
  prompts, options = requests(seed, batch, sampled)
  model, own = make(CASES[name], seed, dtype)
  plain = decode(Decoder(model, NoDraft()), prompts, options)
  fast = decode(Decoder(model, CASES[name].drafter, own), prompts, options)
  return plain, fast, prompts, options, model


@pytest.mark.parametrize("name", in_short(CASES, SHORT))
def test_tokens_are_those_of_plain_decoding(x64, name):
  accepted = []

  @settings(max_examples=8)
  @given(SEEDS)
  def check(seed):
    plain, fast, _, options, _ = compare(name, seed, 3, sampled=True)
    assert [x.token_ids for x in fast] == [x.token_ids for x in plain]
    for x in fast:
      cut = x.target_calls + sum(x.accepts[1:]) - len(x.token_ids)
      assert 0 <= cut < len(x.accepts)
      accepted.append(sum(x.accepts[1:]))

  check()
  assert sum(accepted) > 0  # or nothing was tested


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_every_batch_greedy_and_sampled(x64, name, batch):
  for sampled in (False, True):
    for seed in range(20):
      plain, fast, *_ = compare(name, seed, batch, sampled)
      assert [x.token_ids for x in fast] == [x.token_ids for x in plain]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_float32_differs_in_ties_alone(name):
  for seed in range(25):
    plain, fast, prompts, options, model = compare(
      name, seed, 3, sampled=True, dtype="float32"
    )
    found = differences(model, prompts, plain, fast, options)
    assert all(x.margin < 1e-4 for x in found), list(map(str, found))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lookahead", "eagle"])
def test_streaming_gives_the_same(x64, name):
  model, own = make(CASES[name], 5)
  options = dict(max_new_tokens=14, end_token=-1)
  looped = decode(Decoder(model, CASES[name].drafter, own), [[3, 3]], options)
  steps = list(stream(model, [3, 3], CASES[name].drafter, **options))
  assert sum((x.token_ids for x in steps), []) == looped[0].token_ids
  for x in steps[1:]:
    drawn = [int(x.tree.tokens[n]) for n in x.path[1:]]
    ids = x.token_ids  # the drafted ones and one more, cut at the limit
    assert drawn[: len(ids)] == ids[: len(drawn)]


# -- training and drafting are the same function -----------------------------

TRAINED = {
  "streams, corrected": case("streams", TreeSpec("chain"), target=CORRECTED),
  "medusa": case("medusa", TreeSpec("chain"), length=4, layers=2),
  "hydra": case("hydra", TreeSpec("chain"), length=4),
  "redrafter": case("redrafter", TreeSpec("chain"), length=4),
  "eagle": case("eagle", TreeSpec("chain"), length=4),
  "eagle, fused": case("eagle", TreeSpec("chain"), length=4, fuse=(2, 0)),
}


@pytest.mark.parametrize(
  "tree",
  [
    pytest.param(TreeSpec("chain"), marks=pytest.mark.slow),
    TreeSpec("best_first", 4, 1),
  ],
  ids=str,
)
def test_a_model_that_drafts_for_itself_is_always_right(x64, tree):
  """Sampled as well: drafts meet the noise that the target will meet."""
  model, _ = make(CASES["draft_model"], 2)
  drafter = registry.get("draft_model").of(tree, 3, Prune())
  prompts, options = random_requests(2, 4)
  options |= dict(
    temperature=np.array([0.0, 0.3, 1.0, 1.7]), max_new_tokens=13, end_token=-1
  )
  options |= dict(repetition_penalty=1.0, stop=())
  made = decode(Decoder(model, drafter, model), prompts, options)
  plain = decode(Decoder(model, NoDraft()), prompts, options)
  for one, expected in zip(made, plain, strict=True):
    assert one.token_ids == expected.token_ids
    assert one.target_calls == 1 + 12 / 4  # all three drafts, and one more
  # What is likely enough needs no luck: the most probable is drafted.
  lossy = dataclasses.replace(drafter, rule="typical")
  logits = np.zeros((4, 2, 9))
  assert lossy.guess(None, logits) is logits


@pytest.mark.parametrize(
  "name", in_short(TRAINED, TRAINED.keys() - {"eagle, fused"})
)
def test_training_finds_right_what_drafting_proposes(x64, name):
  """A chain that the drafter proposed, put behind its prompt as the text of the
  data: each of its tokens is then what the training pass expects, too."""
  fast = decoder(TRAINED[name], 7)
  model, _ = make(TRAINED[name], 7)
  prompt = [3, 1, 4, 1, 5, 9, 2]
  chain = np.asarray(fast.start([prompt], max_new_tokens=9).tree.tokens[0])
  text = [*prompt, *chain.tolist()]  # the root is the chain's first
  size, at = len(text), len(prompt) - 1
  batch = {
    "tokens": np.array([text], np.int32),
    "segment_ids": np.ones((1, size), np.int32),
    "positions": np.arange(size, dtype=np.int32)[None],
    "loss_mask": np.arange(size)[None] > at,
    "stream_at": np.array([[at]], np.int32),
    "stream_mask": np.ones((1, 1), bool),
  }
  alone = TRAINED[name].drafter.Module is not None
  config = losses.LossConfig(main_weight=0.0, streams=not alone)
  graph, state = nnx.split(model)
  run = jax.jit(
    lambda state, batch: losses.loss(nnx.merge(graph, state), batch, config)
  )
  loss = lambda batch: run(state, batch)
  total, metrics = loss(batch)
  assert np.isfinite(total)
  for j in range(1, len(chain)):
    assert metrics[f"accept_{j}"] == 1
  for j in range(1, len(chain)):
    other = {**batch, "tokens": batch["tokens"].copy()}
    other["tokens"][0, at + 1 + j] = (text[at + 1 + j] + 1) % 11
    _, metrics = loss(other)
    assert metrics[f"accept_{j}"] == 0


# -- the example of CONTRIBUTING.md ------------------------------------------


@pytest.mark.slow
def test_a_new_drafter_is_a_file_and_a_line(x64, monkeypatch):
  text = (ROOT / "CONTRIBUTING.md").read_text()
  (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  assert code.count("\n") < 36
  module = types.ModuleType("spec_stream.drafters.repeat")
  monkeypatch.setitem(sys.modules, module.__name__, module)
  exec(compile(code, "repeat.py", "exec"), module.__dict__)
  monkeypatch.setitem(registry.DRAFTERS, "repeat", "repeat:Repeat")
  found = case("repeat", TreeSpec("chain"), 3, target=ATTENDS)
  for seed in range(3):
    prompts, options = requests(seed, 3, sampled=True)
    model, _ = make(found, seed)
    plain = decode(Decoder(model, NoDraft()), prompts, options)
    fast = decode(Decoder(model, found.drafter), prompts, options)
    assert [x.token_ids for x in fast] == [x.token_ids for x in plain]
  model, _ = make(case("repeat", TreeSpec("chain")), 1)
  (tree,) = {
    tuple(x.tree.tokens.tolist())
    for x in list(stream(model, [3], found.drafter, max_new_tokens=3))[1:2]
  }
  assert len(tree) == 4 and len(set(tree)) == 1


# -- words for people --------------------------------------------------------


@pytest.mark.parametrize(
  "name, change, words",
  [
    ("medusa", dict(length=4), "trained for 3"),
    ("hydra", dict(tree=TreeSpec("beam2")), "unknown tree"),
    ("hydra", dict(tree=TreeSpec(num_nodes=400)), "does not fit"),
    ("redrafter", dict(tree=TreeSpec(num_nodes=-1)), "negative"),
    ("eagle", dict(length=-1), "1 or more"),
    ("lookahead", dict(tree=TreeSpec(num_nodes=2)), "at least"),
    ("lookahead", dict(tree=TreeSpec("chain")), "a tree of its own"),
    ("prompt_lookup", dict(tree=TreeSpec("cartesian")), "draws chains"),
    ("prompt_lookup", dict(tree=TreeSpec("chain", 3), length=4), "contradicts"),
  ],
)
def test_wrong_settings(name, change, words):
  found = CASES[name]
  drafter = dataclasses.replace(found.drafter, **change)
  with pytest.raises(UserError, match=words):
    decoder(found._replace(drafter=drafter), 0, "float32")


@pytest.mark.parametrize("name", CASES)
def test_settings_once_resolved_stay(name):
  found = CASES[name]
  model, own = make(found, 0, "float32")
  once = Decoder(model, found.drafter, own).drafter
  assert Decoder(model, once, own).drafter == once


@pytest.mark.parametrize("name", ["redrafter", "hydra", "prompt_lookup"])
@pytest.mark.parametrize("nodes", [4, 16, 32])
def test_the_budget_of_nodes_is_used(name, nodes):
  found = case(name, TreeSpec("best_first", nodes))
  if name == "redrafter":
    found = case(name, TreeSpec("beam", nodes))
  model, _ = make(found, 0, "float32")
  assert nodes - 2 < Decoder(model, found.drafter).drafter.num_nodes <= nodes


def test_missing_or_wrong_weights():
  model, _ = make(case("prompt_lookup", TreeSpec()), 0, "float32")
  with pytest.raises(UserError, match="trained without medusa"):
    Decoder(model, CASES["medusa"].drafter)
  with pytest.raises(UserError, match="needs a second run"):
    Decoder(model, CASES["draft_model"].drafter)
  other = dataclasses.replace(PLAIN, vocab_size=12)
  with pytest.raises(UserError, match="12 tokens"):
    decoder(CASES["draft_model"]._replace(own=other), 0, "float32")

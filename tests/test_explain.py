"""The report on differences: is plain decoding to blame, or a drafter?"""

import dataclasses

import pytest
from test_bench import PROMPTS, SETTINGS
from tiny import SMALL, make_model

from spec_stream import bench, explain
from spec_stream.bench import NOISE
from spec_stream.decode import Decoder, collect, generate
from spec_stream.drafters.none import NoDraft
from spec_stream.drafters.streams import StreamDraft
from spec_stream.tree import TreeSpec


@pytest.fixture(scope="module")
def measured():
  methods = bench.plan(SMALL, [StreamDraft(TreeSpec(num_nodes=3))])
  return bench.measure(make_model(SMALL), PROMPTS, methods, SETTINGS)


def changed(measured, method, prompt, change):
  """The same results with other tokens of one prompt."""

  def replace(i, generation):
    if i != prompt:
      return generation
    ids = change(list(generation.token_ids))
    return dataclasses.replace(generation, token_ids=ids)

  return [
    dataclasses.replace(
      r, generations=[replace(i, g) for i, g in enumerate(r.generations)]
    )
    if r.method.name == method
    else r
    for r in measured
  ]


class Words:
  pad_id, bos_id, sep_id, eos_ids = 0, 1, 2, (3,)

  def decode(self, ids):
    return f"word{ids[0]}"


@pytest.mark.slow
def test_no_difference(measured):
  assert (
    explain.differences(make_model(SMALL), PROMPTS, measured, SETTINGS) == []
  )
  assert "No prompt differs" in explain.render([], Words())


@pytest.mark.slow
def test_a_wrong_token_is_the_drafters_own(measured):
  """Plain decoding gives the same through every shape, by a wide margin."""

  def change(ids):
    ids[2] = 5 if ids[2] != 5 else 6
    return ids

  results = changed(measured, "streams", 1, change)
  plain = results[0].generations[1].token_ids
  (found,) = explain.differences(make_model(SMALL), PROMPTS, results, SETTINGS)
  assert (found["method"], found["tree_nodes"]) == ("streams", 3)
  assert (found["prompt"], found["position"]) == (1, 2)
  assert found["plain"] == found["whole"] == plain[2] != found["drafted"]
  assert found["margin"] > 1e-3
  assert not found["plain_in_batch"] and not found["plain_in_tree"]
  text = explain.render([found], Words())
  assert "In 0 of 1" in text and f"'word{plain[2]}'" in text


@pytest.mark.slow
def test_where_plain_decoding_departs_from_itself(measured, monkeypatch):
  results = changed(measured, NOISE, 0, lambda ids: ids[:-1])
  asked = []

  def other(model, prompts, drafter, **options):
    asked.append((len(prompts), drafter.num_nodes))
    made = generate(model, prompts, drafter, **options)
    if len(prompts) == SETTINGS.batch:
      return made
    return [dataclasses.replace(made[0], token_ids=[4])]

  monkeypatch.setattr(explain, "generate", other)
  (found,) = explain.differences(make_model(SMALL), PROMPTS, results, SETTINGS)
  assert found["margin"] is None and found["drafted"] is None  # one ended
  assert found["plain_in_batch"] and not found["plain_in_tree"]
  assert asked == [(SETTINGS.batch + 1, 1), (SETTINGS.batch, 1)]
  assert "In 1 of 1" in explain.render([found], Words())


@pytest.mark.parametrize("nodes", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_dead_nodes_change_nothing(nodes):
  model = make_model(SMALL)
  options = dict(max_new_tokens=9, temperature=0.8, seed=4)
  plain = generate(model, PROMPTS, NoDraft(), **options)
  decoder = Decoder(model, NoDraft(dead_nodes=nodes))
  state = decoder.start(PROMPTS, **options)
  assert state.tree.num_nodes == 1 + nodes
  for a, b in zip(plain, collect(decoder.finish(state))):
    assert (a.token_ids, a.target_calls) == (b.token_ids, b.target_calls)

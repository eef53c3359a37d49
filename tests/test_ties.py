"""Margins are those of the scores that decoding itself compared."""

import math

import jax
import numpy as np
import pytest
from tiny import SMALL, make_model

from spec_stream import sampling, ties
from spec_stream.decode import generate
from spec_stream.drafters.none import NoDraft
from spec_stream.weights import to_model, to_weights

PROMPT = [3, 1, 4, 1, 5]


@pytest.mark.parametrize(
  ("a", "b", "at"),
  [
    ([1, 2], [1, 2], None),
    ([1, 2], [1, 3], 1),
    ([4], [5, 6], 0),
    ([1, 2, 3], [1, 2], 2),  # one goes on where the other ended
    ([], [], None),
  ],
)
def test_first_difference(a, b, at):
  assert ties.first_difference(a, b) == at
  assert ties.first_difference(b, a) == at


def margins(model, tokens, draws, attach):
  """How far each emitted token is below the best, given those before it."""
  return [
    ties._margin(
      model,
      [*PROMPT, *tokens[:k]],
      len(PROMPT),
      (tokens[k], tokens[k]),
      draws,
      attach,
    )[0]
    for k in range(len(tokens))
  ]


def test_every_token_decoded_is_the_best_of_the_recomputed_scores():
  model = make_model(SMALL)
  settings = dict(temperature=0.8, seed=11)
  draws = sampling.make(1, **settings)
  made = generate(model, [PROMPT], NoDraft(), max_new_tokens=11, **settings)
  tokens = made[0].token_ids
  assert max(margins(model, tokens, draws, True)) < 1e-5
  # Its main stream attends to its streams: without them it is another model.
  assert max(margins(model, tokens, draws, False)) > 0.01


def scores_after(model, tokens):
  """Logits of the first new token, by way of the margins of each token."""
  below = [
    ties._margin(model, tokens, len(tokens), (t,), sampling.make(1), True)[0]
    for t in range(model.config.vocab_size)
  ]
  return -np.array(below)


def test_a_tie_has_no_margin_and_a_wrong_token_a_wide_one():
  model = make_model(SMALL)
  best = int(np.argmax(scores_after(model, PROMPT)))
  twin = next(t for t in range(6, 19) if t != best)
  weights = dict(to_weights(model))
  table = np.array(weights["embed/table"])
  table[twin] = table[best]  # tied embeddings: equal logits
  weights["embed/table"] = jax.numpy.asarray(table)
  model = to_model(SMALL, weights)
  scores = scores_after(model, PROMPT)
  worst = int(np.argmin(scores))

  def compare(expected, got):
    draws = [sampling.make(1)]
    return ties.compare(model, [PROMPT], [expected], [got], draws)

  assert compare([best, 2], [best, 2]) == []
  (tie,) = compare([best, 2], [twin, 3])
  assert (tie.prompt, tie.position) == (0, 0) and tie.margin < 1e-5
  # The worse of the two counts, whichever was expected.
  for pair in (([best], [worst]), ([worst], [best])):
    (bug,) = compare(*pair)
    assert bug.margin == pytest.approx(-scores.min(), rel=1e-4)
    assert bug.margin > ties.widest_tie("float32")
  (ended,) = compare([best], [best, 2])
  assert ended.position == 1 and ended.margin == math.inf


def test_the_bound_follows_what_the_device_computes_in(monkeypatch):
  assert ties.widest_tie("float32") == 1e-4
  assert ties.widest_tie("float64") < 1e-6
  assert ties.widest_tie("bfloat16") == math.inf
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert ties.widest_tie("float32") == math.inf
  with jax.default_matmul_precision("highest"):
    assert ties.widest_tie("float32") == 1e-4

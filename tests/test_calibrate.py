"""Trees from calibration: counting by hand, choosing by trying all."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import reference
from random_drafters import CASES as RIVALS
from random_drafters import make, typed
from random_models import CASES, in_short, random_model
from test_drafter_papers import medusa

from spec_stream import calibrate
from spec_stream.decode import generate
from spec_stream.drafters.none import NoDraft
from spec_stream.errors import UserError
from spec_stream.tree import check_paths

PROMPTS = [[3, 1, 4], [2, 7], [5, 5, 5, 1]]


def medusa_at(model, row, i):
  values = reference.numpy_weights(model)
  return medusa(model.config, values, None, row[: i + 1], row[i + 1])


@pytest.mark.parametrize("name", in_short(["streams", "medusa"], ("medusa",)))
def test_counts_are_those_of_plain_loops(x64, name):
  if name == "streams":
    model = random_model(CASES["lossless"][0], 2)
  else:
    model, _ = make(RIVALS["medusa"], 2)
  got = calibrate.accuracies(model, PROMPTS, name, 4, max_new_tokens=9)
  plain = generate(model, PROMPTS, NoDraft(), max_new_tokens=9)
  rows = [[*p, *g.token_ids] for p, g in zip(PROMPTS, plain)]
  heads = len(got)
  hits, totals = np.zeros((heads, 4)), np.zeros(heads)
  if name == "streams":
    said = reference.sequences(model, rows, [len(p) - 1 for p in PROMPTS])[1]
  else:
    score = functools.partial(medusa_at, model)
  for b, row in enumerate(rows):
    for i in range(len(PROMPTS[b]) - 1, len(row)):
      for j in range(1, heads + 1):
        if i + 1 + j >= len(row):
          continue
        if name == "streams":
          logits = said[b, i, j - 1]
        else:
          logits = score(row, i)([0] * (j - 1))
        order = np.argsort(-logits, kind="stable").tolist()
        rank = order.index(row[i + 1 + j])
        totals[j - 1] += 1
        if rank < 4:
          hits[j - 1, rank] += 1
  np.testing.assert_allclose(got, hits / totals[:, None])


@pytest.mark.parametrize("seed", range(4))
def test_the_paths_are_the_best_of_all(seed):
  accuracy = np.random.default_rng(seed).dirichlet(np.ones(5), 3)[:, :4]
  paths, expected = calibrate.best_paths(accuracy, 9)
  every = [
    path
    for depth in (1, 2, 3)
    for path in itertools.product(range(4), repeat=depth)
  ]
  value = lambda path: np.prod([accuracy[g, c] for g, c in enumerate(path)])
  best = sorted(map(value, every))[::-1][:8]
  np.testing.assert_allclose(sorted(map(value, paths))[::-1], best)
  np.testing.assert_allclose(expected, 1 + sum(best))
  assert check_paths(paths) == tuple(map(tuple, paths))


def test_what_cannot_be_calibrated():
  model, _ = make(RIVALS["hydra"], 0, "float32")
  for name, words in (
    ("streams", "no streams"),
    ("medusa", "no Medusa heads"),
    ("hydra", "no use for a calibrated tree"),
  ):
    with pytest.raises(UserError, match=words):
      calibrate.accuracies(model, PROMPTS, name, 3)
  with pytest.raises(UserError, match="no tree of 40 nodes"):
    calibrate.best_paths(np.ones((2, 3)) / 4, 40)
  config = typed(RIVALS["medusa"].target, "float32")
  model = random_model(dataclasses.replace(config), 0)
  with pytest.raises(UserError, match="too short"):
    calibrate.accuracies(model, PROMPTS, "medusa", 3, max_new_tokens=1)

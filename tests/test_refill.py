"""More requests than rows: each gives what it gives alone."""

import numpy as np
import pytest
from random_drafters import CASES as RIVALS
from random_drafters import make
from random_models import (
  CASES,
  MODES,
  MOST,
  VOCAB,
  random_model,
  random_requests,
)

from spec_stream.decode import Decoder, collect, generate
from spec_stream.drafters.none import NoDraft
from spec_stream.errors import UserError

COUNT = 9


def requests(seed):
  prompts, options = random_requests(seed, COUNT)
  options["max_new_tokens"][:2] = 1, MOST  # done at once, and last
  options["temperature"][0], options["repetition_penalty"][0] = 0.9, 1.2
  return prompts, options


@pytest.mark.slow
@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("batch", [1, 4, COUNT])
def test_each_request_gives_what_it_gives_alone(x64, name, batch):
  config, drafter = CASES[name]
  for seed in range(2):
    model = random_model(config, seed)
    prompts, options = requests(seed)
    expected = generate(model, prompts, drafter, **options)
    assert generate(model, prompts, drafter, batch=batch, **options) == expected
    plain = generate(model, prompts, NoDraft(), batch=batch, **options)
    assert [x.token_ids for x in plain] == [x.token_ids for x in expected]


@pytest.mark.parametrize(
  "name",
  [
    "lookahead",
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in (
        "prompt_lookup",
        "draft_model",
        "medusa",
        "hydra",
        "redrafter",
        "eagle",
      )
    ),
  ],
)
def test_rows_change_hands_with_the_drafters_state(x64, name):
  found = RIVALS[name]
  model, own = make(found, 3)
  prompts, options = requests(3)
  expected = generate(model, prompts, found.drafter, own, **options)
  got = generate(model, prompts, found.drafter, own, batch=2, **options)
  assert got == expected


def test_no_row_waits_for_another(x64):
  """One long request and many short ones: two rows need little more passes
  than the long one alone, where batches of two need one long pass each."""
  config, _ = CASES["lossless"]
  decoder = Decoder(random_model(config, 1), NoDraft())
  prompts = [[i % VOCAB, 1] for i in range(8)]
  limits = np.array([MOST, *[3] * 7])
  served = decoder.serve(prompts, 2, max_new_tokens=limits)
  assert [len(x.token_ids) for x in collect(served)] == limits.tolist()
  assert int(served.passes) <= MOST + 1


def test_sizes_that_cannot_be():
  decoder = Decoder(random_model(CASES["lossless"][0], 0), NoDraft())
  for batch in (-1, 0, 3):
    with pytest.raises(UserError, match="between 1 and the 2 prompts"):
      decoder.serve([[1], [2]], batch)

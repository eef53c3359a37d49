"""Drafts that are drawn: the loop's output is distributed as the target's.

tests/test_accept.py sums over the rule alone; here all of it runs: streams that
draw, the tree, the cache, the noise of seeds and positions.
"""

import dataclasses

import jax
import numpy as np
import pytest
import reference
import tiny
from random_models import CASES, random_model, random_requests, row
from scipy import stats

from spec_stream import accept, checkpoints
from spec_stream.decode import Decoder, collect, generate
from spec_stream.drafters.none import NoDraft
from spec_stream.drafters.prompt_lookup import PromptLookup
from spec_stream.drafters.streams import StreamDraft
from spec_stream.errors import UserError
from spec_stream.models.prune import Prune
from spec_stream.tree import TreeSpec

CHAIN = TreeSpec("chain")
PAIRS = TreeSpec("cartesian", width=2)
PATHS = TreeSpec("paths", paths=((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)))
SHARED, LOSSLESS = CASES["shared, main attends"][0], CASES["lossless"][0]


def drawn(tree, **settings):
  return StreamDraft(tree, rule="rejection", **settings)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
  "tree",
  [
    pytest.param(CHAIN, marks=SLOW, id="chain"),
    pytest.param(PATHS, id="paths"),
  ],
)
def test_greedy_rows_are_those_of_plain_decoding(x64, tree):
  """Beside rows that sample: certainties are accepted, and nothing else is."""
  for seed in range(4):
    model = random_model(LOSSLESS, seed)
    prompts, options = random_requests(seed)
    options["temperature"] = np.array([0.9, 0.0, 0.0])
    options["repetition_penalty"] = np.array([1.2, 1.0, 0.9])
    plain = generate(model, prompts, NoDraft(), **options)
    fast = generate(model, prompts, drawn(tree), **options)
    assert [x.token_ids for x in plain[1:]] == [x.token_ids for x in fast[1:]]


@SLOW
def test_a_row_in_a_batch_gives_what_it_gives_alone(x64):
  model = random_model(SHARED, 0)
  prompts, options = random_requests(0)
  options["temperature"] = np.array([0.9, 1.2, 0.0])
  together = generate(model, prompts, drawn(PATHS), **options)
  for i, expected in enumerate(together):
    alone = generate(model, [prompts[i]], drawn(PATHS), **row(options, i))[0]
    assert alone == expected


@pytest.mark.slow
def test_typical_acceptance_in_the_loop(x64):
  """Greedy rows are those of plain decoding; the others accept more often."""
  calls = {"exact": 0, "typical": 0}
  for seed in range(2):
    model = random_model(SHARED, seed)
    prompts, options = random_requests(seed)
    options |= {"temperature": np.array([1.3, 0.0, 1.3]), "end_token": -1}
    options |= {"max_new_tokens": 14, "stop": (), "top_k": 0}
    plain = generate(model, prompts, NoDraft(), **options)
    for rule in calls:
      drafter = StreamDraft(TreeSpec("best_first", 9), rule=rule)
      made = generate(model, prompts, drafter, **options)
      assert made[1].token_ids == plain[1].token_ids
      assert all(len(x.token_ids) == 14 for x in made)
      calls[rule] += sum(x.target_calls for x in made)
  assert calls["typical"] < calls["exact"]


def first_three(model, prompt, options):
  """{three tokens: probability}, from passes over whole texts."""
  out = {(): 1.0}
  for _ in range(3):
    rows = [prompt + list(text) for text in out]
    first = [len(prompt) - 1] * len(rows)
    logits = reference.sequences(model, rows, first)[0]
    grown = {}
    for i, (text, mass) in enumerate(out.items()):
      x = logits[i, len(rows[i]) - 1]
      x = reference.penalize(x, rows[i], options["repetition_penalty"])
      x = reference.filter_logits(
        x / options["temperature"],
        options["top_k"],
        options["top_p"],
        options["min_p"],
      )
      probs = np.exp(reference.log_softmax(x))
      for token in np.flatnonzero(probs):
        grown[(*text, int(token))] = mass * probs[token]
    out = grown
  return out


def chi_square(counts, expected):
  """Statistic and degrees of freedom; rare texts are one."""
  common = [text for text, n in expected.items() if n >= 5]
  rare = sum(n for text, n in expected.items() if n < 5)
  pairs = [(counts.get(text, 0), expected[text]) for text in common]
  if rare >= 5:
    seen = sum(counts.values()) - sum(n for n, _ in pairs)
    pairs.append((seen, rare))
  return sum((o - e) ** 2 / e for o, e in pairs), len(pairs) - 1


def count_texts(model, prompt, drafter, options, rows, batches, offset=0):
  """{first three tokens: how often}, under seeds from `offset` on."""
  counts = {}
  decoder = Decoder(model, drafter)
  for batch in range(batches):
    seeds = np.arange(rows) + batch * rows + offset
    state = decoder.start([prompt] * rows, seed=seeds, **options)
    for x in collect(decoder.finish(state)):
      text = tuple(x.token_ids[:3])
      counts[text] = counts.get(text, 0) + 1
  return counts


OPTIONS = dict(
  max_new_tokens=4,
  temperature=1.1,
  top_k=3,
  top_p=0.95,
  min_p=0.02,
  repetition_penalty=1.2,
)


@pytest.mark.slow
@pytest.mark.parametrize(
  "config",
  [
    pytest.param(SHARED, id="shared"),
    pytest.param(LOSSLESS, id="lossless"),
  ],
)
def test_samples_follow_the_targets_distribution(x64, config):
  model, prompt = random_model(config, 3), [3, 1, 4, 1]
  expected = first_three(model, prompt, OPTIONS)
  rows, batches = 1000, 3
  counts = count_texts(model, prompt, drawn(PAIRS), OPTIONS, rows, batches)
  assert set(counts) <= set(expected)
  scaled = {text: p * rows * batches for text, p in expected.items()}
  value, freedom = chi_square(counts, scaled)
  assert stats.chi2.sf(value, freedom) > 0.01
  # It has the power to tell a near miss.
  wrong = {text: p**0.7 for text, p in expected.items()}
  total = sum(wrong.values())
  wrong = {text: p / total * rows * batches for text, p in wrong.items()}
  assert stats.chi2.sf(*chi_square(counts, wrong)) < 1e-3


@pytest.mark.slow
def test_200_000_continuations_of_a_trained_model(tmp_path, monkeypatch):
  """Plain against speculative, as two samples; and a rule that is broken.

  A rejected token gives way to a draw from p itself and not from what is left
  of it: the mistake that is easiest to make.
  """
  tiny.use_small_data(monkeypatch)
  settings = dataclasses.replace(tiny.TRAIN, steps=200, save_every=200)
  tiny.train(str(tmp_path / "run"), train=settings)
  run = checkpoints.load_run(tmp_path / "run")
  prompt = run.tokenizer.encode_prompt("red green")
  options = dict(max_new_tokens=4, temperature=1.5)
  rows, batches = 2000, 100

  def sample(drafter, offset):
    return count_texts(
      run.model, prompt, drafter, options, rows, batches, offset
    )

  def p_value(a, b):
    """Of both being from one distribution; rare texts are one."""
    both = {text: a.get(text, 0) + b.get(text, 0) for text in {*a, *b}}
    common = [text for text, n in both.items() if n >= 20]
    table = [[x.get(text, 0) for text in common] for x in (a, b)]
    for line, x in zip(table, (a, b)):
      line.append(sum(x.values()) - sum(line))
    table = np.array(table)
    table = table[:, table.sum(0) > 0]
    assert table.shape[1] > 10
    return stats.chi2_contingency(table).pvalue

  plain = sample(NoDraft(), 0)
  shift = rows * batches
  assert p_value(plain, sample(drawn(PAIRS, num_streams=1), shift)) > 0.01
  exact = StreamDraft(TreeSpec("best_first", 4))
  assert p_value(plain, sample(exact, 2 * shift)) > 0.01
  monkeypatch.setattr(accept, "residual", lambda target, draft: target)
  jax.clear_caches()
  try:
    assert p_value(plain, sample(drawn(PAIRS, num_streams=1), shift)) < 1e-6
  finally:
    jax.clear_caches()


# -- words for people --------------------------------------------------------


@pytest.mark.parametrize(
  "drafter, words",
  [
    (StreamDraft(rule="rejection"), "shape of a best_first tree"),
    (drawn(CHAIN, prune=Prune(threshold=0.1)), "neither pruning"),
    (
      drawn(TreeSpec("paths", paths=((0,), (2,)))),
      r"\[2\] without \[1\]",
    ),
    (PromptLookup(CHAIN, rule="rejection"), "takes the most probable"),
    (PromptLookup(TreeSpec("chain", 1), rule="rejection"), "use exact"),
    (PromptLookup(CHAIN, rule="often"), "use one of exact"),
  ],
)
def test_what_cannot_be(drafter, words):
  model = random_model(CASES["shared, pruned"][0], 0)
  with pytest.raises(UserError, match=words):
    Decoder(model, drafter)

"""Stop sequences: the automaton against searching the text."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_stream import stops
from spec_stream.data.tokenizer import Tokenizer
from spec_stream.errors import UserError

LETTERS = 3
SEEDS = st.integers(0, 2**32 - 1)
walk = jax.jit(stops.walk)


def first_end(pieces, tokens, wanted):
  """How many tokens until the text holds a stop; None: it never does."""
  text = ()
  for i, token in enumerate(tokens, 1):
    text += tuple(pieces[token])
    for stop in wanted:
      size = len(stop)
      if any(text[j : j + size] == tuple(stop) for j in range(len(text))):
        return i
  return None


@settings(max_examples=60)
@given(SEEDS)
def test_a_walk_finds_what_a_search_finds(seed):
  """Pieces of no, one or several letters; stops that are parts of others."""
  rng = np.random.default_rng(seed)
  draw = lambda low, high: rng.integers(0, LETTERS, rng.integers(low, high))
  pieces = [draw(0, 4) for _ in range(8)]
  wanted = [draw(1, 6) for _ in range(rng.integers(1, 4))]
  table = stops.of_pieces(wanted, pieces, LETTERS)
  tokens = rng.integers(0, len(pieces), (4, 12)).astype(np.int32)
  state = np.zeros(4, np.int32)
  found = []
  for start in range(0, 12, 3):  # three tokens a call
    whole = np.full(4, 3)
    state, done = walk(table, state, tokens[:, start : start + 3], whole)
    found.append(np.asarray(done))
  found = np.concatenate(found, 1)
  for row, got in zip(tokens, found):
    end = first_end(pieces, row, wanted)
    first = int(np.argmax(got)) + 1 if got.any() else None
    assert first == end
    assert got[first - 1 :].all() if first else not got.any()


def test_tokens_that_do_not_count_move_nothing():
  table = stops.of_tokens([[1, 2]], 4)
  tokens = np.array([[1, 2], [1, 2], [2, 1]], np.int32)
  state, done = walk(table, np.zeros(3, int), tokens, np.array([1, 2, 0]))
  assert done.tolist() == [[False] * 2, [False, True], [False] * 2]
  after = np.array([[2], [0], [2]], np.int32)
  _, done = walk(table, state, after, np.ones(3, int))
  assert done[:, 0].tolist() == [True, True, False]


def test_text_is_found_across_tokens_of_a_tokenizer():
  texts = ["one two three four", "one, two; naïve 漢字 text"] * 5
  tokenizer = Tokenizer.train(texts, 300)
  for text, stop in [
    ("one two three", "wo thr"),
    ("naïve 漢字 text", "漢字"),
    ("naïve", "ï"),
  ]:
    ids = tokenizer.encode(text)
    table = stops.of_text(tokenizer, [stop], tokenizer.vocab_size)
    tokens = np.array([ids], np.int32)
    _, done = walk(table, np.zeros(1, int), tokens, np.array([len(ids)]))
    for i in range(len(ids)):
      assert done[0, i] == (stop in tokenizer.decode(ids[: i + 1])), (text, i)
    assert done[0, -1]


@pytest.mark.parametrize(
  "text, wanted, behind, held",
  [
    ("a stop here", ["stop"], "stop here", 0),
    ("a sto", ["stop", "o!"], "", 3),
    ("end", ["\n\n"], "", 0),
    ("end\n", ["\n\n"], "", 1),
    ("ab", [], "", 0),
    ("aa", ["aab"], "", 2),
    ("one two", ["two", "ne"], "ne two", 0),
  ],
)
def test_text_at_a_stop(text, wanted, behind, held):
  found = stops.behind(text.encode(), [x.encode() for x in wanted])
  assert found.decode() == behind
  if not behind:
    assert stops.held(text, wanted) == held


def test_stops_of_like_length_have_tables_of_one_size():
  sizes = {len(stops.of_tokens([[1] * n], 3)) for n in (3, 4, 5, 6)}
  assert sizes == {8}


@pytest.mark.parametrize(
  "wanted, words",
  [
    ([[]], "is empty"),
    ([[4]], "ends at 3"),
    ([[1], [-1]], "token -1"),
    ([1, 2], "list of token ids"),
  ],
)
def test_stops_that_cannot_be(wanted, words):
  with pytest.raises(UserError, match=words):
    stops.of_tokens(wanted, 4)

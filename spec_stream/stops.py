"""Stop sequences: one automaton that the compiled loop walks token by token.

A stop may begin and end inside tokens: a blank line may come as one token, as
two, or in the middle of one. So it is matched in bytes: the states are those of
Aho and Corasick (1975), how much of which stop the text ends with, and a table
says to which state each token leads. Stops may also be given as token ids.

Letters: B batch row, A tokens of a call, S states, V vocabulary.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spec_stream.errors import UserError


def of_text(tokenizer, stops: Sequence[str], vocab_size: int) -> np.ndarray:
  """The table of `stops`: see `of_pieces`.

  tokenizer: its `token_bytes(id)` are what a token adds to a text. Tokens that
  it does not know add nothing.

  Raises: UserError if a stop is empty.
  """
  pieces = [tokenizer.token_bytes(i) for i in range(vocab_size)]
  return of_pieces([stop.encode() for stop in stops], pieces)


def of_tokens(stops: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
  """The same for stops that are token ids.

  Raises: UserError if a stop is empty or holds what is no token.
  """
  for stop in stops:
    if not isinstance(stop, Sequence | np.ndarray) or isinstance(stop, str):
      raise UserError(f"stop={stop!r} must be a list of token ids")
    if bad := [t for t in stop if not 0 <= t < vocab_size]:
      raise UserError(
        f"a stop sequence has token {bad[0]}: the vocabulary ends at "
        f"{vocab_size - 1}"
      )
  return _padded(_letters(stops, vocab_size))


def of_pieces(
  stops: Sequence[Sequence[int]],
  pieces: Sequence[Sequence[int]],
  letters: int = 256,
) -> np.ndarray:
  """Table [S, V] int32: the state after each token in each state.

  State 0 is the start; the last state means that a stop is complete, and is
  never left. S is a power of two, so that other stops of about that length
  compile nothing.

  Args:
    stops: each some letters, whole numbers below `letters`.
    pieces: for each token its letters.
  """
  step = _letters(stops, letters)
  longest = max(map(len, pieces), default=0)
  letter = np.full((len(pieces), longest), -1, np.int16)
  for row, piece in zip(letter, pieces):
    row[: len(piece)] = list(piece)
  table = np.repeat(np.arange(len(step))[:, None], len(pieces), 1)
  for i in range(longest):
    live = np.flatnonzero(letter[:, i] >= 0)  # few tokens are long
    table[:, live] = step[table[:, live], letter[live, i]]
  return _padded(table)


def _letters(stops: Sequence[Sequence[int]], letters: int) -> np.ndarray:
  """[states, letters]: the state after each letter in each state."""
  if not all(map(len, stops)):
    raise UserError("a stop sequence is empty: it needs at least one character")
  nodes, ends = [{}], set()  # of a trie: letter -> node
  for stop in stops:
    at = 0
    for letter in stop:
      if letter not in nodes[at]:
        nodes[at][letter] = len(nodes)
        nodes.append({})
      at = nodes[at][letter]
    ends.add(at)
  # Breadth first. Where a letter does not go on, the longest suffix may.
  found = len(nodes)
  step = np.zeros((found + 1, letters), np.int32)
  suffix, order = {0: 0}, [0]
  for at in order:
    if at in ends or suffix[at] in ends:
      ends.add(at)
    if at:
      step[at] = step[suffix[at]]
    for letter, to in nodes[at].items():
      suffix[to] = step[suffix[at], letter] if at else 0
      order.append(to)
    for letter, to in nodes[at].items():
      step[at, letter] = to
  for at in ends:
    step[step == at] = found
  step[[*ends, found]] = found
  return step


def _padded(table: np.ndarray) -> np.ndarray:
  """The table with its last state repeated: a power of two of states."""
  found, size = len(table) - 1, 1 << (len(table) - 1).bit_length()
  table = np.where(table == found, size - 1, table)
  more = np.full((size - len(table), table.shape[1]), size - 1)
  return np.concatenate([table, more]).astype(np.int32)


def walk(
  table: jax.Array, state: jax.Array, tokens: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """-> the state [B] after the first `count` [B] of `tokens` [B, A], and
  whether each token completes a stop or comes after one [B, A].
  """
  states = []
  for i in range(tokens.shape[1]):
    after = table[state, tokens[:, i]]
    state = jnp.where(i < count, after, state)
    states.append(state)
  done = jnp.stack(states, 1) == table.shape[0] - 1
  return state, done & (jnp.arange(tokens.shape[1]) < count[:, None])


def behind(data: bytes, stops: Sequence[bytes]) -> bytes:
  """What of `data` is behind where its first stop begins; b"" without one."""
  found = [at for stop in stops if (at := data.find(stop)) >= 0]
  return data[min(found) :] if found else b""


def held(text: str, stops: Sequence[str]) -> int:
  """How many letters at the end of `text` may be the start of a stop."""
  return max(
    (
      size
      for stop in stops
      for size in range(1, min(len(stop), len(text) + 1))
      if text.endswith(stop[:size])
    ),
    default=0,
  )

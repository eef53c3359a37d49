"""Where two decodings of one prompt part, and by how small a margin.

Exact acceptance gives the tokens of plain decoding, but for ties: floating
point sums in another order move logits by a few units in the last place, and
where the two best tokens are that close either may win. So a difference is
judged by its margin, taken from a plain forward pass over what the two have in
common. A wide margin is no tie but a bug.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spec_stream import buckets
from spec_stream.models.transformer import (
  Transformer,
  causal_mask,
  for_decoding,
  forward,
)
from spec_stream.sampling import Sampling, scores, seen_in

# Widest margin of a tie between scores (logits plus noise) of size about 10.
WIDEST_TIE = {"float64": 1e-9, "float32": 1e-4}
_FULL_PRECISION = ("highest", "float32", "F32_F32_F32")


def widest_tie(dtype: str) -> float:
  """From which margin on a difference is a bug; inf: no margin is one.

  There is no such bound in bfloat16, nor in float32 where the device multiplies
  in less (TensorFloat-32, bfloat16 passes), as accelerators do by default.
  """
  full = jax.config.jax_default_matmul_precision in _FULL_PRECISION
  if dtype == "float32" and jax.default_backend() != "cpu" and not full:
    return math.inf
  return WIDEST_TIE.get(dtype, math.inf)


@dataclasses.dataclass(frozen=True)
class Difference:
  """The first token in which a decoding departs from what was expected."""

  prompt: int  # its place in the list of prompts
  position: int  # of the token among the new ones, from 0
  margin: float  # inf where one of the two ended and the other went on
  tokens: tuple[int, int] | None = None  # expected and got; None: one ended
  whole: int | None = None  # what one pass over the whole text gives

  def __str__(self):
    return (
      f"prompt {self.prompt}, new token {self.position}: margin "
      f"{self.margin:.2e}"
    )


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
  """Index of the first token that differs, or None; an end counts as one."""
  for i, (a, b) in enumerate(zip(expected, got, strict=False)):
    if a != b:
      return i
  shorter = min(len(expected), len(got))
  return None if len(expected) == len(got) else shorter


def compare(
  model: Transformer,
  prompts: Sequence[Sequence[int]],
  expected: Sequence[Sequence[int]],
  got: Sequence[Sequence[int]],
  sampling: Sequence[Sampling],
  attach_streams: bool = True,
) -> list[Difference]:
  """The prompts whose new tokens differ, with their margins.

  Args:
    model: the target of both.
    prompts: token ids.
    expected, got: new tokens of each prompt, of plain decoding and of another.
    sampling: of each prompt, a batch of one.
    attach_streams: whether the two were decoded with streams attached. Matters
      where the main stream attends to its streams.
  """
  model = for_decoding(model)  # as decoding does
  attach = attach_streams and model.config.streams.attends
  found = []
  for i, (a, b) in enumerate(zip(expected, got, strict=True)):
    at = first_difference(a, b)
    if at is None:
      continue
    margin, tokens, whole = math.inf, None, None
    if at < min(len(a), len(b)):
      common, tokens = [*prompts[i], *a[:at]], (a[at], b[at])
      margin, whole = _margin(
        model, common, len(prompts[i]), tokens, sampling[i], attach
      )
    found.append(Difference(i, at, margin, tokens, whole))
  return found


def _margin(
  model, common, prompt_length, tokens, sampling, attach
) -> tuple[float, int]:
  """How far the worse of two tokens is below the best of all; and the best."""
  length = len(common)
  # Powers of two, so that many differences share few programs.
  bucket = buckets.round_up(length)
  padded = np.zeros((1, bucket), np.int32)
  padded[0, :length] = common
  at = None
  if attach:
    # As in decoding: streams on the last prompt token and on all after it.
    order = np.arange(bucket)
    carries = (order >= prompt_length - 1) & (order < length)
    at = np.where(carries, order, -1)[None].astype(np.int32)
  values = _next_scores(
    *nnx.split(model), padded, np.int32(length), at, sampling
  )
  values = np.asarray(values, np.float64)
  margin = values.max() - values[list(tokens)].min()
  return float(margin), int(values.argmax())


@functools.partial(jax.jit, static_argnames="graphdef")
def _next_scores(graphdef, weights, tokens, length, at, sampling):
  """[V] scores of the token after `tokens` [1, P], of which `length` count."""
  model = nnx.merge(graphdef, weights)
  order = jnp.arange(tokens.shape[1])
  out = forward(
    model,
    tokens,
    order[None],
    causal_mask((order < length).astype(jnp.int32)[None]),
    streams=at,
  )
  last = jnp.take(out.main, length - 1, 1)[:, None]
  depth = jnp.zeros((1, 1), jnp.int32)
  position = jnp.reshape(length - 1, (1,))
  seen = None
  if sampling.penalized:
    counts = (order < length)[None]
    seen = seen_in(tokens, counts, model.config.vocab_size)[:, None]
  return scores(model.logits(last), depth, position, 1, sampling, seen)[0, 0]

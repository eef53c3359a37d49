"""A fixed tree for streams or Medusa's heads, from how often each is right.

On the target's own greedy outputs to calibration prompts, count how often the
c-th candidate of head j is the token that came, a[j, c]. A path of ranks
(c_1, .., c_g) is then accepted with probability a[1, c_1] ... a[g, c_g], if
heads are right independently of each other; the nodes with the largest ones are
the tree (Medusa, 2401.10774, section 2.3.3, which adds them one by one).

Letters: B batch row, T positions, J heads or streams, C ranks, M nodes.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spec_stream import evaluate
from spec_stream.drafters.medusa import Medusa
from spec_stream.drafters.none import NoDraft
from spec_stream.errors import UserError
from spec_stream.models.transformer import (
  Transformer,
  causal_mask,
  forward,
  merge_lora,
)

ROWS = 8  # sequences of one pass


@functools.partial(jax.jit, static_argnames=("graphdef", "name", "width"))
def _counts(graphdef, state, name, width, tokens, first, length):
  """[J, C] how often rank c of head j came, and [J] how often any could.

  tokens: [B, T], of which those from `first` [B] to `length` [B] are output.
  """
  model = nnx.merge(graphdef, state)
  order = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  inside = order < length[:, None]
  at = jnp.where(inside & (order >= first[:, None] - 1), order, -1)
  out = forward(
    model,
    tokens,
    order,
    causal_mask(inside.astype(jnp.int32)),
    streams=at if model.config.streams.num_streams else None,
  )
  if name == "streams":
    heads = model.config.streams.num_streams
    logits = lambda j: model.logits(out.streams[:, :, j - 1])
  else:
    heads = model.drafter.options.length
    logits = lambda j: model.drafter.logits(out.main, j)
  hits, totals = [], []
  for j in range(1, heads + 1):
    came = jnp.roll(tokens, -1 - j, 1)
    valid = (at >= 0) & (order + 1 + j < length[:, None])
    said = logits(j)
    own = jnp.take_along_axis(said, came[..., None], 2)
    ids = jnp.arange(said.shape[2])
    above = (said > own) | ((said == own) & (ids < came[..., None]))
    rank = jnp.where(valid, above.sum(2), -1)
    hits.append((rank[..., None] == jnp.arange(width)).sum((0, 1)))
    totals.append(valid.sum())
  return jnp.stack(hits), jnp.stack(totals)


def accuracies(
  model: Transformer,
  prompts: Sequence[Sequence[int]],
  name: str,
  width: int,
  **settings,
) -> np.ndarray:
  """a [J, C]: share of positions at which rank c of head j came.

  Args:
    model: the target with its streams or heads.
    prompts: token ids.
    name: "streams" or "medusa".
    width: C.
    **settings: max_new_tokens, end_token, batch and on_batch of
      `evaluate.decode_all`.

  Raises: UserError if the model has none of that name, or nothing was decoded.
  """
  if name == "streams" and not model.config.streams.num_streams:
    raise UserError("this model has no streams to calibrate")
  if name == "streams" and model.config.streams.correction_rank:
    raise UserError(
      "these streams are corrected by the token before "
      "(model.streams.correction_rank): a fixed tree cannot know it"
    )
  if name == "medusa" and not isinstance(model.drafter, Medusa):
    raise UserError("this model has no Medusa heads to calibrate")
  if name not in ("streams", "medusa"):
    raise UserError(
      f"{name} has no use for a calibrated tree: streams and medusa have, "
      "whose candidates do not depend on each other"
    )
  made = evaluate.decode_all(model, prompts, NoDraft(), **settings)
  rows = [[*p, *g.token_ids] for p, g in zip(prompts, made, strict=True)]
  size = -(-max(map(len, rows)) // 64) * 64
  graphdef, state = nnx.split(merge_lora(model))
  hits, totals = 0, 0
  for start in range(0, len(rows), ROWS):
    here = rows[start : start + ROWS]
    tokens = np.zeros((ROWS, size), np.int32)
    first, length = np.ones((2, ROWS), np.int32)
    for i, row in enumerate(here):
      tokens[i, : len(row)] = row
      first[i], length[i] = len(prompts[start + i]), len(row)
    more = _counts(graphdef, state, name, width, tokens, first, length)
    hits, totals = hits + np.asarray(more[0]), totals + np.asarray(more[1])
  if not totals.all():
    raise UserError("the outputs are too short to calibrate with: more prompts")
  return hits / totals[:, None]


def best_paths(
  accuracy: np.ndarray, num_nodes: int
) -> tuple[list[list[int]], float]:
  """-> (the num_nodes - 1 most probable paths, tokens per call to expect).

  accuracy: [J, C]. Raises: UserError if there are fewer paths.
  """
  heads, width = accuracy.shape
  open_paths = {(c,): accuracy[0, c] for c in range(width)}
  chosen, total = [], 1.0
  while len(chosen) < num_nodes - 1:
    if not open_paths:
      raise UserError(
        f"{heads} heads with {width} candidates each give no tree of "
        f"{num_nodes} nodes"
      )
    path = max(open_paths, key=lambda p: (open_paths[p], -len(p)))
    value = open_paths.pop(path)
    chosen.append(list(path))
    total += value
    if len(path) < heads:
      level = accuracy[len(path)]
      open_paths |= {(*path, c): value * level[c] for c in range(width)}
  return sorted(chosen, key=lambda p: (len(p), p)), float(total)

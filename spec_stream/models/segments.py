"""Attention of training, queries in segments (paper appendix C).

A training row holds T main positions and U sets of J streams. Scores of all
against all, [T + U J, T + U J], would grow with the square of both; but a
stream sees the main stream and its own set alone. So the scores are

    main t     to main 0..t   [T, T]        to the streams of t    [T, J]
    (u, j)     to main 0..t   [U J, T]      to streams 1..j of u   [U J, J]

and they are held for one segment of queries at a time: the backward pass
computes them again. The memory of attention is then linear in the sequence.
`attention` has the same for decoding, dense; a test compares the two.

Letters: as in `attention`; P examples of a packed row, C queries of a segment.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from spec_stream.models.config import ModelConfig
from spec_stream.models.layers import frequencies, rotation
from spec_stream.models.scores import joined, scores


@flax.struct.dataclass
class Segments:
  """In place of a mask: causal within examples, queries in segments.

  ids: [B, T] which of the P examples a position belongs to, 0 for padding.
  size: positions (main ones, and ones with streams) of a segment, which must
    divide T and U; 0 for all of them at once.
  """

  ids: jax.Array
  size: int = flax.struct.field(pytree_node=False, default=0)


@flax.struct.dataclass
class SegmentRows:
  """What the rows [main 0..T-1 | streams (u, j)] are; see `attention.Rows`."""

  rotary: jax.Array | None  # [B, R, 2, 2, n]
  positions: jax.Array  # [B, R]
  ids: jax.Array  # [B, T]
  at: jax.Array  # [B, U] main row of each set, -1 for none
  set_of: jax.Array  # [B, T] the set of each main row, -1 for none
  turn: jax.Array | None = None
  size: int = flax.struct.field(pytree_node=False, default=0)
  window: int = flax.struct.field(pytree_node=False, default=0)
  num_streams: int = flax.struct.field(pytree_node=False, default=0)  # J
  attends: bool = flax.struct.field(pytree_node=False, default=False)

  @property
  def num_main(self) -> int:
    return self.ids.shape[1]


def segment_rows(
  config: ModelConfig,
  positions: jax.Array,
  mask: Segments,
  at: jax.Array | None = None,
  num_streams: int = 0,
  slides: bool = False,
) -> SegmentRows:
  """Rows of training. positions: [B, T]; at: [B, U], None for no streams."""
  batch, num_main = positions.shape
  if at is None:
    at = jnp.zeros((batch, 0), jnp.int32)
  j = jnp.arange(1, num_streams + 1)
  start = jnp.take_along_axis(positions, jnp.maximum(at, 0), 1)[..., None]
  future = config.streams.stream_position == "future"
  every = start + (j if future else jnp.zeros_like(j))  # [B, U, J]
  positions = jnp.concatenate([positions, every.reshape(batch, -1)], 1)
  # Row T of the scatter takes what belongs nowhere, and is cut off.
  where = jnp.where(at < 0, num_main, at)
  sets = jnp.arange(at.shape[1], dtype=jnp.int32)
  sets = jnp.broadcast_to(sets, at.shape)
  set_of = jnp.full((batch, num_main + 1), -1, jnp.int32)
  set_of = jax.vmap(lambda x, i, u: x.at[i].set(u))(set_of, where, sets)
  rotary, turn = None, None
  if config.positions == "rotary":
    turns, factor = frequencies(config, slides)
    rotary = rotation(positions, turns, config.dtype, factor)
  if config.streams.stream_id == "rotation" and num_streams:
    # Eq. 9: value of stream j times e^{i eps j}; main values stay.
    j = jnp.concatenate([jnp.zeros(num_main), jnp.tile(j, at.shape[1])])[None]
    pairs = np.ones(config.head_dim // 2)
    turn = rotation(j, config.streams.rotation_eps * pairs, config.dtype)
  return SegmentRows(
    rotary=rotary,
    positions=positions,
    ids=mask.ids,
    at=at,
    set_of=set_of[:, :-1],
    turn=turn,
    size=mask.size,
    window=config.sliding_window if slides else 0,
    num_streams=num_streams,
    attends=config.streams.attends and num_streams > 0,
  )


def attend(q, k, v, rows: SegmentRows, cap: float):
  """q [B, K, R, G, H], k [B, K, H, R], v [B, K, R, H] -> y like q."""
  batch, heads, _, groups, size = q.shape
  num_main, num_streams = rows.num_main, rows.num_streams
  sets = rows.at.shape[1]
  own_k = k[..., num_main:].reshape(batch, heads, size, sets, num_streams)
  own_v = v[:, :, num_main:].reshape(batch, heads, sets, num_streams, size)
  k, v = k[..., :num_main], v[:, :, :num_main]
  key = dict(
    id=rows.ids, order=jnp.arange(num_main), at=rows.positions[:, :num_main]
  )

  def visible(ids, order, positions):
    """[B, C, J or 1, T]; ids, order [B, C]; positions [B, C, J or 1]."""
    seen = (ids[..., None] == key["id"][:, None]) & (key["id"][:, None] > 0)
    seen &= order[..., None] >= key["order"]
    seen = seen[:, :, None]
    if rows.window:
      seen &= positions[..., None] - key["at"][:, None, None] < rows.window
    return seen

  def main(q, ids, order, positions, sets):
    """Segment of main rows: q [B, K, C, G, H]; the rest [B, C]."""
    seen = visible(ids, order, positions[..., None])[:, :, 0]
    parts = [scores("bkcgh,bkht->bkcgt", q, k, seen[:, None, :, None], cap)]
    weigh = [("bkcgt,bkth->bkcgh", v)]
    if rows.attends:
      take = lambda x, axis: jnp.take_along_axis(
        x, jnp.expand_dims(jnp.maximum(sets, 0), _others(axis)), axis
      )
      mine = (sets >= 0)[:, None, :, None, None]
      parts.append(scores("bkcgh,bkhcj->bkcgj", q, take(own_k, 3), mine, cap))
      weigh.append(("bkcgj,bkcjh->bkcgh", take(own_v, 2)))
    return joined(parts, weigh)

  def streams(q, own_k, own_v, at, positions):
    """Segment of sets: q [B, K, C, J, G, H], at [B, C], positions [B, C, J]."""
    ids = jnp.take_along_axis(rows.ids, jnp.maximum(at, 0), 1)
    seen = visible(ids, at, positions)  # an `at` of -1 sees nothing
    order = jnp.arange(num_streams)
    earlier = (order[:, None] >= order)[:, None]
    parts = [
      scores("bkcjgh,bkht->bkcjgt", q, k, seen[:, None, :, :, None], cap),
      scores("bkcjgh,bkhci->bkcjgi", q, own_k, earlier, cap),
    ]
    weigh = [("bkcjgt,bkth->bkcjgh", v), ("bkcjgi,bkcih->bkcjgh", own_v)]
    return joined(parts, weigh)

  order = jnp.broadcast_to(jnp.arange(num_main), rows.ids.shape)
  args = (rows.ids, order, key["at"], rows.set_of)
  args = ((q[:, :, :num_main], 2), *((x, 1) for x in args))
  y = _by_segments(main, args, rows.size, 2)
  if not sets:
    return y
  shape = (batch, heads, sets, num_streams, groups, size)
  places = rows.positions[:, num_main:].reshape(batch, sets, num_streams)
  args = ((q[:, :, num_main:].reshape(shape), 2), (own_k, 3), (own_v, 2))
  args = (*args, (rows.at, 1), (places, 1))
  out = _by_segments(streams, args, rows.size, 2)
  return jnp.concatenate([y, out.reshape(*y.shape[:2], -1, *y.shape[3:])], 2)


def _others(axis: int) -> tuple[int, ...]:
  """Axes to add to [B, C] so that it indexes `axis` of a rank-5 array."""
  return tuple(i for i in range(1, 5) if i != axis)


def _by_segments(function, args, size: int, out_axis: int):
  """`function` of slices of each (array, axis), `size` long, joined again.

  One segment is in memory at a time; the backward pass computes it again.
  """
  length = args[0][0].shape[args[0][1]]
  if not size or size >= length:
    return function(*(x for x, _ in args))
  count = length // size

  def split(x, axis):  # [..., length, ...] -> [count, ..., size, ...]
    shape = (*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)

  parts = tuple(split(x, axis) for x, axis in args)
  y = jax.lax.map(jax.checkpoint(lambda part: function(*part)), parts)
  y = jnp.moveaxis(y, 0, out_axis)
  shape = (*y.shape[:out_axis], length, *y.shape[out_axis + 2 :])
  return y.reshape(shape)

"""Attention over the cache, the new tokens and their streams.

The rows of one call are [main 0..T-1 | streams (u, j)], in one block: one
projection, one softmax. `at[u]` is the main row that carries set u.

                cache slots   main rows      streams (u', j')
    main t      < length      mask[t]        u' at t, if main attends (eq. 1)
    (u, j)      < length      mask[at[u]]    u' = u, j' <= j         (eq. 2)

Only main rows' keys and values ever reach the cache. Streams of a token that is
there already need no main rows (`own_rows`).

Letters: B batch row, R rows, T main rows, U sets of streams, J streams, S cache
slots, K key/value heads, G query heads per key/value head, H head size.
"""

import functools
import importlib
import warnings

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spec_stream.models import segments
from spec_stream.models.config import ModelConfig
from spec_stream.models.layers import (
  Norm,
  frequencies,
  rotate,
  rotation,
  wide,
)
from spec_stream.models.lora import Linear, platform_names
from spec_stream.models.scores import joined, scores
from spec_stream.models.segments import SegmentRows

# Kernels that read the cache, by platform, and where they do so: on devices
# where a step measured faster by them, "platform" or "platform capability".
# That is an H100 (experiments/gpu), and a CPU (experiments/step_cost); the one
# for a TPU was not measured. A module `fits` some shapes, and has `attend`, of
# turned and scaled queries, keys and values, or `attend_projections`.
KERNELS = {
  "tpu": "tree_attention",
  "cuda": "tree_attention_gpu",
  "cpu": "tree_attention_cpu",
}
KERNEL_ON: tuple[str, ...] = ("cuda 9.0", "cpu")


def kernels_on(devices) -> tuple[str, ...]:
  """The platform whose kernel is to read the cache of a model that lies on
  `devices`, or none: of one device alone, for XLA cannot split a kernel."""
  found = platform_names(devices)
  if not {*found} & {*KERNEL_ON}:
    return ()
  platform = found[0]
  try:
    _kernel(platform)
  except ImportError as error:  # jax.experimental, which a jax may part with
    warnings.warn(f"attention is dense, without kernel: {error}", stacklevel=2)
    return ()
  return (platform,)


def _kernel(platform: str):
  # Only where it is used: Pallas is slow to import.
  return importlib.import_module(f"spec_stream.models.{KERNELS[platform]}")


@flax.struct.dataclass
class Rows:
  """What the rows of a call are; the same for all layers of a kind."""

  rotary: jax.Array | None  # [B, R, 2, 2, n], see `rotation`
  mask: jax.Array  # [B, R, R] row may attend to the key of row
  positions: jax.Array  # [B, R]
  turn: jax.Array | None = None  # rotation of values (eq. 9), as `rotary`
  old: jax.Array | None = None  # [B, R, S] slots to see, if not all committed
  num_main: int = flax.struct.field(pytree_node=False, default=0)  # T
  window: int = flax.struct.field(pytree_node=False, default=0)  # 0 = none

  def near(self, slots: int, length: jax.Array) -> jax.Array:
    """[B, 1 or R, slots] those that a row may attend to; length: [B]."""
    slot, old = jnp.arange(slots), self.old
    if old is None:
      old = (slot < length[:, None])[:, None]
    if self.window:
      old &= slot > self.positions[..., None] - self.window
    return old


def main_rows(
  config: ModelConfig, positions, mask, slides=False, old=None
) -> Rows:
  """Rows without streams. positions: [B, T]; mask: [B, T, T]; slides: for the
  layers with a sliding window; old: see `Rows`."""
  rotary, window = None, config.sliding_window if slides else 0
  if config.positions == "rotary":
    turns, factor = frequencies(config, slides)
    rotary = rotation(positions, turns, config.dtype, factor)
  if window:
    mask = mask & (positions[:, :, None] - positions[:, None] < window)
  num_main = positions.shape[1]
  return Rows(
    rotary, mask, positions, old=old, num_main=num_main, window=window
  )


def stream_rows(
  config: ModelConfig, positions, mask, at, num_streams: int, slides=False
) -> Rows:
  """Rows of main tokens and of a set of streams on each position `at`.

  positions: [B, T]; mask: [B, T, T]; at: [B, U] main rows, -1 for none (its
  rows hold junk, which no other row sees), or None for every row.
  """
  batch, num_main = positions.shape
  if at is None:
    at = jnp.broadcast_to(jnp.arange(num_main), positions.shape)
  set_of = jnp.repeat(jnp.arange(at.shape[1]), num_streams)  # [U J]
  j = jnp.tile(jnp.arange(1, num_streams + 1), at.shape[1])
  carrier = at[:, set_of]  # [B, U J] main row of each stream row
  take = lambda x: at_rows(x, carrier)
  to_main = jnp.concatenate([mask, take(mask)], 1)  # [B, R, T]
  own = (set_of[:, None] == set_of) & (j[:, None] >= j)
  own = jnp.broadcast_to(own, (batch, *own.shape))
  if config.streams.attends:
    back = jnp.arange(num_main)[None, :, None] == carrier[:, None]
  else:
    back = jnp.zeros((batch, num_main, j.size), bool)
  to_streams = jnp.concatenate([back, own], 1)  # [B, R, U J]
  mask = jnp.concatenate([to_main, to_streams], 2)
  j = jnp.concatenate([jnp.zeros(num_main, j.dtype), j])
  positions = jnp.concatenate([positions, take(positions)], 1)
  return _numbered(config, positions, mask, j, slides, num_main)


def own_rows(
  config: ModelConfig, positions, num_streams: int, slides: bool
) -> Rows:
  """Rows of the streams alone, of one committed token in each batch row.

  positions: [B] of those tokens.
  """
  j = jnp.arange(1, num_streams + 1)
  mask = jnp.broadcast_to(j[:, None] >= j, (len(positions), j.size, j.size))
  positions = jnp.broadcast_to(positions[:, None], mask.shape[:2])
  return _numbered(config, positions, mask, j, slides, 0)


def _numbered(config: ModelConfig, positions, mask, j, slides, num_main: int):
  """Rows of streams j [R], 0 for main rows; positions [B, R] of what carries
  them."""
  if config.streams.stream_position == "future":
    positions = positions + j
  turn = None
  if config.streams.stream_id == "rotation":
    # Eq. 9: value of stream j times e^{i eps j}; main values stay.
    pairs = np.ones(config.head_dim // 2)
    turn = rotation(j[None], config.streams.rotation_eps * pairs, config.dtype)
  rows = main_rows(config, positions, mask, slides)
  return rows.replace(turn=turn, num_main=num_main)


def at_rows(x: jax.Array, at: jax.Array) -> jax.Array:
  """x [B, T, ...] -> [B, U, ...], the rows `at` [B, U]; -1 reads row 0."""
  index = jnp.maximum(at, 0).reshape(*at.shape, *(1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, index, 1)


class Attention(nnx.Module):
  """Grouped-query attention with rotary positions over `Rows`."""

  kernels: tuple[str, ...] = ()  # see `kernels_on`

  def __init__(self, config: ModelConfig, *, lora_rank: int, rngs: nnx.Rngs):
    self.config = config
    heads = (config.num_kv_heads, config.groups)
    keys = dict(lora_rank=lora_rank, quantize=config.quantize, rngs=rngs)
    # Per key/value head: its G queries, its key, its value.
    out = (heads[0], heads[1] + 2, config.head_dim)
    bias = config.qkv_bias
    self.qkv = Linear((config.width,), out, config, bias=bias, **keys)
    std = (config.num_heads * config.head_dim * 2 * config.num_layers) ** -0.5
    inputs = (*heads, config.head_dim)
    keys = dict(std=std, bias=config.out_bias, **keys)
    self.out = Linear(inputs, (config.width,), config, **keys)
    norm = lambda: Norm(config, config.head_dim, "rms")
    self.q_norm = norm() if config.qk_norm else None
    self.k_norm = norm() if config.qk_norm else None

  def __call__(
    self, x, rows: Rows | SegmentRows, cache, length, adapt_from: int
  ):
    """x [B, R, D] -> (y [B, R, D], (k, v) of the T main rows).

    k [B, K, H, T] and v [B, K, T, H]. cache: (k, v) of this layer with S in the
    place of T, or None; length: [B], beyond which no row sees a slot, or None
    if `rows.old` alone says it.
    """
    config, num_main = self.config, rows.num_main
    with jax.named_scope("qkv"):
      qkv = self.qkv(x, adapt_from)  # [B, R, K, G+2, H]
      if self.q_norm is not None:
        # With the values beside them, for a kernel that takes all as one.
        q, k, v = jnp.split(qkv, (config.groups, config.groups + 1), 3)
        qkv = jnp.concatenate([self.q_norm(q), self.k_norm(k), v], 3)
    with jax.named_scope("attend"):
      if isinstance(rows, SegmentRows):
        q, k, v = _turned(config, qkv, rows)
        y = segments.attend(q, k, v, rows, config.attention_softcap)
      else:
        y, k, v = self._attend(qkv, rows, cache, length)
    with jax.named_scope("out"):
      y = self.out(jnp.moveaxis(y, 1, 2), adapt_from)
    return y, (k[..., :num_main], v[:, :, :num_main])

  def _attend(self, qkv, rows: Rows, cache, length):
    """qkv [B, R, K, G+2, H] -> y [B, K, R, G, H], k [B, K, H, R], v
    [B, K, R, H]."""
    args, config = (qkv, rows, cache, length), self.config
    default = functools.partial(_dense, config)
    if cache is None or length is None or not self.kernels:
      return default(*args)
    # What is compiled for another platform after all (ROCm too is a GPU, for
    # `kernels_on`) is dense.
    ways = {
      on: functools.partial(_by_kernel, on, config) for on in self.kernels
    }
    return jax.lax.platform_dependent(*args, default=default, **ways)


def _scale(config: ModelConfig) -> float:
  return config.attention_scale or config.head_dim**-0.5


def _turned(config: ModelConfig, qkv, rows: Rows | SegmentRows):
  """qkv [B, R, K, G+2, H] -> q [B, K, R, G, H], turned and scaled, k
  [B, K, H, R], turned, and v [B, K, R, H]."""
  qk, v = qkv[:, :, :, :-1], qkv[:, :, :, -1]
  if rows.rotary is not None:
    qk = rotate(qk, rows.rotary[:, :, None, None])
  if rows.turn is not None:
    v = rotate(v, rows.turn[:, :, None])
  # Scaled before it is rounded: the scale itself may be no bfloat16.
  q, k = qk[:, :, :, :-1], qk[:, :, :, -1]
  q = (q.astype(wide(q.dtype)) * _scale(config)).astype(q.dtype)
  return jnp.moveaxis(q, 2, 1), jnp.moveaxis(k, 1, 3), v.swapaxes(1, 2)


def _dense(config: ModelConfig, qkv, rows: Rows, cache, length):
  """As `Attention._attend`."""
  q, k, v = _turned(config, qkv, rows)
  y = _by_scores(config.attention_softcap, q, k, v, rows, cache, length)
  return y, k, v


def _by_scores(cap: float, q, k, v, rows: Rows, cache, length):
  """The cache, where there is one, is a second block of keys in one softmax."""
  equation = "bkrgh,bkht->bkrgt"
  blocks = [scores(equation, q, k, rows.mask[:, None, :, None], cap)]
  values = [v]
  if cache is not None:
    old = rows.near(cache[0].shape[3], length)[:, None, :, None]
    blocks.append(scores(equation, q, cache[0], old, cap))
    values.append(cache[1])
  weigh = [("bkrgt,bkth->bkrgh", x.astype(q.dtype)) for x in values]
  return joined(blocks, weigh)


def _by_kernel(
  platform: str, config: ModelConfig, qkv, rows: Rows, cache, length
):
  """As `Attention._attend`."""
  kernel = _kernel(platform)
  shape = qkv.shape[1], config.groups, config.head_dim, cache[0].shape[3]
  # A prompt's later chunks are too much for them.
  fits = kernel.fits(*shape, qkv.dtype)
  if rows.old is not None or not fits:  # a mask of its own for every row
    return _dense(config, qkv, rows, cache, length)
  first = jnp.zeros_like(rows.positions)
  if rows.window:
    first = jnp.maximum(rows.positions - rows.window + 1, 0)
  seen = (rows.mask, cache, length, first)
  cap = config.attention_softcap
  if hasattr(kernel, "attend_projections"):
    turns = rows.rotary, rows.turn
    return kernel.attend_projections(
      qkv, *turns, *seen, scale=_scale(config), cap=cap
    )
  q, k, v = _turned(config, qkv, rows)
  return kernel.attend(q, k, v, *seen, cap=cap), k, v

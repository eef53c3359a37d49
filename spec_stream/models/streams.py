"""Stream insertion: where speculative streams start (paper 3.1.1, eq. 3, 9)."""

import jax
import jax.numpy as jnp
from flax import nnx

from spec_stream.models.config import ModelConfig
from spec_stream.models.layers import wide


class StreamParam(nnx.Param):
  """A weight that exists for the streams alone."""


class Streams(nnx.Module):
  """Stream j at position t starts as f(main[t]) + embed[j], j = 1..J.

  f is the identity, or with map_rank > 0 the identity plus a low-rank map. With
  stream_id "rotation" there is no embedding: attention tells the streams apart
  by their rotated values (eq. 9).
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    streams = config.streams
    normal = jax.nn.initializers.normal
    weight = lambda init, shape: StreamParam(
      init(rngs.params(), shape, jnp.float32)
    )
    # Embeddings start as the noise of the token embeddings, not at zero: equal
    # streams would get equal gradients but for their positions.
    shape = (streams.num_streams, config.width)
    named = streams.stream_id == "embedding"
    self.embed = weight(normal(0.02), shape) if named else None
    down = (config.width, streams.map_rank)
    std, rank = config.width**-0.5, streams.map_rank
    self.map_a = weight(normal(std), down) if rank else None
    zeros = jax.nn.initializers.zeros
    self.map_b = weight(zeros, down[::-1]) if rank else None
    rank = streams.correction_rank
    down, up = (config.width, rank), (rank, config.vocab_size)
    self.correct_a = weight(normal(std), down) if rank else None
    self.correct_b = weight(zeros, up) if rank else None

  def correction(self, words: jax.Array) -> jax.Array:
    """What a token, by its embedding [..., D], adds to the logits [..., V] of
    the stream that speaks of the next one. Not in the paper: its streams guess
    each position whatever was guessed before it."""
    low = words @ self.correct_a[...].astype(words.dtype)
    up = self.correct_b[...].astype(words.dtype)
    return jnp.matmul(low, up, preferred_element_type=wide(words.dtype))

  def __call__(self, main: jax.Array, num_streams: int) -> jax.Array:
    """main [B, U, D] at the insertion layer -> streams [B, U, J, D]."""
    dtype = main.dtype
    if self.map_a is not None:
      low = main @ self.map_a[...].astype(dtype)
      main = main + low @ self.map_b[...].astype(dtype)
    shape = (*main.shape[:2], num_streams, main.shape[2])
    start = jnp.broadcast_to(main[:, :, None], shape)
    if self.embed is not None:
      start = start + self.embed[...].astype(dtype)[:num_streams]
    return start

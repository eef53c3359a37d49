"""RMSNorm, rotary positions, embedding and the SwiGLU feed-forward."""

import jax
import jax.numpy as jnp
from flax import nnx

from spec_stream.models.config import ModelConfig
from spec_stream.models.lora import Linear


def wide(dtype) -> jnp.dtype:
  """float32, or float64 where the computation runs in it."""
  return jnp.promote_types(dtype, jnp.float32)


class RMSNorm(nnx.Module):
  """x / rms(x) * scale over the last axis, computed in float32."""

  def __init__(self, config: ModelConfig):
    self.eps = config.norm_eps
    self.scale = nnx.Param(jnp.ones((config.width,), config.param_dtype))

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(wide(x.dtype))
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
    return (y * self.scale[...]).astype(x.dtype)


class Embed(nnx.Module):
  """Token embeddings, [V, D]."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.dtype = config.dtype
    normal = jax.nn.initializers.normal(0.02, dtype=config.param_dtype)
    shape = (config.vocab_size, config.width)
    self.table = nnx.Param(normal(rngs.params(), shape))

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """[...] int32 -> [..., D]. Dead tree nodes (-1) read row 0."""
    table = self.table[...]
    return table[jnp.maximum(tokens, 0)].astype(self.dtype)

  def decode(self, hidden: jax.Array) -> jax.Array:
    """Tied LM head: [..., D] -> [..., V]."""
    return hidden @ self.table[...].astype(hidden.dtype).T


class FeedForward(nnx.Module):
  """SwiGLU: down(silu(gate x) * up x), gate and up in one product."""

  def __init__(self, config: ModelConfig, *, lora_rank: int, rngs: nnx.Rngs):
    width, hidden = config.width, config.ffw_dim
    keys = dict(lora_rank=lora_rank, rngs=rngs)
    self.gate_up = Linear((width,), (2, hidden), config, **keys)
    # Residual branches start small, so that depth does not blow up the sum.
    std = (hidden * 2 * config.num_layers) ** -0.5
    self.down = Linear((hidden,), (width,), config, std=std, **keys)

  def __call__(self, x: jax.Array, adapt_from: int) -> jax.Array:
    gate, up = jnp.moveaxis(self.gate_up(x, adapt_from), 2, 0)
    return self.down(jax.nn.silu(gate) * up, adapt_from)


def rotation(positions: jax.Array, head_dim: int, theta: float, dtype):
  """Cosines and signed sines [..., 2, 2, H/2] of positions [...].

  Pair i, of elements i and i + H/2, turns by positions / theta^(2i/H).
  """
  exponent = jnp.arange(head_dim // 2, dtype=wide(dtype)) / (head_dim // 2)
  angle = positions[..., None].astype(wide(dtype)) / theta**exponent
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return jnp.stack([jnp.stack([cos, cos], -2), jnp.stack([-sin, sin], -2)], -3)


def rotate(x: jax.Array, turn: jax.Array) -> jax.Array:
  """Turns the pairs of the last axis of x [..., H]; turn: see `rotation`."""
  # Halves as an axis of their own: one fused pass, without concatenation.
  halves = x.reshape(*x.shape[:-1], 2, -1).astype(turn.dtype)
  y = halves * turn[..., 0, :, :] + halves[..., ::-1, :] * turn[..., 1, :, :]
  return y.reshape(x.shape).astype(x.dtype)

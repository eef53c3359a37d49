"""Norms, rotary and learned positions, embedding and the feed-forward."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spec_stream.models import panels
from spec_stream.models.config import ModelConfig, RopeScaling
from spec_stream.models.lora import (
  PANELS,
  Linear,
  lay_out,
  matmul,
  matmul_out_first,
)


def wide(dtype) -> jnp.dtype:
  """float32, or float64 where the computation runs in it."""
  return jnp.promote_types(dtype, jnp.float32)


class Norm(nnx.Module):
  """Over the last axis, in float32: x / rms(x) * scale, or with norm "layer"
  (x - mean) / std * scale + bias."""

  def __init__(self, config: ModelConfig, size: int = 0, kind: str = ""):
    self.eps, self.kind = config.norm_eps, kind or config.norm
    self.offset = 1.0 if config.norm_offset else 0.0
    shape, dtype = (size or config.width,), config.param_dtype
    self.scale = nnx.Param(jnp.full(shape, 1 - self.offset, dtype))
    layer = self.kind == "layer"
    self.bias = nnx.Param(jnp.zeros(shape, dtype)) if layer else None

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(wide(x.dtype))
    if self.kind == "layer":
      y = y - jnp.mean(y, -1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
    y = y * (self.offset + self.scale[...].astype(y.dtype))
    if self.bias is not None:
      y = y + self.bias[...]
    return y.astype(x.dtype)


class Embed(nnx.Module):
  """Token embeddings, [V, D]; `out_first` as of `lora.Linear`."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.dtype, self.multiplier = config.dtype, config.embed_scale
    self.out_first, self.vocab_size = "", config.vocab_size
    normal = jax.nn.initializers.normal(0.02, dtype=config.param_dtype)
    shape = (config.vocab_size, config.width)
    self.table = nnx.Param(normal(rngs.params(), shape))

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """[...] int32 -> [..., D]. Dead tree nodes (-1) read row 0."""
    table, tokens = self.table[...], jnp.maximum(tokens, 0)
    in_panels = self.out_first == PANELS
    x = panels.take(table, tokens) if in_panels else table[tokens]
    x = x.astype(self.dtype)
    if self.multiplier != 1:
      x = x * jnp.asarray(self.multiplier, x.dtype)
    return x

  def decode(self, hidden: jax.Array) -> jax.Array:
    """Tied LM head: [..., D] -> [..., V], float32 or wider."""
    table, dtype = self.table[...], wide(hidden.dtype)
    if not self.out_first:
      return matmul(hidden, table.astype(hidden.dtype).T, dtype)
    outputs = (self.vocab_size,)
    return matmul_out_first(hidden, table, outputs, dtype, self.out_first)

  def lay_out(self, laid: str):
    """Lays out the table for the LM head, as `Linear.lay_out`."""
    self.table, self.out_first = nnx.Param(lay_out(self.table[...], laid)), laid


class Positions(nnx.Module):
  """Learned positions: a table [P + offset, D] added to the embeddings."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.offset = config.position_offset
    normal = jax.nn.initializers.normal(0.02, dtype=config.param_dtype)
    shape = (config.max_positions + self.offset, config.width)
    self.table = nnx.Param(normal(rngs.params(), shape))

  def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
    table = self.table[...]
    # A draft may reach beyond the last position: its nodes are never emitted,
    # but must not be NaN.
    at = jnp.minimum(positions + self.offset, table.shape[0] - 1)
    return x + table[at].astype(x.dtype)


_ACTIVATIONS = {
  "silu": jax.nn.silu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "relu": jax.nn.relu,
}


class FeedForward(nnx.Module):
  """down(f(gate x) * up x), gate and up in one product; or down(f(up x))."""

  def __init__(self, config: ModelConfig, *, lora_rank: int, rngs: nnx.Rngs):
    width, hidden = config.width, config.ffw_dim
    keys = dict(lora_rank=lora_rank, bias=config.ffw_bias, rngs=rngs)
    keys |= dict(quantize=config.quantize)
    self.activation, parts = config.activation, 2 if config.gated else 1
    gate = self.activation if config.gated else ""
    outputs = (parts, hidden)
    self.gate_up = Linear((width,), outputs, config, gate=gate, **keys)
    # Residual branches start small, so that depth does not blow up the sum.
    std = (hidden * 2 * config.num_layers) ** -0.5
    self.down = Linear((hidden,), (width,), config, std=std, **keys)

  def __call__(self, x: jax.Array, adapt_from: int) -> jax.Array:
    y = self.gate_up(x, adapt_from)
    if not self.gate_up.gated:  # else it is what this gives
      first = _ACTIVATIONS[self.activation](y[:, :, 0])
      y = first * y[:, :, 1] if y.shape[2] > 1 else first
    return self.down(y, adapt_from)


def frequencies(config: ModelConfig, slides: bool) -> tuple[np.ndarray, float]:
  """Turn of each pair per position [turned / 2], and the factor of cosines and
  sines. Pair i turns by theta^(-2i / turned), before scaling."""
  pairs, scaling = config.turned // 2, config.rope_scaling
  theta = config.rope_theta
  if slides and config.rope_theta_sliding:
    theta, scaling = config.rope_theta_sliding, RopeScaling()
  turns = theta ** -(np.arange(pairs) / pairs)
  if scaling.kind == "linear":
    turns = turns / scaling.factor
  elif scaling.kind == "llama3":
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    rounds = scaling.original_positions * turns / (2 * np.pi)
    keep = np.clip((rounds - low) / (high - low), 0, 1)
    turns = turns * (keep + (1 - keep) / scaling.factor)
  elif scaling.kind == "longrope":
    is_long = config.max_positions > scaling.original_positions
    factors = scaling.long_factors if is_long else scaling.short_factors
    return turns / np.array(factors), scaling.attention_factor
  return turns, 1.0


def rotation(positions: jax.Array, turns, dtype, factor: float = 1.0):
  """Cosines and signed sines [..., 2, 2, n] of positions [...], n turns.

  Pair i, of elements i and i + n, turns by positions * turns[i].
  """
  dtype = wide(dtype)
  angle = positions[..., None].astype(dtype) * jnp.asarray(turns, dtype)
  cos, sin = jnp.cos(angle) * factor, jnp.sin(angle) * factor
  return jnp.stack([jnp.stack([cos, cos], -2), jnp.stack([-sin, sin], -2)], -3)


def rotate(x: jax.Array, turn: jax.Array) -> jax.Array:
  """Turns the first 2n elements of x [..., H] in pairs; turn: `rotation`."""
  size = 2 * turn.shape[-1]
  rest = x[..., size:]
  # Halves as an axis of their own: one fused pass, without concatenation.
  halves = x[..., :size].reshape(*x.shape[:-1], 2, -1).astype(turn.dtype)
  y = halves * turn[..., 0, :, :] + halves[..., ::-1, :] * turn[..., 1, :, :]
  y = y.reshape(*x.shape[:-1], size).astype(x.dtype)
  return jnp.concatenate([y, rest], -1) if rest.shape[-1] else y


def softcap(x: jax.Array, cap: float) -> jax.Array:
  """cap tanh(x / cap); x itself for cap 0."""
  return cap * jnp.tanh(x / cap) if cap else x

"""Products on a CPU with coarse copies of kernels, 4 bits a weight.

For drafts alone (`coarse`): the weights of an output are rounded to integers of
-7 to 7 by the largest of them, and a row to integers of 8 bits by its own; what
is left is exact. `four_bits.cc` (see `native`) multiplies, and reads an eighth
of float32's bytes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from spec_stream.models import panels

OUTPUTS = 8  # of a panel
_CHUNK = 32  # inputs are filled up to a multiple of it
_BITS = np.array([[0, 8, 16, 24], [4, 12, 20, 28]], np.int32)  # of 8 inputs
TARGET = "spec_stream_four_bits"


@functools.partial(jax.jit, static_argnums=1)
def pack(kernel: jax.Array, outputs: int) -> tuple[jax.Array, jax.Array]:
  """A kernel of O outputs in panels of float32 (`panels.pack`) -> in 4 bits.

  Returns:
    int32 [2 P, I / 8, 8], inputs filled up with zeros: panels of 8 outputs, in
    an element the weights of 8 inputs, 8 more than they are: in its byte b
    those of inputs b (low half) and b + 4; and float32 [O], what 1 is: the
    largest weight of an output is 7 or -7.
  """
  one = jnp.abs(kernel).max(1, keepdims=True) / 7
  whole = jnp.round(kernel / jnp.where(one > 0, one, 1))
  whole = jnp.clip(whole, -7, 7).astype(jnp.int32) + 8
  pad = -whole.shape[1] % _CHUNK
  whole = jnp.pad(whole, ((0, 0), (0, pad), (0, 0)), constant_values=8)
  # [panel, element, half, byte, which 8, output]
  whole = whole.reshape(len(kernel), -1, 2, 4, panels.WIDTH // OUTPUTS, OUTPUTS)
  # No bit is of two of them, so that their sum is their union.
  packed = (whole << _BITS[..., None, None]).sum((2, 3), dtype=jnp.int32)
  packed = packed.swapaxes(1, 2).reshape(-1, packed.shape[1], OUTPUTS)
  return packed, one.reshape(-1)[:outputs]


def matmul(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
  """x [R, I] float32 times what `pack` gave -> float32 [R, O].

  On a CPU it needs `native.is_ready`. Neither differentiated nor split over
  devices.
  """
  y = jax.ShapeDtypeStruct((x.shape[0], scale.shape[0]), jnp.float32)
  here = jax.ffi.ffi_call(TARGET, y, vmap_method="sequential")
  return jax.lax.platform_dependent(x, kernel, scale, cpu=here, default=by_xla)


def by_xla(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
  """As `matmul`, of a model that was moved to another platform: rows are as
  they are."""
  # [P, I / 8, 2, 4, 8]
  whole = (kernel[:, :, None, None] >> _BITS[..., None]) & 15
  whole = jnp.moveaxis(whole, -1, 1).reshape(len(kernel) * OUTPUTS, -1) - 8
  whole = whole[: len(scale), : x.shape[1]]
  return x @ (whole * scale[:, None]).T

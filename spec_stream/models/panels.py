"""Products on a CPU in float32, of kernels that lie in panels.

XLA's library for CPUs packs a kernel anew in each call, so that four rows take
1.4 times as long as one although they read no more. Here it is packed once,
when the model is made ready: a panel is WIDTH outputs, of each input in turn
the weights of all of them. `panels.cc` (see `native`) multiplies such kernels,
two panels at a time.

A kernel is of float32 or int8, or a coarse copy of one in float32: `in_8_bits`.
"""

import functools

import jax
import jax.numpy as jnp

WIDTH = 16  # outputs of a panel: of an input a cache line in float32
DTYPES = (jnp.float32, jnp.int8)  # of kernels; int16: see `in_8_bits`
TARGET = "spec_stream_panels"


@jax.jit
def pack(kernel: jax.Array) -> jax.Array:
  """[O, I] -> panels [P, I, WIDTH], P = O / WIDTH, rounded up to an even
  number; what is left of the last ones is zeros."""
  panels = 2 * -(-len(kernel) // (2 * WIDTH))
  kernel = jnp.pad(kernel, ((0, panels * WIDTH - len(kernel)), (0, 0)))
  return kernel.reshape(panels, WIDTH, -1).swapaxes(1, 2)


@jax.jit
def in_8_bits(panels: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Panels of float32 -> of 8 bits, and how much 1 is in each output, float32
  [P WIDTH]: the largest weight of an output is 127 or -127.

  Those of two inputs stand together in an int16, [P, I / 2, WIDTH] (rounded up;
  the even one in its low half): rows are rounded too then, to 16 bits, and
  products are of integers, half the work.
  """
  one = jnp.abs(panels).max(1, keepdims=True) / 127
  rounded = jnp.round(panels / jnp.where(one > 0, one, 1)).astype(jnp.int8)
  rounded = jnp.pad(rounded, ((0, 0), (0, panels.shape[1] % 2), (0, 0)))
  two = rounded.reshape(len(panels), -1, 2, WIDTH).swapaxes(2, 3)
  return jax.lax.bitcast_convert_type(two, jnp.int16), one.reshape(-1)


def _one_by_one(panels: jax.Array, inputs: int) -> jax.Array:
  """Panels of what `in_8_bits` made, or others as they are."""
  if panels.dtype != jnp.int16:
    return panels
  two = jax.lax.bitcast_convert_type(panels, jnp.int8).swapaxes(2, 3)
  return two.reshape(len(panels), -1, WIDTH)[:, :inputs]


def take(panels: jax.Array, outputs: jax.Array) -> jax.Array:
  """The weights [..., I] of outputs [...], as they were given to `pack`.

  Each comes from a cache line of its own, so this is for few outputs.
  """
  return panels[outputs // WIDTH, :, outputs % WIDTH]


def matmul(x: jax.Array, panels: jax.Array, outputs: int) -> jax.Array:
  """x [R, I] times panels of O outputs, as `pack` or `in_8_bits` made them ->
  [R, O].

  x and the result are float32, panels of one of DTYPES or int16. On a CPU,
  where it needs `native.is_ready`, a row of the result does not depend, to the
  bit, on how many others there are. Neither differentiated nor split over
  devices.

  Raises: TypeError of another dtype.
  """
  if x.dtype != jnp.float32 or panels.dtype not in (*DTYPES, jnp.int16):
    raise TypeError(
      f"{x.dtype} rows, {panels.dtype} panels: rows are to be float32, panels "
      "float32, int8 or int16"
    )
  y = jax.ShapeDtypeStruct((x.shape[0], outputs), jnp.float32)
  here = jax.ffi.ffi_call(TARGET, y, vmap_method="sequential")
  elsewhere = functools.partial(by_xla, outputs=outputs)
  return jax.lax.platform_dependent(x, panels, cpu=here, default=elsewhere)


def by_xla(x: jax.Array, panels: jax.Array, outputs: int) -> jax.Array:
  """As `matmul`, of a model that was moved to another platform: slower."""
  kernel = _one_by_one(panels, x.shape[1]).astype(x.dtype)
  return x @ kernel.swapaxes(0, 1).reshape(x.shape[1], -1)[:, :outputs]

"""Products on a CPU in float32, of kernels that lie in panels.

XLA's library for CPUs packs a kernel anew in each call, so that four rows take
1.4 times as long as one although they read no more. Here it is packed once,
when the model is made ready: a panel is WIDTH outputs, of each input in turn
the weights of all of them. `panels.cc` (see `native`) multiplies such kernels,
two panels at a time, and applies the activation of a gated feed-forward layer.

`four_bits` multiplies coarse copies of them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

WIDTH = 16  # outputs of a panel: of an input a cache line in float32
DTYPES = (jnp.float32, jnp.int8)  # of kernels
# Activations of a gated product, and their numbers in `panels.cc`.
GATES = {
  "silu": (1, jax.nn.silu),
  "gelu_tanh": (2, functools.partial(jax.nn.gelu, approximate=True)),
}
TARGET = "spec_stream_panels"


@jax.jit
def pack(kernel: jax.Array) -> jax.Array:
  """[O, I] -> panels [P, I, WIDTH], P = O / WIDTH, rounded up to an even
  number; what is left of the last ones is zeros."""
  panels = 2 * -(-len(kernel) // (2 * WIDTH))
  kernel = jnp.pad(kernel, ((0, panels * WIDTH - len(kernel)), (0, 0)))
  return kernel.reshape(panels, WIDTH, -1).swapaxes(1, 2)


@jax.jit
def in_turn(kernel: jax.Array) -> jax.Array:
  """[2 F, I] -> the same with WIDTH outputs of either half in turn, as a gated
  product wants them; F is a multiple of WIDTH."""
  halves = kernel.reshape(2, -1, WIDTH, kernel.shape[-1])
  return halves.swapaxes(0, 1).reshape(kernel.shape)


def gated(y: jax.Array, gate: str) -> jax.Array:
  """f(first) * second of products y [..., 2 F] with what `in_turn` made."""
  halves = y.reshape(*y.shape[:-1], -1, 2, WIDTH)
  y = GATES[gate][1](halves[..., 0, :]) * halves[..., 1, :]
  return y.reshape(*y.shape[:-2], -1)


def take(panels: jax.Array, outputs: jax.Array) -> jax.Array:
  """The weights [..., I] of outputs [...], as they were given to `pack`.

  Each comes from a cache line of its own, so this is for few outputs.
  """
  return panels[outputs // WIDTH, :, outputs % WIDTH]


def matmul(
  x: jax.Array, panels: jax.Array, outputs: int, gate: str = ""
) -> jax.Array:
  """x [R, I] times panels [P, I, WIDTH] of O outputs, as `pack` made them ->
  [R, O]; with a gate (of GATES) what `gated` makes of that, [R, O / 2].

  x and the result are float32, panels of one of DTYPES. On a CPU, where it
  needs `native.is_ready`, a row of the result does not depend, to the bit, on
  how many others there are. Neither differentiated nor split over devices.

  Raises: TypeError of another dtype.
  """
  if x.dtype != jnp.float32 or panels.dtype not in DTYPES:
    raise TypeError(
      f"{x.dtype} rows, {panels.dtype} panels: rows are to be float32, panels "
      "float32 or int8"
    )
  y = jax.ShapeDtypeStruct(
    (x.shape[0], outputs // 2 if gate else outputs), jnp.float32
  )
  here = functools.partial(
    jax.ffi.ffi_call(TARGET, y, vmap_method="sequential"),
    gate=np.int64(GATES[gate][0] if gate else 0),
  )
  elsewhere = functools.partial(by_xla, outputs=outputs, gate=gate)
  return jax.lax.platform_dependent(x, panels, cpu=here, default=elsewhere)


def by_xla(
  x: jax.Array, panels: jax.Array, outputs: int, gate: str = ""
) -> jax.Array:
  """As `matmul`, of a model that was moved to another platform: slower."""
  kernel = panels.astype(x.dtype).swapaxes(0, 1).reshape(x.shape[1], -1)
  y = x @ kernel[:, :outputs]
  return gated(y, gate) if gate else y

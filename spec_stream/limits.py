"""How fast a step could be here: what it must move, and what this device does.

Beside `roofline`, which reads a compiled program and takes published peaks:
here rates are measured, and a step's bytes are those that no implementation
can leave out.
"""

import dataclasses
import functools
import math
import time

import jax
import jax.numpy as jnp
from flax import nnx

from spec_stream import decode, roofline
from spec_stream import step as steps


@dataclasses.dataclass(frozen=True)
class Rates:
  """read: bytes/s from memory; copy: bytes/s read and written together;
  matrix: FLOP/s of a product of large matrices."""

  read: float
  copy: float
  matrix: float


@functools.cache
def of_device(dtype: str, size: int = 2**29) -> Rates:
  """Measured on the default device, the best of five; size: bytes of the array
  that is read, far above any on-chip memory."""
  width = 4096
  array = jnp.ones((size // (width * jnp.dtype(dtype).itemsize), width), dtype)
  row = jnp.ones((width, 1), dtype)
  square = jnp.ones((2048, 2048), dtype)
  seconds = lambda f, *args: _seconds(jax.jit(f), *args)
  # Whichever way of reading it all is fastest here.
  read = min(
    seconds(lambda x, y: (x @ y).sum(), array, row),
    seconds(lambda x, y: x.sum() + y[0, 0], array, row),
  )
  copy = seconds(lambda x: x + 1, array)
  matrix = seconds(lambda x: x @ x, square)
  return Rates(
    read=array.nbytes / read,
    copy=2 * array.nbytes / copy,
    matrix=2 * 2048**3 / matrix,
  )


def _seconds(function, *args) -> float:
  found = []
  for _ in range(6):  # the first compiles
    begin = time.perf_counter()
    jax.block_until_ready(function(*args))
    found.append(time.perf_counter() - begin)
  return min(found[1:])


@dataclasses.dataclass(frozen=True)
class Step:
  """What one step needs: bytes to be read, FLOPs of its matrix products."""

  bytes: int
  flops: int

  def seconds(self, rates: Rates) -> float:
    """The least, if reading and multiplying overlap without a gap."""
    return max(self.bytes / rates.read, self.flops / rates.matrix)

  def fields(self, rates: Rates, seconds: float) -> dict:
    """For a row of results; seconds: what the step took."""
    return {
      "step_bytes": self.bytes,
      "step_flops": self.flops,
      "read_rate": rates.read,
      "copy_rate": rates.copy,
      "matrix_rate": rates.matrix,
      "read_share": self.bytes / rates.read / seconds,
      "matrix_share": self.flops / rates.matrix / seconds,
      "limit_ms": 1e3 * self.seconds(rates),
    }


def of_step(decoder: decode.Decoder, batch: int = 1, length: int = 128) -> Step:
  """Of the step that decodes `batch` rows with `length` committed tokens each.

  Bytes: every weight that the traced step uses, the drafter's too, once (of a
  table that is only looked up in, what is found); keys and values of `length`
  tokens a row. FLOPs: of the same, whose cache has that many slots, rounded up.
  """
  config = decoder.config
  pairs = 2 * config.num_layers * config.num_kv_heads * config.head_dim
  cache = batch * length * pairs * jnp.dtype(config.dtype).itemsize
  state = jax.eval_shape(
    lambda: decoder.start([[1] * length] * batch, max_new_tokens=1)
  )

  def step(weights, state):
    params = nnx.merge(decoder.graphdef, weights)
    return steps.step(params, decoder.drafter, state)

  jaxpr = jax.make_jaxpr(step)(decoder.weights, state).jaxpr
  held = jaxpr.invars[: len(jax.tree.leaves(decoder.weights))]
  return Step(
    bytes=cache + sum(_read(weight, jaxpr) for weight in held),
    flops=roofline.flops(step, decoder.weights, state),
  )


def _read(weight, jaxpr) -> int:
  """Bytes of an input that a program reads."""
  size = lambda x: math.prod(x.aval.shape) * x.aval.dtype.itemsize
  total = 0
  for equation in jaxpr.eqns:
    for at, x in enumerate(equation.invars):
      if x is weight:
        if equation.primitive.name != "gather" or at:
          return size(weight)
        total += size(equation.outvars[0])
  return total

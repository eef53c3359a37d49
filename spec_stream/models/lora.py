"""Linear maps with low-rank adapters (LoRA).

`y = x W + scale (x A) B` with `scale = alpha / rank` and B zero at the start.
In shared mode the adapter serves every row; in lossless mode stream rows alone,
so that main rows are the base model's to the bit. Which rows: `adapt_from`.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from spec_stream.models import four_bits, native, panels, quant
from spec_stream.models.config import ModelConfig

# Bytes of the smallest kernel laid out for XLA on a CPU; for `panels` an
# eighth of it: experiments/step_cost. In some states of that machine smaller
# ones lost by it with XLA, for one row.
_LARGE = 2**20
# Bytes of the largest kernel laid out on SMALL_ON. Given one row, XLA
# sums such a kernel by columns there, in two programs, which took up to five
# times as long as memory needs; with the outputs first it takes one program.
# Measured up to 10 MB, which gain, and from 22 MB on, which together do not and
# lose a little with more rows (experiments/gpu).
_SMALL, SMALL_ON = 2**24, "cuda 9.0"
PANELS = "panels"
FOUR_BITS = "4 bits"  # of a copy for drafts: see `coarse`


def matmul(x: jax.Array, kernel: jax.Array, dtype=None) -> jax.Array:
  """x [B, R, I] times kernel [I, *out] -> [B, R, *out], of `dtype` if given."""
  product = lambda x: jnp.tensordot(x, kernel, 1, preferred_element_type=dtype)
  if x.shape[0] * x.shape[1] != 1:
    return product(x)
  # One row alone leaves a TPU's matrix unit idle: XLA multiplies and sums it
  # in the vector unit, at a quarter of the speed of the memory. Two do not.
  return jax.lax.platform_dependent(
    x, tpu=functools.partial(_of_two_rows, product), default=product
  )


def _of_two_rows(product, x):
  return product(jnp.pad(x, ((0, 0), (0, 1), (0, 0))))[:, :1]


def matmul_out_first(
  x: jax.Array, kernel: jax.Array, outputs: tuple[int, ...], dtype, laid: str
) -> jax.Array:
  """As `matmul`, of a kernel that `lay_out` made, for `laid`."""
  rows = x.reshape(-1, x.shape[-1])
  if laid == PANELS:
    y = panels.matmul(rows, kernel, math.prod(outputs))
  elif laid == "cpu":
    y = rows_as_columns(rows, kernel.astype(x.dtype), dtype)
  else:
    kernel = kernel.astype(x.dtype)
    y = jnp.dot(rows, kernel.T, preferred_element_type=dtype)
  return y.reshape(*x.shape[:-1], *outputs)


def rows_as_columns(x: jax.Array, kernel: jax.Array, dtype=None) -> jax.Array:
  """x [R, I] times kernel [O, I] -> [R, O], by XLA.

  On a CPU it first copies one side into panels. With the kernel on the left,
  and the rows as columns that truly lie so, it is theirs, which pays where the
  kernel is large: experiments/step_cost has the times.
  """
  if len(x) == 1:  # a vector lies in order as it is
    y = jax.lax.dot(kernel, x[0], preferred_element_type=dtype)
    return y[None]
  in_order = lambda x: with_layout_constraint(x, Layout((0, 1)))
  columns = in_order(in_order(x).T)
  y = jax.lax.dot(kernel, columns, preferred_element_type=dtype)
  return in_order(y).T


class LoRAParam(nnx.Param):
  """A weight of an adapter."""


class Linear(nnx.Module):
  """x [..., *in] -> [..., *out]; kernel [*in, *out], bias [*out] or none.

  `out_first`: see `layout`; then the kernel is as `lay_out` makes it, or, for
  FOUR_BITS, it and its scale are as `four_bits.pack` makes them.

  gate: an activation f, if out is (2, F) and f(y[0]) * y[1] is wanted of it. A
  call gives that, [..., F], where `gated` says so: see `lay_out`.

  Several projections of the same input stand side by side in one kernel, so
  that main and stream rows pass through one matrix product.
  """

  def __init__(
    self,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    config: ModelConfig,
    *,
    lora_rank: int,
    bias: bool = False,
    gate: str = "",
    quantize: str = "",
    std: float | None = None,
    rngs: nnx.Rngs,
  ):
    self.inputs, self.outputs = inputs, outputs
    self.out_first, self.gate, self.gated = "", gate, False
    fan_in = math.prod(inputs)
    normal = jax.nn.initializers.normal(
      std or fan_in**-0.5, dtype=config.param_dtype
    )
    kernel = normal(rngs.params(), (*inputs, *outputs))
    scale = None
    if quantize:
      kernel, scale = quant.quantise(kernel, len(inputs), quantize)
    self.kernel = nnx.Param(kernel)
    self.kernel_scale = None if scale is None else nnx.Param(scale)
    zeros = lambda: nnx.Param(jnp.zeros(outputs, config.param_dtype))
    self.bias = zeros() if bias else None
    self.lora_scale = config.streams.lora_alpha / max(lora_rank, 1)
    small = jax.nn.initializers.normal(fan_in**-0.5, dtype=jnp.float32)
    self.lora_a = (
      LoRAParam(small(rngs.params(), (*inputs, lora_rank)))
      if lora_rank
      else None
    )
    self.lora_b = (
      LoRAParam(jnp.zeros((lora_rank, *outputs), jnp.float32))
      if lora_rank
      else None
    )

  def __call__(
    self, x: jax.Array, adapt_from: int = 0, dtype=None
  ) -> jax.Array:
    """x: [B, R, *in]; rows from `adapt_from` on pass through the adapter.

    dtype: of the result, which is not rounded before; None: that of x.
    """
    batch, rows = x.shape[:2]
    x = x.reshape(batch, rows, -1)
    # Inputs as one axis, outputs as they are: a flat axis of outputs that are
    # split over `tensor` in its inner part would be gathered on every device.
    wide = lambda w: w[...].astype(x.dtype).reshape(x.shape[-1], *w.shape[ins:])
    ins = len(self.inputs)
    if self.out_first == FOUR_BITS:
      of_panels = self.kernel[...], self.kernel_scale[...]
      y = four_bits.matmul(x.reshape(-1, x.shape[-1]), *of_panels)
      if self.gated:
        return panels.gated(y, self.gate).reshape(batch, rows, -1)
      y = y.reshape(batch, rows, *self.outputs)
    elif self.gated:
      kernel, outputs = self.kernel[...], math.prod(self.outputs)
      y = panels.matmul(x.reshape(-1, x.shape[-1]), kernel, outputs, self.gate)
      return y.reshape(batch, rows, -1)
    elif self.out_first:
      kernel, laid = self.kernel[...], self.out_first
      y = matmul_out_first(x, kernel, self.outputs, dtype, laid)
      if self.kernel_scale is not None:
        y = y * self.kernel_scale[...][0]
    elif self.kernel_scale is None:
      y = matmul(x, wide(self.kernel), dtype)
    elif len(self.kernel_scale[...]) == 1:  # of an output as a whole: it waits
      y = matmul(x, wide(self.kernel))
      y = (y * self.kernel_scale[...][0]).astype(y.dtype)
    else:
      kernel = self.kernel[...].reshape(x.shape[-1], *self.outputs)
      scale = self.kernel_scale[...]
      y = matmul(x, quant.dequantise(kernel, scale, x.dtype))
    if self.bias is not None:
      y = y + self.bias[...].astype(y.dtype)
    if self.lora_a is not None and adapt_from < rows:
      low = x[:, adapt_from:] @ wide(self.lora_a)
      low = jnp.tensordot(low, self.lora_b[...].astype(x.dtype), 1)
      low = low * self.lora_scale
      if adapt_from:
        y = jnp.concatenate([y[:, :adapt_from], y[:, adapt_from:] + low], 1)
      else:
        y = y + low
    return y

  def merge(self):
    """Folds the adapter into the kernel: right where it serves every row."""
    if self.lora_a is None:
      return
    wide = jnp.promote_types(self.kernel[...].dtype, jnp.float32)
    a, b = self.lora_a[...].astype(wide), self.lora_b[...].astype(wide)
    delta = jnp.tensordot(a, b, 1) * self.lora_scale
    kernel = self.kernel[...]
    # A new variable: writing into a NumPy array would reach other models too.
    self.kernel = nnx.Param((kernel.astype(wide) + delta).astype(kernel.dtype))
    self.lora_a = self.lora_b = None

  def layout(self, dtype: str, on: Sequence[str]) -> str:
    """For what to lay it out; arguments as of the function."""
    laid = "" if self.out_first else layout(self.kernel[...], dtype, on)
    quantised = self.kernel_scale is not None
    return "" if quantised and laid != PANELS else laid

  def lay_out(self, laid: str):
    """Lays out the kernel for what `layout` said.

    In panels it is `gated` then, if the activation is one of theirs and F of
    whole panels, and nothing else comes between the product and it.
    """
    kernel = self.kernel[...].reshape(math.prod(self.inputs), -1).T
    between = self.kernel_scale, self.bias, self.lora_a
    self.gated = (
      laid == PANELS
      and self.gate in panels.GATES
      and self.outputs[-1] % panels.WIDTH == 0
      and all(x is None for x in between)
    )
    if self.gated:
      kernel = panels.in_turn(kernel)
    self.kernel, self.out_first = nnx.Param(lay_out(kernel, laid)), laid

  def round_to_4_bits(self):
    """Of a kernel in panels of float32: see `four_bits`."""
    packed = four_bits.pack(self.kernel[...], math.prod(self.outputs))
    self.out_first, self.kernel = FOUR_BITS, nnx.Param(packed[0])
    self.kernel_scale = nnx.data(nnx.Param(packed[1]))  # was None


def layout(kernel: jax.Array, dtype: str, on: Sequence[str]) -> str:
  """For what a kernel is to be laid out, that multiplies in `dtype`: PANELS,
  the platform whose compiler wants its outputs first, or "", if it gains
  nothing.

  Of some of them the library of `panels` is compiled here, if it was not.

  on: `platform_names` of the device where it lies.
  """
  if "cpu" in on:
    serves = dtype == "float32" and kernel.dtype in panels.DTYPES
    if serves and kernel.nbytes >= _LARGE // 8 and native.is_ready():
      return PANELS
    return "cpu" if kernel.nbytes >= _LARGE else ""
  gains = SMALL_ON in on and kernel.nbytes <= _SMALL
  return on[0] if gains else ""


def lay_out(kernel: jax.Array, laid: str) -> jax.Array:
  """A kernel [O, I] for `laid`: as it is, its outputs in one piece each, or in
  panels (`panels.pack`)."""
  return panels.pack(kernel) if laid == PANELS else kernel


def devices(x) -> set:
  """Where an array of JAX lies; none of a tracer or of NumPy's."""
  here = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
  return x.devices() if here else set()


def platform_names(on) -> tuple[str, ...]:
  """Of one device: its platform, and "platform capability". Of several: none.

  A ROCm GPU too is "cuda" here.
  """
  if len(on) != 1:
    return ()
  device = next(iter(on))
  platform = {"gpu": "cuda"}.get(device.platform, device.platform)
  return platform, f"{platform} {getattr(device, 'compute_capability', '')}"

"""A frozen base in 8 or 4 bits (qwix): integers, and the scales they stand for.

Every kernel of the blocks is stored as `kernel` [*in, *out] of int8 or int4 and
`kernel_scale` [tiles, *out] in float32; int8 has one scale an output, int4 one
for each 64 inputs of it as well. Embeddings, head, norms and biases stay as
they are. Products are made in the dtype of the computation, of dequantised
kernels, or of the integers where one scale an output can be applied to the
product: the quantised model is the target, for plain decoding as for drafts.
"""

import math
import re

import jax
import jax.numpy as jnp

from spec_stream.errors import UserError

DTYPES = ("int8", "int4")
_TILE = {"int8": 0, "int4": 64}
_KERNEL = re.compile(
  r"blocks/\d+/(attention/(qkv|out)|ffw/(gate_up|down))/kernel"
)


def tiles(kind: str, size: int) -> int:
  """Scales along `size` inputs: one a tile, or one if tiles do not divide."""
  tile = _TILE[kind]
  return size // tile if tile and size % tile == 0 else 1


def is_quantised(path: str) -> bool:
  """Whether a weight of this path is stored in few bits."""
  return bool(_KERNEL.fullmatch(path))


def quantise(kernel: jax.Array, inputs: int, kind: str):
  """-> (integers like kernel [*in, *out], scales [tiles, *out]).

  inputs: how many leading axes of the kernel are inputs.
  """
  shape = kernel.shape
  size = math.prod(shape[:inputs])
  count = tiles(kind, size)
  flat = kernel.astype(jnp.float32).reshape(size, -1)
  q = _qwix().quantize(
    flat,
    jnp.dtype(kind),
    channelwise_axes=(1,),
    tiled_axes={0: size // count},
  )
  return q.qvalue.reshape(shape), q.scale.reshape(count, *shape[inputs:])


def dequantise(kernel: jax.Array, scale: jax.Array, dtype) -> jax.Array:
  """[n, *out] integers and [tiles, *out] scales -> [n, *out] of dtype."""
  # Not by qwix.dequantize, whose result XLA writes out before the product: for
  # a TPU three times the bytes of a bfloat16 kernel.
  parts = kernel.reshape(len(scale), -1, *kernel.shape[1:]).astype(scale.dtype)
  return (parts * scale[:, None]).astype(dtype).reshape(kernel.shape)


def _qwix():
  try:
    import qwix
  except ImportError as e:
    raise UserError(
      "model.quantize needs the package qwix: pip install 'spec_stream[quant]'"
    ) from e
  return qwix

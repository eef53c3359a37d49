"""Products with kernels of few bits, against those of what they stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from spec_stream.models import quant
from spec_stream.models.lora import Linear

qwix = pytest.importorskip("qwix")


@pytest.mark.parametrize("kind", quant.DTYPES)
@pytest.mark.parametrize("inputs", [(64,), (2, 64), (96,)])  # 96: one tile
def test_products_and_gradients_are_those_of_the_dequantised(kind, inputs):
  config = dataclasses.replace(tiny.MODEL, dtype="float32")
  keys = dict(lora_rank=2, quantize=kind, rngs=nnx.Rngs(0))
  linear = Linear(inputs, (3, 8), config, **keys)
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), "float32")
  linear.lora_b = type(linear.lora_b)(normal(2, 3, 8))
  x, size = normal(2, 5, *inputs), int(np.prod(inputs))
  kernel, scale = linear.kernel[...], linear.kernel_scale[...]
  assert len(scale) == quant.tiles(kind, size)
  assert len(scale) == (size // 64 if kind == "int4" and size != 96 else 1)
  whole = qwix.dequantize(
    qwix.QArray(kernel.reshape(size, -1), scale.reshape(len(scale), -1))
  )
  ours = quant.dequantise(
    kernel.reshape(size, -1), scale.reshape(len(scale), -1), jnp.float32
  )
  np.testing.assert_array_equal(ours, whole)
  plain = Linear(inputs, (3, 8), config, lora_rank=2, rngs=nnx.Rngs(0))
  plain.kernel = nnx.Param(whole.reshape(kernel.shape))
  plain.lora_a, plain.lora_b = linear.lora_a, linear.lora_b

  def loss(linear, x, a):
    linear = nnx.clone(linear)
    linear.lora_a = type(linear.lora_a)(a)
    return jnp.sin(linear(x, 1)).sum()

  np.testing.assert_allclose(linear(x, 1), plain(x, 1), atol=1e-4)
  a = linear.lora_a[...]
  for found, expected in zip(
    jax.grad(lambda *args: loss(linear, *args), (0, 1))(x, a),
    jax.grad(lambda *args: loss(plain, *args), (0, 1))(x, a),
    strict=True,
  ):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_in_bfloat16_a_product_is_near():
  config = dataclasses.replace(tiny.MODEL, dtype="bfloat16")
  keys = dict(lora_rank=0, quantize="int8", rngs=nnx.Rngs(0))
  linear = Linear((256,), (32,), config, **keys)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9, 256)), "bfloat16")
  found = linear(x)
  assert found.dtype == "bfloat16"
  kernel, scale = linear.kernel[...], linear.kernel_scale[...]
  exact = x.astype("float32") @ quant.dequantise(kernel, scale, jnp.float32)
  error = np.abs(np.asarray(found, "float32") - exact)
  assert error.max() < 0.01 * np.abs(exact).max()

"""Products by four_bits.cc against NumPy's, and the copies that they are of."""

import ctypes
import dataclasses
import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiler import compiled
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_models import CASES, as_float32, random_model

from spec_stream.cache import empty
from spec_stream.models import four_bits, lora, native, panels, transformer

matmul = jax.jit(four_bits.matmul)


def on_device(config):
  graph, state = nnx.split(random_model(config, 0))
  return nnx.merge(graph, jax.tree.map(jnp.asarray, state))


def packed(kernel):
  return four_bits.pack(panels.pack(kernel), len(kernel))


@compiled
@settings(max_examples=25)
@given(
  rows=st.integers(1, 30),
  inputs=st.integers(1, 600),
  outputs=st.integers(1, 100),
  seed=st.integers(0, 2**32 - 1),
)
@example(rows=3, inputs=2049, outputs=33, seed=0)
@example(rows=4, inputs=32, outputs=32, seed=0)
def test_product(rows, inputs, outputs, seed):
  """That of the integers that rows and weights are rounded to."""
  assert native.is_ready()
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  x, kernel = draw(rows, inputs), draw(outputs, inputs)
  in_4_bits, one = packed(kernel)
  assert in_4_bits.nbytes * 2 <= (inputs + 31) * (outputs + 31)
  step = np.abs(kernel).max(1) / 7
  np.testing.assert_allclose(one, step, rtol=1e-6)
  one = np.asarray(one)
  whole = np.round(kernel / one[:, None]).astype(np.float64)
  largest, half = np.abs(x).max(1, keepdims=True), np.float32(0.5)
  of_x = x * (127 / largest)
  rounded = np.trunc(of_x + np.copysign(half, of_x)).astype(np.float64)
  y = matmul(x, in_4_bits, one)
  right = rounded @ whole.T * one * (largest / 127)  # sums are exact
  np.testing.assert_allclose(y, right, rtol=1e-6)
  np.testing.assert_array_equal(matmul(x[-1:], in_4_bits, one), y[-1:])
  elsewhere = jax.jit(four_bits.by_xla)(x, in_4_bits, one)
  right = x.astype(np.float64) @ (whole * one[:, None]).T
  np.testing.assert_allclose(elsewhere, right, atol=1e-3)


@compiled
def test_integers_at_their_largest():
  """Sums fit into their bits; NaN and infinity stay in their rows."""
  assert native.is_ready()
  x, kernel = np.ones((4, 4096), np.float32), np.ones((32, 4096), np.float32)
  x[1], kernel[1] = -1, -1
  x[2, 5], x[3, 5] = np.inf, np.nan
  in_4_bits, one = packed(kernel)
  y = four_bits.matmul(x, in_4_bits, one)
  np.testing.assert_allclose(y[:2], x[:2] @ kernel.T, rtol=1e-5)
  assert not np.isfinite(y[2]).any() and np.isnan(y[3]).all()
  np.testing.assert_array_equal(four_bits.matmul(0 * x[:1], in_4_bits, one), 0)


@compiled
@pytest.mark.parametrize("multiply", [four_bits.matmul, four_bits.by_xla])
def test_an_output_of_zeros(multiply):
  assert native.is_ready()
  kernel, x = np.eye(3, 5, dtype=np.float32), np.ones((2, 5), np.float32)
  kernel[1] = 0
  y = multiply(x, *packed(kernel))
  np.testing.assert_allclose(y, [[1, 0, 1]] * 2, rtol=1e-6)


@compiled
@pytest.mark.usefixtures("x64")
def test_beside_float64():
  """What is float32 is packed and multiplied as without it."""
  assert native.is_ready()
  x, kernel = np.ones((2, 40), np.float32), np.ones((9, 40), np.float32)
  in_4_bits, one = packed(kernel)
  assert (in_4_bits.dtype, one.dtype) == (jnp.int32, jnp.float32)
  np.testing.assert_allclose(four_bits.matmul(x, in_4_bits, one), 40, rtol=1e-6)


@compiled
@pytest.mark.skipif(
  platform.machine().lower() not in ("x86_64", "amd64"), reason="no x86"
)
@pytest.mark.parametrize("flag", ["-mno-avx512vnni", "-mno-avx2"])
def test_on_older_machines(flag, monkeypatch, tmp_path):
  """The same integers, by sums of 16 bits (which is news where this machine has
  VNNI), and by plain loops."""
  assert native.is_ready()
  monkeypatch.setattr(native, "_SOURCES", [native._HERE / "four_bits.cc"])
  older = native.compile_for([*native.find_compiler(), flag], tmp_path)
  function = jax.ffi.pycapsule(ctypes.CDLL(str(older)).SpecStreamFourBits)
  jax.ffi.register_ffi_target(flag, function, platform="cpu")
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  x, kernel = draw(6, 75), draw(41, 75)
  x[0], kernel[0] = 1, 1  # the largest sums there are
  x[1] = -1
  args = x, *packed(kernel)
  here = four_bits.matmul(*args)
  monkeypatch.setattr(four_bits, "TARGET", flag)
  np.testing.assert_array_equal(four_bits.matmul(*args), here)


STREAMS = dataclasses.replace(
  as_float32(CASES["lossless"][0]),
  **dict(width=64, num_heads=4, head_dim=16, ffw_dim=64),
)


@compiled
@pytest.mark.parametrize("tied", [True, False])
def test_copies_for_drafts_are_nearly_the_weights(tied, monkeypatch):
  config = dataclasses.replace(STREAMS, tie_embeddings=tied)
  model = on_device(config)
  with monkeypatch.context() as patch:
    patch.setattr(lora, "_LARGE", 0)
    laid = transformer.for_decoding(model)
  assert model.coarse is None and laid.coarse is not None
  assert laid.coarse.head.out_first == lora.FOUR_BITS
  # An adapter, which the top layers have in this mode, comes before the gate.
  gated = [block.ffw.gate_up.gated for block in laid.blocks]
  assert gated == [i < config.insertion_layer for i in range(len(gated))]
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  # Of 4 bits a tenth and more in a product; what is not of it is beyond 1.
  near = lambda a, b: jnp.linalg.norm(a - b) < 0.3 * jnp.linalg.norm(b)
  hidden = draw(1, 3, config.width)
  right, drafted = model.logits(hidden), laid.logits(hidden, drafts=True)
  assert near(drafted, right) and (drafted != right).any()
  np.testing.assert_allclose(laid.logits(hidden), right, atol=1e-4)
  sizes = config.num_layers, config.num_kv_heads, config.head_dim
  cache = empty(1, 8, *sizes, "float32").replace(length=jnp.array([1]))
  args = draw(1, config.width), jnp.array([0]), cache, 2
  streams = transformer.forward_streams(laid, *args)
  right = transformer.forward_streams(model, *args)
  assert near(streams, right) and (streams != right).any()


@compiled
def test_no_copies_beside_a_head_that_is_not_in_panels(monkeypatch):
  monkeypatch.setattr(lora, "_LARGE", 2**15)  # an eighth is 4 KiB
  config = dataclasses.replace(STREAMS, tie_embeddings=True)
  model = on_device(config)
  laid = transformer.for_decoding(model)
  assert not laid.embed.out_first and laid.blocks[0].attention.qkv.out_first
  assert laid.coarse is None

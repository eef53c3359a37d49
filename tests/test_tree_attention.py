"""The kernels for a TPU and a GPU, interpreted, against the dense form."""

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_stream.models import attention, tree_attention, tree_attention_gpu

KERNELS = (tree_attention, tree_attention_gpu)


def case(seed, batch, heads, rows, groups, size, slots, dtype):
  """Random operands; rows see what is above them in a random tree."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  mask = np.eye(rows, dtype=bool)
  for row in range(1, rows):
    mask[row] |= mask[rng.integers(row)]
  return dict(
    q=normal(batch, heads, rows, groups, size),
    k=normal(batch, heads, size, rows),
    v=normal(batch, heads, rows, size),
    mask=jnp.broadcast_to(mask, (batch, rows, rows)),
    cache=(
      normal(batch, heads, size, slots),
      normal(batch, heads, slots, size),
    ),
    length=jnp.asarray(rng.integers(0, slots + 1, batch), jnp.int32),
    first=jnp.zeros((batch, rows), jnp.int32),
  )


def slide(x, window):
  """The case with rows that see the last `window` positions alone."""
  positions = x["length"][:, None] + jnp.arange(x["q"].shape[2])
  return x | {"first": jnp.maximum(positions - window + 1, 0)}


def dense(q, k, v, mask, cache, length, first, window=0, cap=0.0):
  del first  # is that of the window
  rows = q.shape[2]
  about = attention.Rows(
    None, mask, length[:, None] + jnp.arange(rows), num_main=rows, window=window
  )
  return attention._dense(cap, q, k, v, about, cache, length)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window, cap", [(0, 0.0), (9, 0.0), (0, 5.0)])
def test_it_is_as_the_dense_form(x64, kernel, window, cap):
  shapes = st.tuples(
    st.integers(0, 2**32 - 1),  # seed
    st.sampled_from([1, 3]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 5]),
    st.sampled_from([1, 2, 3]),
    st.just(4),
    st.sampled_from([8, 40, 48]),
  )

  @settings(max_examples=8)
  @given(shapes)
  def check(shape):
    x = case(*shape, "float64")
    x = slide(x, window) if window else x
    # Of the one for a GPU the slots in up to two parts.
    more = {} if kernel is tree_attention else {"least": 1}
    found = kernel.attend(**x, cap=cap, block=16, interpret=True, **more)
    expected = dense(**x, window=window, cap=cap)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-13)

  check()


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_lies_beyond_the_length_is_not_read(kernel):
  x = case(0, 2, 2, 3, 2, 8, 40, "float32")
  x["length"] = jnp.array([0, 17], jnp.int32)
  expected = dense(**x)
  beyond = jnp.arange(40) >= x["length"][:, None]
  x["cache"] = (
    jnp.where(beyond[:, None, None, :], jnp.nan, x["cache"][0]),
    jnp.where(beyond[:, None, :, None], jnp.nan, x["cache"][1]),
  )
  found = kernel.attend(**x, block=16, interpret=True)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_in_bfloat16_it_is_near(kernel):
  x = case(1, 1, 2, 6, 4, 64, 300, "bfloat16")
  found = kernel.attend(**x, block=128, interpret=True)
  exact = {
    name: jax.tree.map(lambda x: x.astype("float32"), x[name])
    for name in ("q", "k", "v", "cache")
  }
  expected = dense(**{**x, **exact})
  assert found.dtype == "bfloat16"
  assert np.abs(np.asarray(found, "float32") - expected).max() < 0.03


@pytest.mark.skipif(
  jaxlib.version.__version_info__ > (0, 10, 2),
  reason="lowering compiles there, which needs a GPU: test_gpu",
)
def test_the_one_for_a_gpu_is_lowered_to_triton():
  x = case(2, 1, 8, 16, 4, 128, 2064, "bfloat16")
  assert tree_attention_gpu.fits(16, 4, 128, 2064, "bfloat16")
  call = "__gpu$xla.gpu.triton"
  lowered = jax.export.export(
    jax.jit(lambda x: tree_attention_gpu.attend(**x)),
    platforms=["cuda"],
    disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(call)],
  )(x)
  assert call in lowered.mlir_module()


def test_a_kernel_is_of_one_device(monkeypatch):
  monkeypatch.setattr(attention, "KERNEL_ON", ("cuda", "cpu"))
  (device,) = jax.devices()[:1]
  assert attention.kernels_on([device]) == ("cpu",)
  assert attention.kernels_on([device, device]) == ()
  monkeypatch.setattr(attention, "KERNEL_ON", ("cuda",))
  assert attention.kernels_on([device]) == ()


def test_what_a_kernel_is_for():
  assert tree_attention.fits(128, 8, 80, 100, "bfloat16")
  assert not tree_attention.fits(512, 8, 80, 100, "bfloat16")
  fits = tree_attention_gpu.fits
  assert fits(128, 4, 128, 2048, "bfloat16")
  assert fits(32, 7, 128, 2048, "float32")
  assert not fits(256, 4, 256, 2048, "float32")
  assert not fits(16, 4, 80, 2048, "bfloat16")  # no power of two
  assert not fits(512, 1, 128, 2048, "bfloat16")

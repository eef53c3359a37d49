"""The kernels for a TPU and a GPU, interpreted, against the dense form."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_stream import decode, weights
from spec_stream.drafters.draft_model import DraftModel
from spec_stream.models import attention, tree_attention, tree_attention_gpu
from spec_stream.models.config import StreamConfig

KERNELS = (tree_attention, tree_attention_gpu)


def case(seed, batch, heads, rows, groups, size, slots, dtype):
  """Random operands; rows see what is above them in a random tree."""
  rng = np.random.default_rng(seed)
  # NumPy's: JAX would compile each operation anew for each shape.
  normal = lambda *shape: rng.normal(size=shape).astype(jnp.dtype(dtype))
  mask = np.eye(rows, dtype=bool)
  for row in range(1, rows):
    mask[row] |= mask[rng.integers(row)]
  return dict(
    q=normal(batch, heads, rows, groups, size),
    k=normal(batch, heads, size, rows),
    v=normal(batch, heads, rows, size),
    mask=np.broadcast_to(mask, (batch, rows, rows)),
    cache=(
      normal(batch, heads, size, slots),
      normal(batch, heads, slots, size),
    ),
    length=rng.integers(0, slots + 1, batch).astype(np.int32),
    first=np.zeros((batch, rows), np.int32),
  )


def slide(x, window):
  """The case with rows that see the last `window` positions alone."""
  rows = np.arange(x["mask"].shape[1], dtype=np.int32)
  positions = x["length"][:, None] + rows
  return x | {"first": np.maximum(positions - window + 1, 0)}


@functools.partial(jax.jit, static_argnames=("window", "cap"))
def dense(q, k, v, mask, cache, length, first, window=0, cap=0.0):
  del first  # is that of the window
  rows = q.shape[2]
  about = attention.Rows(
    None, mask, length[:, None] + jnp.arange(rows), num_main=rows, window=window
  )
  return attention._by_scores(cap, q, k, v, about, cache, length)


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
    seed, *_ = shape
    x = case(*shape, "float64")
    x = slide(x, window) if window else x
    if seed % 2:  # as positions of 64 bits make it
      x["first"] = x["first"].astype("int64")
    # Of the one for a GPU the slots in up to three parts, of a block each.
    more = {} if kernel is tree_attention else {"least": 1}
    found = kernel.attend(**x, cap=cap, block=16, interpret=True, **more)
    expected = dense(**x, window=window, cap=cap)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-13)

  check()


@pytest.mark.parametrize(
  "rows, groups, lengths, programs, least",
  [
    (1, 1, (0, 176), 1, 1),  # one part
    (18, 3, (16, 176), 40, 2),  # tiles, and parts of several blocks
    (33, 5, (175, 1), 1000, 3),
    (5, 16, (0, 90), 4, 1),  # parts that begin beyond the length
  ],
)
def test_tiles_and_parts_of_the_one_for_a_gpu(
  x64, rows, groups, lengths, programs, least
):
  x = case(0, 2, 2, rows, groups, 16, 176, "float64")
  x["length"] = jnp.array(lengths, jnp.int32)
  beyond = jnp.arange(176) >= x["length"][:, None]
  expected = dense(**x)
  x["cache"] = (
    jnp.where(beyond[:, None, None, :], jnp.nan, x["cache"][0]),
    jnp.where(beyond[:, None, :, None], jnp.nan, x["cache"][1]),
  )
  found = tree_attention_gpu.attend(
    **x, block=16, programs=programs, least=least, interpret=True
  )
  np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-13)


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
@pytest.mark.parametrize("slots", [176, 2064])  # in one part, in several
@pytest.mark.parametrize("groups", [1, 3])
def test_the_one_for_a_gpu_is_lowered_to_triton(slots, groups):
  x = case(2, 1, 8, 16, groups, 128, slots, "bfloat16")
  assert tree_attention_gpu.fits(16, groups, 128, slots, "bfloat16")
  call = "__gpu$xla.gpu.triton"
  lowered = jax.export.export(
    jax.jit(lambda x: tree_attention_gpu.attend(**x)),
    platforms=["cuda"],
    disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(call)],
  )(x)
  assert call in lowered.mlir_module()


@pytest.mark.parametrize(
  "on, capability, count, expected",
  [
    (("cuda 9.0",), "9.0", 1, ("cuda",)),
    (("cuda 9.0",), "9.0", 2, ()),  # XLA cannot split a kernel
    (("cuda 9.0",), "8.0", 1, ()),
    (("cuda", "tpu"), "8.0", 1, ("cuda",)),
    (("tpu",), "9.0", 1, ()),
    ((), "9.0", 1, ()),
  ],
)
def test_where_a_kernel_reads_the_cache(
  monkeypatch, on, capability, count, expected
):
  monkeypatch.setattr(attention, "KERNEL_ON", on)
  device = types.SimpleNamespace(platform="gpu", compute_capability=capability)
  assert attention.kernels_on(count * [device]) == expected
  model = weights.to_model(tiny.MODEL, weights.init(tiny.MODEL, 0))
  decode.suit(model, count * [device])
  assert {block.attention.kernels for block in model.blocks} == {expected}


def test_a_draft_model_is_suited_too(monkeypatch):
  monkeypatch.setitem(attention.KERNELS, "cpu", "tree_attention")
  monkeypatch.setattr(attention, "KERNEL_ON", ("cpu",))
  config = dataclasses.replace(tiny.MODEL, streams=StreamConfig(0))
  model, own = (
    weights.to_model(config, weights.init(config, seed)) for seed in (0, 1)
  )
  made = decode.Decoder(model, DraftModel(), own)
  params = made.graph.merge(made.weights)
  kernels = lambda model: {block.attention.kernels for block in model.blocks}
  assert kernels(params.target) == kernels(params.own) == {("cpu",)}
  assert kernels(model) == kernels(own) == {()}  # the caller's stay


def test_without_its_base_a_kernel_is_left_out(monkeypatch):
  monkeypatch.setitem(attention.KERNELS, "cpu", "no_such_module")
  monkeypatch.setattr(attention, "KERNEL_ON", ("cpu",))
  with pytest.warns(UserWarning, match="dense.*no_such_module"):
    assert attention.kernels_on(jax.devices()[:1]) == ()


def test_what_a_kernel_is_for():
  assert tree_attention.fits(128, 8, 80, 100, "bfloat16")
  assert not tree_attention.fits(512, 8, 80, 100, "bfloat16")
  fits = tree_attention_gpu.fits
  assert fits(128, 4, 128, 2048, "bfloat16")
  assert fits(32, 7, 128, 2048, "float32")
  assert not fits(32, 4, 256, 2048, "float32")
  assert not fits(1, 1, 64, 2048, "float64")
  assert not fits(16, 4, 80, 2048, "bfloat16")  # no power of two
  assert not fits(129, 1, 128, 2048, "bfloat16")
  assert not fits(1, 1, 128, 2047, "bfloat16")

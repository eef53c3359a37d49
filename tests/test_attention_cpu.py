"""The kernel for a CPU's attention against the dense form."""

import jax
import jax.numpy as jnp
import numpy as np
from compiler import compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tree_attention import case, dense, slide

from spec_stream.models import native, tree_attention_cpu


@compiled
@settings(max_examples=60, deadline=None)
@given(
  seed=st.integers(0, 2**32 - 1),
  batch=st.integers(1, 3),
  heads=st.integers(1, 3),
  rows=st.integers(1, 70),  # with their query heads in parts of 48
  groups=st.sampled_from([1, 2, 3, 50]),
  size=st.integers(1, 70),  # of whole registers, and not
  slots=st.integers(1, 150),
  window=st.sampled_from([0, 0, 1, 9]),
  cap=st.sampled_from([0.0, 0.0, 5.0]),
)
def test_it_is_as_the_dense_form(window, cap, **shape):
  """Whatever lies beyond the length."""
  assert native.is_ready()
  x = case(**shape, dtype="float32")
  x = slide(x, window) if window else x
  expected = dense(**x, window=window, cap=cap)
  beyond = jnp.arange(shape["slots"]) >= x["length"][:, None]
  keys, values = x["cache"]
  x["cache"] = (
    jnp.where(beyond[:, None, None], jnp.nan, keys),
    jnp.where(beyond[:, None, :, None], jnp.nan, values),
  )
  found = jax.jit(tree_attention_cpu.attend, static_argnames="cap")(
    **x, cap=cap
  )
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@compiled
def test_positions_may_be_wide(x64):
  """As JAX makes them where it is asked for 64 bits."""
  assert native.is_ready()
  x = slide(case(0, 2, 2, 3, 2, 8, 16, "float32"), 4)
  wide = x | {"first": x["first"].astype("int64")}
  found, again = (tree_attention_cpu.attend(**y) for y in (x, wide))
  np.testing.assert_array_equal(found, again)

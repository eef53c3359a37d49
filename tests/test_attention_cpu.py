"""The kernel for a CPU's attention against the dense form."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiler import compiled
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tree_attention import case, slide

from spec_stream.models import attention, native, tree_attention_cpu


def projections(seed, batch, heads, rows, groups, size, slots):
  """`case` with projections in the place of q, k and v."""
  x = case(seed, batch, heads, rows, groups, size, slots, "float32")
  q, k, v = x.pop("q"), x.pop("k"), x.pop("v")
  parts = q, np.moveaxis(k, 2, 3)[:, :, :, None], v[:, :, :, None]
  return x | {"qkv": np.swapaxes(np.concatenate(parts, 3), 1, 2)}


@jax.jit
def rotation(at, turns):
  return attention.rotation(at, turns, "f4")


def tables(seed, batch, rows, pairs):
  """Of random angles, or None."""
  if pairs is None:
    return None
  at = np.random.default_rng(seed).uniform(0, 500, (batch, rows))
  return rotation(at, 1 / (1 + np.arange(pairs)))


@functools.partial(jax.jit, static_argnames=("scale", "window", "cap"))
def dense(qkv, rotary, turn, mask, cache, length, first, scale, window, cap):
  del first  # is that of the window
  config = types.SimpleNamespace(
    attention_scale=scale, attention_softcap=cap, head_dim=0
  )
  rows = qkv.shape[1]
  about = attention.Rows(
    *(rotary, mask, length[:, None] + jnp.arange(rows), turn),
    num_main=rows,
    window=window,
  )
  return attention._dense(config, qkv, about, cache, length)


@functools.partial(jax.jit, static_argnames=("scale", "cap"))
def kernel(rotary, turn, scale, cap=0.0, **x):
  call = tree_attention_cpu.attend_projections
  return call(x.pop("qkv"), rotary, turn, **x, scale=scale, cap=cap)


@compiled
@settings(max_examples=40, deadline=None)
@given(
  seed=st.integers(0, 2**32 - 1),
  batch=st.integers(1, 3),
  heads=st.integers(1, 3),
  rows=st.integers(1, 70),  # with their query heads in parts of 48
  groups=st.sampled_from([1, 2, 3, 50]),
  size=st.integers(1, 70),  # of whole registers, and not
  slots=st.integers(1, 150) | st.integers(240, 300),  # few, and not
  window=st.sampled_from([0, 0, 1, 9]),
  cap=st.sampled_from([0.0, 0.0, 5.0]),
  scale=st.sampled_from([0.125, 1.0]),
  # Of a head's pairs that turn; None without a table.
  share=st.sampled_from([None, 0, 0.5, 1]),
  turns=st.booleans(),
)
# Of many slots: keys of 64 KiB and more, values in several pieces.
@example(
  **dict(seed=3, batch=2, heads=2, rows=9, groups=3, size=70, slots=300),
  **dict(window=0, cap=0.0, scale=0.125, share=1, turns=True),
)
def test_it_is_as_the_dense_form(
  window, cap, scale, share, turns, seed, batch, rows, size, **shape
):
  """Whatever lies beyond the length."""
  assert native.is_ready()
  x = projections(seed, batch, rows=rows, size=size, **shape)
  x = slide(x, window) if window else x
  pairs = None if share is None else int(size // 2 * share)
  x["rotary"] = tables(seed, batch, rows, pairs)
  x["turn"] = tables(seed + 1, 1, rows, size // 2 if turns else None)
  expected = dense(**x, window=window, cap=cap, scale=scale)
  beyond = np.arange(shape["slots"]) >= x["length"][:, None]
  keys, values = x["cache"]
  x["cache"] = (
    np.where(beyond[:, None, None], np.float32("nan"), keys),
    np.where(beyond[:, None, :, None], np.float32("nan"), values),
  )
  found = kernel(**x, cap=cap, scale=scale)
  for a, b in zip(found, expected, strict=True):
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@compiled
@pytest.mark.parametrize(
  "size, slots, lengths",
  [(16, 100, [77, 100]), (70, 300, [290, 300])],  # of few, of many slots
)
def test_rows_do_not_depend_on_those_after_them(size, slots, lengths):
  """Not in a bit, wherever in the cache each begins to see."""
  assert native.is_ready()
  x = projections(0, 2, 1, rows=44, groups=5, size=size, slots=slots)
  first = np.random.default_rng(0).integers(0, 70, (2, 44))
  x |= {"length": jnp.array(lengths), "first": jnp.asarray(first)}
  x |= dict(rotary=tables(0, 2, 44, 8), turn=None, scale=0.25)
  y, k, v = kernel(**x)
  for rows in (1, 2, 5, 8, 14, 43):
    few = {name: x[name][:, :rows] for name in ("qkv", "rotary", "first")}
    some = kernel(**x | few | {"mask": x["mask"][:, :rows, :rows]})
    np.testing.assert_array_equal(some[0], y[:, :, :rows])
    np.testing.assert_array_equal(some[1], k[..., :rows])
    np.testing.assert_array_equal(some[2], v[:, :, :rows])


@compiled
def test_positions_may_be_wide(x64):
  """As JAX makes them where it is asked for 64 bits."""
  assert native.is_ready()
  x = slide(projections(0, 2, 2, 3, 2, 8, 16), 4)
  x |= dict(rotary=tables(0, 2, 3, 4), turn=None, scale=1.0)
  wide = x | {"first": x["first"].astype("int64")}
  for a, b in zip(kernel(**x), kernel(**wide), strict=True):
    np.testing.assert_array_equal(a, b)

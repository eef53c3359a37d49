"""Attention over the slots that are in use, whatever the cache's size; and
prompts that are read chunk by chunk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_drafters import CASES, make
from random_models import in_short, random_requests

from spec_stream import UserError, step
from spec_stream.decode import Decoder, collect
from spec_stream.drafters.none import NoDraft
from spec_stream.models import attention, tree_attention

SEEDS = range(4)


@pytest.fixture
def anew():
  """Forgets what was compiled, and whatever the test compiled."""
  jax.clear_caches()
  yield
  jax.clear_caches()


@pytest.fixture
def short(monkeypatch, anew):
  """Prefixes of 4, 8, 16, ... slots: tiny caches have several."""
  monkeypatch.setattr(attention, "SHORTEST", 4)
  monkeypatch.setitem(attention.ON, "cpu", "prefixes")


@pytest.fixture
def kernel(monkeypatch, anew):
  """The kernel, interpreted, of blocks of 16 slots; -> its calls."""
  attend, calls = tree_attention.attend, []

  def interpreted(*args, **keys):
    calls.append(args)
    return attend(*args, **keys, block=16, interpret=True)

  monkeypatch.setattr(tree_attention, "attend", interpreted)
  monkeypatch.setitem(attention.ON, "cpu", "kernel")
  return calls


def test_sizes_double_up_to_the_slots():
  assert attention.prefixes(96) == [96]
  assert attention.prefixes(128) == [128]
  assert attention.prefixes(560) == [128, 256, 512, 560]


@pytest.mark.parametrize("window, masked", [(0, False), (7, False), (0, True)])
def test_any_length_is_as_over_all_slots(x64, short, window, masked):
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
  batch, heads, rows, groups, size, slots = 2, 2, 3, 2, 4, 24
  q = normal(batch, heads, rows, groups, size)
  k, v = normal(batch, heads, size, rows), normal(batch, heads, rows, size)
  cache = normal(batch, heads, size, slots), normal(batch, heads, slots, size)
  mask = jnp.broadcast_to(jnp.eye(rows, dtype=bool), (batch, rows, rows))
  seen = jnp.asarray(rng.random((batch, rows, slots)) < 0.7)

  def attend(way, length):
    positions = length[:, None] + jnp.arange(rows)
    old = None
    if masked:
      old = seen & (jnp.arange(slots) < length[:, None, None])
    about = attention.Rows(
      None, mask, positions, old=old, num_main=rows, window=window
    )
    return way(q, k, v, about, cache, length)

  few = jax.jit(lambda x: attend(lambda *a: attention._attend(*a, cap=0.0), x))
  every = jax.jit(
    lambda x: attend(lambda *a: attention._over_slots(slots, 0.0, *a), x)
  )
  for length in range(slots + 1):
    lengths = jnp.array([length, length // 2])
    np.testing.assert_allclose(few(lengths), every(lengths), rtol=1e-13)
  # What lies beyond the prefix is not read at all.
  nan = tuple(
    jnp.where(jnp.arange(slots).reshape(shape) < 8, x, jnp.nan)
    for x, shape in zip(cache, ((slots,), (slots, 1)), strict=True)
  )
  cache, lengths = nan, jnp.array([5, 8])
  assert jnp.isfinite(few.__wrapped__(lengths)).all()
  assert not jnp.isfinite(every.__wrapped__(lengths)).all()


@pytest.mark.parametrize("name", in_short(CASES, ("draft_model",)))
def test_tokens_where_a_step_reads_more_and_more(x64, short, name):
  """Of every drafter, those of plain decoding that reads all slots."""
  cases = [
    (*random_requests(seed, 3), *make(CASES[name], seed)) for seed in SEEDS
  ]

  def decode(drafter, prompts, options, model, own=None):
    made = Decoder(model, drafter, own)
    return collect(made.finish(made.start(prompts, slots=80, **options)))

  fast = [decode(CASES[name].drafter, *case) for case in cases]
  jax.clear_caches()
  attention.ON["cpu"] = "whole"  # until the end of the test
  plain = [decode(NoDraft(), *case[:3]) for case in cases]
  tokens = lambda found: [[x.token_ids for x in batch] for batch in found]
  assert tokens(fast) == tokens(plain)
  assert sum(sum(x.accepts[1:]) for batch in fast for x in batch)


@pytest.mark.parametrize("name", in_short(CASES, ("streams, corrected",)))
def test_tokens_of_a_queue_of_prompts(x64, short, name):
  """Rows at places of their own, and prompts read while others decode."""
  prompts, options = random_requests(7, 5)
  model, own = make(CASES[name], 7)
  fast = Decoder(model, CASES[name].drafter, own)
  fast = collect(fast.serve(prompts, 2, slots=80, **options))
  jax.clear_caches()
  attention.ON["cpu"] = "whole"  # until the end of the test
  plain = Decoder(model, NoDraft())
  plain = collect(plain.finish(plain.start(prompts, slots=80, **options)))
  assert [x.token_ids for x in fast] == [x.token_ids for x in plain]


@pytest.mark.parametrize("name", in_short(CASES, ("streams, corrected",)))
@pytest.mark.parametrize("window", [0, 6])
def test_tokens_with_the_kernel(x64, kernel, name, window):
  """Of a cache whose end is inside of a block; in every second layer of which
  a row sees no more than a window."""
  prompts, options = random_requests(3, 3)
  case = CASES[name]
  if window:
    slides = dict(sliding_window=window, sliding_layers=(0, 2))
    case = case._replace(target=dataclasses.replace(case.target, **slides))
  model, own = make(case, 3)

  def decode(*made):
    made = Decoder(model, *made)
    return collect(made.finish(made.start(prompts, slots=72, **options)))

  fast = decode(case.drafter, own)
  assert kernel
  jax.clear_caches()
  del attention.ON["cpu"], kernel[:]
  plain = decode(NoDraft())
  assert [x.token_ids for x in fast] == [x.token_ids for x in plain]
  assert not kernel


def test_a_chunk_of_many_rows_is_not_read_by_the_kernel(kernel, monkeypatch):
  model, _ = make(CASES["streams, corrected"], 0, "float32")
  groups = model.config.groups
  decoder = Decoder(model, NoDraft())
  for largest, calls in ((16 * groups, True), (16 * groups - 1, False)):
    monkeypatch.setattr(tree_attention, "LARGEST", largest)
    monkeypatch.setattr(step, "CHUNK", 16)
    jax.clear_caches()
    kernel.clear()
    decoder.start([[1, 2, 3] * 10], max_new_tokens=4)
    assert bool(kernel) == calls


@pytest.mark.parametrize("slots", [-1, 3.5, "80", 10**6])
def test_slots_that_are_none(slots):
  model, _ = make(CASES["streams, corrected"], 0, "float32")
  with pytest.raises(UserError, match=f"slots={slots} must be a whole number"):
    Decoder(model, NoDraft()).start([[1]], max_new_tokens=4, slots=slots)


@pytest.mark.parametrize("slots", [0, 80])
def test_a_cache_may_be_larger_than_it_must(slots):
  name = next(iter(CASES))
  model, own = make(CASES[name], 0, "float32")
  state = Decoder(model, CASES[name].drafter, own).start(
    [[1, 2, 3]], max_new_tokens=4, slots=slots
  )
  assert state.cache.num_slots >= max(slots, 20)
  assert (state.cache.num_slots == 80) == (slots == 80)


@pytest.mark.parametrize(
  "name", in_short(CASES, ("streams, corrected", "eagle, fused"))
)
def test_prompts_in_chunks(x64, monkeypatch, anew, name):
  """State and tokens are those of prompts that are read in one pass; lengths
  before, at and behind the ends of chunks."""
  prompts = [[1 + (i * i) % 9 for i in range(n)] for n in (1, 6, 7, 13, 14, 30)]
  options = dict(max_new_tokens=9)
  model, own = make(CASES[name], 5)
  decoder = Decoder(model, CASES[name].drafter, own)
  monkeypatch.setattr(step, "CHUNK", 32)
  whole = decoder.start(prompts, **options)
  jax.clear_caches()
  monkeypatch.setattr(step, "CHUNK", 7)  # 4, then 7 at a time
  parts = decoder.start(prompts, **options)
  assert parts.cache.length.tolist() == [*map(len, prompts)]
  used = jnp.arange(parts.cache.num_slots) < parts.cache.length[:, None]
  for (k, v), (same_k, same_v) in zip(
    parts.cache.layers, whole.cache.layers, strict=True
  ):
    masks = used[:, None, None], used[:, None, :, None]
    for x, same, mask in zip((k, v), (same_k, same_v), masks, strict=True):
      found, expected = jnp.where(mask, x, 0), jnp.where(mask, same, 0)
      np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
  for x, same in zip(
    jax.tree.leaves((parts.tree, parts.tokens)),
    jax.tree.leaves((whole.tree, whole.tokens)),
    strict=True,
  ):
    np.testing.assert_allclose(x, same, rtol=1e-9)
  parts, whole = (collect(decoder.finish(x)) for x in (parts, whole))
  assert [x.token_ids for x in parts] == [x.token_ids for x in whole]
  assert [x.accepts for x in parts] == [x.accepts for x in whole]

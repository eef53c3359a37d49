"""Caches that grow, the kernel in place of dense attention, prompts in chunks:
nothing of it is to be seen in the tokens."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_drafters import CASES, make
from random_models import REJECTION, in_short, random_model, random_requests

from spec_stream import UserError, bench, buckets, decode, step
from spec_stream.decode import Decoder, collect
from spec_stream.drafters.none import NoDraft
from spec_stream.models import attention, tree_attention

SEEDS = range(2)


@pytest.fixture
def anew():
  """Forgets what was compiled, and whatever the test compiled."""
  jax.clear_caches()
  yield
  jax.clear_caches()


@pytest.fixture
def small(monkeypatch):
  """Caches begin with 16 slots, or as many as the prompts need."""
  monkeypatch.setattr(buckets, "SMALLEST", 16)


@pytest.fixture(params=["tree_attention"])
def kernel(request, monkeypatch, anew):
  """A kernel, interpreted, of blocks of 16 slots; -> its calls."""
  module = importlib.import_module(f"spec_stream.models.{request.param}")
  attend, calls, more = module.attend, [], {}

  def interpreted(*args, **keys):
    calls.append(args)
    return attend(*args, **keys, **more, block=16, interpret=True)

  monkeypatch.setattr(module, "attend", interpreted)
  if request.param == "tree_attention_gpu":
    monkeypatch.setattr(module, "fits", lambda *_: True)  # of float64 too
    more["least"] = 1  # blocks of a part
  monkeypatch.setitem(attention.KERNELS, "cpu", request.param)
  monkeypatch.setattr(attention, "KERNEL_ON", ("cpu",))
  return calls


def finished(model, drafter, prompts, options, own=None, **more):
  made = Decoder(model, drafter, own)
  state = made.start(prompts, **options, **more)
  first = state.cache.num_slots
  state = made.finish(state)
  return collect(state), first, state.cache.num_slots


@pytest.mark.parametrize("name", in_short(CASES, ("eagle",)))
def test_tokens_where_the_cache_grows(x64, small, name):
  """Of every drafter, those of plain decoding in a cache that does not; and
  each draft as it is in such a cache."""
  grew = drafted = 0
  for seed in SEEDS:
    prompts, options = random_requests(seed, 3)
    options["max_new_tokens"] = [40, 7, 23]
    model, own = make(CASES[name], seed)
    fast, first, last = finished(
      model, CASES[name].drafter, prompts, options, own
    )
    plain, least, most = finished(model, NoDraft(), prompts, options, slots=112)
    assert least == most == 112
    assert [x.token_ids for x in fast] == [x.token_ids for x in plain]
    whole, *same = finished(
      model, CASES[name].drafter, prompts, options, own, grow=False
    )
    assert last <= same[0] == same[1]
    assert fast == whole
    grew += last > first
    drafted += sum(sum(x.accepts[1:]) for x in fast)
  assert grew and drafted


def test_a_queue_of_prompts_has_its_whole_cache(small):
  model, _ = make(CASES["prompt_lookup"], 1, "float32")
  decoder = Decoder(model, NoDraft())
  served = decoder.serve([[1, 2], [3]], 1, max_new_tokens=40)
  assert served.state.cache.num_slots == 96  # 16 + 64 + 1, rounded up


def test_drafts_of_the_rejection_rule_outlive_a_growth(x64, small):
  config, drafter = REJECTION
  model, prompts = random_model(config, 4), [[1, 2, 3], [4, 5]]
  options = dict(max_new_tokens=40, temperature=1.0, seed=[3, 4])
  fast, first, last = finished(model, drafter, prompts, options)
  whole, *_ = finished(model, drafter, prompts, options, grow=False)
  assert last > first and fast == whole


def test_a_cache_grows_by_twice_up_to_what_is_needed(small):
  model, own = make(CASES["eagle"], 1, "float32")
  decoder = Decoder(model, CASES["eagle"].drafter, own)
  longest = decoder.drafter.longest
  state = decoder.start([[1, 2, 3], [4]], max_new_tokens=60)
  slots = [state.cache.num_slots]
  while not state.done.all():
    state = decoder._run(state)
    if not state.done.all():
      assert int(state.cache.length.max()) >= slots[-1] - longest
      state = decoder._grown(state)
      slots.append(state.cache.num_slots)
      assert state.drafter.num_slots > slots[-1]
  # Prompts of up to 16, outputs of up to 64 tokens.
  assert slots == [24, 48, 96] and 16 + longest <= 24
  assert state.num_tokens.tolist() == [60, 60]


def test_no_larger_cache_for_a_last_quarter(monkeypatch):
  model, _ = make(CASES["eagle"], 1, "float32")
  decoder = Decoder(model, NoDraft())
  first = lambda smallest, **more: (
    monkeypatch.setattr(buckets, "SMALLEST", smallest)
    or decoder.start([[1]], max_new_tokens=30, **more).cache.num_slots
  )
  # 16 + 32 + 1, rounded up: 64.
  assert first(32) == 32 and first(64) == 64
  assert first(256) == 64 and first(32, slots=36) == 48
  assert first(16) == 24  # 16 is full with the prompt
  assert first(16, slots=80) == 80
  assert first(16, grow=False) == 64


def test_warmed_up_nothing_compiles_when_an_output_grows(small):
  """What was warmed up with ended after one token."""
  model, own = make(CASES["prompt_lookup"], 2, "float32")
  decoder = Decoder(model, CASES["prompt_lookup"].drafter, own)
  options = dict(max_new_tokens=40)
  ends = np.arange(model.config.vocab_size)
  decoder.warm_up([[1, 2, 3]], **options, end_token=ends)
  compilations = bench.Compilations()
  state = decoder.start([[3, 1]], **options, end_token=ends * 0 - 1)
  first = state.cache.num_slots
  state = decoder.finish(state)
  assert state.cache.num_slots > first
  assert compilations.count == 0


def test_one_step_after_the_other_grows_too(x64, small):
  model, own = make(CASES["prompt_lookup"], 3)
  options = dict(max_new_tokens=40, temperature=1.0, seed=5)
  args = CASES["prompt_lookup"].drafter, own
  steps = decode.stream(model, [1, 2], *args, **options)
  plain = decode.generate(model, [[1, 2]], NoDraft(), slots=80, **options)
  assert sum((s.token_ids for s in steps), []) == plain[0].token_ids


@pytest.mark.parametrize("name", in_short(CASES, ("streams, corrected",)))
@pytest.mark.parametrize("window", [6, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
  "kernel", ["tree_attention", "tree_attention_gpu"], indirect=True
)
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
  attention.KERNEL_ON = ()  # until the end of the test
  kernel.clear()
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

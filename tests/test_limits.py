"""What a step needs, and what a device gives."""

import dataclasses
import itertools

import jax.numpy as jnp
import pytest

from spec_stream import NoDraft, StreamDraft, TreeSpec, limits, weights
from spec_stream.decode import Decoder
from spec_stream.drafters.medusa import MedusaDraft
from spec_stream.models.config import (
  DrafterConfig,
  ModelConfig,
  StreamConfig,
)

MODEL = ModelConfig(
  vocab_size=64,
  width=32,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  ffw_dim=64,
  streams=StreamConfig(2, 1, main_attends_streams=False, prune_rank=0),
)


def make(**changes):
  config = dataclasses.replace(MODEL, **changes)
  return weights.to_model(config, weights.init(config, 0))


def num_bytes(model, *prefixes) -> int:
  """Of the weights whose paths begin so; of float32."""
  shapes = weights.shapes(model.config)
  return 4 * sum(x.size for p, x in shapes.items() if p.startswith(prefixes))


def cache(rows, length):
  """Bytes of keys and values of two layers with two heads of 8."""
  return rows * length * 2 * 2 * 2 * 8 * 4


DECODER = ("embed", "blocks", "final_norm", "head")


def test_a_plain_step_reads_every_weight_of_its_own_and_the_cache_once():
  model = make()
  plain = Decoder(model, NoDraft())
  read = num_bytes(model, *DECODER)
  assert read < num_bytes(model, "")  # the streams are not
  assert limits.of_step(plain, 1, 30).bytes == read + cache(1, 30)
  assert limits.of_step(plain, 3, 30).bytes == read + cache(3, 30)
  untied = make(tie_embeddings=False)
  read = num_bytes(untied, "blocks", "final_norm", "head")
  found = limits.of_step(Decoder(untied, NoDraft()), 3, 30)
  assert found.bytes == read + 3 * 32 * 4 + cache(3, 30)  # of three tokens


def test_nodes_cost_products_and_hardly_bytes():
  model = make()
  plain = limits.of_step(Decoder(model, NoDraft()), 1, 30)
  tree = StreamDraft(TreeSpec("best_first", 4))
  found = limits.of_step(Decoder(model, tree), 1, 30)
  assert found.bytes == plain.bytes + num_bytes(model, "streams/embed")
  assert 4 * plain.flops < found.flops < 12 * plain.flops


def test_a_drafters_own_weights_are_read():
  none = StreamConfig(num_streams=0, num_stream_layers=1, prune_rank=0)
  model = make(streams=none, drafter=DrafterConfig("medusa"))
  plain = limits.of_step(Decoder(model, NoDraft()), 1, 30)
  heads = MedusaDraft(TreeSpec("best_first", 4))
  found = limits.of_step(Decoder(model, heads), 1, 30)
  own = num_bytes(model, "drafter/")
  assert own and found.bytes == plain.bytes + own


def test_the_limit_is_the_slower_of_two():
  rates = limits.Rates(read=10.0, copy=8.0, matrix=100.0)
  assert limits.Step(40, 100).seconds(rates) == 4.0
  assert limits.Step(40, 1000).seconds(rates) == 10.0
  fields = limits.Step(40, 1000).fields(rates, 20.0)
  assert (fields["read_share"], fields["matrix_share"]) == (0.2, 0.5)
  assert fields["limit_ms"] == 10_000


def test_rates_are_means_of_samples(monkeypatch):
  readings = iter(([5, 7], [1, 3], [8, 4], [2, 6]))  # seconds, of each turn
  monkeypatch.setattr(
    limits, "_timer", lambda *_: iter(next(readings)).__next__
  )
  now = [0.0]
  monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
  meter = limits.Meter("float32", size=2**22, every=2.0)
  for now[0] in (0.0, 1.9, 3.8, 5.7):  # the second and fourth are too soon
    meter.sample(3, 9)
  rates = meter.rates()
  # The faster way of reading takes 1 and 3.
  assert rates.read == 2**22 / 2 and rates.copy == 2 * 2**22 / 6
  assert rates.matrix == 2 * 2048**3 / 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_turn_is_timed(monkeypatch, dtype):
  """On a clock that goes on by 1, 2, 9, 5 seconds from call to call."""
  ticks, now, calls = iter((1, 2, 9, 5)), [0.0], itertools.count()

  def clock():
    if next(calls) % 2:  # the end of a call
      now[0] += next(ticks)
    return now[0]

  monkeypatch.setattr(limits.time, "perf_counter", clock)
  array = jnp.ones((3, 5), dtype)
  turn = limits._timer(lambda c, x: c @ x, array, jnp.ones((5, 5), dtype))
  # The first two, which compile and say how often, do not count.
  assert (turn(), turn()) == (9, 5)
  assert array.sum() == 15  # and is not given away


def test_what_is_short_is_done_often(monkeypatch):
  turns, now = [], [0.0]

  def jit(loop, donate_argnums):
    def call(count, carry, args):
      turns.append(count)
      now[0] += 0.001 + 0.002 * count  # a millisecond to start it
      return carry

    return call

  monkeypatch.setattr(limits.time, "perf_counter", lambda: now[0])
  monkeypatch.setattr(limits.jax, "jit", jit)
  turn = limits._timer(lambda c: c, 0.0)
  assert turn() == pytest.approx(0.002 + 0.001 / 17)
  assert turns == [1, 1, 17]  # 0.05 over 0.003

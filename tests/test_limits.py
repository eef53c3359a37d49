"""What a step needs, and what a device gives."""

import dataclasses

import pytest

from spec_stream import NoDraft, StreamDraft, TreeSpec, limits, weights
from spec_stream.models.config import ModelConfig, StreamConfig

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


def count(model):
  shapes = weights.shapes(model.config)
  return {path: x.size for path, x in shapes.items()}


def test_a_plain_step_reads_every_weight_and_the_cache_once():
  model = make()
  # Keys and values of two layers, of 30 tokens a row.
  cache = lambda rows, length: rows * length * 2 * 2 * 2 * 8 * 4
  held = 4 * sum(count(model).values())
  assert limits.of_step(model, NoDraft(), 1, 30).bytes == held + cache(1, 30)
  assert limits.of_step(model, NoDraft(), 3, 30).bytes == held + cache(3, 30)
  untied = make(tie_embeddings=False)
  held = 4 * sum(count(untied).values())
  looked_up = 4 * 64 * 32  # a row of it
  found = limits.of_step(untied, NoDraft(), 1, 30)
  assert found.bytes == held - looked_up + cache(1, 30)


def test_nodes_cost_products_and_no_bytes():
  model = make()
  plain = limits.of_step(model, NoDraft(), 1, 30)
  tree = StreamDraft(TreeSpec("best_first", 4))
  found = limits.of_step(model, tree, 1, 30)
  assert found.bytes == plain.bytes
  assert 4 * plain.flops < found.flops < 12 * plain.flops


def test_the_limit_is_the_slower_of_two():
  rates = limits.Rates(read=10.0, copy=8.0, matrix=100.0)
  assert limits.Step(40, 100).seconds(rates) == 4.0
  assert limits.Step(40, 1000).seconds(rates) == 10.0
  fields = limits.Step(40, 1000).fields(rates, 20.0)
  assert (fields["read_share"], fields["matrix_share"]) == (0.2, 0.5)
  assert fields["limit_ms"] == 10_000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_device_has_rates(dtype):
  rates = limits.of_device(dtype, size=2**22)
  assert all(x > 1e6 for x in dataclasses.astuple(rates))

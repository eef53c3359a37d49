"""A model and batches small enough that compiling is what takes the time."""

import functools

import jax
import numpy as np

from spec_stream import weights
from spec_stream.models.config import ModelConfig, StreamConfig

MODEL = ModelConfig(
  vocab_size=19,
  width=16,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  ffw_dim=24,
  streams=StreamConfig(num_streams=3, num_stream_layers=1, prune_rank=2),
)
# Segment lengths (prompt, completion) of each row; the rest is padding.
ROWS = (((3, 4), (2, 5)), ((4, 2), (2, 3)), ((1, 8),))


def make_batch(rows=ROWS, size=16, places=12, vocab=19, seed=0):
  """Packed examples; streams on each position before a completion token."""
  rng = np.random.default_rng(seed)
  shape = (len(rows), size)
  batch = {
    "tokens": np.zeros(shape, np.int32),
    "segment_ids": np.zeros(shape, np.int32),
    "positions": np.zeros(shape, np.int32),
    "loss_mask": np.zeros(shape, bool),
    "stream_at": np.zeros((len(rows), places), np.int32),
    "stream_mask": np.zeros((len(rows), places), bool),
  }
  for b, row in enumerate(rows):
    at, chosen = 0, []
    for segment, (prompt, completion) in enumerate(row, 1):
      span = slice(at, at + prompt + completion)
      length = prompt + completion
      batch["tokens"][b, span] = rng.integers(1, vocab, length)
      batch["segment_ids"][b, span] = segment
      batch["positions"][b, span] = np.arange(length)
      batch["loss_mask"][b, at + prompt : at + length] = True
      chosen += range(at + prompt - 1, at + length - 1)
      at += length
    batch["stream_at"][b, : len(chosen)] = chosen
    batch["stream_mask"][b, : len(chosen)] = True
  return batch


@functools.cache
def make_model(config=MODEL, seed=0):
  """A model whose zero-initialised weights are not zero, so that they count."""

  @jax.jit
  def make():
    values = weights.init(config, seed)
    keys = jax.random.split(jax.random.key(seed), len(values))
    return {
      path: w + 0.3 * jax.random.normal(key, w.shape, w.dtype)
      for key, (path, w) in zip(keys, sorted(values.items()))
    }

  return weights.to_model(config, make())

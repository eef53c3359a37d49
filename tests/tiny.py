"""Models, batches and runs so small that compiling is what takes the time.

As a program, `python tests/tiny.py WORKDIR STEP` trains and kills itself with
a signal, SIGKILL or the one named by a third argument, once STEP is logged.
"""

import dataclasses
import functools
import json
import os
import signal
import sys

import jax
import numpy as np

from spec_stream import sharding, weights
from spec_stream.models.config import ModelConfig, StreamConfig
from spec_stream.train import fit, start
from spec_stream.train.config import TrainConfig

MODEL = ModelConfig(
  vocab_size=19,
  width=16,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  ffw_dim=24,
  streams=StreamConfig(num_streams=2, num_stream_layers=1, prune_rank=2),
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


def pairs(dataset="", data_dir="", manual_dir="", split="train"):
  """In place of `data.source.examples`: a small corpus, made at once."""
  rng = np.random.default_rng(len(split))
  words = "red green blue old new big small round square".split()
  draw = lambda: " ".join(rng.choice(words, rng.integers(2, 5)))
  return tuple((text := draw(), f"It is {text}.") for _ in range(200))


# One layer, one stream, no pruner: the same paths through `fit`, half compiled.
SMALL = dataclasses.replace(
  MODEL, num_layers=1, streams=StreamConfig(1, 1, prune_rank=0)
)
DATA = dict(seq_len=64, stream_positions=32, batch_size=4, vocab_size=280)
TRAIN = TrainConfig(
  steps=12, learning_rate=0.01, warmup_steps=2, log_every=1, save_every=4
)


def train(
  workdir, model=SMALL, train=TRAIN, sizes=(-1, 1, 1), profile=False, **data
):
  """`fit` from the tokenizer on, as launch/train.py does it."""
  from spec_stream.data.pipeline import DataConfig

  data = DataConfig(**{**DATA, **data})
  tokenizer = start.prepare_tokenizer(workdir, data, train)
  model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
  mesh = sharding.make_mesh(*sizes)
  return fit.fit(workdir, model, data, train, tokenizer, mesh, profile)


def losses(workdir):
  """{step: loss} of metrics.jsonl."""
  with open(f"{workdir}/metrics.jsonl") as file:
    records = [json.loads(line) for line in file]
  return {record["step"]: record["loss"] for record in records}


def iterator():
  """A grain iterator of numbers in some fixed order."""
  import grain

  return iter(grain.MapDataset.range(100).seed(1).shuffle().to_iter_dataset())


def use_small_data(monkeypatch=None):
  from spec_stream.data import source

  if monkeypatch is None:
    source.examples = pairs
  else:
    monkeypatch.setattr(source, "examples", pairs)


def main(workdir, last, kind="SIGKILL"):
  use_small_data()
  write = fit.MetricWriter.write

  def write_and_stop(self, step, metrics):
    write(self, step, metrics)
    if step == int(last):
      os.kill(os.getpid(), getattr(signal, kind))

  fit.MetricWriter.write = write_and_stop
  number = train(workdir)
  return 128 + number if number else 0


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))

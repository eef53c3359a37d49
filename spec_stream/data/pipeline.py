"""Batches for training: tokenise, shuffle, pack, batch (grain).

A row packs several examples, each a segment:

    tokens       <bos> p p <sep> c c <eos> <bos> p <sep> c <eos> <pad>
    segment_ids    1   1 1   1   1 1   1     2   2   2   2   2     0
    positions      0   1 2   3   4 5   6     0   1   2   3   4     0
    loss_mask      .   . .   .   x x   x     .   .   .   x   x     .
    stream_at    = [3, 4, 5, 9, 10, ...]: the last prompt position and every
                   completion position but that of <eos>

Streams have a budget of their own: a row is full when either its tokens or its
stream positions are, so nothing is ever cut.
"""

import dataclasses

import numpy as np

from spec_stream.data import source
from spec_stream.data.tokenizer import Tokenizer
from spec_stream.errors import UserError


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """dataset: see `source.NAMES`; data_dir: where prepared data lies;
  manual_dir: files of a release already at hand. seq_len: T tokens a row;
  stream_positions: U positions a row that carry streams, 0 = T; batch_size:
  rows; packing: several examples a row. too_long: what becomes of an example
  that does not fit a row, "refuse" or "skip" (of the training split alone).
  tokenizer: a tokenizer.json of this project to use as it is, rather than one
  that is trained on the training split with `vocab_size` tokens.
  """

  dataset: str = "restaurants"
  data_dir: str = "data"
  manual_dir: str = ""
  seq_len: int = 256
  stream_positions: int = 0
  batch_size: int = 16
  vocab_size: int = 1024
  seed: int = 0
  packing: bool = True
  too_long: str = "refuse"
  tokenizer: str = ""

  def __post_init__(self):
    for name in ("seq_len", "batch_size", "vocab_size"):
      if getattr(self, name) < 1:
        raise UserError(f"data.{name} must be 1 or more")
    if not 0 <= self.stream_positions <= self.seq_len:
      raise UserError(
        f"data.stream_positions={self.stream_positions} must lie between 0 "
        f"(as many as tokens) and data.seq_len={self.seq_len}"
      )
    if self.too_long not in ("refuse", "skip"):
      raise UserError(
        f"data.too_long is '{self.too_long}': use one of refuse, skip"
      )
    if self.dataset not in source.NAMES:
      raise UserError(
        f"unknown data set '{self.dataset}': use {' or '.join(source.NAMES)}"
      )


def examples(config: DataConfig, split: str) -> tuple[tuple[str, str], ...]:
  """(prompt, completion) pairs of a split."""
  return source.examples(
    config.dataset, config.data_dir, config.manual_dir, split
  )


def prompts(config: DataConfig, split: str) -> list[tuple[str, list[str]]]:
  """Each prompt of a split once, in the order met, with its references."""
  found: dict[str, list[str]] = {}
  for prompt, completion in examples(config, split):
    found.setdefault(prompt, []).append(completion)
  return list(found.items())


def encode(tokenizer: Tokenizer, prompt: str, completion: str) -> dict:
  """One example as arrays; stream_at counts from the example's start."""
  head = tokenizer.encode_prompt(prompt)
  tail = [*tokenizer.encode_completion(completion), tokenizer.eos_id]
  size = len(head) + len(tail)
  return {
    "tokens": np.array(head + tail, np.int32),
    "loss_mask": np.arange(size) >= len(head),
    "stream_at": np.arange(len(head) - 1, size - 1, dtype=np.int32),
  }


def train_iterator(
  config: DataConfig, tokenizer: Tokenizer, split: str = "train"
):
  """Endless iterator of batches; `get_state`/`set_state` are exact.

  Yields dicts of tokens, segment_ids, positions [B, T] int32, loss_mask [B, T]
  bool, stream_at [B, U] int32 and stream_mask [B, U] bool. Each of several
  processes has the whole batch: packing a few rows more costs little, and what
  comes next does not depend on how many processes there are.

  Raises:
    UserError: an example that does not fit a row.
  """
  import grain

  pairs = examples(config, split)
  if tokenizer.eos_id is None:
    raise UserError(
      "the tokenizer names no token that ends an answer: set eos_token in the "
      "checkpoint's tokenizer_config.json"
    )
  encoded = [encode(tokenizer, *pair) for pair in pairs]
  budget = {
    "tokens": config.seq_len,
    "loss_mask": config.seq_len,
    "stream_at": config.stream_positions or config.seq_len,
  }
  encoded = _fitting(config, encoded, budget)
  rows = (
    grain.MapDataset.source(encoded)
    .seed(config.seed)
    .shuffle()
    .repeat()
    .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=64))
  )
  pack = grain.experimental.FirstFitPackIterDataset(
    rows,
    length_struct=budget,
    num_packing_bins=config.batch_size if config.packing else 1,
    max_sequences_per_bin=None if config.packing else 1,
    meta_features=("loss_mask",),
  )
  batches = pack.map(_arrange).batch(config.batch_size, drop_remainder=True)
  threaded = grain.experimental.ThreadPrefetchIterDataset(
    batches, prefetch_buffer_size=4
  )
  return iter(threaded)


def _fitting(config: DataConfig, encoded: list[dict], budget: dict):
  """The examples that fit a row; the others are skipped aloud or refused."""
  for name, setting in (
    ("tokens", "seq_len"),
    ("stream_at", "stream_positions"),
  ):
    longest = max(len(x[name]) for x in encoded)
    if longest <= budget[name]:
      continue
    if config.too_long == "refuse":
      raise UserError(
        f"an example of {config.dataset} needs data.{setting}={longest}, above "
        f"{budget[name]}: raise it, or set data.too_long=skip"
      )
    kept = [x for x in encoded if len(x[name]) <= budget[name]]
    if not kept:
      raise UserError(
        f"no example of {config.dataset} fits data.{setting}={budget[name]}"
      )
    print(
      f"skipping {len(encoded) - len(kept):,} of {len(encoded):,} examples "
      f"that do not fit data.{setting}={budget[name]}"
    )
    encoded = kept
  return encoded


def _arrange(row: dict) -> dict:
  """A packed row in the form that the loss reads."""
  segments = row["tokens_segment_ids"]
  owner = row["stream_at_segment_ids"]
  # First index of each segment; 0 stands for padding.
  start = np.zeros(segments.max() + 1, np.int32)
  for segment in range(1, len(start)):
    start[segment] = np.argmax(segments == segment)
  mask = owner > 0
  return {
    "tokens": row["tokens"].astype(np.int32),
    "segment_ids": segments.astype(np.int32),
    "positions": row["tokens_positions"].astype(np.int32),
    "loss_mask": row["loss_mask"].astype(bool),
    "stream_at": np.where(mask, row["stream_at"] + start[owner], 0).astype(
      np.int32
    ),
    "stream_mask": mask,
  }

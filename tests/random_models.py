"""Random models and requests of a few fixed shapes: programs are shared.

Weights, prompts, lengths, limits, seeds and temperatures vary freely; what is
static (configs, drafters, bucket sizes) comes from this short list.
"""

import dataclasses

import numpy as np
import pytest

from spec_stream import ties, weights
from spec_stream.drafters.streams import StreamDraft
from spec_stream.models.config import ModelConfig, StreamConfig
from spec_stream.models.prune import Prune
from spec_stream.sampling import make as make_sampling
from spec_stream.tree import TreeSpec

VOCAB = 11
MOST = 14  # new tokens


MODES = ("shared, main attends", "lossless")


def in_short(names, short=("lossless",)):
  """The cases `short` in the short run; the others are slow."""
  return [
    name if name in short else pytest.param(name, marks=pytest.mark.slow)
    for name in names
  ]


def _case(tree, prune=None, num_streams=0, **streams):
  config = ModelConfig(
    vocab_size=VOCAB,
    width=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    ffw_dim=24,
    max_positions=64,
    dtype="float64",
    param_dtype="float64",
    streams=StreamConfig(**streams),
  )
  return config, StreamDraft(tree, prune or Prune(), num_streams)


best = lambda nodes: TreeSpec("best_first", nodes)
CASES = {
  "shared, main attends": _case(best(9), num_stream_layers=2),
  "shared, pruned": _case(
    best(12), Prune(kept_nodes=5), num_stream_layers=1, lora_rank=2
  ),
  "shared, first version": _case(
    TreeSpec("cartesian", width=2),
    main_attends_streams=False,
    lora_rank=3,
    lora_layers="all",
  ),
  "shared, rotation": _case(
    TreeSpec("chain"),
    Prune(threshold=0.05),
    stream_id="rotation",
    rotation_eps=0.3,
    stream_position="same",
  ),
  "lossless": _case(
    best(8), mode="lossless", lora_rank=3, num_stream_layers=2, map_rank=2
  ),
  "lossless, fewer streams": _case(
    best(6),
    Prune(kept_nodes=4, threshold=0.01),
    num_streams=2,
    mode="lossless",
    lora_rank=3,
    num_stream_layers=3,
  ),
}

_PATHS = TreeSpec("paths", paths=((0,), (1,), (0, 0), (0, 1), (0, 0, 0)))
REJECTION = CASES["lossless"][0], StreamDraft(_PATHS, rule="rejection")


def random_model(config: ModelConfig, seed: int, scale=0.3):
  """No weight is zero, adapters and pruner included."""
  rng = np.random.default_rng(seed)
  values = {
    path: rng.normal(0, scale, x.shape).astype(config.param_dtype)
    for path, x in sorted(weights.shapes(config).items())
  }
  for path in values:
    if path.endswith("scale"):
      values[path] = 1 + values[path]
  return weights.to_model(config, values)


def as_float32(config: ModelConfig) -> ModelConfig:
  return dataclasses.replace(config, dtype="float32", param_dtype="float32")


def random_requests(seed: int, batch=3) -> tuple[list[list[int]], dict]:
  """Prompts of 1..12 tokens, and settings that differ from row to row.

  Of the rows about one in three is greedy. The batch has two stop sequences,
  and penalties may encourage repetition.
  """
  rng = np.random.default_rng(seed)
  prompts = [
    rng.integers(0, VOCAB, rng.integers(1, 13)).tolist() for _ in range(batch)
  ]
  settings = dict(
    max_new_tokens=rng.integers(1, MOST + 1, batch),
    end_token=int(rng.integers(-1, VOCAB)),
    temperature=rng.choice([0.0, 0.7, 1.3], batch),
    top_k=rng.choice([0, 4], batch),
    top_p=rng.choice([0.8, 1.0], batch),
    min_p=rng.choice([0.0, 0.05], batch),
    repetition_penalty=rng.choice([0.8, 1.0, 1.3], batch),
    # Other first tokens: then their table has the same size each time.
    stop=np.stack(
      [rng.choice(VOCAB, 2, replace=False), rng.integers(0, VOCAB, 2)], 1
    ).tolist(),
    seed=rng.integers(0, 2**32, batch),
  )
  return prompts, settings


def row(settings: dict, i: int) -> dict:
  """The settings of request i alone."""
  shared = ("end_token", "stop")
  return {
    k: v[i] if k not in shared and np.ndim(v) else v
    for k, v in settings.items()
  }


_OF_THE_LOOP = ("max_new_tokens", "end_token", "stop")


def differences(model, prompts, plain, fast, settings):
  """Where two outputs of the same requests differ, with margins: see `ties`."""
  keys = [k for k in settings if k not in _OF_THE_LOOP]
  return ties.compare(
    model,
    prompts,
    [x.token_ids for x in plain],
    [x.token_ids for x in fast],
    [
      make_sampling(1, **{k: row(settings, i)[k] for k in keys})
      for i in range(len(prompts))
    ],
  )

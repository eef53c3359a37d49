"""What the ablations share: at `small` scale one target, made on the spot.

The target has 1.8 M weights (4 layers; 3.4 M with 8) and is trained on E2E-NLG
as a plain decoder, then frozen; streams are tuned beside it with adapters. At
`paper` scale it is the checkpoint of --config.model.checkpoint.
"""

from collections.abc import Iterable

from ml_collections import ConfigDict

from configs import checkpoint, paper_tasks
from spec_stream.errors import UserError
from spec_stream.sweep import Run

SCALES = ("small", "paper")
_BASE = {
  "train.objective": "next_token",
  "train.trainable": "all",
  "train.init_from": "",
  "train.steps": 600,
  # A plain decoder: adapters would be trained too, and some runs keep them.
  "model.streams.lora_rank": 0,
}


def check(scale: str):
  """Raises: UserError unless an ablation has a config of this scale."""
  if scale not in SCALES:
    raise UserError(f"no scale '{scale}': use one of {', '.join(SCALES)}")


def get_config(scale: str, mode: str, layers: int = 4) -> ConfigDict:
  """Streams beside a frozen base, in `mode`; layers: of the small target."""
  check(scale)
  if scale == "paper":
    return checkpoint.get_config(mode)
  config = paper_tasks.get_config("e2e_nlg")
  config.model.num_layers = layers
  config.model.streams.update(mode=mode, lora_rank=32, num_stream_layers=4)
  config.data.vocab_size = 1024
  config.train.update(trainable="adapters", init_from="RUN", steps=300)
  if mode == "lossless":
    config.train.update(target="main", stream_weight=(1.0,))
  return config


def sweep(scale: str, runs: Iterable[Run]) -> Iterable[Run]:
  """The runs; at small scale from a base that is trained first."""
  if scale == "paper":
    yield from runs
    return
  yield Run("base", _BASE)
  for run in runs:
    start = {"train.init_from": "{base}"}
    yield Run(run.name, {**run.train, **start}, run.benchmark, run.evaluate)

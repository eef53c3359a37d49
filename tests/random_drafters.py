"""Every drafter with random weights, on the targets of `random_models`."""

import dataclasses
from typing import NamedTuple

from random_models import CASES as STREAMS
from random_models import random_model

from spec_stream.decode import Decoder
from spec_stream.drafters import registry
from spec_stream.drafters.base import Drafter
from spec_stream.models.config import DrafterConfig, ModelConfig, StreamConfig
from spec_stream.models.prune import Prune
from spec_stream.tree import TreeSpec

PLAIN = dataclasses.replace(
  STREAMS["lossless"][0],
  streams=StreamConfig(num_streams=0, num_stream_layers=1),
)
ATTENDS = STREAMS["shared, main attends"][0]  # a target with streams of its own
SMALLER = dataclasses.replace(PLAIN, width=8, num_layers=1, num_heads=2)
SLIDES = dataclasses.replace(SMALLER, sliding_window=3, sliding_layers=(0,))


class Case(NamedTuple):
  target: ModelConfig
  drafter: Drafter
  own: ModelConfig | None  # of a draft model


def case(name, tree, ahead=0, target=PLAIN, own=None, **options):
  drafter = registry.get(name).of(tree, ahead, Prune())
  if drafter.Module is not None:
    config = DrafterConfig(name, tuple(sorted(options.items())))
    target = dataclasses.replace(target, drafter=config)
  return Case(target, drafter, own)


best = lambda nodes: TreeSpec("best_first", nodes)
CHAIN = TreeSpec("chain")
PATHS = TreeSpec("paths", paths=((0,), (2,), (0, 1), (2, 0), (0, 1, 1)))
OPT = dataclasses.replace(
  PLAIN,
  norm="layer",
  activation="relu",
  gated=False,
  positions="learned",
  tie_embeddings=False,
  head_bias=True,
  qkv_bias=True,
)
GEMMA = dataclasses.replace(
  PLAIN,
  post_norms=True,
  embed_scale=4.0,
  logit_softcap=5.0,
  attention_softcap=4.0,
  sliding_window=4,
  sliding_layers=(0, 2),
)
CORRECTED = dataclasses.replace(
  STREAMS["lossless"][0],
  streams=StreamConfig(
    mode="lossless", lora_rank=2, num_stream_layers=2, correction_rank=3
  ),
)
CASES = {
  "streams, corrected": case("streams", best(10), target=CORRECTED),
  "prompt_lookup": case("prompt_lookup", best(10), 3),
  "prompt_lookup, chain": case("prompt_lookup", CHAIN, target=ATTENDS),
  "lookahead": case("lookahead", best(21), 2),
  "draft_model": case("draft_model", best(9), own=SMALLER),
  "draft_model, chain": case("draft_model", CHAIN, 3, own=SLIDES),
  "draft_model, paths": case("draft_model", PATHS, own=SMALLER, target=ATTENDS),
  "draft_model, opt": case("draft_model", best(9), own=SMALLER, target=OPT),
  "medusa, gemma": case("medusa", best(8), target=GEMMA),
  "hydra, opt": case("hydra", best(9), target=OPT),
  "redrafter, gemma": case("redrafter", TreeSpec("beam", 0, 2), target=GEMMA),
  "eagle, opt": case("eagle", best(10), target=OPT),
  "eagle, gemma": case("eagle", best(10), target=GEMMA),
  "medusa": case("medusa", best(8), layers=2),
  "hydra": case("hydra", best(9)),
  "hydra, paths": case("hydra", PATHS),
  "redrafter": case("redrafter", TreeSpec("beam", 0, 3)),
  "redrafter, chain": case("redrafter", CHAIN, 5),
  "eagle": case("eagle", best(10)),
  "eagle, fused": case("eagle", CHAIN, 3, fuse=(0, 1, 2), length=3),
}
# Of the drafters these are in the short run: see `in_short`.
SHORT = ("streams, corrected", "prompt_lookup", "medusa")


def typed(config: ModelConfig, dtype: str) -> ModelConfig:
  return dataclasses.replace(config, dtype=dtype, param_dtype=dtype)


def make(case: Case, seed: int, dtype="float64"):
  """-> (target, own weights of a draft model or None), of random weights."""
  own = case.own and random_model(typed(case.own, dtype), seed + 1)
  return random_model(typed(case.target, dtype), seed), own


def decoder(case: Case, seed: int, dtype="float64") -> Decoder:
  model, own = make(case, seed, dtype)
  return Decoder(model, case.drafter, own)

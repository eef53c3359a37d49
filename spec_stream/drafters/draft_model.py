"""A second, smaller model drafts (Leviathan et al., 2211.17192; Chen et al.,
2302.01318).

Any model of ours with the same vocabulary: a run of `launch/train.py`, plain,
with the target's tokenizer. It decodes its own next tokens, as a chain or as a
tree of its most probable ones, and keeps its own cache in step with what the
target accepted. Its parameters are all its weights. Both papers sample the
draft and correct by rejection; here the draft is deterministic and the loop's
own rule accepts.

DistillSpec (Zhou et al., 2310.08461) trains the draft on the target's
distribution: `train.teacher=WORKDIR`.
"""

import dataclasses
import functools

import jax.numpy as jnp

from spec_stream.cache import KVCache, empty
from spec_stream.drafters import cached, grow
from spec_stream.drafters.base import Accepted, Params, TreeDrafter
from spec_stream.errors import UserError
from spec_stream.models.config import ModelConfig
from spec_stream.models.transformer import Transformer, forward


@dataclasses.dataclass(frozen=True)
class DraftModel(TreeDrafter):
  """tree: its kind and size; length: tokens to draft ahead, 0 for 4."""

  name = "draft_model"

  def resolve(self, config: ModelConfig, own=None) -> "DraftModel":
    if not isinstance(own, Transformer):
      raise UserError(
        "draft_model needs a second run that drafts: "
        "--drafters=draft_model=WORKDIR"
      )
    if own.config.vocab_size != config.vocab_size:
      raise UserError(
        f"the draft model has {own.config.vocab_size} tokens, the target "
        f"{config.vocab_size}: both need the same tokenizer"
      )
    if own.config.streams.attends:
      raise UserError(
        "the draft model's main stream attends to its streams (shared mode): "
        "use a run without streams"
      )
    length = self.length or 4
    tree = grow.resolve(self.tree, length, config.vocab_size)
    return self.resolved(config, tree, length)

  def init(self, params: Params, batch: int, slots: int) -> KVCache:
    config = params.own.config
    return empty(
      batch,
      cached.room(self.tree, self.length, slots),
      config.num_layers,
      config.num_kv_heads,
      config.head_dim,
      config.dtype,
    )

  def propose(self, params: Params, state: KVCache, accepted: Accepted):
    own, count = params.own, accepted.count
    rows = jnp.arange(len(count))
    tokens = jnp.pad(accepted.tokens, ((0, 0), (0, 1)))
    tokens = tokens.at[rows, count].set(accepted.root)

    def run(tokens, features, positions, mask, cache, cache_mask):
      out = forward(
        own, tokens, positions, mask, cache=cache, cache_mask=cache_mask
      )
      return out.main, out.kv

    return cached.propose(
      run,
      own.logits,
      state,
      tokens,
      None,
      count,
      count,
      accepted.root,
      self.tree,
      self.length,
      functools.partial(self.guess, accepted),
    )

"""Medusa: more LM heads on the last hidden state (Cai et al., 2401.10774).

Head j of J says what comes j tokens after the main head's token, from the
target's last hidden state h alone (section 2.1.1 there):

    p_j = softmax(U_j (h + silu(W_j h + b_j)))

with W_j zero and U_j the target's own LM head at the start, so that a fresh
head says what the main one does (but for a bias of it). With one residual
block, D^2 + D + D V parameters a head, D the width and V the vocabulary: h^2 +
hV for its weights.

Medusa-1 is `train.trainable=drafter`: the target is frozen. Medusa-2 is
`train.trainable=adapters` with LoRA in shared mode and options.weight=0.2,
started from a Medusa-1 run (`train.init_from`): the paper's warm-up of the
heads. Its typical acceptance is not lossless: here it is `--accept=typical`,
and the loop's own rule holds without. The paper's static tree is
`--tree=FILE.json`, with the paths that `launch/calibrate.py` found; otherwise
trees are drawn up from the heads as from streams.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from spec_stream.drafters import base
from spec_stream.drafters.base import Accepted, Params, TreeDrafter
from spec_stream.models.attention import at_rows
from spec_stream.models.config import ModelConfig
from spec_stream.models.layers import wide
from spec_stream.train import losses


@dataclasses.dataclass(frozen=True)
class Options:
  """length: J heads; layers: residual blocks of each.

  weight, decay: head j counts weight * decay^j in the loss (eq. 1, 2 there).
  """

  length: int = 3
  layers: int = 1
  weight: float = 1.0
  decay: float = 0.8


class Medusa(base.DrafterModule):
  """The heads, stacked."""

  def __init__(self, config: ModelConfig, options: Options, *, rngs: nnx.Rngs):
    self.options = options
    blocks, width = options.length * options.layers, config.width
    self.block_kernels = base.zeros(blocks, width, width)
    self.block_bias = base.zeros(blocks, width)
    heads = (options.length, width, config.vocab_size)
    self.head_kernels = base.normal(rngs, *heads)

  @staticmethod
  def start(options: Options, weights: dict) -> dict:
    head = base.lm_head(weights)
    heads = jnp.broadcast_to(head, (options.length, *head.shape))
    return {"drafter/head_kernels": heads}

  def logits(self, hidden: jax.Array, j: int) -> jax.Array:
    """[B, R, D] -> [B, R, V] of head j = 1..J."""
    dtype, layers = hidden.dtype, self.options.layers
    for block in range((j - 1) * layers, j * layers):
      kernel = self.block_kernels[block].astype(dtype)
      y = hidden @ kernel + self.block_bias[block].astype(dtype)
      hidden = hidden + jax.nn.silu(y)
    kernel = self.head_kernels[j - 1].astype(dtype)
    return jnp.matmul(hidden, kernel, preferred_element_type=wide(dtype))

  def loss(self, model, batch, at, main, config, count, out):
    options = self.options
    heads = range(1, options.length + 1)
    score = lambda j, model, hidden: model.drafter.logits(hidden, j)
    return losses.ahead(
      model,
      batch,
      at,
      main,
      config,
      count,
      weights=[options.weight * options.decay**j for j in heads],
      hidden=[at_rows(main, at)] * options.length,
      scores=[functools.partial(score, j) for j in heads],
    )


@dataclasses.dataclass(frozen=True)
class MedusaDraft(TreeDrafter):
  """tree: its kind and size; length: heads to draft with, 0 for all."""

  name = "medusa"
  nested = True
  Options = Options
  Module = Medusa

  def resolve(self, config: ModelConfig, own=None) -> "MedusaDraft":
    base.check_own(self, own)
    length = base.check_length(self, own.options.length)
    tree = self.tree.resolve(length, config.vocab_size)
    return self.resolved(config, tree, length)

  def propose(self, params: Params, state, accepted: Accepted):
    hidden = accepted.last_hidden[:, None]
    heads = range(1, max(self.longest, 2))
    logits = [params.own.logits(hidden, j) for j in heads]
    logits = self.guess(accepted, jnp.concatenate(logits, 1))
    return self.tree.build(accepted.root, logits), state

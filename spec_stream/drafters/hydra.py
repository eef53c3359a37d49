"""Hydra: Medusa's heads, but each knows what was drafted before it (Ankner et
al., 2402.05109).

Head j of J says what follows the root e_0 and j - 1 drafted tokens, from the
target's last hidden state h and the target's embeddings of all of them (eq. 2
there), a residual block and an LM head:

    p_j = softmax(U_j (h + silu(W_j [h; e_0; ...; e_{j-1}] + b_j)))

with W_j zero and U_j the target's LM head at the start. (1 + j) D^2 + D + D V
parameters for head j, D the width and V the vocabulary. Trees grow level by
level. Left out: Hydra++'s extra decoder layer over the prefix; its distillation
is `train.target=main`.

Letters: B batch row, R rows, W nodes of a level, J heads, D width, V
vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from spec_stream.drafters import base, grow
from spec_stream.drafters.base import Accepted, Params, TreeDrafter
from spec_stream.models.attention import at_rows
from spec_stream.models.config import ModelConfig
from spec_stream.models.layers import wide
from spec_stream.train import losses


@dataclasses.dataclass(frozen=True)
class Options:
  """length: J heads; weight, decay: head j counts weight * decay^j."""

  length: int = 3
  weight: float = 1.0
  decay: float = 1.0


class Hydra(base.DrafterModule):
  """The heads. The first D rows of W_j read h, the next D e_0, and so on."""

  def __init__(self, config: ModelConfig, options: Options, *, rngs: nnx.Rngs):
    self.options = options
    width, length = config.width, options.length
    # Those of all heads one below the other: 2 + 3 + ... + (J + 1) blocks of D.
    blocks = length * (length + 3) // 2
    self.block_kernel = base.zeros(blocks * width, width)
    self.block_bias = base.zeros(length, width)
    heads = (length, width, config.vocab_size)
    self.head_kernels = base.normal(rngs, *heads)

  @staticmethod
  def start(options: Options, weights: dict) -> dict:
    head = base.lm_head(weights)
    heads = jnp.broadcast_to(head, (options.length, *head.shape))
    return {"drafter/head_kernels": heads}

  def logits(self, hidden: jax.Array, before: jax.Array, j: int) -> jax.Array:
    """[B, R, V] of head j = 1..J.

    hidden: [B, R, D]; before: [B, R, j, D] embeddings of root and draft.
    """
    dtype, width = hidden.dtype, hidden.shape[-1]
    first = (j - 1) * (j + 2) // 2 * width
    kernel = self.block_kernel[first : first + (1 + j) * width].astype(dtype)
    x = jnp.concatenate([hidden, before.reshape(*hidden.shape[:2], -1)], -1)
    y = x @ kernel + self.block_bias[j - 1].astype(dtype)
    x = hidden + jax.nn.silu(y)
    head = self.head_kernels[j - 1].astype(dtype)
    return jnp.matmul(x, head, preferred_element_type=wide(dtype))

  def loss(self, model, batch, at, main, config, count, out):
    options = self.options
    heads = range(1, options.length + 1)
    words = [losses.words(model, batch, at, j) for j in heads]
    hidden = at_rows(main, at)
    score = lambda j, model, x: model.drafter.logits(*x, j)
    return losses.ahead(
      model,
      batch,
      at,
      main,
      config,
      count,
      weights=[options.weight * options.decay**j for j in heads],
      hidden=[(hidden, jnp.stack(words[:j], 2)) for j in heads],
      scores=[functools.partial(score, j) for j in heads],
    )


@dataclasses.dataclass(frozen=True)
class HydraDraft(TreeDrafter):
  """tree: its kind and size; length: heads to draft with, 0 for all."""

  name = "hydra"
  Options = Options
  Module = Hydra

  def resolve(self, config: ModelConfig, own=None) -> "HydraDraft":
    base.check_own(self, own)
    length = base.check_length(self, own.options.length)
    tree = grow.resolve(self.tree, length, config.vocab_size)
    return self.resolved(config, tree, length)

  def propose(self, params: Params, state, accepted: Accepted):
    own, embed = params.own, params.target.embed
    hidden = accepted.last_hidden[:, None]

    def extend(before, tokens, parents):
      before = at_rows(before, parents)  # [B, W, j, D]
      before = jnp.concatenate([before, embed(tokens)[:, :, None]], 2)
      shape = (*tokens.shape, hidden.shape[-1])
      j = before.shape[2]
      return own.logits(jnp.broadcast_to(hidden, shape), before, j), before

    before = embed(accepted.root)[:, None, None]
    logits = own.logits(hidden, before, 1)[:, 0]
    tree = grow.grow(
      self.tree,
      self.length,
      accepted.root,
      logits,
      before,
      extend,
      functools.partial(self.guess, accepted),
    )
    return tree, state

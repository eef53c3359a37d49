"""ReDrafter: a recurrent head and a beam search (Zhang et al., 2403.09919).

From the target's last hidden state h, fixed for a draft, and a state s that
starts as the embedding of the root and takes in what is drafted (section 3.1):

    s_t = silu(U s_{t-1} + W e_t + b)
    p_t = softmax(V x_n),  x_{i+1} = x_i + silu(A_i x_i + a_i),  x_0 = [s_t; h]

e_t are the target's embeddings. A beam search of width W and length K runs in
the compiled loop, and paths that share a beginning share its nodes: the paper's
dynamic tree attention, here the tree of the beams itself (`--tree=beam`, with
`--tree_width` W). One set of weights drafts any number of tokens: 2 D^2 + D for
the recurrence, n (4 D^2 + 2 D) for n layers and 2 D V for the head. The lower
half of V, which reads h, is the target's LM head at the start.

Trained by local distillation (section 3.3) with `train.target=main`: the
target's own distribution at each future position, along the text of the data.

Letters: B batch row, R rows, W nodes of a level, D width, V vocabulary.
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
from spec_stream.tree import TreeSpec


@dataclasses.dataclass(frozen=True)
class Options:
  """length: tokens ahead in training; layers: n; weight: of all of its loss."""

  length: int = 4
  layers: int = 2
  weight: float = 1.0


class Recurrent(base.DrafterModule):
  """The recurrence and its head."""

  def __init__(self, config: ModelConfig, options: Options, *, rngs: nnx.Rngs):
    self.options = options
    width, layers = config.width, options.layers
    self.state_kernel = base.normal(rngs, width, width)  # U
    self.word_kernel = base.normal(rngs, width, width)  # W
    self.state_bias = base.zeros(width)
    self.block_kernels = base.zeros(layers, 2 * width, 2 * width)
    self.block_bias = base.zeros(layers, 2 * width)
    self.head_kernel = base.normal(rngs, 2 * width, config.vocab_size)

  @staticmethod
  def start(options: Options, weights: dict) -> dict:
    head = base.lm_head(weights)
    head = jnp.concatenate([jnp.zeros_like(head), head])
    return {"drafter/head_kernel": head}

  def next_state(self, state: jax.Array, word: jax.Array) -> jax.Array:
    """s_t [..., D] from s_{t-1} and e_t."""
    dtype = state.dtype
    y = state @ self.state_kernel[...].astype(dtype)
    y = y + word @ self.word_kernel[...].astype(dtype)
    return jax.nn.silu(y + self.state_bias[...].astype(dtype))

  def logits(self, state: jax.Array, hidden: jax.Array) -> jax.Array:
    """[B, R, V] from s_t and h, [B, R, D] each."""
    dtype = hidden.dtype
    x = jnp.concatenate([state, hidden], -1)
    for layer in range(self.options.layers):
      y = x @ self.block_kernels[layer].astype(dtype)
      x = x + jax.nn.silu(y + self.block_bias[layer].astype(dtype))
    head = self.head_kernel[...].astype(dtype)
    return jnp.matmul(x, head, preferred_element_type=wide(dtype))

  def loss(self, model, batch, at, main, config, count, out):
    options = self.options
    word = lambda j: losses.words(model, batch, at, j)
    states = [word(1)]
    for j in range(2, options.length + 1):
      states.append(self.next_state(states[-1], word(j)))
    hidden = at_rows(main, at)
    return losses.ahead(
      model,
      batch,
      at,
      main,
      config,
      count,
      weights=[options.weight] * options.length,
      hidden=[(state, hidden) for state in states],
      scores=[lambda model, x: model.drafter.logits(*x)] * options.length,
    )


@dataclasses.dataclass(frozen=True)
class RecurrentDraft(TreeDrafter):
  """tree: its kind ("beam" is the paper's) and size; length: tokens to draft
  ahead, 0 for as many as in training."""

  tree: TreeSpec = TreeSpec("beam")

  name = "redrafter"
  Options = Options
  Module = Recurrent

  def resolve(self, config: ModelConfig, own=None) -> "RecurrentDraft":
    base.check_own(self, own)
    length = self.length or own.options.length
    tree = grow.resolve(self.tree, length, config.vocab_size)
    return self.resolved(config, tree, length)

  def propose(self, params: Params, state, accepted: Accepted):
    own, embed = params.own, params.target.embed
    hidden = accepted.last_hidden[:, None]

    def extend(states, tokens, parents):
      states = own.next_state(at_rows(states, parents), embed(tokens))
      shape = (*tokens.shape, hidden.shape[-1])
      return own.logits(states, jnp.broadcast_to(hidden, shape)), states

    first = embed(accepted.root)[:, None]
    logits = own.logits(first, hidden)[:, 0]
    tree = grow.grow(
      self.tree,
      self.length,
      accepted.root,
      logits,
      first,
      extend,
      functools.partial(self.guess, accepted),
    )
    return tree, state

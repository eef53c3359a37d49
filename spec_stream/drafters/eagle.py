"""EAGLE: one layer predicts the target's next hidden state (Li et al.,
2401.15077, EAGLE-1; 2406.16858, EAGLE-2; 2503.01840, EAGLE-3).

The input at position i is the target's final hidden state f_i beside the
embedding of the token that was drawn from it, e_{i+1}; the output predicts
f_{i+1}, and the target's own LM head reads it (EAGLE-1, section 3):

    g_{i+1} = layer(F [e_{i+1}; f_i]),   p(token i+2) = softmax(head(g_{i+1}))

While drafting, g stands for the f that is not known yet. 2 D^2 parameters for F
and those of one layer; a cache of its own for it.

EAGLE-1 trains on f with smooth L1 to f_{i+1} (options.regression) plus 0.1
times the cross-entropy with the target's distribution (options.weight, with
`train.target=main`). EAGLE-2 is this head with the dynamic tree of `grow`.
EAGLE-3 replaces f by F' [h_a; h_b; h_c], hidden states of several layers
(options.fuse), drops the regression, and trains on its own outputs for
options.length steps (training-time test): row (k, i) of step k takes g of
(k-1, i-1), and sees the rows (1, ..i-k+1) of known features and its own chain.

Left out: EAGLE-1's noise on features, EAGLE-3's own head of frequent tokens.
Its training holds scores of all positions against all, k times for step k,
whatever `train.segment` and `train.remat` say.
The layer here is a block of the target's kind, whose first norm EAGLE-1 drops.

Letters: B batch row, T positions, W nodes of a level, D width, n fused layers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from spec_stream.cache import KVCache, empty
from spec_stream.drafters import base, cached, grow
from spec_stream.drafters.base import Accepted, Params, TreeDrafter
from spec_stream.errors import UserError
from spec_stream.models.attention import at_rows, main_rows
from spec_stream.models.config import ModelConfig, StreamConfig
from spec_stream.models.transformer import Block, causal_mask
from spec_stream.train import losses


@dataclasses.dataclass(frozen=True)
class Options:
  """length: steps of the training-time test, 1 = EAGLE-1's teacher forcing.

  regression, weight: of smooth L1 and of the cross-entropy. fuse: layers
  (0-based) whose hidden states are the features; () = the final one.
  """

  length: int = 1
  regression: float = 1.0
  weight: float = 0.1
  fuse: tuple[int, ...] = ()


def _layer(config: ModelConfig) -> ModelConfig:
  """Of the head's own layer: like the target's, plain."""
  return dataclasses.replace(
    config,
    param_dtype="float32",
    quantize="",
    sliding_layers=(),
    streams=StreamConfig(num_streams=0, num_stream_layers=1),
  )


class Eagle(base.DrafterModule):
  """F, the layer, and F' where layers are fused."""

  def __init__(self, config: ModelConfig, options: Options, *, rngs: nnx.Rngs):
    if any(not 0 <= layer < config.num_layers for layer in options.fuse):
      raise UserError(
        f"model.drafter.options.fuse={options.fuse}: layers must lie in [0, "
        f"{config.num_layers})"
      )
    self.options, self.config = options, _layer(config)
    self.taps, width = options.fuse, config.width
    fuse = (len(options.fuse) * width, width)
    self.fuse_kernel = base.normal(rngs, *fuse) if options.fuse else None
    # It starts by passing the feature on.
    self.word_kernel = base.normal(rngs, width, width)
    self.feature_kernel = nnx.Param(jnp.eye(width, dtype=jnp.float32))
    self.block = Block(self.config, lora_rank=0, rngs=rngs)

  def features(self, main: jax.Array, taps: jax.Array | None) -> jax.Array:
    """[B, T, D] of known positions, from final and tapped hidden states."""
    if self.fuse_kernel is None:
      return main
    taps = taps.reshape(*taps.shape[:2], -1)
    return taps @ self.fuse_kernel[...].astype(taps.dtype)

  def __call__(self, words, features, positions, mask, kv, length, old):
    """One pass of the layer over rows [B, T, D]; -> (g, (k, v)).

    kv: earlier keys and values or None, of which rows see `old` [B, T, S], or
    those below `length` [B].
    """
    x = words @ self.word_kernel[...].astype(words.dtype)
    x = x + features @ self.feature_kernel[...].astype(words.dtype)
    rows = main_rows(self.config, positions, mask, old=old)
    return self.block(x, rows, kv, length, 0)

  def loss(self, model, batch, at, main, config, count, out):
    options, steps = self.options, self.options.length
    main, taps = jax.lax.stop_gradient((main, out.taps))
    given = self.features(main, taps)
    words = model.embed(jnp.roll(batch["tokens"], -1, 1))
    last, mask = main.shape[1] - 1, causal_mask(batch["segment_ids"])
    unit = jnp.broadcast_to(jnp.eye(last + 1, dtype=bool), mask.shape)
    # Row i of step k sees the known ones up to i-k+1: the mask k-1 rows lower.
    lower = lambda x, by: jnp.pad(x, ((0, 0), (by, 0), (0, 0)))[:, : last + 1]
    total, metrics, hidden, kv = jnp.zeros(()), {}, [], None
    for k in range(1, steps + 1):
      own, old = (mask, None) if k == 1 else (unit, [lower(mask, k - 1)])
      if old:
        old += [lower(unit, k - m) for m in range(2, k)]
        old = jnp.concatenate(old, 2)
      g, new = self(words, given, batch["positions"], own, kv, None, old)
      if kv is not None:
        new = tuple(
          jnp.concatenate(x, axis) for *x, axis in zip(kv, new, (3, 2))
        )
      kv, given = new, jnp.pad(g, ((0, 0), (1, 0), (0, 0)))[:, :-1]
      here = jnp.where(at < 0, -1, jnp.minimum(at + k - 1, last))
      hidden.append(at_rows(g, here))
      if options.regression:
        _, valid = losses.targets(batch, at, 1 + k)
        truth = at_rows(main, jnp.minimum(at + k, last))
        error = jnp.abs(hidden[-1] - truth)
        error = jnp.where(error < 1, 0.5 * error**2, error - 0.5).mean(-1)
        mean = jnp.where(valid, error, 0).sum() / count[k]
        metrics[f"loss_feature_{k}"] = mean
        total += options.regression * mean
    weights = [options.weight] * steps
    more, parts = losses.ahead(
      model, batch, at, main, config, count, weights, hidden
    )
    return total + more, metrics | parts


@dataclasses.dataclass(frozen=True)
class EagleDraft(TreeDrafter):
  """tree: its kind and size; length: tokens to draft ahead, 0 for 4 or as many
  as the training-time test had."""

  taps: tuple[int, ...] = ()

  name = "eagle"
  Options = Options
  Module = Eagle

  def resolve(self, config: ModelConfig, own=None) -> "EagleDraft":
    base.check_own(self, own)
    length = self.length or max(4, own.options.length)
    tree = grow.resolve(self.tree, length, config.vocab_size)
    return self.resolved(config, tree, length, taps=own.taps)

  def init(self, params: Params, batch: int, slots: int) -> KVCache:
    config = params.own.config
    slots = cached.room(self.tree, self.length, slots)
    heads, size = config.num_kv_heads, config.head_dim
    return empty(batch, slots, 1, heads, size, config.dtype)

  def propose(self, params: Params, state: KVCache, accepted: Accepted):
    own, embed = params.own, params.target.embed
    last = jnp.maximum(accepted.count - 1, 0)
    rows = jnp.arange(len(last))
    tokens = jnp.roll(accepted.tokens, -1, 1)
    tokens = tokens.at[rows, last].set(accepted.root)

    def run(tokens, features, positions, mask, cache, cache_mask):
      kv, length = cache.layers[0], cache.length
      words = embed(tokens)
      g, new = own(words, features, positions, mask, kv, length, cache_mask)
      return g, (new,)

    return cached.propose(
      run,
      functools.partial(params.target.logits, drafts=True),
      state,
      tokens,
      own.features(accepted.hidden, accepted.taps),
      last,
      accepted.count,
      accepted.root,
      self.tree,
      self.length,
      functools.partial(self.guess, accepted),
    )

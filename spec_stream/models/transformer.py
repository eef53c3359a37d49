"""The decoder and its one forward pass.

Training, prefill, a plain step and the verification of a tree are the same
function with another mask among the new tokens:

    training     T = sequence, mask causal within segments, no cache
    prefill      T = prompt bucket, mask causal, streams on the last position
    plain step   T = 1
    verify       T = M tree nodes, mask = ancestors, streams on every node

Where many nodes are verified they go without, and the accepted one's streams
run through the top layers by themselves: `forward_streams`.

Letters: B batch row, T new positions, U positions with streams, J streams, D
width, V vocabulary, L layers, N_s top layers with streams.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from spec_stream.cache import KV, KVCache, take
from spec_stream.errors import UserError
from spec_stream.models import coarse
from spec_stream.models.attention import (
  Attention,
  Rows,
  at_rows,
  main_rows,
  own_rows,
  stream_rows,
)
from spec_stream.models.config import ModelConfig
from spec_stream.models.layers import (
  Embed,
  FeedForward,
  Norm,
  Positions,
  softcap,
  wide,
)
from spec_stream.models.lora import (
  PANELS,
  Linear,
  devices,
  layout,
  platform_names,
)
from spec_stream.models.prune import Pruner
from spec_stream.models.segments import Segments, segment_rows
from spec_stream.models.streams import Streams

ALL = "all"  # streams on every new position


class Block(nnx.Module):
  """Pre-norm attention and feed-forward, each added to the residual.

  With parallel_block both read the same norm; with post_norms each is normed
  again before it is added.
  """

  def __init__(self, config: ModelConfig, *, lora_rank: int, rngs: nnx.Rngs):
    keys = dict(lora_rank=lora_rank, rngs=rngs)
    norm = lambda wanted: Norm(config) if wanted else None
    self.attention_norm = Norm(config)
    self.attention = Attention(config, **keys)
    self.post_attention_norm = norm(config.post_norms)
    self.ffw_norm = norm(not config.parallel_block)
    self.ffw = FeedForward(config, **keys)
    self.post_ffw_norm = norm(config.post_norms)

  def __call__(self, x, rows: Rows, cache, length, adapt_from: int):
    y = normed = self.attention_norm(x)
    y, kv = self.attention(y, rows, cache, length, adapt_from)
    if self.post_attention_norm is not None:
      y = self.post_attention_norm(y)
    x = x + y
    with jax.named_scope("ffw"):
      y = normed if self.ffw_norm is None else self.ffw_norm(x)
      y = self.ffw(y, adapt_from)
      if self.post_ffw_norm is not None:
        y = self.post_ffw_norm(y)
      return x + y, kv

  def linears(self) -> tuple[Linear, ...]:
    attention, ffw = self.attention, self.ffw
    return attention.qkv, attention.out, ffw.gate_up, ffw.down


class Transformer(nnx.Module):
  """Weights; `forward` runs them. Stream modules exist if J > 0."""

  one_pass_rows = 0  # see `one_pass.most_rows`

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    streams = config.streams
    self.embed = Embed(config, rngs=rngs)
    learned = config.positions == "learned"
    self.positions = Positions(config, rngs=rngs) if learned else None
    self.blocks = nnx.List()
    for layer in range(config.num_layers):
      adapt = streams.lora_layers == "all" or layer >= config.insertion_layer
      rank = streams.lora_rank if adapt else 0
      self.blocks.append(Block(config, lora_rank=rank, rngs=rngs))
    self.final_norm = Norm(config)
    shape = (config.width,), (config.vocab_size,)
    tied, some = config.tie_embeddings, streams.num_streams > 0
    keys = dict(lora_rank=0, bias=config.head_bias, rngs=rngs)
    self.head = None if tied else Linear(*shape, config, **keys)
    self.streams = Streams(config, rngs=rngs) if some else None
    prunes = some and streams.prune_rank > 0
    self.pruner = Pruner(config, rngs=rngs) if prunes else None
    self.drafter = nnx.data(None)  # weights of a drafter: see `weights`
    self.coarse = nnx.data(None)  # see `lay_out`

  def logits(self, hidden: jax.Array, drafts: bool = False) -> jax.Array:
    """Final-normed hidden [B, R, D] -> logits [B, R, V], float32 or wider.

    drafts: by the copy of the LM head that drafts may use, where there is one.
    """
    head = self.coarse.head if drafts and self.coarse else self.head
    with jax.named_scope("head"):
      if head is None:
        logits = self.embed.decode(hidden)
      else:
        logits = head(hidden, dtype=wide(hidden.dtype))
      logits = softcap(logits, self.config.logit_softcap)
      if known := self.config.known_tokens:
        # A finite number, so that a probability of 0 times it is 0.
        padding = jnp.arange(logits.shape[-1]) >= known
        logits = jnp.where(padding, _NEVER, logits)
      return logits

  def early_logits(self, early: jax.Array) -> jax.Array:
    """Early exit of the pruner: hidden at layer L-N_s [B, R, D] -> logits."""
    if self.pruner is None:
      raise UserError(
        "this model has no pruner: train with model.streams.prune_rank above 0"
      )
    return self.logits(self.final_norm(self.pruner(early)), drafts=True)


_NEVER = -1e9  # logit of a token that does not exist


@flax.struct.dataclass
class Output:
  """Of one forward pass over T (or with `keep`, T') new positions."""

  main: jax.Array  # [B, T', D] final-normed hidden of the main stream
  streams: jax.Array | None  # [B, U, J, D] the same of the streams
  kv: KV  # of the main stream at the T' positions, per layer
  early: jax.Array  # [B, T', D] main stream after layer L-N_s
  taps: jax.Array | None  # [B, T', n, D] main stream after the layers `taps`
  stream_taps: jax.Array | None  # [B, U, J, n', D] streams after those in MSA
  kept: Any = None  # what `keep` returned beside the rows


def forward(
  model: Transformer,
  tokens: jax.Array,
  positions: jax.Array,
  mask: jax.Array | Segments,
  *,
  cache: KVCache | None = None,
  cache_mask: jax.Array | None = None,
  streams: jax.Array | str | None = None,
  num_streams: int | None = None,
  taps: tuple[int, ...] = (),
  keep: Callable[[jax.Array], tuple[jax.Array, Any]] | None = None,
  remat: bool = False,
) -> Output:
  """One pass over new tokens.

  Args:
    model: the weights.
    tokens: [B, T] int32.
    positions: [B, T] absolute positions.
    mask: [B, T, T]; True where position (row) may attend to position (column).
      In training `Segments`, which never holds it whole; no cache, no `keep`.
    cache: committed tokens, all visible to all new ones; or with `cache_mask`
      [B, T, S], those of them that it says. Not with streams.
    streams: which positions carry streams: None, ALL, or [B, U] indices into T,
      -1 for none. After `keep`, indices into what it kept.
    num_streams: streams attached, the first J' of the J trained ones; None for
      all. A stream never sees a later one, so fewer change nothing else, but
      where the main stream attends to its streams.
    taps: layers (0-based) whose output is returned as well, before the final
      norm.
    keep: chooses, from the hidden states [B, T, D] after layer L-N_s, the rows
      [B, T'] (ascending) that enter the top layers, and returns them with
      whatever the caller wants back as `Output.kept`: see `prune`.
    remat: compute each block again in the backward pass rather than keep what
      it computed: less memory, a third more time. Not with a cache.

  Raises:
    UserError: streams asked of a model that has none.
  """
  config = model.config
  num_streams = _check_streams(config, streams, num_streams)
  if not num_streams:
    streams = None
  length = None if cache is None else cache.length
  # Layers with a sliding window have another mask, and maybe other angles.
  kinds = {config.slides(layer) for layer in range(config.num_layers)}
  of_kinds = lambda make, *args: {
    slides: make(config, *args, slides=slides) for slides in kinds
  }
  in_segments = isinstance(mask, Segments)
  make_rows = segment_rows if in_segments else main_rows
  rows = of_kinds(make_rows, positions, mask)
  if cache_mask is not None:
    rows = {slides: r.replace(old=cache_mask) for slides, r in rows.items()}
  x = model.embed(tokens)
  if model.positions is not None:
    x = model.positions(x, positions)
  kv, tapped = [], {}

  def run(x, layers, adapt_from):
    for layer in layers:
      old = None if cache is None else cache.layers[layer]
      kind = rows[config.slides(layer)]
      block = model.blocks[layer]
      call = _rematerialised(block) if remat else block
      x, new = call(x, kind, old, length, adapt_from)
      kv.append(new)
      if layer in taps:
        tapped[layer] = x
    return x

  # In lossless mode adapters start at the stream rows: there are none yet.
  lossless = config.streams.mode == "lossless"
  main_from = tokens.shape[1] if lossless else 0
  x = early = run(x, range(config.insertion_layer), main_from)
  kept = None
  if keep is not None:
    with jax.named_scope("prune"):
      nodes, kept = keep(early)
      x, positions, mask = (at_rows(y, nodes) for y in (x, positions, mask))
      early = x
      mask = jnp.take_along_axis(mask, nodes[:, None], 2)
      kv = [*take(kv, nodes)]
      tapped = {layer: at_rows(y, nodes) for layer, y in tapped.items()}
      rows = of_kinds(main_rows, positions, mask)
  num_main = x.shape[1]
  if streams is not None:
    at = None if isinstance(streams, str) else streams
    if in_segments and at is None:
      at = jnp.broadcast_to(jnp.arange(num_main), x.shape[:2])
    with jax.named_scope("insert_streams"):
      carriers = x if at is None else at_rows(x, at)
      start = model.streams(carriers, num_streams)
      x = jnp.concatenate([x, start.reshape(x.shape[0], -1, x.shape[2])], 1)
      make_rows = segment_rows if in_segments else stream_rows
      rows = of_kinds(make_rows, positions, mask, at, num_streams)
  top = range(config.insertion_layer, config.num_layers)
  x = model.final_norm(run(x, top, num_main if lossless else 0))
  main, out = x[:, :num_main], None
  if streams is not None:
    out = x[:, num_main:].reshape(start.shape)
  stack = lambda layers, of, axis: (
    jnp.stack([of(tapped[layer]) for layer in layers], axis) if layers else None
  )
  carried = [] if streams is None else [l for l in taps if l in top]
  return Output(
    main=main,
    streams=out,
    kv=tuple(kv),
    early=early,
    taps=stack(taps, lambda x: x[:, :num_main], 2),
    stream_taps=stack(
      carried, lambda x: x[:, num_main:].reshape(start.shape), 3
    ),
    kept=kept,
  )


def forward_streams(
  model: Transformer,
  early: jax.Array,
  positions: jax.Array,
  cache: KVCache,
  num_streams: int,
) -> jax.Array:
  """The streams of one committed token in each row, without main rows.

  What `forward` gives as streams of that token, for a main stream that does not
  attend to its streams: they read what it left in the cache. By `Coarse` copies
  of the layers where the model has them, so nearly that.

  Args:
    model: the weights.
    early: [B, D] main stream of the token after layer L-N_s (`Output.early`).
    positions: [B] of the token.
    cache: its last token is that one (else the row's result is junk).
    num_streams: J', of the J that were trained.

  Returns:
    [B, J', D] final-normed.
  """
  config = model.config
  top = range(config.insertion_layer, config.num_layers)
  rows = {
    slides: own_rows(config, positions, num_streams, slides)
    for slides in {config.slides(layer) for layer in top}
  }
  with jax.named_scope("insert_streams"):
    x = model.streams(early[:, None], num_streams)[:, 0]
  blocks = model.coarse.blocks if model.coarse else model.blocks[top.start :]
  for layer, block in zip(top, blocks, strict=True):
    kind, old = rows[config.slides(layer)], cache.layers[layer]
    x, _ = block(x, kind, old, cache.length, 0)
  return model.final_norm(x)


def _rematerialised(block: Block):
  graph, state = nnx.split(block)

  def call(x, rows, cache, length, adapt_from):
    del cache, length
    run = lambda state, x, rows: nnx.merge(graph, state)(
      x, rows, None, None, adapt_from
    )
    return jax.checkpoint(run)(state, x, rows)

  return call


def _check_streams(config: ModelConfig, streams, num_streams) -> int:
  """Number of streams to attach, 0 without `streams`."""
  trained = config.streams.num_streams
  if streams is None:
    return 0
  num_streams = trained if num_streams is None else num_streams
  if trained == 0 and num_streams == 0:
    raise UserError("this model was trained without streams (num_streams=0)")
  if num_streams > trained:
    raise UserError(
      f"{num_streams} streams asked for, but the model was trained with "
      f"{trained}"
    )
  if config.streams.attends and num_streams != trained:
    raise UserError(
      "the main stream of this model attends to its streams: all "
      f"{trained} must be attached"
    )
  return num_streams


def causal_mask(segment_ids: jax.Array) -> jax.Array:
  """[B, T, T] causal within segments; 0 is padding, which sees and is seen by
  nothing. segment_ids: [B, T] int32."""
  same = segment_ids[:, :, None] == segment_ids[:, None, :]
  order = jnp.arange(segment_ids.shape[1])
  return same & (segment_ids[:, None] > 0) & (order[:, None] >= order)


def merge_lora(model: Transformer) -> Transformer:
  """A copy with shared-mode adapters folded into the kernels.

  The model itself where there are none, or where they cannot be: lossless
  adapters serve stream rows alone, and a quantised kernel would lose them.
  """
  config = model.config
  if (
    config.streams.mode == "lossless"
    or config.quantize
    or not any(linear.lora_a is not None for linear in _linears(model))
  ):
    return model
  model = nnx.clone(model)
  for linear in _linears(model):
    linear.merge()
  return model


def for_decoding(model: Transformer) -> Transformer:
  """A copy as decoding is fastest: adapters folded in, kernels laid out; the
  model itself where there is nothing to do, so that it may be done early.

  It is not to be saved or trained: `lay_out` changes shapes of its weights.
  """
  return lay_out(merge_lora(model))


def lay_out(model: Transformer) -> Transformer:
  """A copy with its kernels as this device's products want them, which costs
  the memory of those that change (`lora.layout`) once more, and with those that
  streams alone may use beside them (`coarse.copies`); the model itself where
  none gains by it, as on several devices. To be called where the model is to
  stay: what was laid out is not laid out anew."""
  on = platform_names(devices(model.embed.table[...]))
  if not on:
    return model

  def wanted(model):
    dtype, embed = model.config.dtype, model.embed
    found = [(linear, linear.layout(dtype, on)) for linear in _linears(model)]
    # A table has its outputs first as it is: XLA needs telling on a CPU alone.
    if model.head is None and not embed.out_first and "cpu" in on:
      found.append((embed, layout(embed.table[...], dtype, on)))
    return [(module, laid) for module, laid in found if laid]

  if not wanted(model):
    return model
  model = nnx.clone(model)
  for module, laid in wanted(model):
    module.lay_out(laid)
  head = model.head or model.embed
  model.coarse = coarse.copies(model.config, model.blocks, head)
  return model


def uses_panels(model: Transformer) -> bool:
  """Whether `panels.matmul` multiplies with any of its kernels."""
  return any(x.out_first == PANELS for x in (model.embed, *_linears(model)))


def _linears(model: Transformer):
  linears = [linear for block in model.blocks for linear in block.linears()]
  return linears + ([model.head] if model.head else [])


def num_params(model: nnx.Module, *kinds) -> int:
  """Number of weights, of the given parameter types or all."""
  return sum(x.size for x in jax.tree.leaves(nnx.state(model, *kinds)))

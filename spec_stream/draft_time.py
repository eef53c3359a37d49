"""The time of one draft, apart from all else of a step.

Streams are not counted, whichever pass they go through.
"""

import functools
import time

import jax
import jax.numpy as jnp

from spec_stream.decode import Decoder
from spec_stream.drafters.base import Accepted
from spec_stream.models.layers import wide
from spec_stream.one_pass import reads_head_once
from spec_stream.step import DecodeState


def seconds(decoder: Decoder, state: DecodeState, count: int = 64) -> float:
  """Of one draft: of `count` in one compiled loop the mean, the best of three.

  state: of `decoder.start`, whose caches the drafts read.
  """
  args = (decoder.graph, decoder.weights, decoder.drafter, count, state)
  taken = []
  for _ in range(4):  # the first compiles
    begin = time.perf_counter()
    jax.block_until_ready(_drafts(*args))
    taken.append(time.perf_counter() - begin)
  return min(taken[1:]) / count


@functools.partial(jax.jit, static_argnames=("graph", "drafter", "count"))
def _drafts(graph, weights, drafter, count, state):
  """`count` drafts, one after the other, each with what a step would give."""
  params, batch = graph.merge(weights), len(state.num_tokens)
  config = params.target.config
  zeros = lambda *shape: jnp.zeros((batch, *shape), config.dtype)
  longest, streams = drafter.longest, drafter.num_streams
  stream_logits = None
  if reads_head_once(params.target, drafter, batch):
    known = (batch, drafter.stream_depth, config.vocab_size)
    stream_logits = jnp.zeros(known, wide(config.dtype))
  accepted = Accepted(
    root=state.tree.tokens[:, 0],
    position=state.cache.length,
    tokens=state.tokens[:, :longest],
    count=jnp.zeros(batch, jnp.int32),  # so that all may start at one place
    hidden=zeros(longest, config.width),
    streams=zeros(streams, config.width) if streams else None,
    stream_logits=stream_logits,
    taps=zeros(longest, len(drafter.taps), config.width)
    if drafter.taps
    else None,
    draws=state.tree.tokens,
    sampling=state.sampling,
  )

  def draft(_, carry):
    root, own = carry
    # All that a draft reads waits for the one before: or XLA would compute what
    # stays the same once, before the loop.
    now = jax.tree.map(
      lambda x: x + (root.max() < 0).astype(x.dtype),
      accepted.replace(root=root),
    )
    tree, own = drafter.propose(params, own, now)
    return jnp.maximum(tree.tokens.max(1), 0), own

  return jax.lax.fori_loop(0, count, draft, (accepted.root, state.drafter))

"""One step of decoding: draft, verify, accept, commit.

    prefill  the prompt -> first token (the root), first draft
    step     verify the draft with one forward pass; accept its longest path
             that the target goes along with; commit the path's keys and
             values; the target's own next token is the new root; draft again

Plain autoregressive decoding is the same with a tree of one node. Between
steps, for each row: `cache.length == prompt length + num_tokens - 1`, since the
root is emitted but not yet committed.

Letters: B batch row, P prompt bucket, N most new tokens, M tree nodes, A
longest path (root included), V vocabulary, D width.
"""

import flax.struct
import jax
import jax.numpy as jnp

from spec_stream import accept, one_pass, stops
from spec_stream.cache import KVCache, commit, empty
from spec_stream.drafters.base import Accepted, Drafter, Params
from spec_stream.models.prune import prune
from spec_stream.models.transformer import (
  ALL,
  causal_mask,
  forward,
  forward_streams,
)
from spec_stream.sampling import (
  Sampling,
  coupled,
  draw,
  next_positions,
  noise,
  probabilities,
  seen_at_nodes,
  seen_in,
)
from spec_stream.tree import TokenTree, ancestors

CHUNK = 512  # tokens of a prompt that one pass of the prefill reads


@flax.struct.dataclass
class DecodeState:
  cache: KVCache
  tree: TokenTree  # the next draft; its roots are the last emitted tokens
  drafter: object  # the drafter's own state
  sampling: Sampling
  limit: jax.Array  # [B] most tokens to emit
  end_token: jax.Array  # [E] int32, any of which ends a row; -1 for none
  stop: jax.Array | None  # [S, V] the table of stop sequences, see `stops`
  stop_state: jax.Array | None  # [B] where each row is in it
  seen: jax.Array | None  # [B, V] tokens of prompt and output, for a penalty
  tokens: jax.Array  # [B, N + A] emitted tokens, then junk
  calls: jax.Array  # [B, N + A] call of the target that emitted each token
  num_tokens: jax.Array  # [B]
  accepts: jax.Array  # [B, A] steps that accepted a node of each depth
  done: jax.Array  # [B] bool
  broken: jax.Array  # [B] bool: ended by a logit that is not finite

  @property
  def target_calls(self) -> jax.Array:
    """[B] prefill and every step: roots are always accepted."""
    return 1 + self.accepts[:, 0]


def prefill(
  params: Params,
  drafter: Drafter,
  prompt: jax.Array,
  length: jax.Array,
  limit: jax.Array,
  end_token: jax.Array,
  stop: jax.Array | None,
  sampling: Sampling,
  slots: int,
  num_new: int,
) -> DecodeState:
  """Reads the prompts [B, P] of `length` [B]; streams on the last token."""
  model, config = params.target, params.target.config
  batch, bucket = prompt.shape
  order = jnp.arange(bucket)
  cache, hidden, streams, taps = _read(model, drafter, prompt, length, slots)
  last = jnp.take_along_axis(hidden, length[:, None, None] - 1, 1)
  logits = model.logits(last)
  depth = jnp.zeros((batch, 1), jnp.int32)
  seen = None
  if sampling.penalized:
    seen = seen_in(prompt, order < length[:, None], config.vocab_size)[:, None]
  root = draw(logits, depth, length - 1, 1, sampling, seen)[:, 0]
  if seen is not None:
    seen = seen[:, 0] | jax.nn.one_hot(root, config.vocab_size, dtype=bool)
  broken = _not_finite(logits)[:, 0]
  done = _ends(root, end_token) | (limit <= 1) | broken
  stop_state = None
  if stop is not None:
    one = jnp.ones_like(root)
    stop_state, stopped = stops.walk(stop, one - 1, root[:, None], one)
    done |= stopped[:, 0]
  tree, state = drafter.propose(
    params,
    drafter.init(params, batch, slots),
    Accepted(
      root=root,
      position=length,
      tokens=prompt,
      count=length,
      hidden=hidden,
      streams=streams,
      taps=taps,
      sampling=sampling,
    ),
  )
  space = (batch, num_new + drafter.longest)
  return DecodeState(
    cache=cache,
    tree=_in_vocabulary(tree, config.vocab_size),
    drafter=state,
    sampling=sampling,
    limit=limit,
    end_token=end_token,
    stop=stop,
    stop_state=stop_state,
    seen=seen,
    tokens=jnp.zeros(space, jnp.int32).at[:, 0].set(root),
    calls=jnp.zeros(space, jnp.int32),
    num_tokens=jnp.ones((batch,), jnp.int32),
    accepts=jnp.zeros((batch, drafter.longest), jnp.int32),
    done=done,
    broken=broken,
  )


def _read(model, drafter: Drafter, prompt, length, slots: int):
  """-> the cache, hidden states [B, P, D], streams [B, J, D] of the last token
  or None, taps [B, P, n, D] or None.

  Chunk by chunk, each of which attends to those before it in the cache: scores
  take the memory of CHUNK rows, not of P. The first is what is left over.
  """
  config = model.config
  batch, bucket = prompt.shape
  head = (bucket - 1) % CHUNK + 1

  def read(cache, start, tokens, seen):
    order = start + jnp.arange(tokens.shape[1])
    at = length - 1 - start
    at = jnp.where((at >= 0) & (at < len(order)), at, -1)[:, None]
    out = forward(
      model,
      tokens,
      jnp.broadcast_to(order, tokens.shape),
      causal_mask((order < length[:, None]).astype(jnp.int32)),
      cache=seen,
      streams=at if drafter.num_streams else None,
      num_streams=drafter.num_streams,
      taps=drafter.taps,
    )
    cache = commit(cache, out.kv, None, jnp.clip(length - start, 0, len(order)))
    streams = None if out.streams is None else out.streams[:, 0]
    return cache, (out.main, streams, out.taps)

  cache = empty(
    batch,
    slots,
    config.num_layers,
    config.num_kv_heads,
    config.head_dim,
    config.dtype,
  )
  cache, (hidden, streams, taps) = read(cache, 0, prompt[:, :head], None)
  if head == bucket:
    return cache, hidden, streams, taps
  rest = prompt[:, head:].reshape(batch, -1, CHUNK).swapaxes(0, 1)
  starts = head + CHUNK * jnp.arange(len(rest), dtype=jnp.int32)
  cache, more = jax.lax.scan(
    lambda cache, x: read(cache, *x, cache), cache, (starts, rest)
  )
  if streams is not None:
    which = jnp.maximum(length - 1 - head + CHUNK, 0) // CHUNK  # [B]
    every = jnp.concatenate([streams[None], more[1]])  # by chunk
    streams = every[which, jnp.arange(batch)]

  def join(first, rest):  # [B, P', ...], [chunks, B, CHUNK, ...]
    rest = rest.swapaxes(0, 1).reshape(batch, -1, *rest.shape[3:])
    return jnp.concatenate([first, rest], 1)

  taps = None if taps is None else join(taps, more[2])
  return cache, join(hidden, more[0]), streams, taps


def has_room(state: DecodeState, drafter: Drafter) -> jax.Array:
  """Whether the cache holds what another step may write."""
  # And one more, for drafters that also keep the root.
  return state.cache.length.max() + drafter.longest < state.cache.num_slots


def step(params: Params, drafter: Drafter, state: DecodeState) -> DecodeState:
  """Draft-verify-accept-commit for every row; done rows stay as they are."""
  model, longest = params.target, drafter.longest
  tree, cache = state.tree, state.cache
  with jax.named_scope("verify"):
    keep = None
    if drafter.prune:

      def keep(early):
        logits = model.early_logits(early)
        if drafter.rule == "exact":  # by what the drafts were chosen by
          at = cache.length
          logits = coupled(logits, tree.depth, at, longest, state.sampling)
        kept, nodes = prune(tree, logits, drafter.prune, longest)
        return nodes, kept

    above = ancestors(tree.parents, longest)
    attached = one_pass.streams_on_nodes(model, drafter, len(tree.tokens))
    out = forward(
      model,
      tree.tokens,
      cache.length[:, None] + tree.depth,
      above,
      cache=cache,
      streams=ALL if attached else None,
      num_streams=attached,
      taps=drafter.taps,
      keep=keep,
    )
    tree = tree if keep is None else out.kept
    logits, of_streams = _logits(model, drafter, out)
  with jax.named_scope("accept"):
    seen = None
    if state.seen is not None:
      above = above if keep is None else ancestors(tree.parents, longest)
      seen = seen_at_nodes(state.seen, tree.tokens, above)
    draws = draw(
      logits, tree.depth, cache.length, longest, state.sampling, seen
    )
    accepted = _accept(drafter, state, tree, logits, draws, seen)
    count, ended, stop_state = _emitted(state, accepted)
    broken = jnp.take_along_axis(_not_finite(logits), accepted.path, 1)
    # A token that is cut emits nothing, whatever came of it.
    broken &= jnp.arange(longest) < count[:, None]
    broken = state.broken | broken.any(1)
  with jax.named_scope("commit"):
    # Where to write depends, for XLA, on the draws (which are never negative):
    # else it moves the writes of a plain step ahead of other layers' reads, and
    # copies the whole cache, twice a layer, to be able to do so.
    length = jnp.minimum(cache.length, cache.num_slots + draws[:, 0])
    cache = commit(cache.replace(length=length), out.kv, accepted.path, count)
    write = jax.vmap(jax.lax.dynamic_update_slice)
    start = state.num_tokens[:, None]
    calls = jnp.broadcast_to(state.target_calls[:, None], accepted.path.shape)
    tokens = write(state.tokens, accepted.tokens, start)
    calls = write(state.calls, calls.astype(jnp.int32), start)
    depths = jnp.arange(longest) <= accepted.accepted_len[:, None]
    accepts = state.accepts + (depths & ~state.done[:, None])
    if state.seen is not None:
      new = jnp.arange(longest) < count[:, None]
      seen = state.seen | seen_in(accepted.tokens, new, state.seen.shape[1])
  take = lambda x, at: jnp.take_along_axis(
    x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), 1
  )
  last = accepted.last[:, None]
  one = lambda x: None if x is None else take(x, last)[:, 0]
  with jax.named_scope("streams"):
    streams = one(out.streams)
    if drafter.stream_depth and not attached:
      early, at = one(out.early), cache.length - 1
      depth = drafter.stream_depth
      streams = forward_streams(model, early, at, cache, depth)
  with jax.named_scope("draft"):
    next_tree, drafter_state = drafter.propose(
      params,
      state.drafter,
      Accepted(
        root=accepted.bonus,
        position=cache.length,
        tokens=take(tree.tokens, accepted.path),
        count=count,
        hidden=take(out.main, accepted.path),
        streams=streams,
        stream_logits=one(of_streams),
        taps=None if out.taps is None else take(out.taps, accepted.path),
        draws=draws,
        sampling=state.sampling,
      ),
    )
  return state.replace(
    cache=cache,
    tree=_in_vocabulary(next_tree, model.config.vocab_size),
    drafter=drafter_state,
    tokens=tokens,
    calls=calls,
    num_tokens=state.num_tokens + count,
    accepts=accepts,
    done=state.done | ended | broken,
    broken=broken,
    stop_state=stop_state,
    seen=seen,
  )


def _logits(model, drafter: Drafter, out):
  """-> logits of the nodes [B, T, V]; of their streams [B, T, J', V], or None
  if only the draft is to know those that it needs."""
  batch, num_nodes, width = out.main.shape
  if not one_pass.reads_head_once(model, drafter, batch):
    return model.logits(out.main), None
  depth = drafter.stream_depth
  streams = out.streams[:, :, :depth].reshape(batch, -1, width)
  logits = model.logits(jnp.concatenate([out.main, streams], 1))
  of_streams = logits[:, num_nodes:]
  shape = batch, num_nodes, depth, of_streams.shape[-1]
  return logits[:, :num_nodes], of_streams.reshape(shape)


def _accept(drafter: Drafter, state: DecodeState, tree, logits, draws, seen):
  """By the rule of the drafter; draws [B, M] are the target's at each node."""
  longest, sampling = drafter.longest, state.sampling
  if drafter.rule == "exact":
    return accept.exact(tree, draws, longest)
  probs = probabilities(logits, sampling, seen)
  if drafter.rule == "typical":
    return accept.typical(tree, draws, probs, longest)
  levels = next_positions(state.cache.length, longest)
  draft = drafter.distribution(state.drafter)
  return accept.rejection(
    tree,
    drafter.tree.paths,
    probs,
    draft,
    noise(sampling.seed, levels[:, :-1], drafter.tree.width, "accept"),
    noise(sampling.seed, levels, logits.shape[-1]),
  )


def _not_finite(logits: jax.Array) -> jax.Array:
  """[B, M] for logits [B, M, V]; the largest is not finite if one is NaN."""
  return ~jnp.isfinite(logits.max(-1))


def _in_vocabulary(tree: TokenTree, vocab_size: int) -> TokenTree:
  """The tree with nodes of tokens that there are not dead."""
  known = (tree.tokens >= 0) & (tree.tokens < vocab_size)
  return tree.replace(tokens=jnp.where(known, tree.tokens, -1))


def _ends(tokens: jax.Array, end_token: jax.Array) -> jax.Array:
  return (tokens[..., None] == end_token).any(-1)


def _emitted(state: DecodeState, accepted: accept.Acceptance):
  """Tokens each row emits [B], cut at an end token, a stop sequence and the
  limit; whether it ends [B]; and where it is among the stops then."""
  longest = accepted.tokens.shape[1]
  count = accepted.accepted_len + 1
  order = jnp.arange(longest)
  is_end = _ends(accepted.tokens, state.end_token)
  is_end &= order < count[:, None]
  stop_state = state.stop_state
  if state.stop is not None:
    stop_state, stopped = stops.walk(
      state.stop, stop_state, accepted.tokens, count
    )
    is_end |= stopped
  has_end = is_end.any(1)
  to_end = jnp.where(has_end, jnp.argmax(is_end, 1) + 1, longest)
  count = jnp.minimum(count, to_end)
  room = state.limit - state.num_tokens
  ended = has_end | (count >= room)
  count = jnp.where(state.done, 0, jnp.minimum(count, room))
  return count.astype(jnp.int32), ended, stop_state

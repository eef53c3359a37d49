"""One step of decoding: draft, verify, accept, commit.

    prefill  the prompt -> first token (the root), first draft
    step     verify the draft with one forward pass; accept its longest path
             that the target would have drawn; commit the path's keys and
             values; the target's last draw is the new root; draft again

Plain autoregressive decoding is the same with a tree of one node. Between
steps, for each row: `cache.length == prompt length + num_tokens - 1`, since the
root is emitted but not yet committed.

Letters: B batch row, P prompt bucket, N most new tokens, M tree nodes, A
longest path (root included), V vocabulary, D width.
"""

import flax.struct
import jax
import jax.numpy as jnp

from spec_stream import accept
from spec_stream.cache import KVCache, commit, empty
from spec_stream.drafters.base import Accepted, Drafter, Params
from spec_stream.models.prune import prune
from spec_stream.models.transformer import ALL, causal_mask, forward
from spec_stream.sampling import Sampling, draw
from spec_stream.tree import TokenTree, ancestors


@flax.struct.dataclass
class DecodeState:
  cache: KVCache
  tree: TokenTree  # the next draft; its roots are the last emitted tokens
  drafter: object  # the drafter's own state
  sampling: Sampling
  limit: jax.Array  # [B] most tokens to emit
  end_token: jax.Array  # [E] int32, any of which ends a row; -1 for none
  tokens: jax.Array  # [B, N + A] emitted tokens, then junk
  calls: jax.Array  # [B, N + A] call of the target that emitted each token
  num_tokens: jax.Array  # [B]
  accepts: jax.Array  # [B, A] steps that accepted a node of each depth
  done: jax.Array  # [B] bool

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
  sampling: Sampling,
  slots: int,
  num_new: int,
) -> DecodeState:
  """One pass over the prompts [B, P] of `length` [B]; streams on the last."""
  model, config = params.target, params.target.config
  batch, bucket = prompt.shape
  at = length[:, None] - 1
  order = jnp.arange(bucket)
  out = forward(
    model,
    prompt,
    jnp.broadcast_to(order, prompt.shape),
    causal_mask((order < length[:, None]).astype(jnp.int32)),
    streams=at if drafter.num_streams else None,
    num_streams=drafter.num_streams,
    taps=drafter.taps,
  )
  last = jnp.take_along_axis(out.main, at[:, :, None], 1)
  logits = model.logits(last)
  depth = jnp.zeros((batch, 1), jnp.int32)
  root = draw(logits, depth, length - 1, 1, sampling)[:, 0]
  cache = commit(
    empty(
      batch,
      slots,
      config.num_layers,
      config.num_kv_heads,
      config.head_dim,
      config.dtype,
    ),
    out.kv,
    None,
    length,
  )
  tree, state = drafter.propose(
    params,
    drafter.init(params, batch, slots),
    Accepted(
      root=root,
      position=length,
      tokens=prompt,
      count=length,
      hidden=out.main,
      streams=None if out.streams is None else out.streams[:, 0],
      taps=out.taps,
    ),
  )
  space = (batch, num_new + drafter.longest)
  return DecodeState(
    cache=cache,
    tree=tree,
    drafter=state,
    sampling=sampling,
    limit=limit,
    end_token=end_token,
    tokens=jnp.zeros(space, jnp.int32).at[:, 0].set(root),
    calls=jnp.zeros(space, jnp.int32),
    num_tokens=jnp.ones((batch,), jnp.int32),
    accepts=jnp.zeros((batch, drafter.longest), jnp.int32),
    done=_ends(root, end_token) | (limit <= 1),
  )


def step(params: Params, drafter: Drafter, state: DecodeState) -> DecodeState:
  """Draft-verify-accept-commit for every row; done rows stay as they are."""
  model, longest = params.target, drafter.longest
  tree, cache = state.tree, state.cache
  with jax.named_scope("verify"):
    keep = None
    if drafter.prune:

      def keep(early):
        logits = model.early_logits(early)
        kept, nodes = prune(tree, logits, drafter.prune, longest)
        return nodes, kept

    out = forward(
      model,
      tree.tokens,
      cache.length[:, None] + tree.depth,
      ancestors(tree.parents, longest),
      cache=cache,
      streams=ALL if drafter.num_streams else None,
      num_streams=drafter.num_streams,
      taps=drafter.taps,
      keep=keep,
    )
    tree = tree if keep is None else out.kept
    logits = model.logits(out.main)
  with jax.named_scope("accept"):
    draws = draw(logits, tree.depth, cache.length, longest, state.sampling)
    accepted = accept.exact(tree, draws, longest)
    count, ended = _emitted(state, accepted)
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
  with jax.named_scope("draft"):
    take = lambda x, at: jnp.take_along_axis(
      x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), 1
    )
    last = accepted.last[:, None]
    root = take(draws, last)[:, 0]
    next_tree, drafter_state = drafter.propose(
      params,
      state.drafter,
      Accepted(
        root=root,
        position=cache.length,
        tokens=take(tree.tokens, accepted.path),
        count=count,
        hidden=take(out.main, accepted.path),
        streams=None if out.streams is None else take(out.streams, last)[:, 0],
        taps=None if out.taps is None else take(out.taps, accepted.path),
        draws=draws,
      ),
    )
  return state.replace(
    cache=cache,
    tree=next_tree,
    drafter=drafter_state,
    tokens=tokens,
    calls=calls,
    num_tokens=state.num_tokens + count,
    accepts=accepts,
    done=state.done | ended,
  )


def _ends(tokens: jax.Array, end_token: jax.Array) -> jax.Array:
  return (tokens[..., None] == end_token).any(-1)


def _emitted(state: DecodeState, accepted: accept.Acceptance):
  """Tokens each row emits [B], cut at the end token and the limit; and done."""
  longest = accepted.tokens.shape[1]
  count = accepted.accepted_len + 1
  order = jnp.arange(longest)
  is_end = _ends(accepted.tokens, state.end_token)
  is_end &= order < count[:, None]
  has_end = is_end.any(1)
  to_end = jnp.where(has_end, jnp.argmax(is_end, 1) + 1, longest)
  count = jnp.minimum(count, to_end)
  room = state.limit - state.num_tokens
  ended = has_end | (count >= room)
  count = jnp.where(state.done, 0, jnp.minimum(count, room))
  return count.astype(jnp.int32), ended

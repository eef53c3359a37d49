"""Decoding: draft, verify, accept, commit, in one compiled loop.

    prefill  the prompt -> first token (the root), first draft
    step     verify the draft with one forward pass; accept its longest path
             that the target would have drawn; commit the path's keys and
             values; the target's last draw is the new root; draft again
    loop     `lax.while_loop` over `step` until every row is done

Plain autoregressive decoding is the same loop with a tree of one node. Between
steps, for each row: `cache.length == prompt length + num_tokens - 1`, since the
root is emitted but not yet committed.

Letters: B batch row, P prompt bucket, N most new tokens, M tree nodes, A
longest path (root included), V vocabulary, D width.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spec_stream import accept
from spec_stream.cache import KVCache, commit, empty
from spec_stream.drafters.base import Accepted, Drafter, Params
from spec_stream.drafters.streams import StreamDraft
from spec_stream.errors import UserError
from spec_stream.models.prune import prune
from spec_stream.models.transformer import (
  ALL,
  Transformer,
  causal_mask,
  forward,
  merge_lora,
)
from spec_stream.sampling import Sampling, draw
from spec_stream.sampling import make as make_sampling
from spec_stream.tree import TokenTree, ancestors


@flax.struct.dataclass
class DecodeState:
  cache: KVCache
  tree: TokenTree  # the next draft; its roots are the last emitted tokens
  drafter: object  # the drafter's own state
  sampling: Sampling
  limit: jax.Array  # [B] most tokens to emit
  end_token: jax.Array  # [] int32, -1 for none
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
    drafter.init(params, batch),
    Accepted(
      root=root,
      position=length,
      tokens=prompt,
      count=length,
      hidden=out.main,
      streams=None if out.streams is None else out.streams[:, 0],
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
    done=(root == end_token) | (limit <= 1),
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
      keep=keep,
    )
    tree = tree if keep is None else out.kept
    logits = model.logits(out.main)
  with jax.named_scope("accept"):
    draws = draw(logits, tree.depth, cache.length, longest, state.sampling)
    accepted = accept.exact(tree, draws, longest)
    count, ended = _emitted(state, accepted)
  with jax.named_scope("commit"):
    cache = commit(cache, out.kv, accepted.path, count)
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


def _emitted(state: DecodeState, accepted: accept.Acceptance):
  """Tokens each row emits [B], cut at the end token and the limit; and done."""
  longest = accepted.tokens.shape[1]
  count = accepted.accepted_len + 1
  order = jnp.arange(longest)
  is_end = (accepted.tokens == state.end_token) & (order < count[:, None])
  has_end = is_end.any(1)
  to_end = jnp.where(has_end, jnp.argmax(is_end, 1) + 1, longest)
  count = jnp.minimum(count, to_end)
  room = state.limit - state.num_tokens
  ended = has_end | (count >= room)
  count = jnp.where(state.done, 0, jnp.minimum(count, room))
  return count.astype(jnp.int32), ended


# Jitted entry points. The module travels as (graphdef, weights): its structure
# is static, its weights are arguments.

_STATIC = ("graphdef", "drafter", "slots", "num_new")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _prefill(graphdef, weights, drafter, own, slots, num_new, *args):
  params = Params(nnx.merge(graphdef, weights), own)
  return prefill(params, drafter, *args, slots=slots, num_new=num_new)


@functools.partial(
  jax.jit, static_argnames=("graphdef", "drafter"), donate_argnames="state"
)
def _loop(graphdef, weights, drafter, own, state):
  params = Params(nnx.merge(graphdef, weights), own)
  return jax.lax.while_loop(
    lambda state: ~state.done.all(),
    lambda state: step(params, drafter, state),
    state,
  )


@functools.partial(jax.jit, static_argnames=("graphdef", "drafter"))
def _step(graphdef, weights, drafter, own, state):
  return step(Params(nnx.merge(graphdef, weights), own), drafter, state)


class Decoder:
  """A target and a drafter, checked against each other and ready to run.

  Shared-mode adapters are folded into the kernels here. Holds no state between
  requests: `start` and `finish` are the two compiled calls that `generate`
  makes, apart so that they can be timed apart.
  """

  def __init__(self, model: Transformer, drafter: Drafter, own=None):
    self.config = model.config
    self.drafter = drafter.resolve(model.config)
    self.graphdef, self.weights = nnx.split(merge_lora(model))
    self.own = own

  def start(
    self,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int] = 128,
    end_token: int = -1,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    seed=0,
  ) -> DecodeState:
    """Prefill of a batch of prompts; arguments as in `generate`."""
    prompts = [np.asarray(p, np.int64) for p in prompts]
    batch = len(prompts)
    limits = np.broadcast_to(np.asarray(max_new_tokens, np.int64), (batch,))
    slots, bucket, num_new = self._sizes(prompts, limits)
    if not -1 <= end_token < self.config.vocab_size:
      raise UserError(
        f"end token {end_token} is outside the vocabulary of "
        f"{self.config.vocab_size} tokens"
      )
    padded = np.zeros((batch, bucket), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
      row[: len(prompt)] = prompt
    return _prefill(
      self.graphdef,
      self.weights,
      self.drafter,
      self.own,
      slots,
      num_new,
      padded,
      np.array([len(p) for p in prompts], np.int32),
      limits.astype(np.int32),
      np.int32(end_token),
      make_sampling(batch, temperature, top_k, top_p, seed),
    )

  def finish(self, state: DecodeState) -> DecodeState:
    """Decodes to the end of every row. `state` is donated."""
    return _loop(self.graphdef, self.weights, self.drafter, self.own, state)

  def step(self, state: DecodeState) -> DecodeState:
    """One step, for streaming and debugging."""
    return _step(self.graphdef, self.weights, self.drafter, self.own, state)

  def _sizes(self, prompts, limits) -> tuple[int, int, int]:
    """Cache slots, prompt bucket and room for new tokens; or a UserError.

    Both are rounded up, so that requests of like length share one program.
    """
    if not prompts:
      raise UserError("no prompt given: a batch needs at least one")
    vocab, most = self.config.vocab_size, self.config.max_positions
    longest = max(len(p) for p in prompts)
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
      if not len(prompt):
        raise UserError(f"prompt {i} is empty: it needs at least one token")
      bad = prompt[(prompt < 0) | (prompt >= vocab)]
      if bad.size:
        raise UserError(
          f"prompt {i} has token {bad[0]}: the vocabulary ends at {vocab - 1}"
        )
      if limit < 1:
        raise UserError(f"max_new_tokens={limit} must be 1 or more")
      if len(prompt) + limit > most:
        raise UserError(
          f"prompt {i} of {len(prompt)} tokens and {limit} new ones do not fit "
          f"the cache of {most} (model.max_positions): shorten the prompt or "
          "lower max_new_tokens"
        )
    bucket = min(_round_up(longest), most)
    num_new = min(_round_up(int(limits.max())), most)
    slots = bucket + num_new + self.drafter.longest
    return -(-slots // 16) * 16, bucket, num_new


def _round_up(length: int) -> int:
  """16, 32, 64, ...: the next power of two."""
  return max(16, 1 << (length - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class Generation:
  """Output of one request."""

  token_ids: list[int]  # new tokens; the end token is the last, if it came
  calls: list[int]  # call of the target that emitted each; 0 = prefill
  target_calls: int  # prefill included
  accepts: list[int]  # steps that accepted a node of depth 0, 1, ...

  @property
  def tokens_per_call(self) -> float:
    return len(self.token_ids) / self.target_calls


def collect(state: DecodeState) -> list[Generation]:
  """The outputs of a finished state, on the host."""
  state = jax.device_get(
    (state.tokens, state.calls, state.num_tokens, state.accepts)
  )
  return [
    Generation(
      token_ids=tokens[:count].tolist(),
      calls=calls[:count].tolist(),
      target_calls=1 + int(accepts[0]),
      accepts=accepts.tolist(),
    )
    for tokens, calls, count, accepts in zip(*state, strict=True)
  ]


def generate(
  model: Transformer,
  prompts: Sequence[Sequence[int]],
  drafter: Drafter | None = None,
  **settings,
) -> list[Generation]:
  """Decodes a batch of prompts (token ids) in one compiled loop.

  Args:
    model: the target.
    prompts: token ids; rows may differ in length.
    drafter: StreamDraft() if None.
    **settings: max_new_tokens=128, temperature=0 (greedy), top_k=0 (off),
      top_p=1 (off), seed=0: one value or one per prompt; end_token=-1 (none).
      The noise of a request depends on its seed and on positions alone: the
      same prompt and seed give the same tokens in any batch, with any drafter.

  Raises:
    UserError: prompt empty, too long, or outside the vocabulary; a setting out
      of range; a drafter that does not fit the model.
  """
  decoder = Decoder(model, drafter or StreamDraft())
  return collect(decoder.finish(decoder.start(prompts, **settings)))


@dataclasses.dataclass(frozen=True)
class Step:
  """One call of the target while streaming; node 0 is the root."""

  token_ids: list[int]  # emitted by this call
  tree: TokenTree | None  # the draft it verified, [M] arrays; None for prefill
  path: list[int]  # accepted nodes of `tree`, root first


def stream(
  model: Transformer,
  prompt: Sequence[int],
  drafter: Drafter | None = None,
  **settings,
) -> Iterator[Step]:
  """`generate` for one prompt, call by call, with the drafts."""
  decoder = Decoder(model, drafter or StreamDraft())
  state = decoder.start([prompt], **settings)
  yield Step(state.tokens[0, :1].tolist(), None, [])
  while not bool(state.done[0]):
    before, tree = state, jax.tree.map(lambda x: np.asarray(x[0]), state.tree)
    state = decoder.step(state)
    first, last = int(before.num_tokens[0]), int(state.num_tokens[0])
    accepts = np.asarray(state.accepts[0] - before.accepts[0]).sum()
    drawn = np.asarray(state.tokens[0, first : first + accepts])
    path = [0]
    for token in drawn[: accepts - 1]:
      match = (tree.parents == path[-1]) & (tree.tokens == token)
      path.append(int(np.argmax(match)))
    yield Step(state.tokens[0, first:last].tolist(), tree, path)
